"""schedule.py - DeepScaleR's heart: the same training three times, each time with a longer context.

    python schedule.py --run runs/deepscaler --gpus 8              # 8K -> 16K -> 24K as published
    python schedule.py --run runs/deepscaler                       # go on after a crash, a kill, a reboot
    python schedule.py --preset toy                                # the whole story on a laptop
    python schedule.py --preset justrl --gpus 8                    # the other school: one long stage
    python schedule.py --dry_run --gpus 8 --gpu_type H100-80       # memory, hours, dollars before a GPU is used
    python schedule.py --switch auto --gpus 8 --run RUN            # a stage ends where its response length turns
    python schedule.py --stages 8192:500:8,16384:200:16:lr=5e-7 --run RUN --lr 2e-6      # any other schedule
    python schedule.py --gpus 8 --run SHARED --torchrun "--nnodes 4 --node_rank R --rdzv_backend c10d
                       --rdzv_endpoint HOST:29500"                 # on each node, R from 0 to 3

grpo.py and evaluate.py run as programs, one after another; options unknown here are handed to grpo.py. RUN/plan.json
holds the words of the command line and what is done. Continuing means old words, then new words. Between stages only
weights are handed over: the optimizer is fresh, the KL reference is the stage's start, the data order is new.
Left out on purpose: hyper-parameter search, job queues, retries (a crash wants a look before it is repeated).
"""
import argparse
import contextlib
import glob
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import torch

import common

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = os.path.join(HERE, "assets")
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
PRESETS = {  # words that stand before those of the command line
    "deepscaler": [
        "--run", "runs/deepscaler", "--model", MODEL, "--stages",
        "8192:1040:8:save_every=20:eval_every=20:eval_n=8,16384:480:16:save_every=10:eval_every=10:eval_n=16,"
        "24576:200:16:save_every=10:eval_every=10:eval_n=16"],
    "justrl": ["--run", "runs/justrl", "--model", MODEL, "--stages", "15360:4380:8", "--recipe", "justrl"],
    "toy": [
        "--run", "runs/toy", "--model", f"{ASSETS}/toy/model", "--stages", "40:70:8,80:50:8,120:30:8",
        "--switch", "auto", "--turn_window", "8", "--benchmarks", f"{ASSETS}/toy/heldout.jsonl",
        "--evaluate", "-n 16 --max_tokens 192 --temperature 1 --top_p 1", "--data", f"{ASSETS}/toy/train.jsonl.gz",
        "--eval_data", f"{ASSETS}/toy/heldout.jsonl", "--eval_every", "10", "--eval_n", "2", "--eval_max_len", "192",
        "--eval_temperature", "1", "--save_every", "5", "--recipe", "improved", "--prompts", "128", "--updates", "1",
        "--lr", "2e-4", "--engine", "torch", "--max_seqs", "256", "--token_budget", "8192",
        "--max_prompt_len", "128", "--show_every", "0"],
}
COSTS = [  # what others paid for the same model, by their own accounts
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


# ---------------------------------------------------------------------------------------------------------------
# The turning point
# ---------------------------------------------------------------------------------------------------------------

def turning_point(steps, length, truncated, reward, window, fall=0.05, rise=0.05, z=4.0):
    """Where a stage should have ended (DeepScaleR: length grows again, more is cut off, reward is flat), or None.

    steps, length, truncated, reward: [n], one number a step. The newest window of steps is compared with the trough,
    the last window whose mean length is within one standard error of the lowest. Length fell to the trough (by `fall`
    of its size) and has risen since (by `rise` and `z` standard errors), truncation has risen (`z`), and reward stays
    within one error or grows at less than half its former pace; all that for half a window of looks in a row.
    Nothing here looks ahead: the same past gives the same answer, whenever and however often it is asked.
    """
    w, x = window, np.array([length, truncated, reward], dtype=float)
    if x.shape[1] < 3 * w:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(x, w, axis=1)                              # [3, n - w + 1, w]
    mean = windows.mean(2)
    # noise is what is left around a straight line through each window; its size, and how far neighbouring steps are
    # alike (phi, which short windows underestimate), come from all windows so far
    t = np.arange(w) - (w - 1) / 2
    noise = windows - mean[..., None] - (windows @ t / (t @ t))[..., None] * t
    square = (noise ** 2).sum(2).cumsum(1) + 1e-12
    phi = ((noise[..., 1:] * noise[..., :-1]).sum(2).cumsum(1) / square + 4 / w).clip(0, 0.9)
    variance = square / np.arange(1, mean.shape[1] + 1) / (w - 2)
    se = np.sqrt(variance / w * (1 + phi) / (1 - phi))  # of a window's mean, as for an AR(1) series
    held = 0
    for now in range(2 * w, mean.shape[1]):
        past = mean[0, :now - w + 1]
        trough = int(np.flatnonzero(past <= past.min() + np.sqrt(2) * se[0, now])[-1])
        before, after = mean[:, trough].copy(), mean[:, now]
        start = max(0, trough - w)
        before[2] = x[2, start:trough + 2 * w].mean()  # reward changes slowly: a longer stretch has less noise
        errors = (after - before) / (se[:, now] * np.sqrt([2, 2, 4 / 3]))
        pace = (mean[2, trough] - mean[2, 0]) / max(1, trough)
        flat = errors[2] < 1 or after[2] - before[2] < pace * (now - trough) / 2
        turned = (before[0] <= (1 - fall) * past[:trough + 1].max() and after[0] >= (1 + rise) * before[0]
                  and errors[0] > z and errors[1] > z and flat)
        held = held + 1 if turned else 0
        if held >= w // 2:
            series = {name: [float(v[i]) for v in (before, after, errors)]
                      for i, name in enumerate(("length", "truncated", "reward"))}
            first, last = ([int(steps[i]), int(steps[i + w - 1])] for i in (trough, now))
            return dict(turn=first[0], seen_at=last[1], before=first, after=last,
                        fell_from=float(past[:trough + 1].max()), **series)
    return None


def describe_turn(e):
    """The evidence in plain words."""
    change = {name: (form.format(e[name][0]) + " to " + form.format(e[name][1]) + f", {e[name][2]:+.1f} standard errors")
              for name, form in (("length", "{:.1f}"), ("truncated", "{:.1%}"), ("reward", "{:.3f}"))}
    return (f"responses had become shorter, from {e['fell_from']:.1f} to {e['length'][0]:.1f} tokens at step {e['turn']}. "
            f"Steps {e['after'][0]}-{e['after'][1]} against {e['before'][0]}-{e['before'][1]}: they grow again "
            f"({change['length']}), more of them are cut off at the limit ({change['truncated']}), and that hardly pays "
            f"(reward {change['reward']}). The model asks for more room")


def read_metrics(folder, validation=False):
    """Lines of a stage's metrics.jsonl that describe a training step, each step once; `validation`: all lines."""
    path = os.path.join(folder, "metrics.jsonl")
    lines = common.read_lines(path, on_bad=lambda text: None) if os.path.exists(path) else ()
    rows = {row["step"]: row for row in lines if validation or "reward" in row}
    return list(rows.values())


def find_turn(folder, window):
    rows = read_metrics(folder)
    return turning_point(*([row[k] for row in rows] for k in ("step", "length_mean", "truncated", "reward")), window)


# ---------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------

PATHS = ("--model", "--ref_model", "--data", "--eval_data", "--examples", "--style", "--benchmarks")
PER_STAGE = {"--max_len": "--stages", "--steps": "--stages", "--group": "--stages", "--out": "--run",
             "--resume": "--run (it is always on)", "--optimizer_from": "--optimizer carry"}
GONE = {
    "--ablation": "python bench/staging.py compares staged with direct training",
    "--token_limit": "python bench/staging.py compares at equal tokens; RUN/stageN/stop ends a stage by hand",
    "--reference": "--ref_model MODEL goes to grpo.py and holds for all stages; without it, a stage's own start",
    **dict.fromkeys(("--nproc_per_node", "--ranks"), "use --gpus"),
    **dict.fromkeys(("--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_endpoint", "--master_addr", "--master_port",
                     "--max_restarts"), 'options of torchrun stand in one quoted --torchrun "--nnodes 2 ..."'),
    **dict.fromkeys(("--bench_n", "--bench_max_tokens", "--bench_temperature", "--bench_top_p"),
                    'options of evaluate.py stand in one quoted --evaluate "-n 16 --max_tokens 32768"'),
    **dict.fromkeys(("--turn_z", "--turn_flat", "--turn_fall", "--turn_rise"),
                    "the bounds are the same for every run; --turn_window is left"),
}


def parser():
    p = common.Parser(gone=GONE, description="Stages of grpo.py with a growing context. Options that are not listed "
                      "here go to grpo.py.")
    add = p.add_argument_group("what is trained").add_argument
    add("--run", help="folder of the whole run; one that exists is continued (default: runs/PRESET)")
    add("--preset", choices=list(PRESETS), default="deepscaler", help="toy: minutes on a laptop; justrl: one stage of "
        "15,360 tokens")
    add("--stages", help="CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...],... with samples for each problem and options of "
        "grpo.py for one stage (default: the preset's)")
    add("--model", help="start weights, folder or hub name (default: the preset's)")
    add("--optimizer", choices=["fresh", "carry"], default="fresh", help="Adam's state at the start of a stage")
    add("--seed", type=int, default=0, help="stage k trains with seed + k - 1: a new data order, as the original had")
    add = p.add_argument_group("when a stage ends").add_argument
    add("--switch", choices=["steps", "auto"], default="steps", help="auto: at the turning point of the response "
        "length, --stages' steps at most; the last stage, which nothing follows, takes all its steps")
    add("--turn_window", type=int, default=0, help="steps of a window; 0: a twentieth of the stage, 10 to 50")
    add = p.add_argument_group("machines").add_argument
    add("--gpus", type=int, default=0, help="processes on each node; 0: the GPUs found, without any 1 (toy: 2)")
    add("--torchrun", default="", help="this node's options of torchrun, quoted, for several nodes on a shared disk: "
        '"--nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint HOST:PORT"; node rank 0 keeps the plan')
    add = p.add_argument_group("evaluation after each stage").add_argument
    add("--benchmarks", nargs="+", default=["aime24", "math500", "amc23", "minerva", "olympiad"], help="of evaluate.py")
    add("--evaluate", default="", help='more options of evaluate.py, quoted: "-n 4 --temperature 1"')
    add("--no_eval", action="store_true", help="no evaluate.py at all")
    add("--no_base_eval", action="store_true", help="do not evaluate the start model")
    add = p.add_argument_group("prediction and cost").add_argument
    add("--dry_run", action="store_true", help="predict memory, time and dollars, check that it fits, and leave")
    add("--gpu_type", help=f"{', '.join(GPUS)} (default: what is found here, else A100-80)")
    add("--gpu_memory_gib", type=float, default=0, help="memory of one GPU, for any other card")
    add("--gpu_price", type=float, help="dollars an hour (default: an assumption for --gpu_type)")
    add("--mean_len", type=int, default=0, help="mean tokens of a response; 0: half the context, at most 5,000")
    return p


def absolute(words):
    """Paths among the words made absolute: the next call may stand in another folder."""
    out, option = [], ""
    for word in words:
        option = word.split("=")[0] if word.startswith("-") else option
        head, sep, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
        exists = option in PATHS and value and value != option and os.path.exists(value)
        out.append(head + sep + os.path.abspath(value) if exists else word)
    return out


def parse(p, words):
    """-> (this program's options, words for grpo.py). Of two equal options the later one counts."""
    preset = p.parse_known_args(words)[0].preset
    args, rest = p.parse_known_args(PRESETS[preset] + words)
    rest = [word for word in rest if word != "--"]
    for name in (word.split("=")[0] for word in rest):
        if name in GONE:
            p.refuse([name])
        if name in PER_STAGE:
            p.error(f"{name} is set for each stage: use {PER_STAGE[name]}")
    for name in ("turn_window", "gpus", "gpu_memory_gib", "mean_len"):
        if getattr(args, name) < 0:
            p.error(f"--{name} must not be negative")
    if args.turn_window in (1, 2, 3):
        p.error("--turn_window must be at least 4 steps: noise cannot be told from fewer")
    torchrun = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    torchrun.add_argument("--nnodes", default="1")
    torchrun.add_argument("--node_rank", "--node-rank", type=int)
    nodes = torchrun.parse_known_args(shlex.split(args.torchrun))[0]
    args.nodes, args.node_rank = int(nodes.nnodes.split(":")[-1]), nodes.node_rank or 0
    if args.nodes > 1 and nodes.node_rank is None:
        p.error('--torchrun for several nodes needs a --node_rank: 0 on the node that keeps the plan, 1, 2, ... on the '
                'others')
    found = torch.cuda.device_count()
    args.gpus = args.gpus or (min(2, found or 2) if args.preset == "toy" else max(1, found))
    return args, rest


def ask(p, program, words):
    """The options that `program` (grpo or evaluate) makes of words. What it refuses is refused here, before any work."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return vars(program.parse_args(words))
    except SystemExit:
        reason = (heard.getvalue().strip().splitlines() or ["no reason given"])[-1].split("error: ")[-1]
    unknown = re.search(r"(?:unknown option|unrecognized arguments:) (--[^\s:=]+)", reason)
    own = [s for action in p._actions for s in action.option_strings]
    if unknown and common.difflib.get_close_matches(unknown[1], own, 1, 0.8):
        p.refuse([unknown[1]])  # a misspelt option of this program
    p.error(f"{program.__name__}.py refuses the options: {reason}")


def parse_stages(text):
    """
    >>> parse_stages("8192:1040:8,16384:480:16:lr=5e-7")[1]["extra"]
    ['--lr', '5e-7']
    """
    stages = []
    for number, entry in enumerate(text.split(","), 1):
        parts = entry.strip().split(":")
        try:
            max_len, steps, group = map(int, parts[:3])
            extra = [x for part in parts[3:] for name, value in [part.split("=", 1)] for x in (f"--{name}", value)]
        except ValueError:
            raise ValueError(f"--stages: {entry!r} is not CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...], for example "
                             f"8192:1040:8") from None
        if max_len < 1 or steps < 1 or group < 2:
            raise ValueError(f"--stages: {entry!r} needs a context and steps of at least 1 and at least 2 samples a "
                             f"problem")
        stages.append(dict(folder=f"stage{number}", max_len=max_len, steps=steps, group=group, extra=extra, picked=None,
                           evidence=None))
    return stages


# ---------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------

def read_plan(run):
    path = os.path.join(run, "plan.json")
    if not os.path.exists(path):
        return None
    plan = common.read_json(path)
    if not isinstance(plan, dict) or not isinstance(plan.get("words"), list) or not plan.get("stages"):
        raise ValueError(f"{path} is of another version of this program and cannot be continued. Its checkpoints can be "
                         f"used: --model {run}/stageN/checkpoints/STEP/hf, with another --run and the stages left")
    return plan


def saved_steps(run, stage):
    """Steps of a stage's checkpoints, in order; a name without suffix is complete."""
    folder = os.path.join(run, stage["folder"], "checkpoints")
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []


def checkpoint(run, stage):
    """The checkpoint that a stage hands on."""
    return os.path.join(os.path.abspath(run), stage["folder"], "checkpoints", f"{stage['picked'] or stage['steps']:06d}")


def carry_on(run, plan, before, args, stages):
    """Give the stages what was done of them. Words that would alter finished work are refused."""
    results = glob.glob(os.path.join(glob.escape(run), "eval", "*.json"))
    begun = results or os.path.isdir(os.path.join(run, plan["stages"][0]["folder"]))
    fixed = ("model", "preset", "seed", "optimizer") if begun else ()
    for name in (*fixed, *(("benchmarks", "evaluate") if results else ())):
        old, new = getattr(before, name), getattr(args, name)
        if old != new:
            raise ValueError(f"{run} was begun with --{name} {old}, not {new}: leave it away to go on, or start "
                             f"another --run")
    for number, old in enumerate(plan["stages"]):
        if not os.path.isdir(os.path.join(run, old["folder"])):
            break
        new = stages[number] if number < len(stages) else {}
        same = ("max_len", "group") + ("steps", "extra") * (old["picked"] is not None)
        if any(new.get(name) != old[name] for name in same):
            shape = ":".join(str(old[name]) for name in ("max_len", "steps", "group"))
            raise ValueError(f"--stages: stage {number + 1} of {run} was begun with {shape} and cannot change; later "
                             f"stages can, and the steps of one that is not finished")
        done = max(saved_steps(run, old), default=0)
        if new["steps"] < done:
            raise ValueError(f"--stages: stage {number + 1} of {run} has done {done} steps already, more than "
                             f"{new['steps']}")
        new.update(picked=old["picked"], evidence=old["evidence"])


def changes(before, args, new_words):
    """What the new words change, a line each."""
    lines = [f"--{name} {old} -> {getattr(args, name)}" for name, old in vars(before).items()
             if name not in ("run", "dry_run", "nodes", "node_rank") and old != getattr(args, name)]
    lines += [f"for grpo.py: {shlex.join(new_words)}"] if new_words else []
    return [f"changed from here on: {line} (finished stages keep what they had)" for line in lines]


# ---------------------------------------------------------------------------------------------------------------
# Running programs
# ---------------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """A signal or a failed program ended the schedule; the plan says where it goes on. args: (exit code, words)"""


def launch(args, script, options, number):
    """Start a program on this node: plain python for one process, torchrun for more."""
    command = [sys.executable, os.path.join(HERE, script), *options]
    if args.gpus > 1 or args.nodes > 1:
        # a rendezvous of its own for every program: a late node must not join the one before
        where = [*shlex.split(args.torchrun), "--rdzv_id", str(number)] if args.nodes > 1 else ["--standalone"]
        command[1:1] = ["-m", "torch.distributed.run", *where, "--nproc_per_node", str(args.gpus)]
    print("$ " + shlex.join(command), flush=True)
    # a session of its own: Ctrl-C in a terminal reaches it through this process alone, once. torchrun would give its
    # workers 30 seconds to save
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True,
                            env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600", **os.environ})


def wait(child, signals, look=lambda: None):
    """Wait for a program, look() at it meanwhile, pass the first signal on -> exit code. A second signal goes on
    as well: programs then leave at once."""
    told = False
    try:
        while child.poll() is None:
            if signals and not told:
                told = True
                child.send_signal(signal.SIGINT if signals[0] == signal.SIGINT else signal.SIGTERM)
            look()
            time.sleep(0.1)
    except KeyboardInterrupt:  # what common.catch_signals makes of the second one
        child.terminate()
        child.wait()
    return child.returncode


class Word:
    """RUN/word.json: what the node of rank 0 runs at this moment. The others wait for its word before each program: a
    shared disk may lag, and two nodes that look at it may see different things. The beat shows that it lives."""

    def __init__(self, args):
        self.path, self.nodes, self.last = os.path.join(args.run, "word.json"), args.nodes, 0.0

    def say(self, **word):
        self.last = time.time()
        if self.nodes > 1:
            common.write_atomic(self.path, json.dumps(word | {"beat": self.last}))

    def read(self):
        try:
            return common.read_json(self.path)
        except (OSError, ValueError):  # not there yet, or not whole
            return {}


def other_node(args, patience=600):
    """A node of rank above 0: start its share of each program that the node of rank 0 names -> exit code."""
    signals, word = common.catch_signals(), Word(args)
    beat, number, heard = word.read().get("beat"), None, time.time()  # of an earlier start, until it changes
    while not signals:
        said = word.read()
        if said.get("beat") not in (None, beat):
            beat, heard = said["beat"], time.time()
            if "code" in said:
                return said["code"]
            if said["number"] != number:
                number = said["number"]
                wait(launch(args, said["script"], said["options"], number), signals)
        elif time.time() - heard > patience:
            raise ValueError(f"no word of the node of rank 0 in {args.run} for {patience} s: does schedule.py run there, "
                             f"and is --run on a shared disk?")
        time.sleep(0.2)
    return 128 + signals[0]


class Schedule:
    """A plan and what is done to it, on the node of rank 0. args, rest: see `parse`; options: grpo.py's, a stage."""

    def __init__(self, args, rest, plan, options):
        self.args, self.rest, self.plan, self.options = args, rest, plan, options
        self.run, self.stages = args.run, plan["stages"]
        self.signals, self.word = common.catch_signals(), Word(args)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal; nohup ignores it
            signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))

    def save_plan(self):
        common.write_atomic(os.path.join(self.run, "plan.json"), json.dumps(self.plan, indent=1))

    def work(self):
        """Do what is left to do -> exit code, which the other nodes are told as well."""
        code = 2
        try:
            self.run_stages()
            code = 0
        except Stopped as e:
            code, words = e.args
            print(f"schedule.py: {words}", file=sys.stderr)
        finally:
            self.word.say(code=code)
        return code

    def run_stages(self):
        """Everything that is left to do, in order. Each line is safe to repeat."""
        self.save_plan()
        if not self.args.no_base_eval:
            self.evaluate("base", self.args.model)
        for k, stage in enumerate(self.stages):
            if stage["picked"] is None:
                self.train(k)
            self.clean_up(k)
            self.evaluate(stage["folder"], os.path.join(checkpoint(self.run, stage), "hf"))
            report(self)
        print(f"done: {os.path.join(self.run, 'report.md')}")

    def program(self, script, options, look=lambda: None):
        """One program on all nodes, to its end."""
        number = time.time_ns()

        def look_and_say():
            if time.time() - self.word.last > 1:
                self.word.say(number=number, script=script, options=options)
            look()

        code = None
        if not self.signals:
            code = wait(launch(self.args, script, options, number), self.signals, look_and_say)
        again = f"python schedule.py --run {shlex.quote(self.run)} goes on from here"
        if self.signals:
            raise Stopped(128 + self.signals[0], f"stopped by a signal, what is done is saved; {again}")
        if code:
            raise Stopped(1, f"{script} ended with exit code {code}, see above; once that is mended, {again}")

    def train(self, k):
        """One stage, to its last step or its turn; stores which checkpoint is handed on."""
        stage, args = self.stages[k], self.args
        folder = os.path.join(self.run, stage["folder"])
        window = watched(args, self.stages, k)
        seen = {"size": -1}

        def turn():
            return find_turn(folder, window) if window else None

        def look():
            path = os.path.join(folder, "metrics.jsonl")
            size = os.path.getsize(path) if window and os.path.exists(path) else -1
            if size != seen["size"]:
                seen["size"] = size
                if turn():
                    open(os.path.join(folder, "stop"), "w").close()  # grpo.py saves and leaves

        self.wait_for_orphans(folder)
        if not turn() and stage["steps"] not in saved_steps(self.run, stage):
            self.program("grpo.py", stage_options(args, self.rest, self.stages, k), look)
        for _ in range(60 * (args.nodes > 1)):  # a shared disk may lag
            if turn() or stage["steps"] in saved_steps(self.run, stage):
                break
            time.sleep(1)
        saved, evidence = saved_steps(self.run, stage), turn()
        if evidence:
            # only steps on the grid: those that a signal saved must not change the choice
            grid = [s for s in saved if s % self.options[k]["save_every"] == 0] or saved
            picked = max([s for s in grid if s < evidence["turn"]], default=min(grid, default=None))
            print(f"{stage['folder']} has turned: {describe_turn(evidence)}; checkpoint {picked} goes on", flush=True)
        else:
            picked = stage["steps"] if stage["steps"] in saved else None
        if picked is None:
            raise Stopped(1, f"{stage['folder']} ended at step {max(saved, default=0)} of {stage['steps']}: by its stop "
                          f"file, or, if ALARM lines above say so, without a checkpoint; python schedule.py --run "
                          f"{shlex.quote(self.run)} goes on from there")
        stage.update(picked=picked, evidence=evidence)
        self.save_plan()

    def wait_for_orphans(self, folder):
        """A grpo.py that a killed schedule.py left behind is asked to save and leave, and waited for."""
        path, told = os.path.join(folder, "lock"), False
        while os.path.exists(path) and not self.signals:
            try:
                return common.lock(path).release()
            except common.RankError as e:
                if not told:
                    print(f"{e}\nIt is asked to save and leave ({folder}/stop), and waited for", flush=True)
                    open(os.path.join(folder, "stop"), "w").close()
                told = True
                time.sleep(0.5)

    def clean_up(self, k):
        """Of a stage that kept all its checkpoints only the one that is handed on stays."""
        stage = self.stages[k]
        for step in saved_steps(self.run, stage) if watched(self.args, self.stages, k) else ():
            if step != stage["picked"]:
                shutil.rmtree(os.path.join(self.run, stage["folder"], "checkpoints", f"{step:06d}"))

    def evaluate(self, name, model):
        """evaluate.py on one model, unless it was done; a killed one goes on with the samples that are missing."""
        if not self.args.no_eval and not os.path.exists(os.path.join(self.run, "eval", name + ".json")):
            self.program("evaluate.py", evaluate_options(self.args, self.options[0], name, model))


def watched(args, stages, k):
    """Steps of the windows in which stage k is watched for its turn, 0 if it is not."""
    if args.switch == "steps" or k + 1 == len(stages):
        return 0
    return args.turn_window or min(50, max(10, stages[k]["steps"] // 20))


def stage_options(args, rest, stages, k):
    """Words for grpo.py; the model is the checkpoint that the stage before handed on."""
    stage, handed = stages[k], checkpoint(args.run, stages[k - 1]) if k else None
    # what stands in --stages by hand wins over options for all stages; what a preset put there does not
    by_preset = args.stages in [words[words.index("--stages") + 1] for words in PRESETS.values()]
    shared = stage["extra"] + rest if by_preset else rest + stage["extra"]
    return ["--model", os.path.join(handed, "hf") if handed else args.model,
            *(["--keep", str(stage.get("keep", 0))] if watched(args, stages, k) else []), *shared,
            "--max_len", str(stage["max_len"]), "--steps", str(stage["steps"]), "--group", str(stage["group"]),
            "--out", os.path.join(os.path.abspath(args.run), stage["folder"]), "--seed", str(args.seed + k), "--resume",
            *(["--optimizer_from", handed] if handed and args.optimizer == "carry" else [])]


def evaluate_options(args, grpo, name, model):
    """Words for evaluate.py: as in training where --evaluate says nothing else."""
    words = ["--model", model, "--name", name, "--out", os.path.join(os.path.abspath(args.run), "eval"), "--seed",
             str(args.seed), "--benchmarks", *args.benchmarks]
    for option in ("style", "engine", "dtype", "max_seqs", "examples", "reward", "instruction"):
        if grpo.get(option):
            words += [f"--{option}", str(grpo[option])]
    return words + ["--no_chat"] * bool(grpo["no_chat"]) + shlex.split(args.evaluate)


def check(p, args, rest, stages):
    """The options that grpo.py makes of the words for each stage; what cannot work is refused before any work."""
    import evaluate
    import grpo
    check_folder(args.model)
    card(args)
    options = [ask(p, grpo, stage_options(args, rest, stages, k)) for k in range(len(stages))]
    for k, (stage, a) in enumerate(zip(stages, options)):
        window = watched(args, stages, k)
        if window and a["save_every"] > window:
            raise ValueError(f"--switch auto compares windows of {window} steps and returns to a checkpoint before the "
                             f"turn: --save_every {a['save_every']} must be at most {window}, or --turn_window larger")
        if window and a["keep"]:
            raise ValueError(f"--switch auto may return to any checkpoint and keeps all: leave --keep {a['keep']} away")
        # --keep 0 keeps all weights, but few optimizer states
        stage["keep"] = stage["steps"] // a["save_every"] + 1 if args.optimizer == "carry" else 0
    if not args.no_eval:
        ask(p, evaluate, evaluate_options(args, options[0], "base", args.model))
    return options


# ---------------------------------------------------------------------------------------------------------------
# Ledger and report
# ---------------------------------------------------------------------------------------------------------------

PHASES = ("generate", "reward", "logprobs", "update", "sync", "idle")


def ledger(run, stages, processes):
    """Rows of numbers for each stage, each evaluation and the total: steps, tokens, seconds by phase, process-hours.

    A step that was done again after a crash counts once; starting, saving and what a crash cost are not in it."""
    rows = []
    for stage in stages:
        folder = os.path.join(run, stage["folder"])
        lines = read_metrics(folder)
        if not lines:
            continue
        past = sum(row["tokens"] for row in lines if stage["picked"] and row["step"] > stage["picked"])
        total = {key: sum(row.get(key) or 0 for row in lines) for key in
                 ("tokens", "tokens_trained", "seconds", *(f"seconds_{phase}" for phase in PHASES))}
        validation = sum(row.get("eval_seconds") or 0 for row in read_metrics(folder, validation=True))
        world = common.read_json(os.path.join(folder, "config.json"))["world"]
        hours = (total["seconds"] + validation) * world / 3600
        rows.append([f"{stage['folder']} ({stage['max_len']:,})", len(lines), total.pop("tokens"), past, *total.values(),
                     validation, hours])
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "eval", "*.json"))):
        result = common.read_json(path)
        rows.append([f"evaluate {result['name']}", 0, result["tokens_generated"], 0, 0, result["seconds"],
                     *[0] * len(PHASES), 0, result["seconds"] * processes / 3600])
    return rows + [["total", *(sum(column) for column in list(zip(*rows))[1:])]] if rows else []


def ledger_table(rows, price):
    """Markdown of `ledger`, with dollars and the published costs beside it."""
    head = ["", "steps", "tokens generated", "past the checkpoint", "tokens trained", "seconds", *PHASES, "validation",
            "GPU-hours", "dollars"]
    body = [[row[0], *(f"{x:,}" for x in row[1:5]), *(f"{x:,.1f}" for x in row[5:-1]), f"{row[-1]:,.2f}",
             f"{row[-1] * price:,.2f}" if price else "-"] for row in rows]
    note = (f"Dollars at {price:g} an hour" if price else "No price is set") + " (--gpu_price). Without GPUs, process-hours "
    return common.table(head, body) + f"\n{note}stand for GPU-hours. Seconds are those of steps, by phase as means over " \
        "ranks; a step repeated after a crash counts once, loading, saving and lost work do not.\n\nPublished costs, by " \
        "their authors' accounts:\n\n" + common.table(["who", "what", "GPU-hours", "dollars", "AIME 2024"], COSTS)


def draw(run):
    """Figures and the page of transcripts -> {what is missing: why}. A report without pictures is still a report."""
    missing = {}
    try:
        import figures
        _, missing = figures.draw(run)
        figures.transcripts(run)
    except Exception as e:  # whatever it is, it must not cost the run
        missing["figures"] = f"{type(e).__name__}: {e}"
    return missing


def scores(run, model):
    results = sorted(glob.glob(os.path.join(run, "eval", "*.json")))
    if not results:
        return "No evaluation was run (--no_eval).\n"
    command = [sys.executable, os.path.join(HERE, "evaluate.py"), "--table", *results]
    done = subprocess.run(command + ["--published"] * (model == MODEL), capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else f"evaluate.py --table failed: {done.stderr.strip()[-300:]}\n"


def report(schedule):
    """Write report.md anew: results, where stages ended, figures, ledger, and what is missing."""
    run, args, stages = schedule.run, schedule.args, schedule.stages
    missing = draw(run)
    price = card(args)[1]["price"] if args.gpu_price is None else args.gpu_price
    rows = ledger(run, stages, args.gpus * args.nodes)
    ends = [f"- {s['folder']}: {s['max_len']:,} tokens of context, {s['group']} samples a problem, up to {s['steps']:,} "
            f"steps" + (f"; checkpoint of step {s['picked']} handed on" if s["picked"] else "; not finished")
            + (f". Turned: {describe_turn(s['evidence'])}" if s["evidence"] else "") for s in stages]
    pictures = sorted(os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(run), "figures", "*.png")))
    page = os.path.exists(os.path.join(run, "transcripts.html"))
    text = [f"# {os.path.basename(os.path.abspath(run))}: training with a growing context\n",
            f"Each stage of {args.model.replace(HERE + os.sep, '')} starts from the weights of the one before, with a "
            f"{'carried' if args.optimizer == 'carry' else 'fresh'} optimizer. Options for grpo.py: "
            f"`{shlex.join(schedule.rest).replace(HERE + os.sep, '') or 'none'}`\n", *ends,
            "\n## Results\n\npass@1 in percent, with its standard error; the protocol stands below the table.\n",
            scores(run, args.model), "## Figures\n", *(f"![{name[:-4]}](figures/{name})\n" for name in pictures),
            *(["Transcripts: [transcripts.html](transcripts.html)\n"] if page else []),
            "## Ledger\n", ledger_table(rows, price) if rows else "Nothing was trained yet.\n",
            "## Not shown, and why\n", *([f"- {name}: {why}" for name, why in missing.items()] or ["Nothing is missing."])]
    common.write_atomic(os.path.join(run, "report.md"), "\n".join(text) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Prediction (--dry_run): P parameters, W ranks, T packed tokens, L layers
# ---------------------------------------------------------------------------------------------------------------

# memory in GiB as the driver reports it; bf16 peak TFLOP/s; assumed: generated tokens/s of a 1.8B model with a full
# batch, tokens/s of one sequence when the batch has run empty, dollars an hour (A100: 4,500 / 3,800, DeepScaleR's)
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
TILE = 150_000_000  # logits of a tile by default, see policy.py
SHAPE = dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
             num_key_value_heads=2, vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=False)


def found_card():
    """(name, GiB) of the first GPU here, None without one. Asked by another process: this one must not take up memory
    of the GPU."""
    if not torch.cuda.device_count():
        return None
    code = ("import torch; p = torch.cuda.get_device_properties(0); print(p.total_memory / 2**30, p.name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    memory, _, name = done.stdout.strip().partition(" ")
    return (name, float(memory)) if done.returncode == 0 else None


def card(args):
    """(name, numbers) of one GPU: the one named, else the one found. A card found is asked for its memory; an unknown one
    is assumed to be as fast as an A100."""
    found = None if args.gpu_type or args.gpu_memory_gib else found_card()
    unnamed = "A100-80" if args.dry_run else "cpu"
    name = args.gpu_type or (f"{args.gpu_memory_gib:g} GiB card" if args.gpu_memory_gib else found[0] if found else unnamed)
    memory = args.gpu_memory_gib or (found[1] if found else 0)
    known = [key for key in GPUS if key == name or (found and key.split("-")[0] in name.replace(" ", ""))]
    if not known and not memory:
        raise ValueError(f"--gpu_type {name} is not known (known: {', '.join(GPUS)}): say how much memory it has with "
                         f"--gpu_memory_gib")
    nearest = min(known or ["A100-80"], key=lambda key: abs(GPUS[key]["memory"] - memory))
    return name, GPUS[nearest] | {"memory": memory or GPUS[nearest]["memory"], "cpu": nearest == "cpu",
                                  "speed": "" if known else ", speed and price assumed as of an A100-80"}


def check_folder(model, reason=""):
    """Refuse a model that is neither a folder nor a hub name; `reason`: why it could not be read."""
    if reason and os.path.isdir(model):
        raise ValueError(f"--model {model} holds no model: {reason}")
    if not os.path.isdir(model) and (model.count("/") > 1 or model[:1] in ("/", ".", "~", "")):
        raise ValueError(f"--model {model}: there is no such folder")


def model_config(model):
    """Config of any causal LM; no weight is loaded. The default model's is known without a network, that of another hub
    name is looked for in the cache and then asked for once, with a short patience."""
    from transformers import AutoConfig
    if model == MODEL:
        return AutoConfig.for_model(**SHAPE)
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
    check_folder(model, reason)
    try:
        url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{model}/resolve/main/config.json"
        with urllib.request.urlopen(url, timeout=2) as f:
            return AutoConfig.for_model(**json.load(f))
    except (OSError, ValueError) as e:
        raise ValueError(f"--model {model} is not a folder here, and the hub gave no answer ({e})") from e


def model_shape(model):
    """Sizes of a model, from its config alone."""
    from transformers import AutoModelForCausalLM
    c = model_config(model).get_text_config()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(c)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kinds = getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers
    parameters, layer = (sum(p.numel() for p in x.parameters()) for x in (shell, shell.base_model.layers[0]))
    return dict(parameters=parameters, layer=layer, root=parameters - c.num_hidden_layers * layer,
                layers=c.num_hidden_layers, hidden=c.hidden_size, mlp=c.intermediate_size,
                q=c.num_attention_heads * head, kv=c.num_key_value_heads * head, vocab=c.vocab_size,
                tied=bool(c.tie_word_embeddings), sliding=kinds.count("sliding_attention"),
                window=getattr(c, "sliding_window", None) or 0, positions=getattr(c, "max_position_embeddings", None))


def kv_bytes(m, tokens, width):
    """Keys and values of one sequence; a sliding-window layer keeps its window at most."""
    seen = (m["layers"] - m["sliding"]) * tokens + m["sliding"] * min(tokens, m["window"] or tokens)
    return 2 * m["kv"] * width * seen


def layer_bytes(m, tokens, width):
    """What one decoder layer keeps for its backward: 53.8 K numbers a token for R1-Distill-Qwen-1.5B."""
    return tokens * width * (4 * m["mlp"] + 6 * m["hidden"] + 5 * m["q"] + 4 * m["kv"])


def update_bytes(m, tokens, width, recompute, chunk, sharded):
    """Peak of forward and backward of one micro-batch, beside weights, gradients and moments. It is reached in the
    backward of the head, or in that of the last layer."""
    stream = tokens * width * m["hidden"]
    kept = m["layers"] * (stream if recompute else layer_bytes(m, tokens, width))
    gathered = (2 * m["layer"] + m["root"]) * width if sharded else 0
    # tiles of logits (in bf16 a second one is made while the first is alive), the head's gradient in fp32 and again in
    # the compute type; final hidden states, those that are scored, and the gradients of both
    head = (1 if width == 4 else 2) * chunk * m["vocab"] * 4 + m["vocab"] * m["hidden"] * (4 + width) + 4 * stream
    # the layer computed again, gradients of three MLP-sized vectors, and the head's, which waits to be reduced
    layer = recompute * layer_bytes(m, tokens, width) + 3 * tokens * width * m["mlp"] + m["vocab"] * m["hidden"] * width
    return kept + gathered + max(head, layer)


def predict(m, a, gpu, world):
    """Memory in GiB of one GPU for a stage with grpo.py's options `a` -> dict."""
    cpu = gpu["cpu"]
    width = 4 if a["dtype"] == "float32" or (cpu and a["dtype"] == "auto") else 2
    longest = a["max_len"] + a["max_prompt_len"]
    tokens = a["token_budget"] or max(2048 if cpu else 32768, longest)
    recompute = (not cpu) if a["recompute"] < 0 else a["recompute"]
    mine = -(-a["prompts"] * a["group"] // world)
    weights = (m["parameters"] + m["tied"] * m["vocab"] * m["hidden"]) * width  # vLLM is given a tied head untied
    slots = cpu or a["engine"] == "torch"
    if slots:  # rollout.TorchEngine: a row for each running sample, as long as the longest; the policy's own weights
        sequences, extra, weights = min(mine, a["max_seqs"] or 64), 0, m["parameters"] * width
        pool = sequences * kv_bytes(m, longest, width)
    else:
        extra, pool = VLLM_EXTRA * GIB, a["gpu_memory"] * gpu["memory"] * GIB - weights - VLLM_EXTRA * GIB
        sequences = int(min(mine, a["max_seqs"] or 256, max(pool, 0) // kv_bytes(m, longest, width)))
    chunk = min(tokens, a["logit_chunk"] or max(1, TILE // m["vocab"]))
    parts = {"weights, gradients, Adam": 16 * m["parameters"] / world,
             "reference": m["parameters"] * width / world if a["kl_coef"] else 0,
             "update": update_bytes(m, tokens, width, recompute, chunk, world > 1 or width == 2),
             "engine's weights": weights, "KV cache": pool, "engine's rest": extra}
    parts = {name: size / GIB for name, size in parts.items()}
    states, reference, update, *engine = parts.values()
    fixed = states + reference + (1.0 if cpu else RESERVE)
    awake = sum(max(x, 0) for x in engine)
    training = fixed + update + (engine[0] if slots else 0 if a["sleep"] else awake)
    return dict(parts=parts, generating=fixed - states / 4 + awake,  # gradients are freed after a step
                training=training, memory=gpu["memory"] / (world if cpu else 1), sequences=sequences,
                tokens=tokens, longest=longest, fits_kv=slots or sequences >= 1, recompute=recompute)


def trouble(m, a, gpu, world):
    """Why a stage cannot run, in words; None if it can."""
    p = predict(m, a, gpu, world)
    if m["positions"] and a["max_len"] >= m["positions"]:
        return f"a context of {a['max_len']} leaves no room for a prompt in the model's {m['positions']} positions"
    if p["tokens"] < p["longest"]:
        return f"--token_budget {a['token_budget']} holds no sequence of {p['longest']} tokens"
    if not p["fits_kv"]:
        return (f"vLLM's share of {a['gpu_memory']:g} leaves a KV cache of {max(0, p['parts']['KV cache']):.1f} GiB: not "
                f"one sequence of {p['longest']} tokens")
    for phase in ("generating", "training"):
        if p[phase] > p["memory"]:
            place = "process" if gpu["cpu"] else "GPU"
            return f"{phase} needs {p[phase]:.1f} GiB on each {place}, which has {p['memory']:.1f}"
    return None


def remedies(m, a, gpu, world):
    """Options that make a stage fit, each alone, with the value nearest to the present one; else several together, else
    the size of a model that fits."""
    p = predict(m, a, gpu, world)

    def down(x, low):
        return [v for v in (x * f // 16 for f in range(15, 0, -1)) if v >= low]

    shares = sorted((x / 20 for x in range(2, 19)), key=lambda x: abs(x - a["gpu_memory"]))
    choices = {"token_budget": [*down(p["tokens"], p["longest"] + 1), p["longest"]], "recompute": [1], "sleep": [1],
               "gpu_memory": shares, "max_seqs": down(p["sequences"], 1), "logit_chunk": [512, 256, 128],
               "max_len": down(a["max_len"], 1)}

    def first(name, base):
        value = next((v for v in choices[name] if not trouble(m, a | base | {name: v}, gpu, world)), None)
        words = "the context in --stages (--max_len) to" if name == "max_len" else f"--{name}"
        return None if value is None else f"{words} {value}"

    alone = [x for x in (first(name, {}) for name in choices) if x]
    small = {"token_budget": p["longest"], "recompute": 1, "sleep": 1, "logit_chunk": 256}
    together = first("gpu_memory", small) or first("max_seqs", small)
    if alone or together:
        return " or ".join(alone) or " ".join(f"--{name} {value}" for name, value in small.items()) + f" {together}"
    sizes = [shrink(m, f / 100) for f in range(99, 4, -1)]
    size = next((s["parameters"] for s in sizes if not trouble(s, a, gpu, world)), None)
    found = [f"--model to one of at most {size / 1e9:.1f} B parameters"] if size else []
    more = [world * 2**i for i in range(1, 9) if not gpu["cpu"] and world > 1]
    found += [f"--gpus {w} (over all nodes)" for w in more if not trouble(m, a, gpu, w)][:1]
    return " or ".join(found) or "to a card with more memory, or a shorter context in --stages"


def shrink(m, share):
    """A model of the same kind with `share` of the widths."""
    layer, root = int(m["layer"] * share ** 2), int(m["root"] * share)
    narrow = {name: int(m[name] * share) for name in ("hidden", "mlp", "q", "kv")}
    return m | narrow | dict(layer=layer, root=root, parameters=m["layers"] * layer + root)


def step_seconds(m, a, gpu, world):
    """Assumed seconds of one step -> dict. Generation is bound by throughput or by its longest sequence; training by two
    FLOP for each weight that a token meets, and causal attention."""
    n, scale, length = a["prompts"] * a["group"], 1.777e9 / m["parameters"], a["mean_len"] + PROMPT
    stream = min(gpu["stream"] * scale, 500.0)  # a small model is bound by launching kernels
    rate = min(gpu["tokens"] * scale, stream * max(1, min(n / world, a["max_seqs"] or 256)))
    generate = max(n * a["mean_len"] / rate / world, a["max_len"] / stream)
    weights = m["parameters"] - (0 if m["tied"] else m["vocab"] * m["hidden"])
    flops = n * (2 * weights * length + 2 * m["layers"] * m["q"] * length ** 2)
    forward = flops / (world * gpu["tflops"] * 1e12 * MFU)
    # old log-probs of all mini-batches but the first, and the reference's
    passes = (a["updates"] - 1) / a["updates"] + bool(a["kl_coef"])
    update = forward * (4 if predict(m, a, gpu, world)["recompute"] else 3)
    return dict(generate=generate, logprobs=forward * passes, update=update, rest=3.0)


def dry_run(args, stages, options):
    """Print what every stage would need -> exit code: 2 if one cannot run."""
    m, (name, gpu), world = model_shape(args.model), card(args), args.gpus * args.nodes
    price = gpu["price"] if args.gpu_price is None else args.gpu_price
    print(f"{args.model}: {m['parameters']:,} parameters\n{world} x {name}, {gpu['memory']:.1f} GiB "
          f"{'shared by all processes' if gpu['cpu'] else 'each'}{gpu['speed']}\nassumed: {gpu['tokens']:,} generated "
          f"tokens/s for each GPU with a full batch and {gpu['stream']} for one sequence (1.8B model; inversely with "
          f"size), {gpu['tflops']} TFLOP/s at {MFU:.0%}, prompts of {PROMPT} tokens, ${price:g} an hour. Estimates, not "
          f"measurements")
    body, refused, hours = [], [], 0.0
    for stage, a in zip(stages, options):
        a = a | {"mean_len": args.mean_len or min(a["max_len"] // 2, 5000)}
        p, t, why = predict(m, a, gpu, world), step_seconds(m, a, gpu, world), trouble(m, a, gpu, world)
        stage_hours = sum(t.values()) * a["steps"] / 3600
        hours += stage_hours
        body.append([stage["folder"], f"{a['max_len']:,}", f"{a['steps']:,}", f"{p['tokens']:,}",
                     *(f"{max(v, 0):.1f}" for v in p["parts"].values()),
                     *(f"{p[k]:.1f}" for k in ("generating", "training", "memory")), p["sequences"],
                     f"{a['mean_len']:,}", " + ".join(f"{v:.0f}" for v in t.values()), f"{stage_hours:,.1f}",
                     f"{stage_hours * world:,.0f}", f"{stage_hours * world * price:,.0f}"])
        if why:
            refused.append(f"{stage['folder']} cannot run: {why}. Change {remedies(m, a, gpu, world)}")
    head = ["", "context", "steps", "token budget", *(f"GiB: {part}" for part in p["parts"]), "GiB: peak generating",
            "GiB: peak training", "GiB there", "sequences of full length at once", "mean length",
            "s a step: " + " + ".join(t), "hours", "GPU-hours", "dollars"]
    for cells in zip(head, *body):  # one line a quantity reads better than 20 columns
        print(f"  {cells[0]:48s}" + "".join(f"{str(c):>20s}" for c in cells[1:]))
    disk = 16 * m["parameters"] / GIB
    print(f"total {hours:,.1f} hours, {hours * world:,.0f} GPU-hours, ${hours * world * price:,.0f} without evaluations\n"
          f"disk: {disk:.1f} GiB a checkpoint, {(max(options[0]['keep'], 2) + 1) * disk:.1f} GiB at least"
          + (f", and {disk / 4:.1f} GiB for each that --switch auto may return to" if args.switch == "auto" else ""))
    print("\n".join(refused) if refused else "it fits", file=sys.stderr if refused else sys.stdout)
    return 2 if refused else 0


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------

NO_GPU = """no GPU was found here. This command trains a 1.5B model on long contexts: 3,800 A100-hours as published.
  python schedule.py --preset toy --run runs/toy     the same story with a small model, on this machine, in minutes
  python schedule.py --dry_run --gpus 8              what the full run needs, predicted
  python schedule.py --model FOLDER --stages ...     your own model on this CPU"""


def start(p, words):
    """Check everything, then work -> exit code."""
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--run")
    args, rest = parse(p, words)
    run, words = args.run, where.parse_known_args(words)[1]  # the folder is no property of the run
    if args.node_rank and not args.dry_run:
        return other_node(args)
    old, stages, told = read_plan(run), parse_stages(args.stages), []
    if old:
        new = [] if words == old["words"][len(old["words"]) - len(words):] else words
        before, _ = parse(p, old["words"])
        args, rest = parse(p, old["words"] + new)
        args.run, stages, words = run, parse_stages(args.stages), old["words"] + new
        carry_on(run, old, before, args, stages)
        told = changes(before, args, p.parse_known_args(new)[1])
    options = check(p, args, rest, stages)
    if args.dry_run:
        return dry_run(args, stages, options)
    if args.model == MODEL and not torch.cuda.device_count():
        raise ValueError(NO_GPU)
    with common.lock(os.path.join(run, "schedule.lock")):
        if read_plan(run) != old:
            raise ValueError(f"{run} was begun or changed by another schedule.py at this very moment: try again")
        print("".join(line + "\n" for line in told), end="")
        return Schedule(args, rest, {"words": words, "model": args.model, "stages": stages}, options).work()


def main(argv=None):
    try:
        return start(parser(), absolute(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, common.RankError) as e:
        print(f"schedule.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
