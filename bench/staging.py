"""staging.py - is a growing context worth it? The toy's three stages against one long stage, seed by seed.

    python bench/staging.py     # half an hour a seed; keeps runs that are finished. --quick: two tiny stages

"direct" trains at the last context until it has generated as many tokens as all stages together. Accuracy is
the mean of three validations in a row, tokens are generated ones (those after a turning point count), seconds
are of training steps. "reached": when direct first was as good as staged at its end.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import measure  # puts the project on the path

import schedule

QUICK = "--stages 9:4:4,12:4:4 --switch steps --prompts 8 --gpus 1 --eval_every 1 --eval_n 1 --eval_max_len 8"


def curve(run):
    """Validations of a run, in order, after one of nothing: [(tokens so far, seconds so far, accuracy)]."""
    tokens, seconds, points = 0, 0.0, [(0, 0.0, 0.0)]
    for folder in sorted(Path(run).glob("stage?")):
        for row in schedule.read_metrics(folder):
            tokens, seconds = tokens + row.get("tokens", 0), seconds + row.get("seconds", 0)
            if "eval_reward" in row:
                points.append((tokens, seconds, row["eval_reward"]))
    return points


def train(run, words, budget=1e99):
    """schedule.py from where it was to its end, or to the first validation after `budget` tokens -> curve."""
    command = [sys.executable, str(measure.ROOT / "schedule.py"), "--preset", "toy", "--run", run, *words]
    if curve(run)[-1][0] < budget:
        with subprocess.Popen([*command, "--no_eval"]) as program:
            while program.poll() is None and curve(run)[-1][0] < budget:
                time.sleep(1)
            if program.poll() is None:
                Path(run, "stage1", "stop").touch()
        if program.returncode and curve(run)[-1][0] < budget:
            raise SystemExit(f"{run} ended with exit code {program.returncode}; the same command goes on")
    return curve(run)[1:]


def state(points):
    """What a run has reached after some of its validations."""
    tokens, seconds, _ = points[-1]
    return {"accuracy": sum(point[2] for point in points[-3:]) / 3, "tokens": tokens, "seconds": seconds}


def compare(folder, seed, words):
    """Both runs of a seed -> a row."""
    words = [*words, "--seed", str(seed)]
    staged = state(train(f"{folder}/staged-{seed}", words))
    context, _, group = schedule.parse(["--preset", "toy", *words]).stages.split(",")[-1].split(":")[:3]
    words += ["--stages", f"{context}:100000:{group}", "--switch", "steps"]
    direct = train(f"{folder}/direct-{seed}", words, budget=staged["tokens"])
    states = [state(direct[:i]) for i in range(3, len(direct) + 1)]
    reached = next((s for s in states if s["accuracy"] >= staged["accuracy"]), None)
    return {"seed": seed, "staged": staged, "direct": states[-1], "reached": reached}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1000, 2000, ...")
    parser.add_argument("--work", default=str(measure.WORK / "staging"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="one seed of two tiny stages")
    parser.add_argument("--out", default=str(measure.RESULTS / "staging.json"), help="JSON to write")
    args = parser.parse_args(argv)
    before, rows = {"busy_cores": measure.busy_cores(), "time": time.time()}, []
    for seed in range(0, 1000 * (1 if args.quick else args.seeds), 1000):
        rows.append(compare(args.work, seed, QUICK.split() if args.quick else []))
        print(rows[-1], flush=True)
        measure.write(args, "staged against direct on the toy", rows, before)


if __name__ == "__main__":
    main()
