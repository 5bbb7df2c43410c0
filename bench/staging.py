"""staging.py - is a growing context worth it? The toy's three stages against one long stage, seed by seed.

    python bench/staging.py --seeds 3               # half an hour a seed; a run that is finished is kept
    python bench/staging.py --quick                 # two tiny stages: tests this script, says nothing

"direct" trains at the last context from the start, until it has generated as many tokens as all stages together,
those after a turning point included. Accuracy is the mean of three validations in a row at 192 tokens, tokens are
generated ones, seconds those of training steps. "reached": when direct first was as good as staged at its end.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import measure  # puts the project on the path

import schedule

QUICK = ("--stages 12:4:4,16:4:4 --switch steps --prompts 8 --token_budget 1024 --eval_every 1 --eval_n 1 "
         "--eval_max_len 8 --save_every 4 --gpus 1").split()


def curve(run):
    """Validations of a run, in order: [(tokens so far, seconds so far, accuracy)]; tokens in all."""
    tokens, seconds, points, stage = 0, 0.0, [], 1
    while rows := schedule.read_metrics(f"{run}/stage{stage}"):
        for row in rows:
            tokens += row.get("tokens", 0)
            seconds += row.get("seconds", 0)
            if "eval_reward" in row:
                points.append((tokens, seconds, row["eval_reward"]))
        stage += 1
    return points, tokens


def train(run, words, budget=None):
    """schedule.py to its end, or until `budget` tokens are generated; it goes on where it was -> curve."""
    if budget and curve(run)[1] >= budget:
        return curve(run)[0]
    command = [sys.executable, str(measure.ROOT / "schedule.py"), "--preset", "toy", "--run", str(run)]
    with subprocess.Popen([*command, "--no_eval", *words]) as program:
        while program.poll() is None:
            time.sleep(1)
            if budget and curve(run)[1] >= budget:
                Path(run, "stage1", "stop").touch()
    if program.returncode and not (budget and curve(run)[1] >= budget):
        raise SystemExit(f"{run} ended with exit code {program.returncode}; the same command goes on")
    return curve(run)[0]


def last_three(points):
    return statistics.mean(accuracy for *_, accuracy in points[-3:])


def compare(folder, seed, words):
    """Both runs of a seed -> a row."""
    staged = train(folder / f"staged-{seed}", [*words, "--seed", str(seed)])
    budget, stages = curve(folder / f"staged-{seed}")[1], schedule.parse(["--preset", "toy", *words]).stages
    context, _, group = stages.split(",")[-1].split(":")[:3]
    one = ["--stages", f"{context}:100000:{group}", "--switch", "steps", "--seed", str(seed)]
    direct = train(folder / f"direct-{seed}", [*words, *one], budget)
    end = last_three(staged)
    reached = [direct[i - 1] for i in range(3, len(direct) + 1) if last_three(direct[:i]) >= end][:1]
    return {"seed": seed, "staged": end, "direct": last_three(direct), "staged_tokens": staged[-1][0],
            "staged_seconds": staged[-1][1], "direct_tokens": direct[-1][0], "direct_seconds": direct[-1][1],
            "reached_tokens": reached[0][0] if reached else None,
            "reached_seconds": reached[0][1] if reached else None}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="0, 1000, 2000, ...: stages take the seeds that follow")
    add("--work", default=str(measure.WORK / "staging"), help="folder of the runs")
    add("--quick", action="store_true", help="one seed of two tiny stages")
    add("--out", default=str(measure.RESULTS / "staging.json"), help="JSON to write")
    args = parser.parse_args(argv)
    before = {"busy_cores": measure.busy_cores(), "time": time.time()}
    rows = []
    for seed in range(0, 1000 * (1 if args.quick else args.seeds), 1000):
        rows.append(compare(Path(args.work), seed, QUICK if args.quick else []))
        print(rows[-1], flush=True)
        measure.write(args, "staged against direct on the toy", rows, before)


if __name__ == "__main__":
    main()
