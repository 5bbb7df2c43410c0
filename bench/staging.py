"""staging.py - is a growing context worth it? The toy's three stages against one long stage, seed by seed.

    python bench/staging.py     # half an hour a seed; keeps runs that are finished. --quick: two tiny stages

"direct" trains at the last context until it has generated as many tokens as all stages together. Both run at
the same time, one process with one thread each, so that a machine that gets slower does so for both. Accuracy
is the mean of three validations in a row, tokens are generated ones (those after a turning point count),
seconds are of training steps. "reached": when direct first was as good as staged at its end, and the ratio of
that to all stages.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import measure  # puts the project on the path

import schedule

QUICK = "--stages 9:4:4,12:4:4 --switch steps --prompts 8 --eval_every 1 --eval_n 1 --eval_max_len 8"


def curve(run):
    """Validations of a run, in order, after one of nothing: [(tokens so far, seconds so far, accuracy)]."""
    tokens, seconds, points = 0, 0.0, [(0, 0.0, 0.0)]
    for folder in sorted(Path(run).glob("stage?")):
        for row in schedule.read_metrics(folder):
            tokens, seconds = tokens + row.get("tokens", 0), seconds + row.get("seconds", 0)
            if "eval_reward" in row:
                points.append((tokens, seconds, row["eval_reward"]))
    return points


def start(run, words):
    """schedule.py from where a run was, in the background: one process with one thread."""
    words = ["--preset", "toy", "--gpus", "1", "--no_eval", "--run", run, *words]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(measure.ROOT / "schedule.py"), *words], env=one_thread)


def train(staged, direct, words, long):
    """Both runs side by side, `direct` until it has as many tokens as `staged` -> both curves."""
    with start(staged, words) as program, start(direct, [*words, *long]) as other:
        if program.wait():
            other.terminate()
            raise SystemExit(f"{staged} ended with exit code {program.returncode}; the same command goes on")
        tokens = curve(staged)[-1][0]
        while other.poll() is None and curve(direct)[-1][0] < tokens:
            time.sleep(1)
        if other.poll() is None:
            Path(direct, "stage1", "stop").touch()
    points = curve(direct)
    if points[-1][0] < tokens:
        raise SystemExit(f"{direct} ended with exit code {other.returncode}; the same command goes on")
    last = next(i for i, point in enumerate(points) if point[0] >= tokens)
    return curve(staged)[1:], points[1:last + 1]


def state(points):
    """What a run has reached after some of its validations."""
    tokens, seconds, _ = points[-1]
    return {"accuracy": sum(point[2] for point in points[-3:]) / 3, "tokens": tokens, "seconds": seconds}


def compare(folder, seed, words):
    """Both runs of a seed -> a row."""
    words = [*words, "--seed", str(seed)]
    context, _, group = schedule.parse(["--preset", "toy", *words]).stages.split(",")[-1].split(":")[:3]
    long = ["--stages", f"{context}:100000:{group}", "--switch", "steps"]
    staged, direct = train(f"{folder}/staged-{seed}", f"{folder}/direct-{seed}", words, long)
    goal, states = state(staged), [state(direct[:i]) for i in range(3, len(direct) + 1)]
    reached = next((s for s in states if s["accuracy"] >= goal["accuracy"]), dict.fromkeys(goal))
    row = {"seed": seed}
    for name, found in {"staged": goal, "direct": states[-1], "reached": reached}.items():
        row |= {f"{name}_{key}": value for key, value in found.items()}
    for key in ("tokens", "seconds"):
        row[f"{key}_ratio"] = reached[key] and reached[key] / goal[key]
    return row


def main():
    args = measure.parse("staging", ("seeds", int, 3, 1, "how many: 0, 1000, 2000, ..."),
                         ("work", str, str(measure.WORK / "staging"), None, "folder of the runs"))
    result = measure.Result(args.out, "staged against direct on the toy")
    for seed in range(0, 1000 * (1 if args.quick else args.seeds), 1000):
        result.add(**compare(args.work, seed, QUICK.split() if args.quick else []))


if __name__ == "__main__":
    main()
