"""schedule.py - DeepScaleR's heart: the same training three times, each time with a longer context.

    python schedule.py --run runs/deepscaler --gpus 8                # 8K -> 16K -> 24K as published
    python schedule.py --run runs/deepscaler                         # go on after a crash, a kill, a reboot: exactly
    python schedule.py --preset toy --run runs/toy                   # the whole story on a laptop
    python schedule.py --dry_run --gpus 8 --gpu_type H100-80         # memory, time and dollars before any GPU is used
    python schedule.py --switch auto --run RUN                       # each stage ends where its response length turns
    python schedule.py --stages 8192:500:8,16384:200:16:lr=5e-7 --run RUN --lr 2e-6      # any other schedule
    python schedule.py --preset toy --ablation 3 --run RUN           # staged against long context from the start
    python schedule.py --run SHARED_DISK --gpus 8 --nnodes 4 --node_rank R --rdzv_endpoint HOST:29500    # on each node

grpo.py and evaluate.py run as programs, one after another; options unknown here are handed to grpo.py. What is done
stands in RUN/plan.json, written before each action, so that any kill leaves a state to continue from. Between stages
only weights are handed over: the optimizer is fresh, the KL reference is the stage's start, the data order is new.

Left out on purpose: hyper-parameter search, job queues, clouds, retries (a crash wants a look before it is repeated).
"""
import argparse
import ctypes
import fcntl
import glob
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = os.path.join(HERE, "assets")
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
# context : steps : samples a problem : other options of grpo.py for this stage alone
PUBLISHED = ("8192:1040:8:save_every=20:eval_every=20:eval_n=8,16384:480:16:save_every=10:eval_every=10:eval_n=16,"
             "24576:200:16:save_every=10:eval_every=10:eval_n=16")
PRESETS = {
    "deepscaler": dict(stages=PUBLISHED, model=MODEL, grpo=[]),
    "toy": dict(
        run="runs/toy", stages="40:70:8,80:50:8,120:30:8", model=f"{ASSETS}/toy/model", gpus=2,
        # few steps: short windows, and fewer looks that noise could deceive; a loop costs no more than the context,
        # here twice a right answer, so that length has less to fall than in the real run
        switch="auto", turn_window=8, turn_z=3.5, turn_fall=0.05,
        benchmarks=[f"{ASSETS}/toy/heldout.jsonl"], bench_n=16, bench_max_tokens=192, bench_temperature=1.0, bench_top_p=1.0,
        grpo=["--data", f"{ASSETS}/toy/train.jsonl.gz", "--eval_data", f"{ASSETS}/toy/heldout.jsonl", "--eval_every", "10",
              "--eval_n", "2", "--eval_max_len", "192", "--eval_temperature", "1", "--save_every", "5", "--recipe", "improved",
              "--prompts", "128", "--updates", "1", "--lr", "2e-4", "--engine", "torch", "--max_seqs", "256",
              "--token_budget", "8192", "--max_prompt_len", "128", "--show_every", "0"]),
}
# what others paid for the same model: (who, what, GPU-hours, dollars, AIME 2024), by their own accounts
COSTS = [
    ("DeepScaleR", "8K, 16K, 24K, about 1,750 steps, A100-80", "3,800", "4,500", "43.1"),
    ("DeepScaleR's code, a user", "8K stage, 1,040 steps at 396 s on 8 H200", "915 (computed)", "", ""),
    ("NeMo-RL", "8K, 240 steps at about 252 s on 8 H100", "134 (computed)", "", "28.3"),
    ("AReaL v0.1", "three stages, 8 H800", "4,160", "", "40.2"),
    ("AReaL paper, asynchronous", "250 PPO steps, 128 H800", "1,894", "", ""),
    ("Archer", "one 32K stage, 520 steps, H800", "1,900", "", "48.7"),
    ("JustRL", "one 16K stage, 4,380 steps, A800", "11,500", "", "52.6"),
    ("ProRL v1", "2,450 steps, H100", "16,000", "", "48.0"),
    ("Open-RS", "7,000 problems, 4 A40 for 24 h", "96", "42", "29.7 (re-measured)"),
]
TORCHRUN = ("rdzv_backend", "rdzv_endpoint", "master_addr", "master_port", "max_restarts")


# ---------------------------------------------------------------------------------------------------------------
# The turning point
# ---------------------------------------------------------------------------------------------------------------

def window_noise(x, window):
    """Standard error of the mean of `window` neighbouring values of x [n], whose trend is not noise.

    Residuals of straight lines through blocks of three windows (the latest four blocks), and their correlation from
    one step to the next, phi: an AR(1) mean has (1 + phi) / (1 - phi) times the variance of an independent one.
    """
    block = min(3 * window, len(x))
    k = min(4, len(x) // block)
    t = np.arange(block) - (block - 1) / 2
    rows = x[len(x) - k * block:].reshape(k, block)
    rows = rows - rows.mean(1, keepdims=True)
    rows = rows - (rows @ t / (t @ t))[:, None] * t
    total = (rows ** 2).sum()
    if total <= 1e-18 * (x ** 2).sum():
        return 0.0
    phi = (rows[:, 1:] * rows[:, :-1]).sum() / total
    phi = min(max(phi + (2 + 4 * max(phi, 0)) / block, 0.0), 0.95)  # removing a line biases phi down
    return math.sqrt(total / (k * (block - 2)) / window * (1 + phi) / (1 - phi))


def turning_point(steps, length, truncated, reward, window, z=4.5, z_cut=3.0, z_flat=2.0, fall=0.1, rise=0.05,
                  cut_rise=0.1, floor=0):
    """Has the run turned, seen from its newest step? -> (evidence or None, start of the lowest window).

    steps, length, truncated, reward: [n], everything measured so far, nothing later. Windows of `window` steps:
      after   the newest one
      before  the trough: the last window whose mean length is within one standard error of the lowest one
      top     the highest one before the trough
    All must hold, a difference being judged by its standard error: length fell from top to before (`z` errors, and
    `fall` of its size) and rose from before to after (`z` errors and `rise`); truncation grew from before to after
    (`z_cut`, `cut_rise`); reward did not: less than `z_flat`, and, if it rose before the trough, at less than half that
    pace with a margin of 1.5 errors. z is high because one looks after every step.
    The turn is the first step of `before`. `floor`: the start returned by the last look, a trough never moves back.
    """
    n, w = len(length), window
    length, truncated, reward = (np.asarray(x, float) for x in (length, truncated, reward))
    if n < 3 * w:
        return None, floor
    sums = np.cumsum(np.concatenate([[0.0], length]))
    means = (sums[w:] - sums[:-w]) / w  # means[i]: steps i .. i + w - 1
    past = means[:n - 2 * w + 1]
    if means[-1] - past.min() < rise * past.min():  # not even the lowest window lies below the newest one
        return None, max(floor, int(past.argmin()))
    noise = window_noise(length, w)
    trough = max(floor, int(np.flatnonzero(past <= past.min() + noise)[-1]))
    top = int(means[:trough - w + 1].argmax()) if trough >= w else None
    if top is None or means[trough] > (1 - fall) * means[top] or means[-1] < (1 + rise) * means[trough]:
        return None, trough
    found = {}
    for name, x in (("length", length), ("truncated", truncated), ("reward", reward)):
        before, after, se = x[trough:trough + w].mean(), x[-w:].mean(), window_noise(x, w) * math.sqrt(2)
        found[name] = dict(before=float(before), after=float(after), se=se, z=z_score(after - before, se))
    fell = z_score(means[top] - means[trough], noise * math.sqrt(2))
    cut, r = found["truncated"], found["reward"]
    # noise hides a slow rise: a reward that rose before the trough must by now have lost half of that pace for sure
    gained = r["before"] - reward[:w].mean()
    pace = gained / trough if z_score(gained, r["se"]) > z_flat else None
    flat = r["z"] < z_flat and (pace is None or r["after"] - r["before"] + 1.5 * r["se"] < pace / 2 * (n - w - trough))
    more_cut = cut["z"] >= z_cut and cut["after"] - cut["before"] >= cut_rise * cut["before"]
    if fell < z or found["length"]["z"] < z or not more_cut or not flat:
        return None, trough
    span = lambda i: [int(steps[i]), int(steps[i + w - 1])]
    return dict(turn=int(steps[trough]), seen_at=int(steps[-1]), window=w, top=span(top), before=span(trough),
                after=span(n - w), fell_from=float(means[top]), fell_z=fell, **found), trough


def z_score(difference, se):
    """Finite, so that it can be stored as JSON.

    >>> z_score(2.0, 0.5), z_score(1.0, 0.0), z_score(0.0, 0.0)
    (4.0, 1000.0, 0.0)
    """
    if se > 0:
        return float(np.clip(difference / se, -1000, 1000))
    return math.copysign(1000.0, difference) if difference else 0.0


def first_turn(steps, length, truncated, reward, window, start=0, floor=0, **thresholds):
    """The first look at which `turning_point` speaks -> (evidence or None, floor); looks before `start` were made."""
    for n in range(max(start + 1, 3 * window), len(steps) + 1):
        past = (x[:n] for x in (steps, length, truncated, reward))
        evidence, floor = turning_point(*past, window, floor=floor, **thresholds)
        if evidence:
            return evidence, floor
    return None, floor


def describe_turn(e):
    """The evidence in words."""
    line = lambda name, key, form: (f"{name} {e[key]['before']:{form}} -> {e[key]['after']:{form}} "
                                    f"({e[key]['z']:+.1f} standard errors)")
    return (f"the turn is at step {e['turn']}, seen at step {e['seen_at']}: steps {e['before'][0]}-{e['before'][1]} "
            f"against {e['after'][0]}-{e['after'][1]}: {line('length', 'length', '.1f')} after falling from "
            f"{e['fell_from']:.1f}, "
            f"{line('truncated', 'truncated', '.3f')}, {line('reward flat', 'reward', '.3f')}")


class Watch:
    """Looks at a stage while it trains: the turning point, and the checkpoints one may have to return to.

    grpo.py keeps its newest four. Every one on the grid of --save_every is hard-linked to STAGE/kept (no copy; space
    is used only once grpo.py drops its own), and dropped there as soon as the trough has moved past it."""

    def __init__(self, folder, options, save_every, steps):
        self.folder, self.options, self.save_every = folder, options, save_every
        self.window = options["turn_window"] or min(50, max(10, steps // 20))
        if save_every > self.window:
            raise ValueError(f"--switch auto compares windows of {self.window} steps and returns to a checkpoint "
                             f"before the turn: --save_every {save_every} must be at most {self.window}, or "
                             f"--turn_window larger")
        self.seen = self.floor = self.size = 0
        self.evidence, self.trough_step = None, 0

    def look(self):
        """True once the turn is found."""
        path = os.path.join(self.folder, "metrics.jsonl")
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != self.size and not self.evidence:
            rows = read_metrics(self.folder)
            if len(rows) < self.seen:  # a resumed run does some steps again
                self.seen = self.floor = 0
            series = [[r[k] for r in rows] for k in ("step", "length_mean", "truncated", "reward")]
            o = self.options
            self.evidence, self.floor = first_turn(*series, self.window, self.seen, self.floor, z=o["turn_z"],
                                                   z_flat=o["turn_flat"], fall=o["turn_fall"], rise=o["turn_rise"])
            self.seen, self.size = len(rows), size
            self.trough_step = rows[self.floor]["step"] if rows else 0
        self.keep_checkpoints()
        return self.evidence is not None

    def keep_checkpoints(self):
        source, kept = (os.path.join(self.folder, x) for x in ("checkpoints", "kept"))
        on_grid = lambda folder: [n for n in checkpoints(folder) if int(n) % self.save_every == 0]
        for name in on_grid(source):
            if not os.path.exists(os.path.join(kept, name)):
                part = "" if self.options["optimizer"] == "carry" else "hf"
                try:
                    link_tree(os.path.join(source, name, part), os.path.join(kept, name + ".tmp", part))
                    os.rename(os.path.join(kept, name + ".tmp"), os.path.join(kept, name))
                except FileNotFoundError:  # grpo.py removed it meanwhile
                    shutil.rmtree(os.path.join(kept, name + ".tmp"), ignore_errors=True)
        for name in [n for n in on_grid(kept) if int(n) < self.trough_step][:-1]:
            shutil.rmtree(os.path.join(kept, name))

    def pick(self):
        """Step of the newest checkpoint before the turn; one on the grid, so that restarts do not change the choice."""
        names = [n for f in ("checkpoints", "kept") for n in checkpoints(os.path.join(self.folder, f))]
        grid = sorted(int(n) for n in set(names) if int(n) % self.save_every == 0)
        return max([s for s in grid if s < self.evidence["turn"]], default=grid[0] if grid else None)


def link_tree(source, target):
    """Copy a folder by hard links; by copies where the disk has none."""
    def link(a, b):
        try:
            os.link(a, b)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copy2(a, b)
    source, target = os.path.normpath(source), os.path.normpath(target)
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        shutil.copytree(source, target, copy_function=link)
    except shutil.Error as e:  # files that vanished on the way
        raise FileNotFoundError(str(e)) from e


def checkpoints(folder):
    """Names of the complete checkpoints, oldest first."""
    return sorted(n for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []


def read_metrics(folder, validation=False):
    """Lines of metrics.jsonl that describe a training step (or all: the one before training too), each step once; half
    a line at the end is one being written."""
    rows, path = {}, os.path.join(folder, "metrics.jsonl")
    with open(path if os.path.exists(path) else os.devnull, encoding="utf-8") as f:
        for text in f:
            try:
                row = json.loads(text)
            except json.JSONDecodeError:
                break
            if validation or "reward" in row:
                rows[row["step"]] = row
    return list(rows.values())


# ---------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------

def parse_stages(text):
    """
    >>> parse_stages("8192:1040:8,16384:480:16:lr=5e-7")[1]["extra"]
    {'lr': '5e-7'}
    """
    stages = []
    for i, entry in enumerate(text.split(","), 1):
        parts = entry.strip().split(":")
        try:
            max_len, steps, group = map(int, parts[:3])
            extra = dict(p.split("=", 1) for p in parts[3:])
        except ValueError:
            raise ValueError(f"--stages: {entry!r} is not CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...], for example "
                             f"8192:1040:8") from None
        if max_len < 1 or steps < 1 or group < 2:
            raise ValueError(f"--stages: {entry!r} needs a context and steps of at least 1 and at least 2 samples a "
                             f"problem")
        stages.append(dict(folder=f"stage{i}", max_len=max_len, steps=steps, group=group, extra=extra, status="waiting",
                           picked=None, evidence=None))
    return stages


def stage_command(run, plan, number):
    """Options of grpo.py for stage `number` (from 1); the model is the checkpoint that the stage before handed on."""
    o, stage = plan["options"], plan["stages"][number - 1]
    before = plan["stages"][number - 2] if number > 1 else None
    step = before and before["picked"] or before and before["steps"]
    handed = before and os.path.join(run, before["folder"], "checkpoints", f"{step:06d}")
    extra = [x for k, v in stage["extra"].items() for x in (f"--{k}", v)]
    # what stands in --stages by hand wins over options for all stages; what a preset put there does not
    shared = extra + o["grpo"] if o["stages"] in [p["stages"] for p in PRESETS.values()] else o["grpo"] + extra
    # a checkpoint must be there long enough to be linked, see Watch
    keep = ["--keep", "4"] if o["switch"] == "auto" and number < len(plan["stages"]) else []
    return ["--model", os.path.join(handed, "hf") if handed else plan["model"], *keep, *shared,
            "--max_len", str(stage["max_len"]), "--steps", str(stage["steps"]), "--group", str(stage["group"]),
            "--out", os.path.join(run, stage["folder"]), "--seed", str(o["seed"] + number - 1), "--resume",
            *(["--ref_model", plan["model"]] if o["reference"] == "start" else []),
            *(["--optimizer_from", handed] if handed and o["optimizer"] == "carry" else [])]


def probe(commands):
    """(number of GPUs here, their name, resolved options of grpo.py for each command). A process of its own: this one
    stays small. Raises ValueError with grpo.py's own words when it refuses an option."""
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import grpo; cuda = sys.modules['torch'].cuda; "
            "n = cuda.device_count(); options = [vars(grpo.parse_args(c)) for c in json.loads(sys.argv[2])]; "
            "print(json.dumps([n, cuda.get_device_name() if n else '', options]))")
    done = subprocess.run([sys.executable, "-c", code, HERE, json.dumps(commands)], capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError("grpo.py refuses the options: " + words[-1].split("error: ")[-1])
    return json.loads(done.stdout.splitlines()[-1])


def new_plan(o):
    return {"options": {k: v for k, v in o.items() if k not in FRESH}, "model": o["model"],
            "stages": parse_stages(o["stages"]), "evals": [], "action": None, "finished": False}


def change_plan(run, plan, given):
    """Take options given for a run that has a plan: what altered finished work is refused, the rest is reported."""
    o = plan["options"]
    changed = {k: v for k, v in given.items() if o.get(k) != v}
    begun = plan["stages"][0]["status"] != "waiting" or plan["evals"]
    for name in ("model", "seed", "preset", "reference", "optimizer") if begun else ():
        if name in changed:
            raise ValueError(f"{run} was begun with --{name} {o[name]}, not {changed[name]}: leave it away to go on, "
                             f"or start another --run")
    for name in ("benchmarks", "bench_n", "bench_max_tokens", "bench_temperature", "bench_top_p"):
        if name in changed and plan["evals"]:
            raise ValueError(f"{', '.join(plan['evals'])} of {run} was evaluated with --{name} {o[name]}: scores by "
                             f"two protocols do not belong in one table. Leave it away, or remove {run}/eval")
    if "stages" in changed:
        new = parse_stages(changed["stages"])
        for i, old in enumerate(plan["stages"]):
            if old["status"] == "waiting":
                break
            same = ["max_len", "group"] + ["steps", "extra"] * (old["status"] != "training")
            if i >= len(new) or any(new[i][k] != old[k] for k in same):
                shape = ":".join(str(old[k]) for k in ("max_len", "steps", "group"))
                raise ValueError(f"--stages: stage {i + 1} of {run} is {old['status']} with {shape} and cannot change; "
                                 f"later stages can")
            done = max([int(n) for n in checkpoints(os.path.join(run, old["folder"], "checkpoints"))], default=0)
            if new[i]["steps"] < done:
                raise ValueError(f"--stages: stage {i + 1} of {run} has done {done} steps already, more than "
                                 f"{new[i]['steps']}")
            new[i] |= {k: old[k] for k in ("status", "picked", "evidence")}
        plan["stages"] = new
    if "model" in changed or "preset" in changed:
        plan["model"] = given.get("model", PRESETS[given.get("preset", o["preset"])]["model"])
    for name, value in changed.items():
        note = " (finished stages keep what they had)" if begun else ""
        print(f"changed from here on: --{name} {o.get(name)} -> {value}{note}")
        o[name] = value
    plan["finished"] = plan["finished"] and not changed


def save_plan(run, plan):
    """One rename: a reader, or a kill, sees the old plan or the new one."""
    path = os.path.join(run, "plan.json")
    with open(path + ".tmp", "w") as f:
        f.write(json.dumps(plan, indent=1))
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def read_plan(run):
    try:
        with open(os.path.join(run, "plan.json")) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------------
# Running programs
# ---------------------------------------------------------------------------------------------------------------

STOP = []  # signals that arrived here


class Stopped(Exception):
    """A signal or a failed program ended the schedule; the plan says where it goes on. args: (exit code, words)"""


def torchrun(o, script, options, rank=None, number=0):
    """Command line of a program on this node: plain python for one process, torchrun for more."""
    if o["gpus"] * o["nnodes"] == 1:
        return [sys.executable, os.path.join(HERE, script), *options]
    friends = {k: o[k] for k in TORCHRUN if o.get(k) is not None} | ({} if rank is None else {"node_rank": rank})
    if o["nnodes"] == 1 and not friends:
        where = ["--standalone"]
    else:  # a rendezvous of its own for every program: a late node must not join the one before
        friends.setdefault("rdzv_backend", "static" if "master_addr" in friends else "c10d")
        where = ["--nnodes", str(o["nnodes"]), "--rdzv_id", str(number)]
        where += [x for k, v in friends.items() for x in (f"--{k}", str(v))]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", str(o["gpus"]),
            os.path.join(HERE, script), *options]


def supervise(command, lock=None, enough=lambda: False):
    """Run a program to its end -> exit code. Signals that arrive here go on to it; it gets SIGTERM when `enough()`.

    It holds a copy of the run's lock, and SIGTERM from the kernel should this process be killed: what it leaves can
    be continued as soon as the lock is free, and not before.
    """
    print("$ " + shlex.join(command), flush=True)
    die = getattr(ctypes.CDLL(None), "prctl", None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock] if lock else [],
                             preexec_fn=(lambda: die(1, signal.SIGTERM)) if die else None)
    forwarded, asked, next_look = 0, False, 0.0
    while True:
        try:
            return child.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            pass
        if len(STOP) > forwarded:
            forwarded = len(STOP)
            tell(child.pid, STOP[-1])
        elif not asked and time.time() > next_look:
            next_look = time.time() + 0.2
            if enough():
                asked = True
                tell(child.pid, signal.SIGTERM)


def tell(pid, number):
    """Signal a program's workers; torchrun itself would give them 30 seconds, less than a large checkpoint takes."""
    workers = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = open(stat).read().rsplit(")", 1)[1].split()
            command = open(stat[:-4] + "cmdline").read()
        except OSError:
            continue
        if int(fields[1]) == pid and ("grpo.py" in command or "evaluate.py" in command):
            workers.append(int(stat.split("/")[2]))
    under_torchrun = workers and "torch.distributed.run" in open(f"/proc/{pid}/cmdline").read()
    for p in workers if under_torchrun else [pid]:
        try:
            os.kill(p, number)
        except ProcessLookupError:
            pass


def take_lock(run, patience=120):
    """Only one schedule.py works on a run. A program that a killed one left behind is given time to save and leave."""
    lock = open(os.path.join(run, "lock"), "a+")
    started, told = time.time(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return lock
        except BlockingIOError:
            lock.seek(0)
            pid = lock.read().strip()
        if not pid.isdigit() or os.path.exists(f"/proc/{pid}") or time.time() - started > patience:
            raise ValueError(f"{run} is in use by process {pid} or a program it started: stop that one first")
        if not told:
            print(f"waiting for a program that process {pid} left behind in {run} to save and leave", flush=True)
            told = True
        time.sleep(0.2)


class Leader:
    """What runs a plan: its folder, lock, and the few things done to it."""

    def __init__(self, run, plan, lock, resolved):
        self.run, self.plan, self.lock, self.resolved = run, plan, lock, resolved

    def program(self, script, options, enough=lambda: False):
        """One program on all nodes; the others read the action in the plan and start their share of it."""
        action = {"id": int(time.time() * 1000), "script": script, "options": options}
        self.plan["action"] = action
        save_plan(self.run, self.plan)
        o = self.plan["options"]
        command = torchrun(o, script, options, 0 if o["nnodes"] > 1 else None, action["id"])
        code = supervise(command, self.lock, enough)
        self.plan["action"] = None
        save_plan(self.run, self.plan)
        again = f"python schedule.py --run {self.run} goes on from here"
        if STOP:
            raise Stopped(130 if STOP[0] == signal.SIGINT else 143, f"stopped by a signal, state saved; {again}")
        if code:
            raise Stopped(1, f"{script} ended with exit code {code}, see above; once that is mended, {again}")


def run_plan(leader):
    """Everything that is left to do, in order. Each line below is safe to repeat."""
    run, plan = leader.run, leader.plan
    plan["finished"] = False
    evaluate(leader, "base", plan["model"])
    for number, stage in enumerate(plan["stages"], 1):
        if stage["status"] in ("waiting", "training"):
            stage["status"] = "training"
            save_plan(run, plan)
            train(leader, number)
            stage["status"] = "trained"
            save_plan(run, plan)
        if stage["status"] == "trained":
            clean_up(run, plan, number)
            evaluate(leader, stage["folder"], picked_model(run, stage))
            stage["status"] = "done"
            save_plan(run, plan)
            if number < len(plan["stages"]):
                report(run, plan)
    plan["finished"] = True
    save_plan(run, plan)
    report(run, plan)
    print(f"done: {os.path.join(run, 'report.md')}")


def train(leader, number):
    """Train one stage to its last step, its turn or the token limit, and store which checkpoint is handed on."""
    run, plan = leader.run, leader.plan
    o, stage = plan["options"], plan["stages"][number - 1]
    folder = os.path.join(run, stage["folder"])
    watch = None
    if o["switch"] == "auto" and number < len(plan["stages"]):
        watch = Watch(folder, o, leader.resolved[number - 1]["save_every"], stage["steps"])
    spent = sum(r["tokens"] for s in plan["stages"][:number - 1] for r in read_metrics(os.path.join(run, s["folder"])))
    over = lambda: bool(o["token_limit"]) and spent + sum(r["tokens"] for r in read_metrics(folder)) >= o["token_limit"]
    enough = lambda: bool(watch and watch.look()) or over()
    last = os.path.join(folder, "checkpoints", f"{stage['steps']:06d}")
    if not enough() and not os.path.isdir(last):
        leader.program("grpo.py", stage_command(run, plan, number), enough)
        enough()  # it may have finished between two looks
    if watch and watch.evidence:
        stage["evidence"], stage["picked"] = watch.evidence, watch.pick()
        print(f"{stage['folder']}: {describe_turn(watch.evidence)}; checkpoint {stage['picked']} goes on")
    elif over():
        stage["picked"] = max(map(int, checkpoints(os.path.join(folder, "checkpoints"))), default=None)
    elif os.path.isdir(last):
        stage["picked"] = stage["steps"]
    if stage["picked"] is None:
        raise Stopped(1, f"{stage['folder']} ended without the checkpoint {last}: look for ALARM lines above (a full "
                         f"disk, or updates that were not finite); python schedule.py --run {run} goes on from the "
                         f"newest checkpoint")


def picked_model(run, stage):
    return os.path.join(run, stage["folder"], "checkpoints", f"{stage['picked']:06d}", "hf")


def clean_up(run, plan, number):
    """Leave the checkpoint that is handed on and remove the others; without its optimizer, unless that is needed."""
    stage, carry = plan["stages"][number - 1], plan["options"]["optimizer"] == "carry"
    folder, name = os.path.join(run, stage["folder"]), f"{stage['picked']:06d}"
    source, kept = os.path.join(folder, "checkpoints"), os.path.join(folder, "kept")
    if not os.path.isdir(os.path.join(source, name)):
        os.rename(os.path.join(kept, name), os.path.join(source, name))
    with open(os.path.join(source, "latest"), "w") as f:
        f.write(name + "\n")
    shutil.rmtree(kept, ignore_errors=True)
    for other in checkpoints(source):
        if other != name:
            shutil.rmtree(os.path.join(source, other))
    for part in os.listdir(os.path.join(source, name)) if number < len(plan["stages"]) and not carry else ():
        if part not in ("hf", "trainer.json"):
            os.remove(os.path.join(source, name, part))


def evaluate(leader, name, model):
    """evaluate.py on one model, unless it was done; a killed one goes on with the samples that are missing."""
    run, o, r = leader.run, leader.plan["options"], leader.resolved[0]
    if o["no_eval"] or (name == "base" and o["no_base_eval"]):
        return
    if not os.path.exists(os.path.join(run, "eval", name + ".json")):
        given = {"-n": o["bench_n"], "--max_tokens": o["bench_max_tokens"], "--temperature": o["bench_temperature"],
                 "--top_p": o["bench_top_p"], "--seed": o["seed"], "--style": r["style"], "--engine": r["engine"],
                 "--dtype": r["dtype"], "--max_seqs": r["max_seqs"], "--out": os.path.join(run, "eval"), "--name": name}
        given |= {"--examples": r["examples"]} if r["examples"] else {}
        leader.program("evaluate.py", ["--model", model, "--benchmarks", *o["benchmarks"],
                                       *(str(x) for pair in given.items() for x in pair),
                                       *["--no_chat"] * r["no_chat"]])
    if name not in leader.plan["evals"]:
        leader.plan["evals"].append(name)
        save_plan(run, leader.plan)


def follow(run, o):
    """Node rank above 0: start this node's share of every program the leader starts, until all is done."""
    last = 0
    while not STOP:
        plan = read_plan(run)
        action = plan and plan["action"]
        if action and action["id"] > last:
            last = action["id"]
            supervise(torchrun({**plan["options"], "gpus": o["gpus"] or plan["options"]["gpus"]}, action["script"],
                               action["options"], o["node_rank"], last))
        elif plan and plan["finished"]:
            return 0
        time.sleep(1)
    return 143


# ---------------------------------------------------------------------------------------------------------------
# Ledger and report
# ---------------------------------------------------------------------------------------------------------------

PHASES = ("generate", "reward", "logprobs", "update", "sync", "idle")


def ledger(run, plan):
    """One dict a stage and one in total: steps, tokens, seconds by phase, process-hours. A step that was done again
    after a crash counts once; starting, saving and what a crash cost are not in it."""
    rows = []
    for stage in plan["stages"]:
        folder = os.path.join(run, stage["folder"])
        lines = read_metrics(folder)
        if not lines:
            continue
        world = json.load(open(os.path.join(folder, "config.json")))["world"]
        past = [r for r in lines if stage["picked"] and r["step"] > stage["picked"]]
        total = lambda key, rows=lines: sum(r.get(key) or 0 for r in rows)
        row = dict(name=f"{stage['folder']} ({stage['max_len']})", steps=len(lines), tokens=total("tokens"),
                   trained=total("tokens_trained"), past=total("tokens", past), seconds=total("seconds"),
                   validate=total("eval_seconds", read_metrics(folder, validation=True)))
        row |= {p: total(f"seconds_{p}") for p in PHASES}
        rows.append(row | {"hours": (row["seconds"] + row["validate"]) * world / 3600})
    for name in plan["evals"]:
        result = read_json(os.path.join(run, "eval", name + ".json"))
        if result:
            world = plan["options"]["gpus"] * plan["options"]["nnodes"]
            nothing = dict.fromkeys(("steps", "trained", "past", "validate", *PHASES), 0)
            rows.append(nothing | dict(name=f"evaluate {name}", tokens=result["tokens_generated"],
                                       seconds=result["seconds"], hours=result["seconds"] * world / 3600))
    if rows:
        rows.append({k: "total" if k == "name" else sum(r[k] for r in rows) for k in rows[0]})
    return rows


def ledger_table(rows, o):
    """Markdown of `ledger`, with dollars and the published costs beside it."""
    price = o["gpu_price"] if o["gpu_price"] is not None else GPUS[o["gpu_type"]]["price"]
    unit = "GPU-hours" if o["gpu_type"] != "cpu" else "process-hours"
    head = ["", "steps", "tokens generated", "of them past the pick", "tokens trained", "seconds", *PHASES,
            "validation", unit, "dollars"]
    body = [[r["name"], r["steps"], *(f"{r[k]:,}" for k in ("tokens", "past", "trained")),
             *(f"{r[k]:,.1f}" for k in ("seconds", *PHASES, "validate")), f"{r['hours']:,.2f}",
             f"{r['hours'] * price:,.2f}" if price else "-"] for r in rows]
    note = (f"\nDollars at {price:g} an hour (--gpu_price). " if price else "\nNo price is set (--gpu_price). ") + (
        "Seconds are those of steps, by phase as means over ranks; a step repeated after a crash counts once, "
        "loading, saving and lost work do not.\n\nPublished costs, by their authors' accounts:\n\n")
    return table(head, body) + note + table(["who", "what", "GPU-hours", "dollars", "AIME 2024"], COSTS)


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |\n"
    return line(head) + line(["---"] * len(head)) + "".join(line(r) for r in rows)


def read_json(path):
    return json.load(open(path)) if os.path.exists(path) else None


def report(run, plan):
    """Tables, figures and report.md, written anew. What cannot be drawn is named, and stops nothing."""
    o, missing = plan["options"], {}
    try:  # a report without pictures is still a report
        import figures
        _, missing = figures.draw(run, window=min(100, max(5, sum(s["steps"] for s in plan["stages"]) // 20)))
    except Exception as e:
        missing["figures"] = f"{type(e).__name__}: {e}"
    try:
        figures.transcripts(run)
    except Exception as e:
        missing["transcripts"] = f"{type(e).__name__}: {e}"
    results = [os.path.join(run, "eval", n + ".json") for n in plan["evals"]]
    scores = "No evaluation was run (--no_eval).\n"
    if results:
        command = [sys.executable, os.path.join(HERE, "evaluate.py"), "--table", *results]
        done = subprocess.run(command + ["--published"] * (o["model"] == MODEL), capture_output=True, text=True)
        scores = done.stdout if done.returncode == 0 else f"evaluate.py --table failed: {done.stderr.strip()[-300:]}\n"
    rows = ledger(run, plan)
    describe = lambda s: (f"{s['max_len']:,} tokens of context, {s['group']} samples a problem, up to {s['steps']:,} "
                          f"steps: {s['status']}" + f", checkpoint of step {s['picked']} handed on" * bool(s["picked"]))
    turns = [f"- {s['folder']}: {describe_turn(s['evidence'])}." for s in plan["stages"] if s["evidence"]]
    how = ("by the turning point of the response length" if o["switch"] == "auto" else "at fixed steps")
    page = os.path.join(run, "transcripts.html")
    pictures = sorted(glob.glob(os.path.join(run, "figures", "*.png")))
    text = [f"# {os.path.basename(os.path.abspath(run))}: training with a growing context\n",
            f"A language model ({plan['model'].replace(HERE + os.sep, '')}) answers problems several times each; right answers earn 1, wrong ones "
            f"0, and "
            f"probability moves towards answers better than their group's mean (GRPO). The context grows from stage to "
            f"stage; stages end {how}. Each starts from the weights of the one before, with "
            f"{'the optimizer state carried over' if o['optimizer'] == 'carry' else 'a fresh optimizer'} and "
            f"{'the start model' if o['reference'] == 'start' else 'its own start'} as reference.\n",
            *[f"- {s['folder']}: {describe(s)}" for s in plan["stages"]],
            "\n## Results\n\npass@1 in percent, with its standard error; the protocol is stated below the table.\n",
            scores,
            "## Where stages ended\n", *(turns or ["No turning point was used: stages ended at their last step.\n"]),
            "\n## Figures\n", *[f"![{os.path.basename(p)[:-4]}](figures/{os.path.basename(p)})\n" for p in pictures],
            *["Transcripts: [transcripts.html](transcripts.html)\n"] * os.path.exists(page),
            "## Ledger\n", ledger_table(rows, o) if rows else "Nothing was trained yet.\n",
            "## Not shown, and why\n", *([f"- {name}: {why}" for name, why in missing.items()]
                                         or ["Nothing is missing."]),
            f"\nOptions of all stages: `{shlex.join(o['grpo']).replace(HERE + os.sep, '') or 'the defaults of grpo.py'}`\n"]
    with open(os.path.join(run, "report.md.tmp"), "w", encoding="utf-8") as f:
        f.write("\n".join(text))
    os.replace(os.path.join(run, "report.md.tmp"), os.path.join(run, "report.md"))
    if rows:
        print(ledger_table(rows, o).split("\n\n")[0])


# ---------------------------------------------------------------------------------------------------------------
# Prediction (--dry_run). Formulas as in DeepScaleR's sizing: P parameters, W ranks, T packed tokens, L layers
# ---------------------------------------------------------------------------------------------------------------

# memory GiB as the driver reports it; bf16 peak TFLOP/s; assumed: generated tokens/s of a 1.8B model with a full batch,
# tokens/s of one sequence when the batch has run empty, dollars an hour. A100: 4,500 / 3,800, what DeepScaleR paid
GPUS = {
    "A100-80": dict(memory=79.2, tflops=312, tokens=6000, stream=110, price=1.18),
    "A100-40": dict(memory=39.4, tflops=312, tokens=5500, stream=100, price=1.1),
    "H100-80": dict(memory=79.1, tflops=989, tokens=12000, stream=180, price=2.5),
    "H200": dict(memory=139.8, tflops=989, tokens=14000, stream=200, price=3.0),
    "L40S": dict(memory=44.4, tflops=362, tokens=4500, stream=70, price=0.9),
    "RTX4090": dict(memory=23.5, tflops=165, tokens=4500, stream=80, price=0.4),
    "cpu": dict(memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, tflops=0.05, tokens=20,
                stream=4, price=0),
}
GIB = 2**30
MFU, PROMPT = 0.4, 150   # assumed: share of the peak reached in training; mean tokens of a prompt
RESERVE = 2.0      # GiB: CUDA context, NCCL buffers, fragmentation
VLLM_EXTRA = 2.0   # GiB: vLLM's activations and CUDA graphs
SHAPE = dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
             num_key_value_heads=2, vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=False)


def model_shape(model):
    """Sizes of any causal LM from its config; no weight is loaded. The default model's are known without a network."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as e:
        if model != MODEL:
            raise ValueError(f"--model {model} cannot be opened: {str(e).splitlines()[0]}") from e
        config = AutoConfig.for_model(**SHAPE)
    c = config.get_text_config()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(c)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kinds = getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers
    count = lambda module: sum(p.numel() for p in module.parameters())
    return dict(parameters=count(shell), layer=count(shell.base_model.layers[0]), layers=c.num_hidden_layers,
                hidden=c.hidden_size, mlp=c.intermediate_size, q=c.num_attention_heads * head,
                kv=c.num_key_value_heads * head, vocab=c.vocab_size, tied=bool(c.tie_word_embeddings),
                sliding=sum(k == "sliding_attention" for k in kinds), window=getattr(c, "sliding_window", None) or 0,
                positions=getattr(c, "max_position_embeddings", None))


def state_bytes(m):
    """fp32 weights, gradients and two Adam moments, all ranks together: 16 bytes a parameter."""
    return 16 * m["parameters"]


def kv_bytes(m, tokens, width):
    """Keys and values of one sequence; a sliding-window layer keeps its window at most."""
    seen = (m["layers"] - m["sliding"]) * tokens + m["sliding"] * min(tokens, m["window"] or tokens)
    return 2 * m["kv"] * width * seen


def layer_bytes(m, tokens, width):
    """What one decoder layer keeps for its backward: four hidden-sized vectors, three of the queries' size (q, rotated,
    attended), four of the keys', four of the MLP's. 47.6 K numbers a token for R1-Distill-Qwen-1.5B."""
    return tokens * width * (4 * m["hidden"] + 3 * m["q"] + 4 * m["kv"] + 4 * m["mlp"])


def activation_bytes(m, tokens, width, recompute):
    """With recomputation the residual stream between layers, and one layer at a time forward and backward."""
    if not recompute:
        return m["layers"] * layer_bytes(m, tokens, width)
    return m["layers"] * m["hidden"] * width * tokens + 2 * layer_bytes(m, tokens, width)


TILE = 150_000_000  # logits of a tile by default, see policy.py


def tile_bytes(m, chunk, width):
    """fp32 tiles of logits (one buffer in fp32; in bf16 the next is made while one is alive), the head's gradient in
    fp32 and once more in the compute type."""
    return (1 if width == 4 else 2) * chunk * m["vocab"] * 4 + m["vocab"] * m["hidden"] * (4 + width)


def gathered_bytes(m, width, sharded):
    """FSDP: two layers (one computes, one arrives), embedding, head and their fp32 gradient before it is reduced."""
    root = m["parameters"] - m["layers"] * m["layer"]
    return (2 * m["layer"] + root) * width + 4 * root if sharded else 0


def predict(m, a, gpu, world):
    """Memory in GiB of one GPU, in parts, for a stage with grpo.py's resolved options `a` -> dict."""
    cpu = gpu is GPUS["cpu"]
    width = 4 if a["dtype"] == "float32" or (cpu and a["dtype"] == "auto") else 2
    longest = a["max_len"] + a["max_prompt_len"]
    tokens = a["token_budget"] or max(2048 if cpu else 32768, longest)
    recompute = (not cpu) if a["recompute"] < 0 else a["recompute"]
    mine = -(-a["prompts"] * a["group"] // world)
    weights = (m["parameters"] + m["tied"] * m["vocab"] * m["hidden"]) * width  # vLLM is given a tied head untied
    slots = cpu or a["engine"] == "torch"
    if slots:  # rollout.TorchEngine: a row for each running sample, as long as the longest
        weights, seqs = m["parameters"] * width, min(mine, a["max_seqs"] or 64)
        pool, extra = seqs * kv_bytes(m, longest, width), 0
    else:
        extra, pool = VLLM_EXTRA * GIB, a["gpu_memory"] * gpu["memory"] * GIB - weights - VLLM_EXTRA * GIB
        seqs = int(min(mine, a["max_seqs"] or 256, max(pool, 0) // kv_bytes(m, longest, width)))
    parts = {"states": state_bytes(m) / world, "reference": m["parameters"] * width / world if a["kl_coef"] else 0,
             "gathered": gathered_bytes(m, width, world > 1 or width == 2),
             "activations": activation_bytes(m, tokens, width, recompute),
             "logit tiles": tile_bytes(m, min(tokens, a["logit_chunk"] or max(1, TILE // m["vocab"])), width),
             "engine weights": weights, "KV cache": pool, "engine extra": extra}
    parts = {k: v / GIB for k, v in parts.items()}
    fixed = parts["states"] + parts["reference"] + (1.0 if cpu else RESERVE)
    engine = parts["engine weights"] + max(parts["KV cache"], 0) + parts["engine extra"]
    train = fixed + parts["gathered"] + parts["activations"] + parts["logit tiles"]
    train += parts["engine weights"] if slots else 0 if a["sleep"] else engine
    need = seqs if slots else 1
    return dict(parts=parts, generating=fixed - parts["states"] / 4 + engine,  # gradients are freed after a step
                 training=train, memory=gpu["memory"] / (world if cpu else 1),
                sequences=seqs,
                mean_sequences=int(max(pool, 0) // kv_bytes(m, PROMPT + a["mean_len"], width)),
                tokens=tokens, longest=longest, fits_kv=seqs >= need, recompute=recompute)


def trouble(m, a, gpu, world):
    """Why a stage cannot run, in words; None if it can."""
    p = predict(m, a, gpu, world)
    if m["positions"] and a["max_len"] >= m["positions"]:
        return f"a context of {a['max_len']} leaves no room for a prompt in the model's {m['positions']} positions"
    if p["tokens"] < p["longest"]:
        return f"--token_budget {a['token_budget']} holds no sequence of {p['longest']} tokens"
    if not p["fits_kv"]:
        return (f"vLLM's share of {a['gpu_memory']:g} leaves a KV cache of {max(0, p['parts']['KV cache']):.1f} GiB: "
                f"not "
                f"one sequence of {p['longest']} tokens")
    for phase in ("generating", "training"):
        if p[phase] > p["memory"]:
            place = "process" if gpu is GPUS["cpu"] else "GPU"
            return f"{phase} needs {p[phase]:.1f} GiB on each {place}, which has {p['memory']:.1f}"
    return None


def remedies(m, a, gpu, world):
    """Options that make a stage fit, each alone, with the value nearest to the present one; else two together."""
    p = predict(m, a, gpu, world)
    down = lambda x, low: [v for v in (int(x * f / 16) for f in range(15, 0, -1)) if v >= low]
    shares = sorted((x / 20 for x in range(2, 19)), key=lambda x: abs(x - a["gpu_memory"]))
    choices = {"token_budget": [*down(p["tokens"], p["longest"] + 1), p["longest"]], "recompute": [1], "sleep": [1],
               "gpu_memory": shares, "max_seqs": down(p["sequences"], 1), "logit_chunk": [512, 256, 128],
               "max_len": down(a["max_len"], 1)}
    worlds = [world * 2**i for i in range(1, 9)] if gpu is not GPUS["cpu"] else []
    fits = lambda change, w: not trouble(m, a | change, gpu, w)
    word = lambda k, v: f"the context in --stages to {v}" if k == "max_len" else f"--{k} {v}"
    first = lambda k, w, base={}: next((word(k, v) for v in choices[k] if fits(base | {k: v}, w)), None)
    found = [x for x in (first(k, world) for k in choices) if x]
    found += [f"--gpus {w} (over all nodes)" for w in worlds if fits({}, w)][:1]
    if found:
        return " or ".join(found)
    small = {"token_budget": p["longest"], "recompute": 1, "sleep": 1, "logit_chunk": 256}
    for w in [world, *worlds]:
        x = first("gpu_memory", w, small) or first("max_seqs", w, small)
        if x:
            gpus = f" --gpus {w} (over all nodes)" if w > world else ""
            return " ".join(f"--{k} {v}" for k, v in small.items()) + f" {x}" + gpus
    return "a GPU with more memory (--gpu_type), a smaller --model, or a shorter context in --stages"


def forward_flops(m, tokens):
    """One forward of one sequence: two FLOP for each weight it meets, and causal attention."""
    weights = m["parameters"] - (0 if m["tied"] else m["vocab"] * m["hidden"])
    return 2 * weights * tokens + 2 * m["layers"] * m["q"] * tokens ** 2


def step_seconds(m, a, gpu, world):
    """Assumed seconds of one step -> dict. Generation is bound by throughput or by its longest sequence."""
    n, scale = a["prompts"] * a["group"], 1.777e9 / m["parameters"]
    stream = min(gpu["stream"] * scale, 500.0)  # a small model is bound by launching kernels
    rate = min(gpu["tokens"] * scale, stream * max(1, min(n / world, a["max_seqs"] or 256)))
    generate = max(n * a["mean_len"] / rate / world, a["max_len"] / stream)
    forward = n * forward_flops(m, a["mean_len"] + PROMPT) / (world * gpu["tflops"] * 1e12 * MFU)
    # old log-probs of all mini-batches but the first, and the reference's
    passes = (a["updates"] - 1) / a["updates"] + bool(a["kl_coef"])
    update = forward * (4 if predict(m, a, gpu, world)["recompute"] else 3)
    total = generate + forward * passes + update + 3
    return dict(generate=generate, logprobs=forward * passes, update=update, total=total)


def dry_run(o, resolved):
    """Print what every stage would need. -> exit code: 2 if one cannot run."""
    m, gpu, world = model_shape(o["model"]), GPUS[o["gpu_type"]], o["gpus"] * o["nnodes"]
    price = gpu["price"] if o["gpu_price"] is None else o["gpu_price"]
    whose = "shared by all processes" if gpu is GPUS["cpu"] else "each"
    print(f"{o['model']}: {m['parameters']:,} parameters ({m['parameters'] - m['layers'] * m['layer']:,} of them "
          f"embedding, head and final norm)\n{world} x {o['gpu_type']}, {gpu['memory']:.1f} GiB {whose}\n"
          f"assumed: {gpu['tokens']:,} generated tokens/s for each GPU with a full batch and {gpu['stream']} for one "
          f"sequence (1.8B model; inversely with size), {gpu['tflops']} TFLOP/s at {MFU:.0%}, prompts of {PROMPT} "
          f"tokens, ${price:g} an hour. Estimates, not measurements")
    body, refused, hours = [], [], 0.0
    for number, (stage, a) in enumerate(zip(parse_stages(o["stages"]), resolved), 1):
        a = a | {"mean_len": o["mean_len"] or min(a["max_len"] // 2, 5000)}
        p, t = predict(m, a, gpu, world), step_seconds(m, a, gpu, world)
        stage_hours = t["total"] * a["steps"] / 3600
        hours += stage_hours
        step = " + ".join(f"{t[k]:.0f}" for k in ("generate", "logprobs", "update")) + " + 3"
        body.append([f"stage{number}", f"{a['max_len']:,}", a["steps"],
                     *(f"{max(v, 0):.2f}" for v in p["parts"].values()),
                     *(f"{p[k]:.1f}" for k in ("generating", "training", "memory")), p["sequences"],
                     p["mean_sequences"],
                     f"{p['tokens']:,}", f"{a['mean_len']:,}", step, f"{stage_hours:,.1f}",
                     f"{stage_hours * world:,.0f}", f"{stage_hours * world * price:,.0f}"])
        why = trouble(m, a, gpu, world)
        if why:
            refused.append(f"stage{number} cannot run: {why}. Change {remedies(m, a, gpu, world)}")
    head = ["", "context", "steps", *p["parts"], "peak generating", "peak training", "GiB there",
            "sequences, full length", "sequences, mean length", "token budget", "mean length",
            "s a step: generate + log-probs + update + rest", "hours", "GPU-hours", "dollars"]
    for cells in zip(head, *body):  # one line a quantity reads better than 23 columns
        print(f"  {cells[0]:46s}" + "".join(f"{str(c):>26s}" for c in cells[1:]))
    disk, n = 16 * m["parameters"] / GIB, resolved[0]["keep"]
    kept = f", {disk / 4:.1f} GiB for each one kept to return to" if o["switch"] == "auto" else ""
    print(f"total {hours:,.1f} hours, {hours * world:,.0f} GPU-hours, ${hours * world * price:,.0f} without "
          f"evaluations; memory in GiB for each GPU\n"
          f"disk: {disk:.1f} GiB a checkpoint, {(n + 1) * disk:.1f} GiB for {n} and one being written{kept}")
    print("\n".join(refused) if refused else "it fits", file=sys.stderr if refused else sys.stdout)
    return 2 if refused else 0


# ---------------------------------------------------------------------------------------------------------------
# Staged against direct
# ---------------------------------------------------------------------------------------------------------------

def ablation(run, o, given, rest):
    """For each seed a staged run, then one at the last context from the start with as many generated tokens; both with
    validation during training. Prints and writes how many tokens each needed for the same pass@1."""
    common = [x for k, v in given.items() if k not in ("run", "ablation", "seed", "stages")
              for x in ([f"--{k}"] if v is True else [f"--{k}", *(map(str, v) if isinstance(v, list) else [str(v)])])]
    rows = []
    for seed in range(o["seed"], o["seed"] + 1000 * o["ablation"], 1000):
        last = parse_stages(o["stages"])[-1]
        curves = {}
        for kind in ("staged", "direct"):
            folder, extra = os.path.join(run, f"seed{seed}", kind), ["--stages", o["stages"]]
            if kind == "direct":
                steps = 10 * sum(s["steps"] for s in parse_stages(o["stages"]))
                extra = ["--stages", f"{last['max_len']}:{steps}:{last['group']}"]
                extra += ["--token_limit", str(budget)]
            if not (read_plan(folder) or {}).get("finished"):
                code = main(["--run", folder, *common, "--seed", str(seed), "--no_eval", *extra, *rest])
                if code:
                    return code
            curves[kind], spent = validation_curve(folder)
            budget = spent if kind == "staged" else budget
        # what the direct run did between the last token of its budget and its end does not count
        rows.append([seed, budget, *compare_curves(curves["staged"], [p for p in curves["direct"] if p[0] <= budget])])
    tokens = ((read_json(os.path.join(folder, "stage1", "config.json")) or {}).get("options") or {}).get("eval_max_len")
    at = f"at {tokens} tokens" if tokens else "each at the context trained with"
    known = [r[-1] for r in rows if isinstance(r[-1], float)]
    head = ["seed", "tokens of each", "final pass@1 staged", "final pass@1 direct", "tokens to the staged run's final "
            "pass@1: staged", "direct", "direct / staged"]
    mean = f"; geometric mean ratio of these {math.exp(np.mean(np.log(known))):.2f}" if known else ""
    bound = " A > is a bound: not reached with as many tokens." if len(known) < len(rows) else ""
    text = table(head, [[f"{x:.3g}" if isinstance(x, float) else x for x in r] for r in rows]) + (
        f"\npass@1: mean of three validations, {at}. {len(known)} of {len(rows)} direct "
        f"runs reached the staged run's final pass@1 within its tokens{mean}.{bound}\n")
    with open(os.path.join(run, "ablation.md"), "w") as f:
        f.write(text)
    print(text)
    return 0


def validation_curve(run):
    """([(tokens generated so far, pass@1)] over all stages, only up to the checkpoints handed on; tokens in all)"""
    curve, spent = [], 0
    for stage in read_plan(run)["stages"]:
        lines = read_metrics(os.path.join(run, stage["folder"]), validation=True)
        here = [r for r in lines if r["step"] <= stage["picked"]]
        curve += [(spent + r.get("tokens_total", 0), r["eval_reward"]) for r in here if "eval_reward" in r]
        spent += sum(r.get("tokens", 0) for r in lines)  # steps past the pick were paid for as well
    if not curve:
        raise ValueError(f"{run} was trained without validation: give --eval_data and --eval_every")
    return curve, spent


def compare_curves(staged, direct):
    """-> final pass@1 of both, tokens until the running mean of three reaches staged's final one, and their ratio.

    >>> compare_curves([(0, 0.0), (10, 0.5), (20, 0.5), (30, 0.5)], [(0, 0.0), (20, 0.25), (40, 0.5)])
    [0.5, 0.25, 30, 'not reached', '> 1.33']
    """
    smooth = lambda c: [(t, sum(v for _, v in c[max(0, i - 2):i + 1]) / min(3, i + 1)) for i, (t, _) in enumerate(c)]
    a, b = smooth(staged), smooth(direct)
    target = a[-1][1]
    reach = lambda curve: next((t for t, v in curve if v >= target - 1e-9 and t > 0), None)
    mine, theirs = reach(a), reach(b)
    ratio = f"> {b[-1][0] / mine:.2f}" if theirs is None else theirs / mine
    return [a[-1][1], b[-1][1], mine, "not reached" if theirs is None else theirs, ratio]


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(description="Stages of grpo.py with a growing context. Options not listed here go to "
                                "grpo.py.",
                                allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--run", default="runs/deepscaler", help="folder of the whole run; one that exists is continued")
    add("--preset", choices=list(PRESETS), default="deepscaler", help="toy: minutes on a laptop")
    add("--stages", default=None, help="CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...],... with samples for each problem and "
        "options of "
        "grpo.py for one stage; default: the preset's, " + PUBLISHED)
    add("--model", default=None, help=f"start weights, folder or hub name; default: the preset's, {MODEL}")
    add("--reference", choices=["stage", "start"], default="stage", help="of the KL term: the stage's own start, or "
        "the first model")
    add("--optimizer", choices=["fresh", "carry"], default="fresh", help="Adam's state at the start of a stage")
    add("--seed", type=int, default=0, help="stage k trains with seed + k - 1: a new data order, as the original had")
    # when a stage ends
    add("--switch", choices=["steps", "auto"], default="steps", help="auto: at the turning point of the response "
        "length, --stages' "
        "steps at most; not in the last stage, which nothing follows")
    add("--turn_window", type=int, default=0, help="steps of a window; 0: a twentieth of the stage, 10 to 50")
    add("--turn_z", type=float, default=4.5, help="standard errors by which length must have fallen and risen; "
        "truncation 3")
    add("--turn_flat", type=float, default=2.0, help="standard errors by which reward may have risen and still counts "
        "as flat")
    add("--turn_fall", type=float, default=0.1, help="least fall of the length before the turn, as a share")
    add("--turn_rise", type=float, default=0.05, help="least rise of the length after the turn, as a share")
    add("--token_limit", type=int, default=0, help="end when so many tokens were generated in all; 0: no limit")
    # machines
    add("--gpus", "--nproc_per_node", "--ranks", dest="gpus", type=int, default=None, help="processes on each node; "
        "default: the GPUs "
        "found. Two or more without GPUs are CPU ranks")
    add("--nnodes", type=int, default=1, help="nodes; run the same command on each with its --node_rank, on a shared "
        "disk")
    add("--node_rank", type=int, default=0, help="of this node; 0 leads, the others follow its plan")
    for name in TORCHRUN:
        add(f"--{name}", type=int if name in ("max_restarts", "master_port") else str, default=None, help="as of "
            "torchrun")
    # evaluation after every stage
    add("--benchmarks", nargs="+", default=["aime24", "math500", "amc23", "minerva", "olympiad"], help="for "
        "evaluate.py after each stage")
    add("--bench_n", type=int, default=16, help="samples of each problem")
    add("--bench_max_tokens", type=int, default=32768, help="of a response, whatever the stage's context")
    add("--bench_temperature", type=float, default=0.6, help="of these samples")
    add("--bench_top_p", type=float, default=0.95, help="of these samples")
    add("--no_eval", action="store_true", help="no evaluate.py at all")
    add("--no_base_eval", action="store_true", help="do not evaluate the start model")
    # prediction and costs
    add("--dry_run", action="store_true", help="predict memory, time and dollars, check that it fits, and leave")
    add("--gpu_type", choices=list(GPUS), default=None, help="for prediction and price; default: what is found, else "
        "A100-80")
    add("--gpu_price", type=float, default=None, help="dollars an hour; default: an assumption for --gpu_type")
    add("--mean_len", type=int, default=0, help="--dry_run: mean tokens of a response; 0: half the context, at most "
        "5,000")
    add("--ablation", type=int, default=0, help="so many seeds of staged against direct training at equal tokens")
    return p


FRESH = ("run", "dry_run", "node_rank")  # belong to a call, not to the run
PER_STAGE = {"--max_len": "--stages", "--steps": "--stages", "--group": "--stages", "--out": "--run",
             "--resume": "--run (it is always on)",
             "--ref_model": "--reference", "--optimizer_from": "--optimizer carry"}


def options(argv):
    """-> (all options with defaults, those given by hand, what is left for grpo.py)"""
    p = parser()
    defaults = vars(p.parse_known_args([])[0])
    for action in p._actions:  # a second time without defaults: what is left was given by hand
        action.default = argparse.SUPPRESS
    given, rest = p.parse_known_args(argv)
    given, rest = vars(given), [x for x in rest if x != "--"]
    for word in rest:
        if word.split("=")[0] in PER_STAGE:
            raise ValueError(f"{word} is set for each stage: use {PER_STAGE[word.split('=')[0]]}")
    absolute = lambda x: os.path.abspath(x) if os.path.exists(x) else x  # the next call may stand elsewhere
    if "model" in given:
        given["model"] = absolute(given["model"])
    if "benchmarks" in given:
        given["benchmarks"] = [absolute(x) for x in given["benchmarks"]]
    rest = [absolute(x) for x in rest]
    preset = PRESETS[given.get("preset", "deepscaler")]
    for name in ("bench_n", "bench_max_tokens", "turn_window", "token_limit", "gpus", "nnodes", "ablation", "mean_len"):
        low = name in ("bench_n", "bench_max_tokens", "gpus", "nnodes")
        if given.get(name, 1) < low:
            raise ValueError(f"--{name} must be at least {int(low)}")
    return defaults | preset | given | {"grpo": preset["grpo"] + rest}, given, rest


def no_gpu():
    return ("no GPU was found here. This command trains a 1.5B model on contexts of 8K, 16K and 24K tokens: 3,800 "
            "A100-hours as published.\n"
            "  python schedule.py --preset toy --run runs/toy     the same story with a small model, on this machine, "
            "in minutes\n"
            "  python schedule.py --dry_run --gpus 8              what the full run needs, predicted\n"
            "  python schedule.py --model FOLDER --stages ...     your own model on this CPU")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        o, given, rest = options(argv)
        run = o["run"]
        again = read_json(os.path.join(run, "ablation.json"))
        if again or o["ablation"]:
            os.makedirs(run, exist_ok=True)
            if again and set(given) == {"run"} and not rest:
                o, given, rest = options(again)
            else:
                with open(os.path.join(run, "ablation.json"), "w") as f:
                    json.dump(argv, f)
            return ablation(run, o, given, rest)
        if o["node_rank"] > 0:
            return follow(run, o)
        dry = o["dry_run"]
        lock = take_lock(run) if os.path.isdir(run) and not dry else None
        plan = read_plan(run)
        if plan and not dry:
            given = {k: v for k, v in given.items() if k not in FRESH}
            if rest:
                given["grpo"] = PRESETS[plan["options"]["preset"]]["grpo"] + rest
            change_plan(run, plan, given)
        else:
            plan = new_plan(o)
        o = plan["options"]
        commands = [stage_command(run, plan, n) for n in range(1, len(plan["stages"]) + 1)]
        gpus, gpu_name, resolved = probe(commands)
        o["gpus"] = o["gpus"] or max(1, gpus)
        if gpus and o["preset"] == "toy" and "gpus" not in given:
            o["gpus"] = min(o["gpus"], gpus)  # two processes are meant for two cores
        known = ["A100-40"] * ("40GB" in gpu_name) + [k for k in GPUS if k.split("-")[0] in gpu_name.replace(" ", "")]
        o["gpu_type"] = o["gpu_type"] or (known + ["A100-80" if gpus or dry else "cpu"])[0]
        for n, stage in enumerate(plan["stages"][:-1] if o["switch"] == "auto" else []):
            Watch("", o, resolved[n]["save_every"], stage["steps"])  # refuses what does not go together
        if dry:
            return dry_run(o, resolved)
        if not gpus and o["preset"] == "deepscaler" and o["model"] == MODEL:
            if not sys.stdin.isatty() or input(no_gpu() + "\nRun the toy preset now? [y/N] ").strip().lower() != "y":
                raise ValueError(no_gpu())
            return main(["--preset", "toy"])
        return lead(run, plan, resolved, lock)
    except (ValueError, OSError) as e:
        print(f"schedule.py: {e}", file=sys.stderr)
        return 2


def lead(run, plan, resolved, lock):
    """Work through a plan, holding the run's lock."""
    if lock is None:
        os.makedirs(run, exist_ok=True)
        lock = take_lock(run)
        if read_plan(run):
            raise ValueError(f"{run} was begun by another schedule.py at this very moment: run the command again")
    save_plan(run, plan)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: STOP.append(n))
    try:
        run_plan(Leader(run, plan, lock.fileno(), resolved))
    except Stopped as e:
        print(f"schedule.py: {e.args[1]}", file=sys.stderr)
        return e.args[0]
    finally:
        lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
