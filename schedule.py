"""schedule.py - DeepScaleR's heart: the same training three times, each time with a longer context.

    python schedule.py --run runs/deepscaler --gpus 8           # 8K -> 16K -> 24K as published
    python schedule.py --run runs/deepscaler                    # go on after a crash, a kill, a reboot
    python schedule.py --preset toy                             # the whole story on a laptop
    python schedule.py --preset justrl --gpus 8                 # the other school: one long stage
    python schedule.py --dry_run --gpus 8 --gpu_type H100-80    # memory, hours, dollars, before a GPU is used
    python schedule.py --switch auto --gpus 8 --run RUN         # a stage ends where its response length turns
    python schedule.py --stages 8192:500:8,16384:200:16:lr=5e-7 --run RUN --lr 2e-6    # any other schedule
    python schedule.py --gpus 8 --run SHARED_DISK --torchrun "--nnodes 4 --node_rank R --rdzv_backend c10d
                       --rdzv_endpoint HOST:29500"              # on each of four nodes, R from 0 to 3

grpo.py and evaluate.py run as programs, one after another; options unknown here are handed to grpo.py.
RUN/plan.json holds the words of the command line and what is done; to go on means old words, then new words.
Only weights pass from stage to stage: the optimizer is fresh, the KL reference is the stage's start, the data
order is new. Left out on purpose: job queues, retries (a crash wants a look before it is repeated).
"""
import argparse
import contextlib
import difflib
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import torch

import common

HERE = os.path.dirname(os.path.abspath(__file__))
TOY = os.path.join(HERE, "toy")
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
LATER = ":save_every=10:eval_every=10:eval_n=16"
PRESETS = {name: shlex.split(words) for name, words in {  # words that stand before those of the command line
    "deepscaler": f"""--run runs/deepscaler --model {MODEL}
        --stages 8192:1040:8:save_every=20:eval_every=20:eval_n=8,16384:480:16{LATER},24576:200:16{LATER}""",
    "justrl": f"--run runs/justrl --model {MODEL} --stages 15360:4380:8 --recipe justrl",
    "toy": f"""--run runs/toy --model '{TOY}/model' --stages 40:70:8,80:50:8,120:30:8 --switch auto
        --turn_window 8 --benchmarks '{TOY}/heldout.jsonl' --data '{TOY}/train.jsonl.gz'
        --evaluate '-n 16 --max_tokens 192 --temperature 1 --top_p 1' --eval_data '{TOY}/heldout.jsonl'
        --eval_every 10 --eval_n 2 --eval_max_len 192 --eval_temperature 1 --save_every 5 --recipe improved
        --prompts 128 --updates 1 --lr 2e-4 --engine torch --max_seqs 256 --token_budget 8192
        --max_prompt_len 128"""}.items()}
COSTS = [  # what others paid for the same model, by their own accounts
    ("DeepScaleR", "8K, 16K, 24K, about 1,750 steps, A100-80", "3,800", "4,500", "43.1"),
    ("NeMo-RL", "8K, 240 steps at about 252 s on 8 H100", "134 (computed)", "", "28.3"),
    ("AReaL v0.1", "three stages, 8 H800", "4,160", "", "40.2"),
    ("Archer", "one 32K stage, 520 steps, H800", "1,900", "", "48.7"),
    ("JustRL", "one 16K stage, 4,380 steps, A800", "11,500", "", "52.6"),
    ("ProRL v1", "2,450 steps, H100", "16,000", "", "48.0"),
    ("Open-RS", "7,000 problems, 4 A40 for 24 h", "96", "42", "29.7 (re-measured)"),
]


# ----- the turning point ------------------------------------------------------------------------------------

def turning_point(steps, length, truncated, reward, window, fall=0.05, rise=0.05, z=4.0):
    """Where a stage should have ended (responses grow again, more are cut off, reward is flat), or None.

    steps, length, truncated, reward: [n], a number for each step. The newest window of steps is compared with
    the trough, the last window whose mean length is within one standard error of the lowest. Length fell to
    it (by `fall` of its size) and has risen since (by `rise` and `z` standard errors), truncation has risen
    (`z`), reward has not (one error, or 40 % of its former pace); all that for half a window of steps.
    A function of the past alone: asked again, at any time, it says the same.
    """
    w, x = window, np.array([length, truncated, reward], dtype=float)
    if x.shape[1] < 3 * w:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(x, w, axis=1)  # [3, n - w + 1, w]
    mean = windows.mean(2)
    # noise: what a straight line through each window leaves over. Its variance, and the likeness phi of
    # neighbouring steps (underestimated in short windows), are those of all windows so far
    t = np.arange(w) - (w - 1) / 2
    noise = windows - mean[..., None] - (windows @ t / (t @ t))[..., None] * t
    square = (noise ** 2).sum(2).cumsum(1) + 1e-12
    phi = ((noise[..., 1:] * noise[..., :-1]).sum(2).cumsum(1) / square + 4 / w).clip(0, 0.9)
    variance = square / np.arange(1, mean.shape[1] + 1) / (w - 2)
    se = np.sqrt(2 * variance / w * (1 + phi) / (1 - phi))  # of two AR(1) windows' difference
    held = 0
    for now in range(2 * w, mean.shape[1]):
        past = mean[0, :now - w + 1]
        trough = int(np.flatnonzero(past <= past.min() + se[0, now])[-1])
        before, after, top = mean[:, trough].copy(), mean[:, now], past[:trough + 1].max()
        before[2] = x[2, max(0, trough - w):trough + 2 * w].mean()  # a longer stretch has less noise
        errors = (after - before) / se[:, now] / np.sqrt([1, 1, 2 / 3])
        pace = (mean[2, trough] - mean[2, 0]) / max(1, trough)
        flat = errors[2] < 1 or after[2] - before[2] < 0.4 * pace * (now - trough)
        fell_and_rose = before[0] <= (1 - fall) * top and after[0] >= (1 + rise) * before[0]
        held = held + 1 if fell_and_rose and min(errors[:2]) > z and flat else 0
        if held >= w // 2:
            first, last = ([int(steps[i]), int(steps[i + w - 1])] for i in (trough, now))
            series = zip(("length", "truncated", "reward"), np.stack([before, after, errors], 1).tolist())
            return {"turn": first[0], "seen_at": last[1], "before": first, "after": last, "top": float(top),
                    **dict(series)}
    return None


def describe_turn(e):
    """The evidence in plain words."""
    (short, long, z), cut, reward = e["length"], e["truncated"], e["reward"]
    return (f"by step {e['turn']} responses had become shorter, from {e['top']:.1f} to {short:.1f} tokens. "
            f"Since then (steps {e['after'][0]}-{e['after'][1]} against {e['before'][0]}-{e['before'][1]}) "
            f"they grow again, to {long:.1f} ({z:+.1f} standard errors), more are cut off at the limit, "
            f"{cut[0]:.1%} -> {cut[1]:.1%} ({cut[2]:+.1f}), and it hardly pays, reward {reward[0]:.3f} -> "
            f"{reward[1]:.3f} ({reward[2]:+.1f}): the model needs more room")


def read_metrics(folder, validation=False):
    """Lines of metrics.jsonl about a training step, each step once; `validation`: the others as well."""
    path = os.path.join(folder, "metrics.jsonl")
    lines = common.read_lines(path, on_bad=lambda text: None) if os.path.exists(path) else ()
    return list({row["step"]: row for row in lines if validation or "reward" in row}.values())


# ----- options ----------------------------------------------------------------------------------------------

PER_STAGE = {"--max_len": "--stages", "--steps": "--stages", "--group": "--stages", "--out": "--run",
             "--resume": "--run (it is always on)", "--optimizer_from": "--optimizer carry"}
GONE = {f"--{name}": successor for names, successor in [
    ("ablation token_limit", "python bench/staging.py compares staged with direct training at equal tokens"),
    ("reference", "the reference of the KL term is a stage's own start"),
    ("nproc_per_node ranks", "--gpus"),
    ("nnodes node_rank rdzv_backend rdzv_endpoint master_addr master_port max_restarts",
     'options of torchrun stand in one quoted --torchrun "--nnodes 2 ..."'),
    ("bench_n bench_max_tokens bench_temperature bench_top_p",
     'options of evaluate.py stand in one quoted --evaluate "-n 4 ..."'),
    ("turn_z turn_flat turn_fall turn_rise", "the bounds are the same everywhere")] for name in names.split()}


def parser():
    p = common.Parser(gone=GONE, description="Stages of grpo.py with a growing context. Options that are not "
                      "listed here go to grpo.py.")
    add = p.add_argument_group("what is trained").add_argument
    add("--run", help="folder of the whole run; one that exists is continued (default: runs/PRESET)")
    add("--preset", choices=list(PRESETS), default="deepscaler", help="toy: on a laptop")
    add("--stages", help="CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...],... with samples for each problem and "
        "options of grpo.py for one stage (default: the preset's)")
    add("--model", help="start weights, folder or hub name (default: the preset's)")
    add("--optimizer", choices=["fresh", "carry"], default="fresh", help="Adam's state in the next stage")
    add("--seed", type=int, default=0, help="stage k trains with seed + k - 1: a new data order")
    add = p.add_argument_group("when a stage ends").add_argument
    add("--switch", choices=["steps", "auto"], default="steps", help="auto: at the turning point of the "
        "response length, --stages' steps at most; not in the last stage, which nothing follows")
    add("--turn_window", type=int, default=0, help="steps of a window; 0: a twentieth of the stage, 10 to 50")
    add = p.add_argument_group("machines").add_argument
    add("--gpus", type=int, default=0, help="processes on each node; 0: the GPUs found, else 1 (toy: 2)")
    add("--torchrun", default="", help="options of torchrun on this node, quoted, for nodes that share a "
        'disk: "--nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint HOST:PORT"')
    add = p.add_argument_group("evaluation after each stage").add_argument
    add("--benchmarks", nargs="+", default=["aime24", "math500", "amc23", "minerva", "olympiad"],
        help="names or files")
    add("--evaluate", default="", help='more options of evaluate.py, quoted: "-n 4 --max_tokens 8192"')
    add("--no_eval", action="store_true", help="no evaluate.py at all")
    add("--no_base_eval", action="store_true", help="do not evaluate the start model")
    add = p.add_argument_group("prediction and cost").add_argument
    add("--dry_run", action="store_true", help="predict memory, time, dollars, check that it fits, and leave")
    add("--gpu_type", help=f"{', '.join(GPUS)} (default: what is found here, else A100-80)")
    add("--gpu_memory_gib", type=float, default=0.0, help="memory of a GPU, to describe any other card")
    add("--gpu_price", type=float, help="dollars an hour (default: an assumption for --gpu_type)")
    add("--mean_len", type=int, default=0, help="of a response; 0: half the context, at most 5,000 tokens")
    return p


def parse(p, words):
    """-> (this program's options, words for grpo.py). Of two equal options the later one counts."""
    preset = p.parse_known_args(words)[0].preset
    args, rest = p.parse_known_args(PRESETS[preset] + words)
    own = [name for action in p._actions for name in action.option_strings]
    for name in (word.split("=")[0] for word in rest if word.startswith("--")):
        if name in GONE or difflib.get_close_matches(name, own, 1, 0.87):
            p.refuse([name])  # misspelt; what resembles none of these options goes to grpo.py
        if name in PER_STAGE:
            p.error(f"{name} is set for each stage: use {PER_STAGE[name]}")
    window = args.turn_window
    if min(args.gpus, args.gpu_memory_gib, args.mean_len, window) < 0 or window in (1, 2, 3):
        p.error("--gpus, --gpu_memory_gib and --mean_len must not be negative, --turn_window 0 or at least 4")
    nodes = re.search(r"--nnodes[= ](?:\d+:)?(\d+)", args.torchrun)
    rank = re.search(r"--node[_-]rank[= ](\d+)", args.torchrun)
    args.nodes, args.node_rank = int(nodes[1]) if nodes else 1, int(rank[1]) if rank else 0
    if args.nodes > 1 and not rank:
        p.error("several nodes need --node_rank in --torchrun: 0 on the one that keeps the plan, 1, 2, ...")
    found = torch.cuda.device_count()
    args.gpus = args.gpus or (min(2, found or 2) if args.preset == "toy" else max(1, found))
    return args, rest


def parse_stages(text):
    """
    >>> parse_stages("8192:1040:8,16384:480:16:lr=5e-7")[1]["extra"]
    ['--lr', '5e-7']
    """
    stages = []
    for number, entry in enumerate(text.split(","), 1):
        shape, *extra = re.split(r":(?=[a-z_])", entry.strip())
        numbers = re.fullmatch(r"(\d+):(\d+):(\d+)", shape)
        if not numbers or not all("=" in option for option in extra):
            raise ValueError(f"--stages: {entry!r} is not CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...], for "
                             f"example 8192:1040:8")
        max_len, steps, group = map(int, numbers.groups())
        if max_len < 1 or steps < 1 or group < 2:
            raise ValueError(f"--stages: {entry!r} needs a context, steps and at least 2 samples a problem")
        words = [word for option in extra for word in ("--" + option).split("=", 1)]
        stages.append({"folder": f"stage{number}", "max_len": max_len, "steps": steps, "group": group,
                       "extra": words, "picked": None, "evidence": None})
    return stages


def watched(args, stages, k):
    """Steps of the windows in which stage k is watched for its turn; 0 if it is not."""
    if args.switch == "steps" or k + 1 == len(stages):
        return 0
    return args.turn_window or min(50, max(10, stages[k]["steps"] // 20))


def stage_words(args, rest, stages, k):
    """Words for grpo.py; the model is the checkpoint that the stage before handed on."""
    stage, handed = stages[k], checkpoint(args.run, stages[k - 1]) if k else None
    # what stands in --stages by hand wins over options for all stages; what a preset put there does not
    by_hand = not any(args.stages in words for words in PRESETS.values())
    return ["--model", os.path.join(handed, "hf") if handed else args.model,
            *(["--keep", str(stage.get("keep", 0))] if watched(args, stages, k) else []),
            *["--recompute", "1"] * args.dry_run,  # as on a GPU, wherever this runs
            *(rest + stage["extra"] if by_hand else stage["extra"] + rest),
            "--max_len", str(stage["max_len"]), "--steps", str(stage["steps"]), "--resume",
            "--group", str(stage["group"]), "--seed", str(args.seed + k),
            "--out", os.path.join(os.path.abspath(args.run), stage["folder"]),
            *(["--optimizer_from", handed] if handed and args.optimizer == "carry" else [])]


def evaluate_words(args, grpo, name, model):
    """Words for evaluate.py: as in training, where --evaluate says nothing else."""
    words = ["--model", model, "--name", name, "--out", os.path.join(os.path.abspath(args.run), "eval"),
             "--seed", str(args.seed), "--benchmarks", *args.benchmarks]
    for option in ("style", "engine", "dtype", "max_seqs", "examples", "reward", "instruction"):
        words += [f"--{option}", str(grpo[option])] if grpo.get(option) else []
    return words + ["--no_chat"] * bool(grpo["no_chat"]) + shlex.split(args.evaluate)


def check(args, rest, stages):
    """grpo.py's own options for each stage. What cannot work is refused here, before any work."""
    import evaluate
    import grpo
    if not os.path.isdir(args.model) and (args.model.count("/") > 1 or args.model[:1] in ("/", ".", "~")):
        raise ValueError(f"--model {args.model}: there is no such folder")
    card(args)
    options = [vars(grpo.parse_args(stage_words(args, rest, stages, k))) for k in range(len(stages))]
    for k, (stage, a) in enumerate(zip(stages, options)):
        window, every = watched(args, stages, k), a["save_every"]
        if window and every > window:
            raise ValueError(f"--switch auto compares windows of {window} steps and returns to a checkpoint: "
                             f"--save_every {every} must be at most {window}, or --turn_window larger")
        if window and a["keep"]:
            raise ValueError(f"--switch auto may return to any checkpoint: leave --keep {a['keep']} away")
        # --keep 0 keeps all weights, but the optimizer's state of few
        stage["keep"] = stage["steps"] // every + 1 if args.optimizer == "carry" else 0
    if not args.no_eval:
        evaluate.parse_args(evaluate_words(args, options[0], "base", args.model))
    return options


# ----- the plan ---------------------------------------------------------------------------------------------

def read_plan(run):
    path = os.path.join(run, "plan.json")
    plan = common.read_json(path) if os.path.exists(path) else None
    if plan is not None and not (isinstance(plan, dict) and plan.get("stages") and "words" in plan):
        raise ValueError(f"{path} is of another version of this program and cannot be continued. Its weights "
                         f"can: --model {run}/stageN/checkpoints/STEP/hf, the --stages left, another --run")
    return plan


def saved_steps(run, stage):
    """Steps of a stage's checkpoints, in order; a name without suffix is complete."""
    folder = os.path.join(run, stage["folder"], "checkpoints")
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []


def checkpoint(run, stage):
    """The checkpoint that a stage hands on."""
    step = stage["picked"] or stage["steps"]
    return os.path.join(os.path.abspath(run), stage["folder"], "checkpoints", f"{step:06d}")


def carry_on(run, plan, before, args, stages):
    """Give the stages what was done of them. Words that would alter finished work are refused."""
    results = glob.glob(os.path.join(glob.escape(run), "eval", "*.json"))
    begun = results or os.path.isdir(os.path.join(run, "stage1"))
    fixed = ["model", "preset", "seed", "optimizer"] if begun else []
    for name in fixed + (["benchmarks", "evaluate"] if results else []):
        was, now = getattr(before, name), getattr(args, name)
        if was != now:
            raise ValueError(f"{run} was begun with --{name} {was}, not {now}: leave it away to go on, or "
                             f"start another --run")
    for number, was in enumerate(plan["stages"]):
        if not os.path.isdir(os.path.join(run, was["folder"])):
            break
        now, done = stages[number] if number < len(stages) else {}, max(saved_steps(run, was), default=0)
        same = ["max_len", "group"] + ["steps", "extra"] * (was["picked"] is not None)
        if any(now.get(name) != was[name] for name in same):
            shape = ":".join(str(was[name]) for name in ("max_len", "steps", "group"))
            raise ValueError(f"--stages: {was['folder']} of {run} was begun with {shape} and cannot change; "
                             f"later stages can, and the steps of one that is not finished")
        if now["steps"] < done:
            raise ValueError(f"--stages: {was['folder']} of {run} has done {done} steps, not {now['steps']}")
        now.update(picked=was["picked"], evidence=was["evidence"])


def changes(before, args, rest):
    """What new words change, in a line; `rest`: those of them that go to grpo.py."""
    found = [f"--{name} {was} -> {getattr(args, name)}" for name, was in vars(before).items()
             if name not in ("run", "dry_run", "nodes", "node_rank") and was != getattr(args, name)]
    found += [f"for grpo.py {shlex.join(rest)}"] if rest else []
    return f"changed from here on (finished stages keep what they had): {', '.join(found)}\n" if found else ""


# ----- running programs -------------------------------------------------------------------------------------

class Stopped(Exception):
    """A signal or a failed program ended the schedule; the plan says where it goes on. args: (code, words)"""


def launch(args, script, options, number):
    """Start a program on this node: plain python for one process, torchrun for more."""
    command = [sys.executable, os.path.join(HERE, script), *options]
    if args.gpus > 1 or args.torchrun:
        where = shlex.split(args.torchrun) or ["--standalone"]
        # a rendezvous of its own for every program: a late node must not join the one before
        where += ["--rdzv_id", str(number)] if args.nodes > 1 else []
        command[1:1] = ["-m", "torch.distributed.run", *where, "--nproc_per_node", str(args.gpus)]
    print("$ " + shlex.join(command), flush=True)
    # A session of its own: Ctrl-C in a terminal comes to this process alone, which passes it on. By itself
    # torchrun gives its workers 30 seconds, less than a large checkpoint takes.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True,
                            env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600", **os.environ})


def wait(child, signals, look=lambda: None):
    """Wait for a program -> exit code. look() once a second; a first and a second signal are passed on."""
    told, turn = False, 0
    try:
        while child.poll() is None:
            if signals and not told:
                told = True
                child.send_signal(signals[0])
            if turn % 10 == 0:
                look()
            turn += 1
            time.sleep(0.1)
    except KeyboardInterrupt:  # what common.catch_signals makes of the second one
        child.terminate()
        child.wait()
    return child.returncode


def say(args, **word):
    """Tell the other nodes what the node of rank 0 does: they wait for its word before each program, since a
    shared disk may lag and two nodes may see different things on it. The beat shows that it lives."""
    if args.nodes > 1:
        common.write_atomic(os.path.join(args.run, "word.json"), json.dumps(word | {"beat": time.time()}))


def other_node(args, patience=600):
    """A node of rank above 0: start its share of each program that node 0 names -> exit code."""
    signals, path, last = common.catch_signals(), os.path.join(args.run, "word.json"), time.time()
    number, beat = None, None
    if os.path.exists(path):  # of an earlier start, until its beat changes
        beat = common.read_json(path)["beat"]
    while not signals:
        word = common.read_json(path) if os.path.exists(path) else {"beat": beat}
        if word["beat"] != beat:
            beat, last = word["beat"], time.time()
            if "code" in word:
                return word["code"]
            if word["number"] != number:
                number = word["number"]
                wait(launch(args, word["script"], word["options"], number), signals)
        elif time.time() - last > patience:
            raise ValueError(f"node 0 says nothing in {args.run}: does it run, and is the disk shared?")
        time.sleep(0.2)
    return 128 + signals[0]


class Schedule:
    """A plan, and what node 0 does with it. options: grpo.py's for each stage, see `check`."""

    def __init__(self, args, rest, plan, options):
        self.args, self.rest, self.plan, self.options = args, rest, plan, options
        self.run, self.stages, self.signals = args.run, plan["stages"], common.catch_signals()
        self.looked, self.again = 0, f"python schedule.py --run {shlex.quote(args.run)} goes on from here"

    def work(self):
        """Do what is left to do -> exit code, which the other nodes are told as well."""
        code = 2
        try:
            code = self.run_stages()
        except Stopped as e:
            code, words = e.args
            print(f"schedule.py: {words}", file=sys.stderr)
        finally:
            say(self.args, code=code)
        return code

    def run_stages(self):
        """Everything that is left to do, in order. Each line is safe to repeat."""
        self.save_plan()
        if not self.args.no_base_eval:
            self.evaluate("base", self.args.model)
        for k, stage in enumerate(self.stages):
            if stage["picked"] is None:
                self.train(k)
            self.remove_checkpoints(k)
            self.evaluate(stage["folder"], os.path.join(checkpoint(self.run, stage), "hf"))
            report(self)
        print(f"done: {os.path.join(self.run, 'report.md')}")
        return 0

    def save_plan(self):
        common.write_atomic(os.path.join(self.run, "plan.json"), json.dumps(self.plan, indent=1))

    def program(self, script, options, look=lambda: None):
        """One program on all nodes, to its end."""
        number, code = time.time_ns(), 0

        def say_and_look():
            say(self.args, number=number, script=script, options=options)
            look()

        if not self.signals:
            code = wait(launch(self.args, script, options, number), self.signals, say_and_look)
        if self.signals:
            raise Stopped(128 + self.signals[0], f"stopped by a signal, what is done is saved; {self.again}")
        if code:
            raise Stopped(1, f"{script} ended with exit code {code}, see above; once mended, {self.again}")

    def evaluate(self, name, model):
        """evaluate.py on one model, unless it was done; a killed one goes on with the samples it lacks."""
        if not self.args.no_eval and not os.path.exists(os.path.join(self.run, "eval", name + ".json")):
            self.program("evaluate.py", evaluate_words(self.args, self.options[0], name, model))

    def train(self, k):
        """One stage, to its last step or its turn; the plan then names the checkpoint that is handed on."""
        stage = self.stages[k]
        self.wait_for_orphans(os.path.join(self.run, stage["folder"]))
        if not self.outcome(k):
            self.program("grpo.py", stage_words(self.args, self.rest, self.stages, k), lambda: self.look(k))
        patience = time.time() + 60 * (self.args.nodes > 1)  # a shared disk may lag
        while not self.outcome(k) and time.time() < patience:
            time.sleep(1)
        if not self.outcome(k):
            done = max(saved_steps(self.run, stage), default=0)
            raise Stopped(1, f"{stage['folder']} ended at step {done} of {stage['steps']}: by its stop file, "
                          f"or ALARM lines above say why; {self.again}")
        stage["picked"], stage["evidence"] = self.outcome(k)
        self.save_plan()
        if stage["evidence"]:
            words = describe_turn(stage["evidence"])
            print(f"{stage['folder']}: {words}. Checkpoint {stage['picked']} goes on", flush=True)

    def outcome(self, k):
        """(step of the checkpoint to hand on, evidence of the turn) of a stage that may end, else None."""
        stage, window = self.stages[k], watched(self.args, self.stages, k)
        saved = saved_steps(self.run, stage)
        rows = read_metrics(os.path.join(self.run, stage["folder"])) if window else []
        series = [[row[key] for row in rows] for key in ("step", "length_mean", "truncated", "reward")]
        evidence = turning_point(*series, window) if rows else None
        # only steps on the grid: what a signal or a stop file saved must not change the choice
        grid = [step for step in saved if step % self.options[k]["save_every"] == 0]
        if evidence and grid:
            return max([step for step in grid if step < evidence["turn"]], default=grid[0]), evidence
        return (stage["steps"], None) if stage["steps"] in saved else None

    def look(self, k):
        """At a stage that trains: once it has turned, grpo.py is asked to save and leave."""
        path = os.path.join(self.run, self.stages[k]["folder"], "metrics.jsonl")
        size = os.path.getsize(path) if watched(self.args, self.stages, k) and os.path.exists(path) else 0
        if size != self.looked and (self.outcome(k) or [0, 0])[1]:
            open(os.path.join(os.path.dirname(path), "stop"), "w").close()
        self.looked = size  # bytes: only new lines are worth a look

    def wait_for_orphans(self, folder):
        """A grpo.py that a killed schedule.py left behind is asked to save and leave, and waited for."""
        told, stop = False, os.path.join(folder, "stop")
        while os.path.exists(os.path.join(folder, "lock")) and not self.signals:
            try:
                with common.lock(os.path.join(folder, "lock")):
                    return
            except common.RankError as e:
                if not told:
                    print(f"{e}\nIt is asked to save and leave ({stop}), and waited for", flush=True)
                    open(stop, "w").close()
                told = True
                time.sleep(0.5)

    def remove_checkpoints(self, k):
        """Of a stage that kept all its checkpoints only the one that is handed on stays."""
        stage = self.stages[k]
        for step in saved_steps(self.run, stage) if watched(self.args, self.stages, k) else ():
            if step != stage["picked"]:
                shutil.rmtree(os.path.join(self.run, stage["folder"], "checkpoints", f"{step:06d}"))


# ----- ledger and report ------------------------------------------------------------------------------------

PHASES = ("generate", "reward", "logprobs", "update", "sync", "idle")


def total(key, rows):
    return sum(row.get(key) or 0 for row in rows)


def ledger(run, stages, processes, price):
    """Markdown: what each stage and evaluation took. A step done again after a crash counts once; loading,
    saving and what a crash cost are not in it."""
    rows = []
    for stage in stages:
        folder = os.path.join(run, stage["folder"])
        lines, validation = read_metrics(folder), total("eval_seconds", read_metrics(folder, validation=True))
        if lines:
            past = [row for row in lines if stage["picked"] and row["step"] > stage["picked"]]
            seconds = [total(key, lines) for key in ("seconds", *(f"seconds_{phase}" for phase in PHASES))]
            world = common.read_json(os.path.join(folder, "config.json"))["world"]
            rows.append([f"{stage['folder']} ({stage['max_len']:,})", len(lines), total("tokens", lines),
                         total("tokens", past), total("tokens_trained", lines), *seconds, validation,
                         (seconds[0] + validation) * world / 3600])
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "eval", "*.json"))):
        result = common.read_json(path)
        rows.append([f"evaluate {result['name']}", 0, result["tokens_generated"], 0, 0, result["seconds"],
                     *[0] * len(PHASES), 0, result["seconds"] * processes / 3600])
    rows.append(["total", *(sum(column) for column in list(zip(*rows))[1:])])
    head = ["", "steps", "tokens generated", "past the checkpoint", "tokens trained", "seconds", *PHASES,
            "validation", "GPU-hours", f"dollars at {price:g} an hour"]
    return common.table(head, [[row[0], *(f"{x:,}" for x in row[1:5]), *(f"{x:,.1f}" for x in row[5:-1]),
                                f"{row[-1]:,.2f}", f"{row[-1] * price:,.2f}"] for row in rows])


def report(schedule):
    """Write report.md anew: where stages ended, results, figures, ledger, and what is missing."""
    run, args, missing = schedule.run, schedule.args, {}
    try:
        import figures
        _, missing = figures.draw(run)
        figures.transcripts(run)
    except Exception as e:  # noqa: BLE001 (a report without pictures is still a report)
        missing["figures"] = f"{type(e).__name__}: {e}"
    results = sorted(glob.glob(os.path.join(glob.escape(run), "eval", "*.json")))
    command = [sys.executable, os.path.join(HERE, "evaluate.py"), "--table", *results]
    command += ["--published"] * (args.model == MODEL)
    done = subprocess.run(command, capture_output=True, text=True, check=False) if results else None
    scores = (done.stdout or f"evaluate.py --table: {done.stderr}\n") if done else "No evaluation was run.\n"
    ends = []
    for s in schedule.stages:
        ends.append(f"- {s['folder']}: {s['max_len']:,} tokens of context, {s['group']} samples a problem, "
                    f"up to {s['steps']:,} steps; checkpoint {s['picked'] or '(not yet)'} handed on")
        ends[-1] += f". It turned: {describe_turn(s['evidence'])}" if s["evidence"] else ""
    pictures = sorted(os.path.basename(path) for path in glob.glob(f"{glob.escape(run)}/figures/*.png"))
    gpus = torch.cuda.device_count()
    price = card(args)["price"] if gpus else args.gpu_price or 0.0
    text = [f"# {os.path.basename(os.path.abspath(run))}: training with a growing context\n",
            (f"The first stage starts from {args.model}, each other one from the weights of the one before, "
             f"with {'its' if args.optimizer == 'carry' else 'a fresh'} optimizer. Options of all stages: "
             f"`{shlex.join(schedule.rest) or 'the defaults of grpo.py'}`\n"),
            *ends, "\n## Results\n", scores, "## Figures\n",
            *(f"![{name[:-4]}](figures/{name})\n" for name in pictures),
            *["[Transcripts](transcripts.html)\n"] * os.path.exists(os.path.join(run, "transcripts.html")),
            *(f"- not shown: {name}: {why}\n" for name, why in missing.items()), "## Ledger\n",
            ledger(run, schedule.stages, args.gpus * args.nodes, price),
            (f"{'' if gpus else 'Without GPUs, hours are process-hours. '}Seconds are those of steps, by "
             f"phase as means over ranks. What others paid, by their own accounts:\n"),
            common.table(["who", "what", "GPU-hours", "dollars", "AIME 2024"], COSTS)]
    common.write_atomic(os.path.join(run, "report.md"), "\n".join(text).replace(HERE + os.sep, ""))


# ----- prediction (--dry_run) -------------------------------------------------------------------------------

# GiB as the driver reports it; bf16 peak TFLOP/s; assumed: tokens/s generated by a 1.8B model with a full
# batch, and by one sequence when it has run empty; dollars an hour (A100: 4,500 / 3,800, as DeepScaleR paid)
GPUS = {"A100-80": (79.2, 312, 6000, 110, 1.18), "A100-40": (39.4, 312, 5500, 100, 1.1),
        "H100-80": (79.1, 989, 12000, 180, 2.5), "H200": (139.8, 989, 14000, 200, 3.0),
        "L40S": (44.4, 362, 4500, 70, 0.9), "RTX4090": (23.5, 165, 4500, 80, 0.4)}
GIB = 2**30
MFU, PROMPT = 0.4, 150          # assumed: share of the peak reached in training; mean tokens of a prompt
RESERVE, VLLM_EXTRA = 2.0, 2.0  # GiB: CUDA context, NCCL, fragmentation; activations and CUDA graphs of vLLM
TILE = 150_000_000              # logits of a tile by default, see policy.py
SHAPE = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
         "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
         "tie_word_embeddings": False, "max_position_embeddings": 131072}


def card(args):
    """Name and numbers of a GPU: the one described, else the one found, which is asked for its memory."""
    name, memory, found = args.gpu_type, args.gpu_memory_gib, False
    if torch.cuda.device_count() and not name and not memory:
        # another process asks: this one must not take memory of the GPU
        code = "import torch; p = torch.cuda.get_device_properties(0); print(p.total_memory / 2**30, p.name)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        memory, name, found = *done.stdout.strip().split(" ", 1), True
    name = name or (f"card of {memory:g} GiB" if memory else "A100-80")
    known = [kind for kind in GPUS if kind == name or (found and kind.split("-")[0] in name.replace(" ", ""))]
    if not known and not memory:
        raise ValueError(f"--gpu_type {name} is none of {', '.join(GPUS)}: describe it with --gpu_memory_gib")
    kind = min(known or ["A100-80"], key=lambda kind: abs(GPUS[kind][0] - float(memory)))
    numbers = dict(zip(("memory", "tflops", "tokens", "stream", "price"), GPUS[kind]))
    return numbers | {"name": name + ("" if known else " (assumed as fast as an A100)"),
                      "memory": float(memory) or numbers["memory"],
                      "price": numbers["price"] if args.gpu_price is None else args.gpu_price}


def model_config(model):
    """A causal LM's config. The default model's is built in; the hub is asked once, with little patience."""
    from transformers import AutoConfig
    if model == MODEL:
        return AutoConfig.for_model(**SHAPE)
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{model}/resolve/main/config.json"
    try:
        with contextlib.suppress(*[] if os.path.isdir(model) else [OSError, ValueError]):  # not in the cache
            return AutoConfig.from_pretrained(model, local_files_only=True)
        with urllib.request.urlopen(url, timeout=2) as f:
            return AutoConfig.for_model(**json.load(f))
    except (OSError, ValueError) as e:
        raise ValueError(f"--model {model} gives no config: {str(e).splitlines()[0]}") from e


def model_shape(model):
    """Sizes of a causal LM; no weight is loaded."""
    from transformers import AutoModelForCausalLM
    c = model_config(model).get_text_config()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(c)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    parameters, layer = (sum(p.numel() for p in x.parameters()) for x in (shell, shell.base_model.layers[0]))
    return {"parameters": parameters, "layer": layer, "root": parameters - c.num_hidden_layers * layer,
            "layers": c.num_hidden_layers, "hidden": c.hidden_size, "mlp": c.intermediate_size,
            "q": c.num_attention_heads * head, "kv": c.num_key_value_heads * head, "vocab": c.vocab_size,
            "tied": bool(c.tie_word_embeddings), "positions": getattr(c, "max_position_embeddings", None)}


def update_bytes(m, tokens, width, recompute, chunk):
    """Peak of an update beside weights, gradients and Adam, in the backward of the head or the last layer."""
    # what a decoder layer keeps for its backward: 53.8 K numbers a token for R1-Distill-Qwen-1.5B
    layer = tokens * width * (4 * m["mlp"] + 6 * m["hidden"] + 5 * m["q"] + 4 * m["kv"])
    stream, head = tokens * width * m["hidden"], m["vocab"] * m["hidden"]
    kept = m["layers"] * (stream if recompute else layer)
    # FSDP: embedding and head, a layer that computes, one that comes, one that goes, the fp32 gradient of one
    gathered = (m["root"] + 3 * m["layer"]) * width + 4 * m["layer"]
    # two fp32 tiles of logits and their gradient; the head's gradient in fp32 and in the compute type; final
    # hidden states before and after their norm, those that are scored, and the gradients of all three
    in_head = chunk * m["vocab"] * (8 + width) + head * (4 + width) + 6 * stream
    # the layer once more, gradients of two MLP-sized vectors and of attention's inputs, the head's gradient
    in_layer = recompute * layer + 2 * tokens * width * m["mlp"] + 6 * stream + head * width
    return kept + gathered + max(in_head, in_layer)


def predict(m, a, gpu, world):
    """GiB of one GPU, in parts, for a stage with grpo.py's options `a`, and "why" it cannot run, or None."""
    longest, width = a["max_len"] + a["max_prompt_len"], 4 if a["dtype"] == "float32" else 2
    tokens, torch_engine = a["token_budget"] or max(32768, longest), a["engine"] == "torch"
    chunk = min(tokens, TILE // m["vocab"])
    full = 2 * m["layers"] * m["kv"] * width * longest  # keys and values of one sequence
    mine = -(-a["prompts"] * a["group"] // world)
    # vLLM is given a tied head untied; rollout.TorchEngine has a row of full length for each sample
    weights = (m["parameters"] + m["tied"] * m["vocab"] * m["hidden"]) * width
    pool = min(mine, a["max_seqs"] or 64) * full if torch_engine else (
        (a["gpu_memory"] * gpu["memory"] - VLLM_EXTRA) * GIB - weights)
    parts = {"weights, gradients, Adam": 16 * m["parameters"] / world,
             "reference": m["parameters"] * width / world if a["kl_coef"] else 0,
             "update": update_bytes(m, tokens, width, a["recompute"], chunk),
             "engine: weights": weights, "engine: KV cache": pool, "engine: rest": VLLM_EXTRA * GIB}
    parts = {name: max(size, 0) / GIB for name, size in parts.items()}
    states, reference, update, *engine = parts.values()
    awake = sum(engine) if torch_engine else 0.0  # vLLM sleeps
    peaks = {"generating": 0.75 * states + reference + sum(engine) + RESERVE,  # a step frees its gradients
             "training": states + reference + update + awake + RESERVE}
    why = [f"{phase} needs {peak:.1f} GiB on each GPU, which has {gpu['memory']:.1f}"
           for phase, peak in peaks.items() if peak > gpu["memory"]]
    sequences = int(min(mine, a["max_seqs"] or 256, max(pool, 0) // full))
    if m["positions"] and a["max_len"] >= m["positions"]:
        why = [f"a context of {a['max_len']} leaves no room for a prompt in {m['positions']} positions"]
    elif tokens < longest:
        why = [f"--token_budget {tokens} holds no sequence of {longest} tokens"]
    elif not sequences:
        why = [f"--gpu_memory {a['gpu_memory']:g} leaves no room for the keys and values of {longest} tokens"]
    return {"parts": parts, **peaks, "sequences": sequences, "tokens": tokens, "why": why[0] if why else None}


def remedies(m, a, gpu, world):
    """Options that make a stage fit, each with the nearest value that does it alone; else a model's size."""
    longest, down = a["max_len"] + a["max_prompt_len"], [i / 16 for i in range(15, 0, -1)]
    budget = max(a["token_budget"] or 32768, longest)
    choices = {"token_budget": [int(budget * x) for x in down] + [longest], "recompute": [1],
               "gpu_memory": sorted((x / 20 for x in range(2, 19)), key=lambda x: abs(x - a["gpu_memory"])),
               "max_len": [int(a["max_len"] * x) or 1 for x in down]}
    for base in ({}, {"token_budget": longest, "recompute": 1}):
        found = []
        for name, values in choices.items():
            fits = [v for v in values if not predict(m, a | base | {name: v}, gpu, world)["why"]]
            found += [f"--{name} {fits[0]}" + " (in --stages)" * (name == "max_len")] if fits else []
        if found:
            return " ".join([*(f"--{name} {value}" for name, value in base.items()), " or ".join(found)])
    for share in range(99, 4, -1):  # the same kind of model with a share of the widths
        narrow = {name: m[name] * share // 100 for name in ("hidden", "mlp", "q", "kv", "root")}
        narrow["layer"] = m["layer"] * share ** 2 // 10_000
        narrow["parameters"] = m["layers"] * narrow["layer"] + narrow["root"]
        if not predict(m | narrow, a, gpu, world)["why"]:
            return f"--model to one of up to {narrow['parameters'] / 1e9:.2f} B parameters"
    return "to a card with more memory (--gpu_memory_gib)"


def step_seconds(m, a, gpu, world):
    """Assumed seconds of a step. Generation is bound by throughput or by its longest sequence, training by
    two FLOP for each weight that a token meets, and causal attention."""
    n, scale, length = a["prompts"] * a["group"], 1.777e9 / m["parameters"], a["mean_len"] + PROMPT
    stream = min(gpu["stream"] * scale, 500.0)  # a small model is bound by launching kernels
    rate = min(gpu["tokens"] * scale, stream * max(1, min(n / world, a["max_seqs"] or 256)))
    weights = m["parameters"] - (0 if m["tied"] else m["vocab"] * m["hidden"])
    flops = n * (2 * weights * length + 2 * m["layers"] * m["q"] * length ** 2)
    forward = flops / (world * gpu["tflops"] * 1e12 * MFU)
    passes = (a["updates"] - 1) / a["updates"] + bool(a["kl_coef"])  # old log-probs but the first, reference
    return {"generate": max(n * a["mean_len"] / rate / world, a["max_len"] / stream),
            "log-probs": forward * passes, "update": forward * (3 + a["recompute"]), "rest": 3.0}


def dry_run(args, stages, options):
    """Print what every stage would need -> exit code: 2 if one cannot run."""
    m, gpu, world = model_shape(args.model), card(args), args.gpus * args.nodes
    print(f"{args.model}: {m['parameters']:,} parameters\n{world} x {gpu['name']}, {gpu['memory']:.1f} GiB")
    print(f"assumed: {gpu['tokens']:,} generated tokens/s for each GPU with a full batch and {gpu['stream']} "
          f"for one sequence\n  (1.8B model; inversely with size), {gpu['tflops']} TFLOP/s at {MFU:.0%}, "
          f"prompts of {PROMPT} tokens, ${gpu['price']:g} an hour")
    columns, refused, hours = [], [], 0.0
    for stage, a in zip(stages, options):
        a = a | {"mean_len": args.mean_len or min(a["max_len"] // 2, 5000)}
        p, t = predict(m, a, gpu, world), step_seconds(m, a, gpu, world)
        mine = sum(t.values()) * a["steps"] / 3600
        hours += mine
        columns.append({
            "": stage["folder"], "context": f"{a['max_len']:,}", "steps": f"{a['steps']:,}",
            **{f"GiB: {part}": f"{size:.1f}" for part, size in p["parts"].items()},
            "GiB: peak generating": f"{p['generating']:.1f}", "GiB: peak training": f"{p['training']:.1f}",
            "token budget": f"{p['tokens']:,}", "sequences of full length at once": p["sequences"],
            "mean length": f"{a['mean_len']:,}",
            "s a step: " + " + ".join(t): " + ".join(f"{seconds:.0f}" for seconds in t.values()),
            "hours": f"{mine:,.1f}", "dollars": f"{mine * world * gpu['price']:,.0f}"})
        if p["why"]:
            refused.append(f"{stage['folder']} cannot run: {p['why']}. Change {remedies(m, a, gpu, world)}")
    for name in columns[0]:  # one line a quantity reads better than 17 columns
        print(f"  {name:46s}" + "".join(f"{column[name]!s:>20s}" for column in columns))
    disk = 16 * m["parameters"] / GIB
    print(f"total {hours:,.1f} hours, {hours * world:,.0f} GPU-hours, ${hours * world * gpu['price']:,.0f} "
          f"without evaluations; disk: {disk:.1f} GiB a checkpoint, three at least"
          + (f", and {disk / 4:.1f} GiB for each that may be returned to" if args.switch == "auto" else ""))
    print("\n".join(refused) if refused else "it fits", file=sys.stderr if refused else sys.stdout)
    return 2 if refused else 0


# ----- the command ------------------------------------------------------------------------------------------

NO_GPU = """no GPU was found here. This trains a 1.5B model on long contexts: 3,800 A100-hours as published.
  python schedule.py --preset toy          the same story with a small model, on this machine, in minutes
  python schedule.py --dry_run --gpus 8    what the full run needs, predicted
  python schedule.py --model FOLDER --stages ...    your own model on this CPU"""


def start(argv):
    """Check everything, then work -> exit code."""
    p, where = parser(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--run")
    args, _ = parse(p, argv)
    run = args.run
    if args.node_rank and not args.dry_run:
        return other_node(args)
    words = where.parse_known_args(argv)[1]  # the folder is no property of the run
    # paths are made absolute: the next call may stand in another folder
    paths = [os.path.exists(word) and (option == "--model" or "." in word or "/" in word)
             for option, word in zip(["", *words], words)]
    words = [os.path.abspath(word) if path else word for path, word in zip(paths, words)]
    old = read_plan(run)
    said = old["words"] if old else []
    new = [] if words == said[len(said) - len(words):] else words
    args, rest = parse(p, said + new)
    args.run, stages, told = run, parse_stages(args.stages), ""
    if old:
        before = parse(p, said)[0]
        carry_on(run, old, before, args, stages)
        told = changes(before, args, p.parse_known_args(new)[1])
    options = check(args, rest, stages)
    if args.dry_run:
        return dry_run(args, stages, options)
    if args.model == MODEL and not torch.cuda.device_count():
        raise ValueError(NO_GPU)
    with common.lock(os.path.join(run, "schedule.lock")):
        if read_plan(run) != old:
            raise ValueError(f"{run} was begun or changed by another schedule.py just now: try again")
        print(told, end="", flush=True)
        plan = {"words": said + new, "model": args.model, "stages": stages}
        return Schedule(args, rest, plan, options).work()


def main(argv=None):
    try:
        return start(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, common.RankError) as e:
        print(f"schedule.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
