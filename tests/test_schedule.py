"""schedule.py: the switching rule on curves, plans and their refusals, kills at any place, the ledger, the predictions.

Most runs here use stand-ins for grpo.py and evaluate.py which write the same files in milliseconds; one uses the real
programs on a tiny model.
"""
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from conftest import ROOT, command, make_model, metrics, run, sequences

import policy
import rollout
import schedule

# ---------------------------------------------------------------------------------------------------------------
# The rule, on curves
# ---------------------------------------------------------------------------------------------------------------


def noise(rng, n, phi):
    """AR(1), standard deviation 1."""
    x = rng.normal(size=n)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + math.sqrt(1 - phi * phi) * x[i]
    return x


def noisy(seed, length, truncated, reward, sd=(200, 0.008, 0.03), phi=0.0, together=0.7):
    """Curves with noise; lengths and truncation move together, as they do in a run."""
    rng = np.random.default_rng(seed)
    n = len(length)
    a, b, c = (noise(rng, n, phi) for _ in range(3))
    cut = truncated + sd[1] * (together * a + math.sqrt(1 - together ** 2) * b)
    return np.arange(1, n + 1), length + sd[0] * a, np.clip(cut, 0, 1), reward + sd[2] * c


def blog(n=1600, turn=1000, rising_reward=False, rises=True):
    """The published 8K stage: length 5,500 -> 3,500 by step 1,000 and up again, truncation 4.2 -> 6.5 %, reward 0.46 ->
    0.58 and flat."""
    t = np.arange(n)
    down = (np.exp(-3 * np.minimum(t, turn) / turn) - np.exp(-3)) / (1 - np.exp(-3))
    after = np.maximum(t - turn, 0) * rises
    reward = 0.46 + 1.2e-4 * t if rising_reward else 0.46 + 0.12 * (1 - down)
    return 3500 + 2000 * down + after, 0.042 + 0.023 * after / 600, reward


def toy(n=80, turn=40):
    t = np.arange(n)
    down, up = np.clip(t / turn, 0, 1), np.clip((t - turn) / (n - turn), 0, 1)
    return 30 - 12 * down + 9 * up, 0.25 - 0.15 * down + 0.2 * up, 0.2 + 0.3 * down


def first(curves, window):
    return schedule.first_turn(*curves, window)[0]


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_finds_the_blogs_turn(phi):
    for seed in range(10):
        e = first(noisy(seed, *blog(), phi=phi), 50)
        assert e and 850 < e["turn"] < 1120 and e["turn"] < e["seen_at"] < 1600, (seed, e)
        assert e["before"][0] == e["turn"] and e["before"][1] < e["after"][0] and e["after"][1] == e["seen_at"]
        assert e["length"]["z"] > 4 and e["truncated"]["z"] >= 3 and e["reward"]["z"] < 2
        json.dumps(e)


def test_finds_a_turn_on_the_scale_of_a_laptop():
    found = [first(noisy(s, *toy(), sd=(1.0, 0.03, 0.04)), 10) for s in range(20)]
    assert sum(e is not None and 32 <= e["turn"] <= 50 for e in found) >= 18


@pytest.mark.parametrize("name, curve", [("still falling", blog(1000)), ("fallen, then flat", blog(1600, rises=False)),
                                         ("reward still rising", blog(1600, rising_reward=True))])
def test_no_turn_where_there_is_none(name, curve):
    for seed in range(8):
        for phi in (0.0, 0.5):
            assert first(noisy(seed, *curve, phi=phi), 50) is None, (name, seed, phi)


def test_no_turn_when_length_rises_and_nothing_is_cut_off():
    length, _, reward = blog()
    assert all(first(noisy(s, length, np.full(1600, 0.05), reward, together=0.0), 50) is None for s in range(8))


@pytest.mark.parametrize("window, n, seeds", [(50, 2000, 90), (10, 100, 210), (24, 480, 90)])
def test_flat_noise_is_no_turn(window, n, seeds):
    """Thousands of looks at each curve; a third of them with noise that is correlated from step to step."""
    flat = np.full(n, 4000.0), np.full(n, 0.05), np.full(n, 0.5)
    false = [s for s in range(seeds) if first(noisy(s, *flat, phi=(0, 0.3, 0.6)[s % 3]), window)]
    assert len(false) <= 1, false


def test_the_rule_sees_only_the_past():
    curves = noisy(3, *blog())
    e = first(curves, 50)
    cut = [x[:e["seen_at"]] for x in curves]
    assert first(cut, 50) == e and first([x[:-1] for x in cut], 50) is None
    changed = [x.copy() for x in curves]
    for x in changed[1:]:
        x[e["seen_at"]:] = 0
    assert first(changed, 50) == e


def test_looks_may_be_made_in_portions():
    curves, start, floor, e = noisy(4, *blog()), 0, 0, None
    for n in range(0, 1600, 37):
        e, floor = schedule.first_turn(*(x[:n] for x in curves), 50, start, floor)
        start = n
        if e:
            break
    assert e == first(curves, 50)


def test_window_noise_knows_correlation_and_ignores_trends():
    rng = np.random.default_rng(0)
    for phi in (0.0, 0.6):
        x = noise(rng, 20000, phi)
        true = np.convolve(x, np.ones(50) / 50, "valid").std()
        guesses = [schedule.window_noise(x[i:i + 600] + 0.01 * np.arange(600), 50) for i in range(0, 19000, 600)]
        assert np.median(guesses) == pytest.approx(true, rel=0.2)
    assert schedule.window_noise(np.arange(100.0), 10) == 0.0


# ---------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------

GRPO = '''
"""A stand-in: the files of grpo.py, a step in a few milliseconds. Lengths fall, turn at step 40 and rise."""
import argparse, json, os, shutil, signal, sys, time, types
if "torch" not in sys.modules:
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: 0))
def parse_args(argv):
    p = argparse.ArgumentParser(allow_abbrev=False)
    defaults = dict(model="", ref_model=None, max_len=8, steps=9, group=2, out="", seed=0, save_every=5, keep=2,
                    lr=1e-6, style="r1", engine="torch", dtype="auto", max_seqs=0, examples=None, ms=4, optimizer_from=None,
                    eval_every=0, eval_n=8, exit=0)
    for name, default in defaults.items():
        p.add_argument("--" + name, default=default, type=type(default) if default is not None else str)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--no_chat", action="store_true")
    return p.parse_args(argv)
def main():
    a = parse_args(sys.argv[1:])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    stop = []
    for n in (signal.SIGTERM, signal.SIGINT):
        signal.signal(n, lambda n, f: stop.append(n))
    if rank:
        return
    folder = os.path.join(a.out, "checkpoints")
    os.makedirs(folder, exist_ok=True)
    json.dump({"options": vars(a), "world": world}, open(os.path.join(a.out, "config.json"), "w"))
    names = lambda: sorted(n for n in os.listdir(folder) if n.isdigit())
    weights = float(open(os.path.join(a.model, "w")).read())
    moments = open(os.path.join(a.optimizer_from, "optim")).read() if a.optimizer_from else "fresh"
    step, path = 0, os.path.join(a.out, "metrics.jsonl")
    if names():
        step = int(names()[-1])
        weights = float(open(os.path.join(folder, names()[-1], "hf", "w")).read())
    lines = [l for l in open(path)] if os.path.exists(path) else []
    open(path, "w").writelines(l for l in lines if step and json.loads(l)["step"] <= step)
    def save():
        tmp = os.path.join(folder, "%06d.tmp" % step)
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp + "/hf")
        open(tmp + "/hf/w", "w").write(repr(weights))
        open(tmp + "/optim", "w").write(f"{moments}+{a.out[-6:]}")
        os.rename(tmp, tmp[:-4])
        for old in names()[:-a.keep]:
            shutil.rmtree(os.path.join(folder, old))
    while step < a.steps:
        time.sleep(a.ms / 1000)
        step += 1
        weights = (weights * 1.1 + a.seed + step) % 97
        wiggle = (step * 7919 % 13 - 6) / 12
        length = 100 - step if step < 40 else 60 + (step - 40)
        truncated = abs(length - 50) / 500 if step >= 40 else .02 + wiggle / 1000
        line = dict(step=step, length_mean=length + wiggle, truncated=truncated, tokens=100 + step, tokens_trained=90,
                    reward=min(step, 30) / 100 + wiggle / 50, seconds=2.0, seconds_generate=1.5, seconds_update=0.5,
                    tokens_total=step * 100, weights=weights)
        if a.eval_every and step % a.eval_every == 0:
            line |= dict(eval_reward=min(0.9, step * a.max_len / 400), eval_seconds=1.0)
        open(path, "a").write(json.dumps(line) + chr(10))
        print("step", step, flush=True)
        if step % a.save_every == 0 or step == a.steps or stop:
            save()
        if stop:
            return
    sys.exit(a.exit)
if __name__ == "__main__":
    main()
'''
EVALUATE = '''
import json, os, sys
argv = sys.argv[1:]
get = lambda name: argv[argv.index(name) + 1]
if "--table" in argv:
    names = [os.path.basename(x)[:-5] for x in argv if x.endswith(".json")]
    print("| model | pass@1 |", *(f"| {x} | 50.0 |" for x in names), sep=chr(10))
else:
    os.makedirs(get("--out"), exist_ok=True)
    json.dump(dict(name=get("--name"), model=get("--model"), tokens_generated=1000, seconds=36.0, argv=argv),
              open(os.path.join(get("--out"), get("--name") + ".json"), "w"))
'''


FIGURES = """
def draw(run, window=1):
    return [], {"figure 1": "a stand-in draws nothing"}
def transcripts(run):
    pass
"""


@pytest.fixture
def stage_hands(tmp_path):
    """A folder with the real schedule.py between stand-ins -> function that makes its command line."""
    code = tmp_path / "code"
    code.mkdir()
    shutil.copy(ROOT / "schedule.py", code)
    (code / "grpo.py").write_text(GRPO)
    (code / "evaluate.py").write_text(EVALUATE)
    (code / "figures.py").write_text(FIGURES)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/w").write_text("1.0")

    def command(*options, run="run"):
        return [sys.executable, str(code / "schedule.py"), "--run", str(tmp_path / run), *map(str, options)]

    command.start = ["--model", tmp_path / "model", "--stages", "8:6:4,16:5:8"]
    command.folder = tmp_path / "run"
    return command


QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
PIPED = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def call(cmd, code=0, timeout=120):
    done = subprocess.run(cmd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def plan_of(run):
    return json.loads((Path(run) / "plan.json").read_text())


def options_of(run, stage):
    return json.loads((Path(run) / stage / "config.json").read_text())["options"]


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "did not happen"
        time.sleep(0.01)


def steps_done(run, stage):
    return len(schedule.read_metrics(str(Path(run) / stage)))


def test_published_schedule():
    stages = schedule.parse_stages(schedule.PUBLISHED)
    shapes = [(s["max_len"], s["steps"], s["group"]) for s in stages]
    assert shapes == [(8192, 1040, 8), (16384, 480, 16), (24576, 200, 16)]
    assert [s["extra"]["save_every"] for s in stages] == ["20", "10", "10"]
    o, _, _ = schedule.options([])
    assert (o["switch"], o["reference"], o["optimizer"]) == ("steps", "stage", "fresh")
    assert (o["bench_n"], o["bench_max_tokens"]) == (16, 32768)
    first = schedule.stage_command("r", schedule.new_plan(o | {"gpus": 8}), 1)
    assert first[first.index("--model") + 1] == schedule.MODEL and "--ref_model" not in first


def test_two_stages(stage_hands):
    text = call(stage_hands(*stage_hands.start, "--lr", "0.5", "--benchmarks", "aime24", "--bench_n", 4))
    run = stage_hands.folder
    plan, one, two = plan_of(run), options_of(run, "stage1"), options_of(run, "stage2")
    assert [s["status"] for s in plan["stages"]] == ["done", "done"] and [s["picked"] for s in plan["stages"]] == [6, 5]
    assert [(x["max_len"], x["group"], x["lr"]) for x in (one, two)] == [(8, 4, 0.5), (16, 8, 0.5)]
    assert two["model"] == str(run / "stage1/checkpoints/000006/hf")
    assert two["ref_model"] is None and two["optimizer_from"] is None
    assert two["seed"] == one["seed"] + 1  # a new data order
    assert sorted(os.listdir(run / "stage1/checkpoints")) == ["000006", "latest"]  # the others are not needed any more
    assert os.listdir(run / "stage1/checkpoints/000006") == ["hf"]
    assert "optim" in os.listdir(run / "stage2/checkpoints/000005")
    assert plan["evals"] == ["base", "stage1", "stage2"] and plan["finished"]
    report = (run / "report.md").read_text()
    for words in ("| stage2 | 50.0 |", "stage1: 8 tokens of context", "figure 1: a stand-in draws nothing", "3,800",
                  "process-hours"):
        assert words in report
    assert "done:" in text
    before = (run / "stage2/metrics.jsonl").read_text()
    assert "grpo.py" not in call(stage_hands())  # nothing left to do
    assert (run / "stage2/metrics.jsonl").read_text() == before


def test_handover_options(stage_hands):
    call(stage_hands(*stage_hands.start, "--reference", "start", "--optimizer", "carry", "--no_eval", "--seed", 7))
    run = stage_hands.folder
    two = options_of(run, "stage2")
    assert two["ref_model"] == str(run.parent / "model") and two["seed"] == 8
    assert two["optimizer_from"] == str(run / "stage1/checkpoints/000006")
    assert (run / "stage2/checkpoints/000005/optim").read_text() == "fresh+stage1+stage2"
    assert not (run / "eval").exists()


def test_one_stage_and_options_for_one_stage(stage_hands):
    call(stage_hands("--model", stage_hands.folder.parent / "model", "--stages", "8:4:4:lr=0.25", "--lr", "0.5",
                     "--no_eval"))
    assert options_of(stage_hands.folder, "stage1")["lr"] == 0.25 and plan_of(stage_hands.folder)["finished"]


@pytest.mark.parametrize("options, words", [
    (["--stages", "8:4"], "CONTEXT:STEPS:SAMPLES"),
    (["--stages", "8:4:1"], "at least 2 samples"),
    (["--stages", "8:4:4:lr"], "OPTION=VALUE"),
    (["--stages", "8:4:4,"], "is not CONTEXT"),
    (["--max_len", "9"], "use --stages"),
    (["--out", "x"], "use --run"),
    (["--learning_rate", "9"], "unrecognized arguments: --learning_rate 9"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--bench_n", "0"], "--bench_n must be at least 1"),
    (["--switch", "auto", "--save_every", "11"], "--save_every 11 must be at most 10"),
    (["--switch", "never"], "invalid choice"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refused_before_work_starts(stage_hands, options, words):
    assert words in call(stage_hands(*stage_hands.start, *options), 2)
    assert not stage_hands.folder.exists()


def test_plain_command_without_a_gpu_offers_the_toy(stage_hands):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text = call(stage_hands(), 2)
    assert "no GPU was found" in text and "--preset toy" in text and "--dry_run" in text
    assert not stage_hands.folder.exists()


# ---------------------------------------------------------------------------------------------------------------
# Kills, signals, locks, changes
# ---------------------------------------------------------------------------------------------------------------

LONG = ["--stages", "8:30:4,16:40:8", "--no_eval", "--ms", "40"]


def test_killed_anywhere_goes_on_to_the_same_numbers(stage_hands):
    """kill -9 of schedule.py in stage 1, in stage 2, and between the two at each write of the plan."""
    model = ["--model", stage_hands.folder.parent / "model"]
    call(stage_hands(*model, *LONG, "--ms", "1", run="whole"))
    whole, run = stage_hands.folder.parent / "whole", stage_hands.folder
    for stage, step in (("stage1", 12), ("stage2", 7), ("stage2", 23)):
        p = subprocess.Popen(stage_hands(*(model + LONG if stage == "stage1" else ())), **QUIET)
        wait_for(lambda: steps_done(run, stage) >= step)
        p.kill()
        p.wait()
    call(stage_hands())
    for stage in ("stage1", "stage2"):
        assert metrics(run / stage) == metrics(whole / stage)
    for status, picked in (("training", None), ("trained", 30), ("done", 30)):  # what a kill between the stages leaves
        other = stage_hands.folder.parent / f"between_{status}"
        shutil.copytree(whole, other)
        shutil.rmtree(other / "stage2")
        plan = plan_of(other)
        plan["stages"][0] |= dict(status=status, picked=picked)
        plan["stages"][1] |= dict(status="waiting", picked=None)
        (other / "plan.json").write_text(json.dumps(plan))
        call(stage_hands(run=other.name))
        assert metrics(other / "stage2") == metrics(whole / "stage2")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_and_says_how_to_go_on(stage_hands, number, code):
    run = stage_hands.folder
    p = subprocess.Popen(stage_hands("--model", run.parent / "model", *LONG), **PIPED)
    wait_for(lambda: steps_done(run, "stage1") >= 7)
    p.send_signal(number)
    text = p.communicate(timeout=60)[0]
    assert p.returncode == code and f"python schedule.py --run {run} goes on" in text
    done = steps_done(run, "stage1")
    assert f"{done:06d}" in os.listdir(run / "stage1/checkpoints")  # saved although it is not on the grid
    assert plan_of(run)["stages"][0]["status"] == "training" and plan_of(run)["action"] is None


def test_one_schedule_at_a_time(stage_hands):
    run = stage_hands.folder
    p = subprocess.Popen(stage_hands("--model", run.parent / "model", *LONG), stdout=subprocess.DEVNULL)
    wait_for(lambda: steps_done(run, "stage1") >= 1)
    assert f"is in use by process {p.pid}" in call(stage_hands(), 2)
    p.terminate()
    p.wait(timeout=60)


def test_a_program_left_behind_keeps_the_lock_until_it_has_saved(stage_hands, tmp_path):
    run = tmp_path / "locked"
    run.mkdir()
    (run / "lock").write_text("999999999")  # the process that wrote it is gone
    held = open(run / "lock", "r+")
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="in use by process 999999999 or a program it started"):
        schedule.take_lock(str(run), patience=0.1)
    held.close()
    schedule.take_lock(str(run), patience=0.1).close()


def test_a_failed_program_stops_the_schedule(stage_hands):
    text = call(stage_hands(*stage_hands.start, "--no_eval", "--exit", 3), 1)
    assert "grpo.py ended with exit code 3" in text and "goes on from here" in text
    assert plan_of(stage_hands.folder)["stages"][0]["status"] == "training"


def test_changed_options(stage_hands):
    """What would alter finished work is refused, and the plan stays as it was; the rest is reported and taken."""
    run = stage_hands.folder
    call(stage_hands(*stage_hands.start))
    before = (run / "plan.json").read_text()
    for options, words in ((["--model", "other"], "was begun with --model"), (["--seed", 3], "was begun with --seed 0"),
                           (["--stages", "8:7:4,16:5:8"], "stage 1 of"), (["--stages", "8:6:4"], "stage 2 of"),
                           (["--bench_n", 3], "two protocols"),
                           (["--reference", "start"], "was begun with --reference")):
        assert words in call(stage_hands(*options), 2)
        assert (run / "plan.json").read_text() == before
    text = call(stage_hands("--stages", "8:6:4,16:5:8,32:4:2", "--lr", "0.125", "--gpu_price", 2))
    for words in ("changed from here on: --stages", "--gpu_price None -> 2.0", "finished stages keep"):
        assert words in text
    assert options_of(run, "stage3")["lr"] == 0.125 and options_of(run, "stage2")["lr"] == 1e-6
    assert options_of(run, "stage3")["model"] == str(run / "stage2/checkpoints/000005/hf")
    assert plan_of(run)["evals"] == ["base", "stage1", "stage2", "stage3"]


def test_a_stage_cannot_become_shorter_than_it_is(stage_hands):
    run = stage_hands.folder
    p = subprocess.Popen(stage_hands("--model", run.parent / "model", *LONG), **QUIET)
    wait_for(lambda: (run / "stage1/checkpoints/000015").exists())
    p.terminate()
    p.wait(timeout=60)
    assert "has done" in call(stage_hands("--stages", "8:9:4,16:40:8"), 2)
    call(stage_hands("--stages", "8:35:4,16:10:8", "--ms", 1))
    assert [s["picked"] for s in plan_of(run)["stages"]] == [35, 10]


# ---------------------------------------------------------------------------------------------------------------
# The switch, end to end
# ---------------------------------------------------------------------------------------------------------------

def test_auto_switch_goes_back_to_before_the_turn(stage_hands):
    """The stand-in turns at step 40 of 200. Its checkpoints, four at a time, are gone when that is seen."""
    call(stage_hands("--model", stage_hands.folder.parent / "model", "--stages", "8:200:4,16:10:4", "--switch", "auto",
                     "--no_eval", "--ms", 20))
    run = stage_hands.folder
    plan = plan_of(run)
    e, picked = plan["stages"][0]["evidence"], plan["stages"][0]["picked"]
    assert 33 <= e["turn"] <= 42 and e["seen_at"] < 80 and steps_done(run, "stage1") < 199
    assert picked % 5 == 0 and e["turn"] - 6 < picked < e["turn"]
    assert os.listdir(run / "stage1/checkpoints") and not (run / "stage1/kept").exists()
    row = next(r for r in schedule.read_metrics(str(run / "stage1")) if r["step"] == picked)
    assert float((run / f"stage1/checkpoints/{picked:06d}/hf/w").read_text()) == row["weights"]
    assert options_of(run, "stage2")["model"] == str(run / f"stage1/checkpoints/{picked:06d}/hf")
    last = plan["stages"][1]
    assert last["evidence"] is None and last["picked"] == 10  # the last stage ends at its steps
    report = (run / "report.md").read_text()
    assert f"the turn is at step {e['turn']}, seen at step {e['seen_at']}" in report and "reward flat" in report


def test_auto_switch_is_the_same_after_a_kill(stage_hands):
    run = stage_hands.folder
    options = ["--model", run.parent / "model", "--stages", "8:100:4,16:5:4", "--switch", "auto", "--optimizer",
               "carry", "--no_eval", "--ms", 20]
    call(stage_hands(*options, run="whole"))
    for step in (28, 47):
        p = subprocess.Popen(stage_hands(*options), **QUIET)
        wait_for(lambda: steps_done(run, "stage1") >= step)
        p.kill()
        p.wait()
    call(stage_hands())
    whole, mine = plan_of(run.parent / "whole"), plan_of(run)
    assert mine["stages"] == whole["stages"] and metrics(run / "stage2") == metrics(run.parent / "whole/stage2")
    assert (run / "stage2/checkpoints/000005/optim").read_text() == "fresh+stage1+stage2"


def test_staged_against_direct(stage_hands):
    """One command, and again after a kill: for each seed a staged run and a direct one with as many tokens."""
    run = stage_hands.folder
    options = ["--model", run.parent / "model", "--stages", "10:20:4,20:20:6", "--ablation", 3, "--eval_every", 5]
    p = subprocess.Popen(stage_hands(*options, "--ms", 10), **QUIET)
    wait_for(lambda: steps_done(run / "seed1000/staged", "stage1") >= 9)
    p.kill()
    p.wait()
    text = call(stage_hands())
    for seed in (0, 1000, 2000):
        staged, direct = (schedule.validation_curve(str(run / f"seed{seed}" / kind))[1] for kind in ("staged",
                                                                                                     "direct"))
        assert staged == 4420 <= direct and options_of(run / f"seed{seed}/direct", "stage1")["max_len"] == 20
        row = next(x for x in text.splitlines() if x.startswith(f"| {seed} |"))
        assert row.split(" | ")[1:3] == ["4420", "0.717"]  # the mean of 0.5, 0.75 and 0.9
    assert (run / "ablation.md").read_text() in text and "3 of 3 direct runs reached" in text
    assert options_of(run / "seed1000/direct", "stage1")["seed"] == 1000


def test_two_nodes_follow_one_plan(stage_hands):
    """Two schedule.py, as on two nodes: the second starts what the first's plan says, each time under torchrun."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = stage_hands.folder
    friends = ["--gpus", 1, "--nnodes", 2, "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_backend", "c10d"]
    lead = subprocess.Popen(stage_hands(*stage_hands.start, *friends, "--no_eval"), **PIPED)
    follower = subprocess.Popen(stage_hands(*friends, "--node_rank", 1), **PIPED)
    text = lead.communicate(timeout=100)[0]
    other = follower.communicate(timeout=30)[0]
    assert lead.returncode == 0, text[-3000:]
    assert follower.returncode == 0 and other.count("$ ") == 2, other[-3000:]
    assert json.loads((run / "stage2/config.json").read_text())["world"] == 2


# ---------------------------------------------------------------------------------------------------------------
# The ledger
# ---------------------------------------------------------------------------------------------------------------

def test_ledger_by_hand(tmp_path):
    o = schedule.options(["--gpus", "2", "--gpu_type", "A100-80", "--gpu_price", "1.5"])[0]
    plan = schedule.new_plan(o)
    for number, (world, steps, picked) in enumerate(((2, 3, 2), (4, 2, 2)), 1):
        folder = tmp_path / f"stage{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"world": world}))
        lines = [dict(step=0, eval_reward=0.1, eval_seconds=50.0)]
        lines += [dict(step=s, reward=0.5, tokens=100 * s, tokens_trained=80, seconds=600.0, seconds_generate=400.0,
                       seconds_update=100.0)
                  for s in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 9, "rew')
        plan["stages"][number - 1] |= dict(picked=picked, status="done")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/stage1.json").write_text(json.dumps(dict(tokens_generated=5000, seconds=360.0)))
    plan["evals"] = ["stage1"]
    one, two, score, total = schedule.ledger(str(tmp_path), plan)
    assert [one[k] for k in ("steps", "tokens", "past", "trained")] == [3, 600, 300, 240]
    assert (one["seconds"], one["generate"]) == (1800, 1200)
    assert one["validate"] == 50 and one["hours"] == pytest.approx((1800 + 50) * 2 / 3600)
    assert two["hours"] == pytest.approx((1200 + 50) * 4 / 3600) and score["hours"] == pytest.approx(0.2)
    assert total["tokens"] == 600 + 300 + 5000 and total["hours"] == pytest.approx(3700 / 3600 + 5000 / 3600 + 0.2)
    text = schedule.ledger_table([one, two, score, total], o)
    assert f"{total['hours'] * 1.5:,.2f} |" in text and "4,500" in text and "3,800" in text and "16,000" in text
    cpu = schedule.ledger_table([total], o | {"gpu_type": "cpu", "gpu_price": None})
    assert "process-hours" in cpu and "No price" in cpu


# ---------------------------------------------------------------------------------------------------------------
# The predictions, against reality
# ---------------------------------------------------------------------------------------------------------------

# the proportions of R1-Distill-Qwen-1.5B at a sixteenth of its width
SMALL = dict(hidden_size=96, intermediate_size=560, num_attention_heads=6, num_key_value_heads=1, num_hidden_layers=4,
             vocab_size=2048,
             max_position_embeddings=4096)


def shape_of(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    return schedule.model_shape(str(tmp_path))


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("qwen2", True), ("llama", True), ("gemma3", True)])
def test_parameters_and_states_are_exact(kind, tied, tmp_path):
    model = make_model(kind, tied)
    m = shape_of(model, tmp_path)
    assert m["parameters"] == sum(p.numel() for p in model.parameters()) and m["tied"] == tied
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1]
    assert schedule.state_bytes(m) == sum(t.numel() * t.element_size() for t in tensors)


def test_the_published_model_without_a_network():
    m = schedule.model_shape(schedule.MODEL)
    assert m["parameters"] == 1_777_088_000 and m["layer"] == 46_797_824
    assert schedule.kv_bytes(m, 1, 2) == 28_672
    assert schedule.layer_bytes(m, 1, 1) == 47_616
    assert schedule.activation_bytes(m, 1, 2, False) / 2**20 == pytest.approx(2.6, abs=0.06)
    assert schedule.forward_flops(m, 4000) == pytest.approx(13.7e12, rel=0.01)
    assert schedule.forward_flops(m, 24576) == pytest.approx(128e12, rel=0.01)
    assert schedule.state_bytes(m) / 2**30 == pytest.approx(26.5, abs=0.05)


def test_kv_cache_of_both_engines_tables(tmp_path):
    """The slots of rollout.TorchEngine and the cache of transformers take what `kv_bytes` says."""
    for kind in ("qwen2", "gemma3"):
        model = make_model(kind).eval()
        m = shape_of(model, tmp_path)
        cache = model(torch.arange(30)[None] % 50, use_cache=True).past_key_values
        real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        # transformers keeps window - 1 past tokens of a sliding layer: the newest one is added when it is used
        slack = m["sliding"] * 2 * m["kv"] * 4
        assert schedule.kv_bytes(m, 30, 4) - slack <= real <= schedule.kv_bytes(m, 30, 4), kind
    model = make_model("qwen2")
    m = shape_of(model, tmp_path)
    slots = rollout.Slots(3, 20, "cpu", torch.float32)
    slots.rows, slots.positions = torch.tensor([0]), torch.tensor([0])
    for layer in range(m["layers"]):
        slots.write(layer, torch.zeros(1, 1, m["kv"]), torch.zeros(1, 1, m["kv"]))
    real = sum(t.numel() * t.element_size() for c in (slots.k, slots.v) for t in c.values())
    assert real == 3 * schedule.kv_bytes(m, 20, 4)


def saved_bytes(p, batch):
    """Bytes that autograd keeps between forward and backward, parameters apart."""
    own, kept = {q.untyped_storage().data_ptr() for q in p.parameters()}, {}

    def pack(x):
        s = x.untyped_storage()
        if s.data_ptr() not in own:
            kept[s.data_ptr()] = s.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = p(batch)
    return sum(kept.values()), out


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_activations_of_a_layer(kind, tmp_path):
    """One more layer, with and without recomputation: the difference of two depths leaves embedding and head out."""
    batch = policy.pack_row([([1] * 64, [2] * 448)] * 2, share=False)
    real, said = {}, {}
    for recompute in (False, True):
        for layers in (2, 4):
            model = make_model(kind, **SMALL | {"num_hidden_layers": layers})
            m = shape_of(model, tmp_path)
            real[layers], _ = saved_bytes(policy.Policy(model, recompute=recompute), batch)
            said[layers] = schedule.activation_bytes(m, 1024, 4, recompute)
        grown, predicted = real[4] - real[2], said[4] - said[2]
        if recompute:
            assert grown == predicted  # exactly the residual stream
        else:  # off a GPU, attention keeps repeated keys and values as well
            assert predicted <= grown <= 1.2 * predicted, (grown, predicted)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest sum of live allocations made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.track, out)
        return out

    def track(self, x):
        s = x.untyped_storage()
        key, size = s._cdata, s.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.seen.discard(key)
            self.now -= size
        weakref.finalize(s, gone)


def test_peak_of_logit_tiles():
    """Forward and backward of token_logprobs at a vocabulary that dwarfs the rest."""
    m = dict(vocab=20000, hidden=64)
    hidden = torch.randn(512, 64, requires_grad=True)
    head = torch.randn(20000, 64, requires_grad=True)
    with Peak() as peak:
        logp, _ = policy.token_logprobs(hidden, head, torch.randint(0, 20000, (512,)), 0.6, chunk=128)
        logp.sum().backward()
    said = schedule.tile_bytes(m, 128, 4)
    assert 0.75 * said < peak.peak < 1.3 * said, (peak.peak, said)


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_an_update(recompute, tmp_path):
    """All live allocations of forward and backward of a whole micro-batch, gradients of the weights apart."""
    model = make_model(**SMALL | {"num_hidden_layers": 8})
    m = shape_of(model, tmp_path)
    p = policy.Policy(model, recompute=recompute, chunk=256)
    for q in p.parameters():
        q.grad = torch.zeros_like(q)
    batch = policy.pack_row([([1] * 64, [2] * 448)] * 4, share=False)
    with Peak() as peak:
        p(batch)[0].sum().backward()
    said = schedule.activation_bytes(m, 2048, 4, recompute) + schedule.tile_bytes(m, 256, 4)
    assert 0.6 * said < peak.peak < 1.25 * said, (peak.peak, said)


RESOLVED = dict(dtype="auto", max_len=8192, max_prompt_len=1024, token_budget=0, recompute=-1, prompts=128, group=8,
                engine="auto", max_seqs=0, gpu_memory=0.6, sleep=1, kl_coef=0.001, logit_chunk=1024, mean_len=4000,
                updates=2, steps=10)


def test_refusals_name_a_value_that_fits():
    m = schedule.model_shape(schedule.MODEL)
    cases = [("A100-80", 8, {}, None), ("A100-80", 1, {}, None), ("A100-40", 8, {}, None),
             ("RTX4090", 1, {}, "--gpus 4"),
             ("RTX4090", 4, {"gpu_memory": 0.7}, "--gpu_memory 0.6"),
             ("A100-40", 8, {"gpu_memory": 0.1}, "--gpu_memory 0.15"),
             ("H100-80", 8, {"token_budget": 400000, "max_len": 100000}, "--token_budget"),
             ("A100-80", 8, {"recompute": 0}, "--recompute 1"),
             ("H100-80", 1, {"max_len": 131072}, "the context in --stages"),
             ("A100-80", 8, {"token_budget": 100}, "--token_budget 9216")]
    for kind, world, change, wanted in cases:
        a, gpu = RESOLVED | change, schedule.GPUS[kind]
        why = schedule.trouble(m, a, gpu, world)
        if wanted is None:
            assert why is None, (kind, world, why)
            continue
        assert why, (kind, world, change)
        offer = schedule.remedies(m, a, gpu, world)
        assert wanted in offer, (kind, world, change, offer)
        for choice in offer.split(" or "):  # every value offered does fit
            words = choice.replace("the context in --stages to", "--max_len").replace(" (over all nodes)", "").split()
            fix = {k[2:]: float(v) if "." in v else int(v) for k, v in zip(words[::2], words[1::2])}
            w = fix.pop("gpus", world)
            assert schedule.trouble(m, a | fix, gpu, w) is None, (choice, offer)


def test_time_of_a_step():
    """84 PFLOP for train and two log-prob passes over 1,024 sequences of 4,000 tokens: about 85 s on 8 A100."""
    m, gpu = schedule.model_shape(schedule.MODEL), schedule.GPUS["A100-80"]
    prompt, schedule.PROMPT = schedule.PROMPT, 0
    try:
        t = schedule.step_seconds(m, RESOLVED | {"updates": 1000}, gpu, 8)
        assert t["update"] + t["logprobs"] == pytest.approx(84.4, rel=0.02)
        assert t["generate"] == pytest.approx(1024 * 4000 / 6000 / 8, rel=1e-3)
        longer = schedule.step_seconds(m, RESOLVED | {"max_len": 24576}, gpu, 32)
        assert longer["generate"] == pytest.approx(24576 / 110, rel=1e-3)  # bound by the longest sequence
    finally:
        schedule.PROMPT = prompt


def test_dry_run_prints_and_refuses(capsys, tmp_path):
    run = tmp_path / "run"
    options = ["--dry_run", "--gpus", "4", "--gpu_type", "RTX4090", "--gpu_memory", "0.7", "--run", str(run)]
    assert schedule.main(options) == 2
    out, err = capsys.readouterr()
    assert "1,777,088,000 parameters" in out and "assumed:" in out
    assert "stage1 cannot run" in err and "--gpu_memory 0.6" in err and not run.exists()


# ---------------------------------------------------------------------------------------------------------------
# The real programs
# ---------------------------------------------------------------------------------------------------------------

def test_real_programs_killed_and_continued(tiny, problems, tmp_path):
    """grpo.py, evaluate.py and figures.py themselves on a tiny model: kill -9 in stage 2, continue, and every metric is
    that of a stage 2 which was left alone."""
    start = [sys.executable, str(ROOT / "schedule.py"), "--run"]
    rest = ["--style", "plain", "--engine", "torch", "--prompts", "6", "--lr", "1e-3", "--show_every", "0", "--data",
            problems, "--save_every", "1"]
    run = tmp_path / "run"
    p = subprocess.Popen([*start, str(run), "--model", tiny, "--stages", "16:2:4,24:3:4", "--benchmarks", problems,
                          "--bench_n", "2", "--bench_max_tokens", "24", "--no_base_eval", *rest], **QUIET)
    wait_for(lambda: steps_done(run, "stage2") >= 1, 240)
    p.kill()
    p.wait()
    call([*start, str(run)], timeout=240)
    call([sys.executable, str(ROOT / "grpo.py"), "--model", str(run / "stage1/checkpoints/000002/hf"), "--max_len",
          "24",
          "--steps", "3", "--group", "4", "--seed", "1", "--out", str(tmp_path / "alone"), *rest])
    assert len(metrics(run / "stage2")) == 3 and metrics(run / "stage2") == metrics(tmp_path / "alone")
    report = (run / "report.md").read_text()
    assert "| stage2" in report and "style plain" in report and "figures/length_and_reward.png" in report
    assert (run / "figures/length_and_reward.png").exists() and (run / "transcripts.html").exists()
    assert plan_of(run)["evals"] == ["stage1", "stage2"]


def test_the_optimizer_may_be_carried_over(tiny, problems, tmp_path):
    """Adam's step count goes on where the first run left it; by default it starts anew."""
    one, two, fresh = (tmp_path / name for name in ("one", "two", "fresh"))
    run(command(tiny, problems, one, "--steps", 2, "--updates", 1))
    model = str(one / "checkpoints/000002/hf")
    run(command(model, problems, two, "--steps", 1, "--updates", 1, "--optimizer_from", one / "checkpoints/000002"))
    run(command(model, problems, fresh, "--steps", 1, "--updates", 1))

    def adam_steps(out, step):
        reader = dcp.FileSystemReader(out / f"checkpoints/{step:06d}")
        names = [k for k in reader.read_metadata().state_dict_metadata if k.endswith(".step")]
        state = {k: torch.zeros(()) for k in names}
        dcp.load(state, checkpoint_id=out / f"checkpoints/{step:06d}")
        return {float(v) for v in state.values()}

    assert adam_steps(one, 2) == {2.0} and adam_steps(two, 1) == {3.0} and adam_steps(fresh, 1) == {1.0}
