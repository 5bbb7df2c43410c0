"""schedule.py - DeepScaleR's heart: the same training three times, each time with a longer context.

    python schedule.py --run runs/deepscaler --gpus 8           # 8K -> 16K -> 24K as published
    python schedule.py --run runs/deepscaler                    # go on after a crash, a kill, a reboot
    python schedule.py --preset toy                             # the whole story on a laptop
    python schedule.py --dry_run --gpus 8 --gpu_type H100-80    # memory, hours, dollars, before a GPU is used
    python schedule.py --switch auto --gpus 8 --run RUN         # a stage ends where its response length turns
    python schedule.py --gpus 8 --run SHARED_DISK --torchrun "--nnodes 4 --node_rank R --rdzv_backend c10d
                       --rdzv_endpoint HOST:29500"              # on each of four nodes, R from 0 to 3

grpo.py and evaluate.py run as programs, one after another. RUN/plan.json holds the words of the command line
and what is done; to go on means old words, then new words. Only weights pass from stage to stage: optimizer,
KL reference and data order are new. Left out on purpose: job queues, retries, searches.
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.run import get_args_parser

import common
import evaluate
import grpo
import predict

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = predict.MODEL
LATER = "save_every=10:eval_every=10:eval_n=16"
PRESETS = {  # words that stand before those of the command line
    "deepscaler": f"--run runs/deepscaler --model {MODEL} --stages 8192:1040:8,16384:480:16:{LATER},"
                  f"24576:200:16:{LATER}",
    "justrl": f"--run runs/justrl --model {MODEL} --stages 15360:4380:8 --recipe justrl",
    "toy": f"""--run runs/toy --model '{HERE}/toy/model' --stages 40:70:8,80:50:8,120:30:8 --switch auto
        --turn_window 8 --data '{HERE}/toy/train.jsonl.gz' --eval_data '{HERE}/toy/heldout.jsonl'
        --benchmarks '{HERE}/toy/heldout.jsonl' --evaluate '-n 16 --max_tokens 192 --temperature 1 --top_p 1'
        --eval_every 10 --eval_n 2 --eval_max_len 192 --eval_temperature 1 --save_every 5 --recipe improved
        --prompts 128 --updates 1 --lr 2e-4 --engine torch --max_seqs 256 --token_budget 8192
        --max_prompt_len 128"""}


# ----- the turning point ------------------------------------------------------------------------------------
def turning_point(steps, length, truncated, reward, window):
    """Where a stage should have ended (responses grow again, more are cut off, reward is flat), or None.

    All but window: [n], a number for each step. The newest window of steps is compared with the trough, the
    last window whose mean length is within one standard error of the lowest. Length fell to it by 5 %, has
    risen since by 5 % and 4 standard errors, truncation by 4, reward by less than 1 or at 40 % of its former
    pace; all that for half a window. A function of the past alone: asked again later, it says the same.
    """
    w, held, x = window, 0, np.array([length, truncated, reward], dtype=float)
    if not 0 < 3 * w <= x.shape[1]:
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
    for now in range(2 * w, mean.shape[1]):
        past = mean[0, :now - w + 1]
        trough = int(np.flatnonzero(past <= past.min() + se[0, now])[-1])
        before, after, top = mean[:, trough].copy(), mean[:, now], past[:trough + 1].max()
        before[2] = x[2, max(0, trough - w):trough + 2 * w].mean()  # a longer stretch has less noise
        errors = (after - before) / se[:, now] / np.sqrt([1, 1, 2 / 3])
        pace = (mean[2, trough] - mean[2, 0]) / max(1, trough)
        flat = errors[2] < 1 or after[2] - before[2] < 0.4 * pace * (now - trough)
        fell_and_rose = before[0] <= 0.95 * top and after[0] >= 1.05 * before[0]
        held = held + 1 if fell_and_rose and min(errors[:2]) > 4 and flat else 0
        if held >= w // 2:
            first, last = ([int(steps[i]), int(steps[i + w - 1])] for i in (trough, now))
            series = zip(("length", "truncated", "reward"), np.stack([before, after, errors], 1).tolist())
            return dict(series, turn=first[0], seen_at=last[1], before=first, after=last, top=float(top))
    return None


def describe_turn(e):
    """The evidence in plain words."""
    changes = ", ".join(f"{name} {e[name][0]:.3g} -> {e[name][1]:.3g} ({e[name][2]:+.1f} standard errors)"
                        for name in ("length", "truncated", "reward"))
    return (f"by step {e['turn']} responses had become shorter, from {e['top']:.1f} tokens. They grow again "
            f"and it hardly pays: the model needs more room. {e['before']} to {e['after']}: {changes}")


def read_metrics(folder):
    """Lines of metrics.jsonl, one for each step: a step done again after a crash counts as done last."""
    path, rows = f"{folder}/metrics.jsonl", {}
    for row in common.read_lines(path, on_bad=lambda text: None) if os.path.exists(path) else ():
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return list(rows.values())


# ----- options ----------------------------------------------------------------------------------------------
OPTIONS = {
    "what is trained": [
        ("run", str, None, None, "folder; a run that is there goes on (default: runs/PRESET)"),
        ("preset", list(PRESETS), "deepscaler", None, "toy: on a laptop; justrl: one long stage"),
        ("stages", str, None, None, "CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...],... (default: the preset's)"),
        ("model", str, None, None, "start weights, folder or hub name (default: the preset's)"),
        ("optimizer", ["fresh", "carry"], "fresh", None, "Adam's state in the next stage"),
        ("seed", int, 0, None, "stage k trains with seed + k - 1: a new data order"),
        ("switch", ["steps", "auto"], "steps", None, "auto: a stage before the last may end where it turns"),
        ("turn_window", int, 0, 0, "steps of a window, 4 or more; 0: a twentieth of the stage, 10 to 50")],
    "evaluation after each stage": [
        ("benchmarks", str, " ".join(evaluate.FIVE), None, "names or files, quoted"),
        ("evaluate", str, "", None, 'more options of evaluate.py, quoted: "-n 4 --max_tokens 8192"'),
        ("no_eval", bool, False, None, "no evaluate.py at all"),
        ("no_base_eval", bool, False, None, "do not evaluate the start model")],
    "machines and their cost": [
        ("gpus", int, 0, 0, "processes on each node; 0: the GPUs found, else 1 (toy: 2)"),
        ("torchrun", str, "", None, "options of torchrun on this node, quoted, for nodes that share a disk"),
        ("gpu_price", float, 0.0, 0, "dollars an hour, for the report; 0: --dry_run assumes one"),
        ("dry_run", bool, False, None, "predict memory, time, dollars, check that it fits, and leave"),
        ("gpu_type", str, "", None, "for --dry_run, listed below; if left away, the GPU found, else A100-80"),
        ("gpu_memory_gib", float, 0.0, 0, "for --dry_run, to describe any other card"),
        ("mean_len", int, 0, 0, "for --dry_run, of responses; 0: half the context, at most 5,000 tokens")]}
GONE = {f"--{name}": f"use {successor}" for successor, names in {
    "--stages": "max_len steps group", "--run": "out resume", "--optimizer carry": "optimizer_from",
    '--torchrun "--nnodes 2 ..."': "nnodes node_rank rdzv_backend rdzv_endpoint master_addr master_port",
    '--evaluate "-n 4 ..."': "bench_n bench_max_tokens bench_temperature bench_top_p",
    "--gpus": "nproc_per_node", "bench/staging.py": "ablation"}.items() for name in names.split()}


def parse(words):
    """-> this program's options; .rest: words for grpo.py. Of two equal options the later one counts."""
    own = common.Parser(OPTIONS, epilog=f"Other options go to grpo.py. GPU types: {', '.join(predict.GPUS)}")
    words = shlex.split(PRESETS[own.parse_known_args(words)[0].preset]) + words
    args, args.rest = own.parse_known_args(words)
    theirs = [row for rows in grpo.OPTIONS.values() for row in rows if f"--{row[0]}" not in GONE]
    known = OPTIONS | {"grpo.py": theirs}  # what is in neither is refused
    common.Parser(known, grpo.GONE | GONE, conflict_handler="resolve").parse(words)
    node = get_args_parser().parse_args([*shlex.split(args.torchrun), "a script"])
    args.nodes, args.node_rank = int(node.nnodes.split(":")[-1]), node.node_rank
    if args.nodes > 1 and not re.search("--node.rank", args.torchrun):
        raise ValueError("--torchrun: several nodes need --node_rank: 0 where the plan is kept, 1, 2, ...")
    args.gpus = args.gpus or torch.cuda.device_count() or 1 + (args.preset == "toy")
    return args


def parse_stages(text):
    """
    >>> parse_stages("8192:1040:8,16384:480:16:lr=5e-7")[1]["extra"]
    ['--lr', '5e-7']
    """
    stages = []
    for number, entry in enumerate(text.split(","), 1):
        found = re.fullmatch(r"\s*(\d+):(\d+):(\d+)((?::[a-z]\w*=[^:]+)*)\s*", entry)
        if not found:
            raise ValueError(f"--stages: {entry!r} is not CONTEXT:STEPS:SAMPLES[:OPTION=VALUE...]")
        extra = [word for pair in found[4].split(":")[1:] for word in f"--{pair}".split("=", 1)]
        stages.append({"folder": f"stage{number}", "max_len": int(found[1]), "steps": int(found[2]),
                       "group": int(found[3]), "extra": extra, "picked": None, "evidence": None})
    return stages


def stage_words(args, k):
    """Words for grpo.py; the model is the checkpoint that the stage before handed on."""
    stage, before = args.plan[k], checkpoint(args, k - 1) if k else ""
    # options for one stage win over those for all, unless a preset brought them
    preset = any(args.stages in words for words in PRESETS.values())
    words = stage["extra"] + args.rest if preset else args.rest + stage["extra"]
    words = ["--keep", str(stage["keep"])] * (stage["window"] > 0) + words
    words += ["--optimizer_from", before] * (k > 0 and args.optimizer == "carry")
    shape = "--max_len {max_len} --steps {steps} --group {group} --resume --seed".format(**stage).split()
    return [*words, *shape, str(args.seed + k), "--model", f"{before}/hf" if k else args.model,
            "--out", f"{args.run}/stage{k + 1}"]


def evaluate_words(args, name, model):
    """Words for evaluate.py: as in training, where --evaluate says nothing else."""
    same = ("style", "instruction", "examples", "reward", "engine", "dtype", "max_seqs")
    words = [f"--{option}={args.options[0][option]}" for option in same if args.options[0][option]]
    words += ["--no_chat"] * args.options[0]["no_chat"] + ["--model", model, "--name", name]
    benchmarks = ["--out", f"{args.run}/eval", "--benchmarks", *shlex.split(args.benchmarks)]
    return words + benchmarks + shlex.split(args.evaluate)


# ----- the plan ---------------------------------------------------------------------------------------------
def open_plan(run, argv):
    """Options of the words of earlier calls, then `argv`; .words, .plan: the stages, .options: grpo.py's for
    each of them. What cannot work is refused before any work."""
    path, cwd = f"{run}/plan.json", os.getcwd()
    old = common.read_json(path) if os.path.exists(path) else {"words": [], "stages": [], "cwd": cwd}
    if not isinstance(old, dict) or {"words", "stages", "cwd"} - set(old):
        raise ValueError(f"{path} is of another version and cannot be continued. Its weights can: --model "
                         f"{run}/stageN/checkpoints/STEP/hf, the --stages left, another --run")
    said, run = old["words"], os.path.abspath(run)
    new = [] if argv == said[-len(argv):] or len(argv) == 2 and argv[0] == "--run" else argv
    os.chdir(old["cwd"] if os.path.isdir(old["cwd"]) else cwd)  # words may name relative paths
    args = parse(said + new)
    args.run, args.words, args.plan, args.options = run, said + new, parse_stages(args.stages), []
    carry_on(args, parse(said), old["stages"])
    for k, stage in enumerate(args.plan):
        watched = args.switch == "auto" and stage is not args.plan[-1]
        window = watched * max(4, args.turn_window or min(50, max(10, stage["steps"] // 20)))
        stage.update(window=window, keep=0)  # --keep 0 keeps all weights, but the optimizer's state of few
        a = vars(grpo.parse_args(["--recompute", "1"] * args.dry_run + stage_words(args, k)))  # as on a GPU
        if watched and (a["save_every"] > window or a["keep"]):
            raise ValueError(f"--switch auto may return to any checkpoint: leave --keep away, --save_every "
                             f"{a['save_every']} must be at most {window}, the window")
        stage["keep"] = (args.optimizer == "carry") * (a["steps"] // a["save_every"] + 1)
        args.options.append(a)
    evaluate.parse_args(evaluate_words(args, "base", args.model))
    if said and new:
        print(f"changed from here on (paths count from {os.getcwd()}): {shlex.join(new)}", flush=True)
    return args


def carry_on(args, before, stages):
    """Take over what was done. Words that would alter finished work are refused."""
    begun = [stage for stage in stages if os.path.isdir(f"{args.run}/{stage['folder']}")]
    touched = begun or stages and os.path.isdir(f"{args.run}/eval")
    for name in ("model", "preset", "seed", "optimizer", "benchmarks", "evaluate") if touched else ():
        if getattr(before, name) != getattr(args, name):
            raise ValueError(f"{args.run} was begun with --{name} {getattr(before, name)}: leave the new one "
                             f"away, or take another --run")
    for k, was in enumerate(begun):
        now = args.plan[k] if k < len(args.plan) else {"steps": -1}
        fixed = ["max_len", "group"] + ["steps", "extra"] * (was["picked"] is not None)
        if now["steps"] < max([0, *saved_steps(args, k)]) or any(now[name] != was[name] for name in fixed):
            raise ValueError(f"--stages: {was['folder']} was begun with {was['max_len']}:{was['steps']}:"
                             f"{was['group']}. Only later stages and steps that are not done may change")
        now.update(picked=was["picked"], evidence=was["evidence"])


def save_plan(args):
    content = {"words": args.words, "cwd": os.getcwd(), "model": args.model, "stages": args.plan}
    if args.node_rank == 0:  # all nodes decide alike, from what is on the shared disk; one writes it down
        common.write_atomic(f"{args.run}/plan.json", json.dumps(content, indent=1))


def saved_steps(args, k):
    """Steps of stage k's checkpoints, in order; a name without suffix is complete."""
    paths = Path(args.run, f"stage{k + 1}/checkpoints").glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def checkpoint(args, k):
    """The checkpoint that stage k hands on."""
    return f"{args.run}/stage{k + 1}/checkpoints/{args.plan[k]['picked'] or args.plan[k]['steps']:06d}"


# ----- running programs -------------------------------------------------------------------------------------
def program(args, name, script, options, look=lambda: None):
    """A program on all nodes, to its end. The schedule ends as well if it failed or a signal came.
    name: of the rendezvous, so that a late node joins no other program. look() is called again and again."""
    command = [sys.executable, f"{HERE}/{script}", *options]
    if args.gpus > 1 or args.torchrun:
        where = shlex.split(args.torchrun) + ["--rdzv_id", name] if args.nodes > 1 else ["--standalone"]
        command[1:1] = ["-m", "torch.distributed.run", *where, "--nproc_per_node", str(args.gpus)]
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with a notice
    print("$ " + shlex.join(command), flush=True)
    # A session of its own: Ctrl-C in a terminal comes to this process alone, which passes it on. By itself
    # torchrun gives its workers 30 seconds, less than a large checkpoint takes.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not args.signals:
            look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
        if args.signals:
            child.send_signal(args.signals[0])
        child.wait()
    finally:  # nothing to do, unless a second signal has raised KeyboardInterrupt
        child.terminate()
    again = f"python schedule.py --run {shlex.quote(args.run)} goes on from here"
    if args.signals:
        print(f"schedule.py: stopped by a signal, what is done is saved; {again}", file=sys.stderr)
        sys.exit(128 + args.signals[0])
    if child.returncode:
        sys.exit(f"schedule.py: {script} ended with exit code {child.returncode}, see above; then {again}")


def measure(args, name, model):
    """evaluate.py on one model, unless it was done; a killed one goes on with the samples it lacks."""
    if not args.no_eval and not os.path.exists(f"{args.run}/eval/{name}.json"):
        program(args, f"eval-{name}", "evaluate.py", evaluate_words(args, name, model))


def find_turn(args, k):
    """Has stage k turned? Then it hands on its last checkpoint before, and grpo.py is asked to leave."""
    stage, folder = args.plan[k], f"{args.run}/stage{k + 1}"
    if stage["picked"] or not stage["window"]:
        return stage["picked"]
    rows = [row for row in read_metrics(folder) if "reward" in row]
    series = ([row[key] for row in rows] for key in ("step", "length_mean", "truncated", "reward"))
    evidence = turning_point(*series, stage["window"])
    # only steps on the grid: what a signal or a stop file saved must not change the choice
    grid = [step for step in saved_steps(args, k) if step % args.options[k]["save_every"] == 0]
    if evidence and grid:
        before = [step for step in grid if step < evidence["turn"]] or grid[:1]
        stage.update(picked=before[-1], evidence=evidence)
        Path(folder, "stop").touch()
    return stage["picked"]


def train(args, k):
    """One stage, to its last step or its turn; the plan then names the checkpoint that is handed on."""
    stage, folder = args.plan[k], f"{args.run}/stage{k + 1}"
    while args.node_rank == 0:
        try:
            with common.lock(f"{folder}/lock"):
                break
        except common.RankError as e:
            print(f"{e}. What a killed schedule.py left behind is asked to save and leave", flush=True)
            Path(folder, "stop").touch()  # grpo.py sees it, saves and leaves
            time.sleep(2)
    if not find_turn(args, k):  # after the last step grpo.py may still lack its last validation
        program(args, f"stage{k + 1}", "grpo.py", stage_words(args, k), lambda: find_turn(args, k))
    late = time.time() + 60 * (args.nodes > 1)  # a shared disk may lag
    while not find_turn(args, k) and stage["steps"] not in saved_steps(args, k):
        if time.time() >= late:
            sys.exit(f"schedule.py: stage{k + 1} ended at step {max([0, *saved_steps(args, k)])} of "
                     f"{stage['steps']}: its stop file, or see ALARM lines; the same command goes on")
        time.sleep(1)
    stage["picked"] = stage["picked"] or stage["steps"]
    if stage["evidence"]:
        print(f"stage{k + 1}: {describe_turn(stage['evidence'])}. Checkpoint {stage['picked']} goes on")
    save_plan(args)


def work(args):
    """Everything that is left to do, in order; each line is safe to repeat."""
    args.signals = common.catch_signals()
    save_plan(args)
    if not args.no_base_eval:
        measure(args, "base", args.model)
    for k, stage in enumerate(args.plan):
        if stage["picked"] is None:
            train(args, k)
        if stage["window"] and args.node_rank == 0:  # all checkpoints were kept in case the stage turned
            for step in set(saved_steps(args, k)) - {stage["picked"]}:
                shutil.rmtree(f"{args.run}/stage{k + 1}/checkpoints/{step:06d}")
        measure(args, stage["folder"], f"{checkpoint(args, k)}/hf")
        if args.node_rank == 0:
            report(args)
    print(f"done: {args.run}/report.md")


# ----- ledger and report ------------------------------------------------------------------------------------
def ledger(args):
    """A Markdown table of what each stage and evaluation took. What a crash cost is not in it."""
    rows, phases = [], ["generate", "reward", "logprobs", "update", "sync", "idle"]
    keys = ["tokens", "tokens_trained", *(f"seconds_{x}" for x in phases), "eval_seconds", "seconds"]
    for folder in (f"{args.run}/{stage['folder']}" for stage in args.plan):
        lines = read_metrics(folder)
        sums = [sum(row.get(key) or 0 for row in lines) for key in keys]
        world = common.read_json(f"{folder}/config.json")["world"] if lines else 0
        rows.append([os.path.basename(folder), *sums, (sums[-1] + sums[-2]) * world / 3600])
    for r in map(common.read_json, sorted(Path(args.run).glob("eval/*.json"))):
        hours = r["seconds"] * args.gpus * args.nodes / 3600
        rows.append([f"evaluate {r['name']}", r["tokens_generated"], *[0] * 8, r["seconds"], hours])
    rows.append(["total", *np.sum([row[1:] for row in rows], axis=0)])
    rows = [[name, *(f"{x:,.0f}" for x in sums), f"{hours:,.2f}", f"{hours * args.gpu_price:,.2f}"]
            for name, *sums, hours in rows]
    head = ["", "tokens generated", "trained", *phases, "validation", "seconds", "GPU-hours", "dollars"]
    return common.table(head, rows)


def report(args):
    """RUN/report.md: where stages ended, results, figures, ledger, and what could not be drawn."""
    try:
        import figures
        drawn, missing = figures.draw(args.run)
        figures.transcripts(args.run)
    except Exception as e:  # noqa: BLE001 (a report without pictures is still a report)
        drawn, missing = [], {"figures": f"{type(e).__name__}: {e}"}
    results = sorted(Path(args.run).glob("eval/*.json"))
    command = [sys.executable, f"{HERE}/evaluate.py", *["--published"] * (args.model == MODEL), "--table"]
    shown = subprocess.run([*command, *results], capture_output=True, text=True, check=False)
    scores = shown.stdout or (shown.stderr if results else "No evaluation was run.\n")
    text = [f"# {args.run}: training with a growing context, from {args.model}\n"]
    for s in args.plan:
        text += ["- {folder}: {max_len} tokens of context, {group} samples a problem, at most {steps} steps; "
                 "checkpoint {picked} handed on".format(**s)]
        text += [f"  - {describe_turn(s['evidence'])}"] if s["evidence"] else []
    text += ["\n## Results\n", scores, "## Figures\n",
             *(f"![](figures/{os.path.basename(path)})\n" for path in drawn if path.endswith("png")),
             *(f"- not shown: {name}: {why}\n" for name, why in missing.items()),
             "[Transcripts](transcripts.html)\n\n## Ledger (without GPUs process-hours)\n", ledger(args)]
    common.write_atomic(f"{args.run}/report.md", "\n".join(text))


# ----- the command ------------------------------------------------------------------------------------------
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        first = not args.dry_run and args.node_rank == 0
        with common.lock(f"{args.run}/schedule.lock") if first else contextlib.nullcontext():
            args = open_plan(args.run, argv)
            if args.model == MODEL and not args.dry_run and not torch.cuda.device_count():
                raise ValueError("no GPU was found, and this takes 3,800 A100-hours. --preset toy tells the "
                                 "story on this machine, --dry_run --gpus 8 predicts what is needed")
            return predict.dry_run(args) if args.dry_run else work(args)
    except (ValueError, OSError, common.RankError) as e:
        print(f"schedule.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
