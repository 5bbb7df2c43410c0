"""schedule.py: the turning point on curves, plans and refusals, kills, two nodes, the ledger, predictions.

Most runs use stand-ins for grpo.py and evaluate.py that write the same files in milliseconds."""
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, metrics, run

import common
import schedule

# ----- the turning point, on curves -------------------------------------------------------------------------


def noise(rng, n, phi):
    """AR(1), standard deviation 1."""
    x = rng.normal(size=n)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + math.sqrt(1 - phi * phi) * x[i]
    return x


def noisy(seed, length, truncated, reward, sd=(200, 0.008, 0.03), phi=0.0, together=0.7):
    """Curves with noise; lengths and truncation move together, as they do in a run."""
    rng = np.random.default_rng(seed)
    a, b, c = (noise(rng, len(length), phi) for _ in range(3))
    cut = truncated + sd[1] * (together * a + math.sqrt(1 - together ** 2) * b)
    return np.arange(1, len(length) + 1), length + sd[0] * a, np.clip(cut, 0, 1), reward + sd[2] * c


def blog(n=1600, turn=1000, rising_reward=False, rises=True):
    """The published 8K stage: length 5,500 -> 3,500 by step 1,000 and up again, truncation 4.2 -> 6.5 %,
    reward 0.46 -> 0.58 and flat."""
    t = np.arange(n)
    down = (np.exp(-3 * np.minimum(t, turn) / turn) - np.exp(-3)) / (1 - np.exp(-3))
    after = np.maximum(t - turn, 0) * rises
    reward = 0.46 + 1.2e-4 * t if rising_reward else 0.46 + 0.12 * (1 - down)
    return 3500 + 2000 * down + after, 0.042 + 0.023 * after / 600, reward


def toy(n=80, turn=40):
    t = np.arange(n)
    down, up = np.clip(t / turn, 0, 1), np.clip((t - turn) / (n - turn), 0, 1)
    return 30 - 12 * down + 9 * up, 0.25 - 0.15 * down + 0.2 * up, 0.2 + 0.3 * down


def count(curve, window, seeds=range(20), phis=(0.0, 0.3, 0.5), turns=range(10_000), **how):
    """How many of the curves, one for each seed and phi, have a turn among `turns`."""
    found = [schedule.turning_point(*noisy(s, *curve, phi=phi, **how), window) for s in seeds for phi in phis]
    return sum(e is not None and e["turn"] in turns for e in found)


LAPTOP = {"phis": [0.0], "sd": (1.0, 0.03, 0.04), "turns": range(32, 51)}
NOTHING_CUT = blog()[0], np.full(1600, 0.05), blog()[2]


@pytest.mark.slow
@pytest.mark.parametrize("curve, window, how, least, most", [
    (blog(), 50, {"turns": range(851, 1120)}, 57, 60),
    (toy(), 8, LAPTOP, 20, 20), (toy(), 10, LAPTOP, 20, 20),
    (blog(1000), 50, {}, 0, 2), (blog(rises=False), 50, {}, 0, 2), (blog(rising_reward=True), 50, {}, 0, 2),
    (NOTHING_CUT, 50, {"phis": [0.0], "together": 0.0}, 0, 0)],
    ids=["published", "laptop", "laptop, window 10", "still falling", "fallen, then flat",
         "reward still rising", "length rises and nothing is cut off"])
def test_a_turn_is_found_where_there_is_one(curve, window, how, least, most):
    assert least <= count(curve, window, **how) <= most


@pytest.mark.slow
def test_flat_noise_is_no_turn():
    """Thousands of looks at each of 195 curves; two thirds of them with noise that is correlated."""
    false = 0
    for window, n in ((50, 2000), (10, 100), (24, 480)):
        flat = np.full(n, 4000.0), np.full(n, 0.05), np.full(n, 0.5)
        false += sum(count(flat, window, range(i, 65, 3), [phi]) for i, phi in enumerate((0.0, 0.3, 0.6)))
    assert false <= 1


@pytest.mark.parametrize("curve, sd, window", [(blog(), (200, 0.008, 0.03), 50), (toy(), (1, 0.03, 0.04), 8)])
def test_the_rule_sees_only_the_past(curve, sd, window):
    """The same answer from the first look that gives one, from any later one, and whatever comes after."""
    curves = noisy(3, *curve, sd=sd)
    e = schedule.turning_point(*curves, window)
    seen = e["seen_at"]
    assert schedule.turning_point(*(x[:seen] for x in curves), window) == e
    for n in range(seen - 6, seen):
        assert schedule.turning_point(*(x[:n] for x in curves), window) is None
    changed = [x.copy() for x in curves]
    for x in changed[1:]:
        x[seen:] = 7
    assert schedule.turning_point(*changed, window) == e
    assert e["before"][0] == e["turn"] and e["before"][1] < e["after"][0] and e["after"][1] == seen
    json.dumps(e)
    text = schedule.describe_turn(schedule.turning_point(*noisy(0, *toy(), sd=(1.0, 0.03, 0.04)), 8))
    for words in ("had become shorter, from 29.3 tokens", "length 19.5 -> ", "grow again", "hardly pays"):
        assert words in text


# ----- stand-ins --------------------------------------------------------------------------------------------

GRPO = '''
"""Writes the files of grpo.py, a step in a few milliseconds. Lengths fall, turn at step 40 and rise."""
import argparse, fcntl, json, os, shutil, signal, sys, time
from pathlib import Path
DEFAULTS = dict(model="", recompute=0, max_len=8, steps=9, seed=0, out="", save_every=5, keep=2, lr=1e-6,
                style="r1", instruction="", reward="", engine="torch", dtype="auto", max_seqs=0, examples="",
                ms=4, exit=0, optimizer_from="", eval_every=0, eval_n=8, resume=False, no_chat=False)
OPTIONS = {"": [("group", int, 2, 2, ""), *((k, type(v), v, None, "") for k, v in DEFAULTS.items())]}
GONE = {}
def parse_args(argv):
    p = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind, default, _, _ in OPTIONS[""]:
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        p.add_argument("--" + name, default=default, **how)
    a = p.parse_args(argv)
    return a if a.group > 1 else p.error("--group must be at least 2")
def main():
    a, signals = parse_args(sys.argv[1:]), []
    for n in (signal.SIGTERM, signal.SIGINT):
        signal.signal(n, lambda n, f: signals.append(n))
    if int(os.environ.get("RANK", 0)):
        return
    out, folder, stop, log = (Path(a.out, name) for name in ("", "checkpoints", "stop", "metrics.jsonl"))
    folder.mkdir(parents=True, exist_ok=True)
    held = (out / "lock").open("a+")
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("in use")
    stop.unlink(missing_ok=True)
    world = int(os.environ.get("WORLD_SIZE", 1))
    (out / "config.json").write_text(json.dumps({"options": vars(a), "world": world}))
    saved = lambda: sorted(path for path in folder.iterdir() if path.name.isdigit())
    moments = Path(a.optimizer_from, "optim").read_text() if a.optimizer_from else "fresh"
    step = int(saved()[-1].name) if saved() else 0
    weights = float((saved()[-1] / "hf" if step else Path(a.model)).joinpath("w").read_text())
    lines = log.read_text().splitlines(True) if step and log.exists() else []
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    def save():
        tmp = folder / f"{step:06d}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        (tmp / "hf").mkdir(parents=True)
        (tmp / "hf/w").write_text(repr(weights))
        (tmp / "optim").write_text(f"{moments}+{out.name}")
        tmp.rename(tmp.with_suffix(""))
        for old in saved()[:-(a.keep or 2)]:
            shutil.rmtree(old) if a.keep else (old / "optim").unlink(missing_ok=True)
    while step < a.steps:
        time.sleep(a.ms / 1000)
        step += 1
        weights = (weights * 1.1 + a.seed + step) % 97
        wiggle = (step * 7919 % 13 - 6) / 12
        length = 100 - step if step < 40 else 60 + (step - 40)
        truncated = abs(length - 50) / 500 if step >= 40 else .02 + wiggle / 1000
        line = dict(step=step, length_mean=length + wiggle, truncated=truncated, tokens=100 + step,
                    weights=weights, reward=min(step, 30) / 100 + wiggle / 50, seconds=2.0)
        with log.open("a") as f:
            print(json.dumps(line), file=f)
        leave = signals or stop.exists()
        if step % a.save_every == 0 or step == a.steps or leave:
            save()
        if leave:
            sys.exit(128 + signals[0] if signals else 0)
    sys.exit(a.exit)
if __name__ == "__main__":
    main()
'''
EVALUATE = '''
import argparse, json, os, sys
FIVE = ["aime24"]
NAMES = ("model", "name", "out", "seed", "style", "engine", "dtype", "max_seqs", "benchmarks", "table", "n")
def parse_args(argv):
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--published", action="store_true")
    for name in NAMES:
        p.add_argument("-" + name if name == "n" else "--" + name, nargs="+", default=[])
    return p.parse_args(argv)
if __name__ == "__main__":
    a = parse_args(sys.argv[1:])
    if a.table:
        print("| model | pass@1 |", *(f"| {os.path.basename(x)[:-5]} | 50.0 |" for x in a.table), sep=chr(10))
    else:
        os.makedirs(a.out[0], exist_ok=True)
        json.dump(dict(name=a.name[0], model=a.model[0], tokens_generated=1000, seconds=36.0, argv=sys.argv),
                  open(os.path.join(a.out[0], a.name[0] + ".json"), "w"))
'''
FIGURES = 'def draw(run):\n    raise RuntimeError("a stand-in draws nothing")\n'


@pytest.fixture
def stage_hands(tmp_path, monkeypatch, capfd):
    """A folder with the real schedule.py between stand-ins. It has .command(*options) for a process of its
    own, and .call(*options, code=0) -> what was printed, in this process."""
    code = tmp_path / "code"
    code.mkdir()
    for name in ("schedule.py", "common.py", "predict.py"):
        (code / name).write_text((ROOT / name).read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/w").write_text("1.0")
    monkeypatch.setattr(schedule, "HERE", str(code))
    for name, text in (("grpo", GRPO), ("evaluate", EVALUATE), ("figures", FIGURES)):
        (code / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, code / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(schedule, name, module, raising=False)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    class Hands:
        folder, model = tmp_path / "run", tmp_path / "model"
        start = ("--model", model, "--stages", "8:6:4,16:5:8")

        def words(self, options, folder):
            return ["--run", str(folder or self.folder), *map(str, options)]

        def command(self, *options, folder=None):
            return [sys.executable, str(code / "schedule.py"), *self.words(options, folder)]

        def call(self, *options, code=0, folder=None):
            try:
                done = schedule.main(self.words(options, folder))
            except SystemExit as e:
                done = e.code
            out = "".join(capfd.readouterr()) + (done if isinstance(done, str) else "")
            assert (1 if isinstance(done, str) else done or 0) == code and "Traceback" not in out, out
            return out

    yield Hands()
    for n, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(n, handler)


PIPED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def plan_of(run):
    return json.loads((Path(run) / "plan.json").read_text())


def options_of(run, stage):
    return json.loads((Path(run) / stage / "config.json").read_text())["options"]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "did not happen"
        time.sleep(0.01)


def steps_done(run, stage):
    return len(schedule.read_metrics(str(Path(run) / stage)))


# ----- plans ------------------------------------------------------------------------------------------------

def test_published_schedules():
    for preset, shapes in (("deepscaler", [(8192, 1040, 8), (16384, 480, 16), (24576, 200, 16)]),
                           ("justrl", [(15360, 4380, 8)]), ("toy", [(40, 70, 8), (80, 50, 8), (120, 30, 8)])):
        args = schedule.parse(["--preset", preset])
        assert [(s["max_len"], s["steps"], s["group"]) for s in schedule.parse_stages(args.stages)] == shapes
        assert (args.model == schedule.MODEL) == (preset != "toy") and args.run == f"runs/{preset}"
        assert args.switch == ("auto" if preset == "toy" else "steps") and args.optimizer == "fresh"
        assert ("justrl" in args.rest) == (preset == "justrl")


def test_two_stages(stage_hands):
    text = stage_hands.call("--model", stage_hands.model, "--stages", "8:6:4:lr=0.25,16:5:8", "--lr", 0.5,
                            "--optimizer", "carry", "--seed", 7, "--evaluate", "-n 4")
    run = stage_hands.folder
    plan, one, two = plan_of(run), options_of(run, "stage1"), options_of(run, "stage2")
    assert [s["picked"] for s in plan["stages"]] == [6, 5] and "done:" in text
    assert [(x["max_len"], x["group"], x["lr"]) for x in (one, two)] == [(8, 4, 0.25), (16, 8, 0.5)]
    assert (one["seed"], two["seed"], two["keep"]) == (7, 8, 2)  # a new data order
    assert two["model"] == str(run / "stage1/checkpoints/000006/hf")
    assert two["optimizer_from"] == str(run / "stage1/checkpoints/000006")
    assert (run / "stage2/checkpoints/000005/optim").read_text() == "fresh+stage1+stage2"
    said = json.loads((run / "eval/stage2.json").read_text())
    assert said["model"] == str(run / "stage2/checkpoints/000005/hf") and said["argv"][-2:] == ["-n", "4"]
    report = (run / "report.md").read_text()
    for words in ("| stage2 | 50.0 |", "stage1: 8 tokens of", "a stand-in draws nothing", "| evaluate base"):
        assert words in report
    before = (run / "stage2/metrics.jsonl").read_text()
    assert "grpo.py" not in stage_hands.call() and (run / "stage2/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("options, words", [
    (["--stages", "8:4"], "CONTEXT:STEPS:SAMPLES"), (["--stages", "8:4:1"], "--group must be"),
    (["--stages", "8:4:4:lr"], "CONTEXT:STEPS:SAMPLES"), (["--stages", "8:4:4,"], "CONTEXT:STEPS:SAMPLES"),
    (["--max_len", "9"], "use --stages"), (["--out", "x"], "use --run"),
    (["--learning_rate", "9"], "--learning_rate"), (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--swich", "auto"], "did you mean --switch"), (["--turn_windw=9"], "did you mean --turn_window"),
    (["--ablation", "3"], "bench/staging.py"), (["--bench_n=4"], "--evaluate"),
    (["--nnodes", "2"], "--torchrun"),
    (["--evaluate", "-m 3"], "unrecognized arguments: -m 3"), (["--torchrun", "--nnodes 2"], "--node_rank"),
    (["--gpus", "-1"], "--gpus must be"), (["--switch", "never"], "invalid choice"),
    (["--switch", "auto", "--save_every", "11"], "--save_every 11 must be at most 10"),
    (["--switch", "auto", "--keep", "3"], "leave --keep away"),
    (["--gpu_type", "X9", "--dry_run"], "--gpu_memory_gib"),
    (["--model", "./modle", "--dry_run"], "--model ./modle"),
    (["--model", "some/model", "--dry_run"], "nor in the cache of the hub"),
], ids=" ".join)
def test_refused_before_work_starts(stage_hands, options, words):
    assert words in stage_hands.call(*stage_hands.start, *options, code=2)
    assert not stage_hands.folder.exists()


def test_help_shows_each_default_once_and_options_of_grpo_are_known(capsys):
    names = {f"--{row[0]}" for rows in schedule.grpo.OPTIONS.values() for row in rows}
    assert len(names) > 30
    words = ["--lr", "1", "--no_chat", "--style", "x"]
    assert schedule.parse(words).rest == words
    with pytest.raises(SystemExit):
        schedule.parse(["--help"])
    text = capsys.readouterr().out
    assert "machines and their cost:" in text and all(x.count("default") < 2 for x in text.split("\n  --"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_plain_command_without_a_gpu_offers_the_toy(stage_hands):
    text = stage_hands.call(code=2)
    assert "no GPU was found" in text and "--preset toy" in text and "--dry_run" in text
    assert not stage_hands.folder.exists()


def test_changed_options(stage_hands):
    """What would alter finished work is refused, and the plan stays as it was; the rest is told and taken."""
    run = stage_hands.folder
    stage_hands.call(*stage_hands.start)
    before = (run / "plan.json").read_text()
    assert not options_of(run, "stage2")["optimizer_from"]
    for options, words in ((["--model", run], "begun with --model"), (["--seed", 3], "begun with --seed 0"),
                           (["--stages", "8:7:4,16:5:8"], "stage1 was begun"),
                           (["--stages", "8:6:4"], "stage2 was begun"),
                           (["--evaluate", "-n 3"], "begun with --evaluate"),
                           (["--optimizer", "carry"], "begun with --optimizer")):
        assert words in stage_hands.call(*options, code=2)
        assert (run / "plan.json").read_text() == before
    new = ("--stages", "8:6:4,16:5:8,32:4:2", "--lr", 0.125, "--gpu_price", 2)
    text = stage_hands.call(*new)
    for words in ("changed from here on", "32:4:2 --lr 0.125 --gpu_price 2"):
        assert words in text
    assert options_of(run, "stage3")["lr"] == 0.125 and options_of(run, "stage2")["lr"] == 1e-6
    assert options_of(run, "stage3")["model"] == str(run / "stage2/checkpoints/000005/hf")
    words = plan_of(run)["words"]
    assert stage_hands.call(*new) and plan_of(run)["words"] == words  # said once more, it is nothing new


def test_relative_paths_hold_from_another_folder(stage_hands, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stage_hands.call("--model", "model", "--stages", "8:6:4", "--no_eval", folder="run")
    monkeypatch.chdir(tmp_path / "code")
    stage_hands.call("--stages", "8:6:4,8:7:4", folder="../run")
    run = tmp_path / "run"
    assert options_of(run, "stage2")["model"] == str(run / "stage1/checkpoints/000006/hf")
    assert not (run / "eval").exists()


@pytest.mark.parametrize("content, words", [('{"options": {}, "stages": [{}]}', "another version"),
                                            ("{", "not JSON")])
def test_a_plan_that_cannot_be_read_is_refused_in_words(stage_hands, content, words):
    stage_hands.folder.mkdir()
    (stage_hands.folder / "plan.json").write_text(content)
    assert words in stage_hands.call(*stage_hands.start, code=2)
    assert (stage_hands.folder / "plan.json").read_text() == content


# ----- kills, signals, locks --------------------------------------------------------------------------------

LONG = ("--stages", "8:30:4,16:40:8", "--no_eval", "--ms", "40")
AUTO = ("--stages", "8:100:4,16:10:4", "--switch", "auto", "--no_eval", "--ms", "40")


@pytest.mark.slow
@pytest.mark.parametrize("options, kills", [
    (LONG, [("stage1", 12), ("stage2", 7), ("stage2", 23)]),
    ((*AUTO, "--optimizer", "carry"), [("stage1", 28), ("stage1", 47)])], ids=["steps", "auto"])
def test_killed_anywhere_goes_on_to_the_same_plan_and_numbers(stage_hands, tmp_path, options, kills):
    """kill -9; what it had started may train on meanwhile."""
    options, run, whole = ("--model", stage_hands.model, *options), stage_hands.folder, tmp_path / "whole"
    stage_hands.call(*options, folder=whole)
    for stage, step in kills:
        p = subprocess.Popen(stage_hands.command(*options), **PIPED)
        wait_for(lambda stage=stage, step=step: steps_done(run, stage) >= step)
        p.kill()
        p.communicate()
    stage_hands.call()
    stages = plan_of(run)["stages"]
    assert stages == plan_of(whole)["stages"]
    for stage in stages:
        mine, theirs = (metrics(folder / stage["folder"])[:stage["picked"]] for folder in (run, whole))
        assert mine == theirs and len(mine) == stage["picked"]
    last = f"stage2/checkpoints/{stages[1]['picked']:06d}/optim"
    assert (run / last).read_text() == (whole / last).read_text()


@pytest.mark.slow
def test_a_program_left_behind_is_asked_to_leave(stage_hands):
    run, code = stage_hands.folder, Path(schedule.HERE)
    orphan = subprocess.Popen([sys.executable, str(code / "grpo.py"), "--model", str(stage_hands.model),
                               "--steps", "2000", "--out", str(run / "stage1"), "--ms", "10"])
    wait_for(lambda: steps_done(run, "stage1") >= 3)
    text = stage_hands.call("--model", stage_hands.model, "--stages", "8:2000:4", "--no_eval", "--ms", 0)
    assert "stage1 is in use" in text and "asked to save and leave" in text and orphan.wait() == 0
    assert steps_done(run, "stage1") == 2000


def test_one_schedule_at_a_time(stage_hands):
    with common.lock(str(stage_hands.folder / "schedule.lock")):
        assert f"{stage_hands.folder} is in use" in stage_hands.call(*stage_hands.start, code=2)
    assert not stage_hands.folder.exists()  # neither start left anything


def test_killed_between_two_stages(stage_hands):
    """The plan as it is before and after the first stage is written down."""
    run, whole = stage_hands.folder, stage_hands.folder.parent / "whole"
    stage_hands.call(*stage_hands.start, folder=whole)
    for picked in (None, 6):
        shutil.copytree(whole, run)
        shutil.rmtree(run / "stage2")
        for name in ("stage1", "stage2"):
            (run / f"eval/{name}.json").unlink()
        plan = plan_of(run)
        plan["stages"][0]["picked"], plan["stages"][1]["picked"] = picked, None
        (run / "plan.json").write_text(json.dumps(plan))
        text = stage_hands.call()  # a last validation may be missing until the plan says that stage 1 is done
        assert ("--max_len 8 " in text) == (picked is None)
        assert metrics(run / "stage2") == metrics(whole / "stage2") and (run / "eval/stage1.json").exists()
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize("number, code, words", [
    (signal.SIGINT, 130, "schedule.py --run {run} goes on"), (None, 1, "stage1 ended at step {done} of 30"),
    (signal.SIGTERM, 143, "schedule.py --run {run} goes on")])
def test_a_signal_or_a_stop_file_ends_it_in_good_order(stage_hands, number, code, words):
    run = stage_hands.folder
    p = subprocess.Popen(stage_hands.command("--model", stage_hands.model, *LONG), **PIPED)
    wait_for(lambda: steps_done(run, "stage1") >= 7)
    if number:
        p.send_signal(number)
    else:
        (run / "stage1/stop").touch()
    text, done = p.communicate(timeout=60)[0], steps_done(run, "stage1")
    assert p.returncode == code and words.format(run=run, done=done) in text
    assert done < 30 and f"{done:06d}" in os.listdir(run / "stage1/checkpoints")  # saved off the grid
    assert "was begun with 8:30:4" in stage_hands.call("--stages", f"8:{done - 1}:4,16:40:8", code=2)
    stage_hands.call("--stages", "8:35:4,16:10:8", "--ms", 1)
    assert [s["picked"] for s in plan_of(run)["stages"]] == [35, 10]


def test_a_failed_program_stops_the_schedule(stage_hands):
    text = stage_hands.call(*stage_hands.start, "--no_eval", "--exit", 3, code=1)
    assert "grpo.py ended with exit code 3" in text and "goes on from here" in text
    assert plan_of(stage_hands.folder)["stages"][0]["picked"] is None


@pytest.mark.slow
def test_auto_switch_goes_back_to_before_the_turn(stage_hands):
    """The stand-in turns at step 40 of 100."""
    text = stage_hands.call("--model", stage_hands.model, *AUTO)
    run = stage_hands.folder
    one, two = plan_of(run)["stages"]
    e, picked = one["evidence"], one["picked"]
    assert 33 <= e["turn"] <= 42 and e["seen_at"] < 80 and steps_done(run, "stage1") < 99
    assert picked % 5 == 0 and e["turn"] - 6 < picked < e["turn"]
    assert os.listdir(run / "stage1/checkpoints") == [f"{picked:06d}"]
    row = next(r for r in schedule.read_metrics(str(run / "stage1")) if r["step"] == picked)
    assert float((run / f"stage1/checkpoints/{picked:06d}/hf/w").read_text()) == row["weights"]
    assert options_of(run, "stage2")["model"] == str(run / f"stage1/checkpoints/{picked:06d}/hf")
    assert two["evidence"] is None and two["picked"] == 10  # the last stage ends at its steps
    for words in (f"by step {e['turn']} responses had become shorter", "hardly pays"):
        assert words in text and words in (run / "report.md").read_text()


@pytest.mark.slow
def test_two_nodes_on_one_host(stage_hands):
    """Both decide alike from what is on the disk; node 0 alone writes plan and report."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = stage_hands.folder

    def node(rank):
        words = f"--nnodes 2 --node_rank {rank} --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port}"
        options = (*stage_hands.start, "--no_eval", "--torchrun", words)
        return subprocess.Popen(stage_hands.command(*options), **PIPED)

    nodes = [node(1), node(0)]
    texts = [p.communicate(timeout=200)[0] for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], "\n".join(texts)[-4000:]
    assert texts[0].count("$ ") == 2 and "--max_len 16" in texts[0]
    assert options_of(run, "stage2")["max_len"] == 16
    assert json.loads((run / "stage2/config.json").read_text())["world"] == 2


# ----- the ledger -------------------------------------------------------------------------------------------

def test_ledger_by_hand(tmp_path):
    args = schedule.parse(["--gpus", "2", "--gpu_price", "1.5"])
    args.run, args.plan = str(tmp_path), schedule.parse_stages("8:3:2,16:2:2")
    for stage, world, steps in zip(args.plan, (2, 4), (3, 2)):
        stage["picked"] = 2
        folder = tmp_path / stage["folder"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"world": world}))
        lines = [{"step": 0, "eval_reward": 0.1, "eval_seconds": 50.0}]
        lines += [{"step": s, "reward": 0.5, "tokens": 100 * s, "tokens_trained": 80, "seconds": 600.0,
                   "seconds_generate": 400.0} for s in [1, 2, 2, 3][:steps + 1]]
        (folder / "metrics.jsonl").write_text(common.json_lines(lines) + '{"step": 9, "rew')
    (tmp_path / "eval").mkdir()
    result = {"name": "a", "tokens_generated": 5000, "seconds": 360.0}
    (tmp_path / "eval/a.json").write_text(json.dumps(result))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
             schedule.ledger(args).splitlines()]
    rows = {row[0]: row[1:] for row in table}
    assert rows["stage1"][:3] == ["600", "240", "1,200"] and rows["stage1"][8:10] == ["50", "1,800"]
    hours = [(1800 + 50) * 2 / 3600, (1200 + 50) * 4 / 3600, 360 * 2 / 3600]
    for name, wanted in zip(("stage1", "stage2", "evaluate a", "total"), (*hours, sum(hours))):
        assert rows[name][-2] == f"{wanted:,.2f}" and rows[name][-1] == f"{wanted * 1.5:,.2f}"
    assert rows["total"][0] == f"{600 + 300 + 5000:,}"


# ----- the real programs ------------------------------------------------------------------------------------

def adam_steps(path):
    """The step counts in a checkpoint of Adam's state."""
    names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.zeros(()) for name in names if name.endswith(".step")}
    dcp.load(state, checkpoint_id=path)
    return {float(value) for value in state.values()}


@pytest.mark.slow
def test_real_programs_killed_and_continued(tiny, problems, tmp_path):
    """grpo.py, evaluate.py and figures.py themselves on a tiny model: kill -9 in stage 2, continue, and every
    metric is that of a stage 2 which was left alone. Adam's step count goes on where stage 1 left it."""
    start = [sys.executable, str(ROOT / "schedule.py"), "--run", str(tmp_path / "run")]
    rest = ["--style", "plain", "--engine", "torch", "--prompts", "6", "--lr", "1e-3", "--data", problems,
            "--save_every", "1", "--updates", "1"]
    new = ["--model", tiny, "--stages", "16:2:4,24:3:4", "--benchmarks", problems, "--optimizer", "carry",
           "--evaluate", "-n 2 --max_tokens 24", "--no_base_eval"]
    p = subprocess.Popen([*start, *new, *rest], **PIPED)
    one, two, alone = (tmp_path / name for name in ("run/stage1", "run/stage2", "alone"))
    wait_for(lambda: steps_done(tmp_path / "run", "stage2") >= 1, 400)
    p.kill()
    p.communicate()
    run(start, timeout=600)
    before = one / "checkpoints/000002"
    run([sys.executable, str(ROOT / "grpo.py"), "--model", f"{before}/hf", "--optimizer_from", str(before),
         "--max_len", "24", "--steps", "3", "--group", "4", "--seed", "1", "--out", str(alone), *rest])
    assert len(metrics(two)) == 3 and metrics(two) == metrics(alone)
    assert adam_steps(before) == {2.0} and adam_steps(two / "checkpoints/000003") == {5.0}
    report = (tmp_path / "run/report.md").read_text()
    assert "| stage2" in report and "style plain" in report and "![" in report
    assert (tmp_path / "run/transcripts.html").exists()
    assert sorted(x.name for x in (tmp_path / "run/eval").glob("*.json")) == ["stage1.json", "stage2.json"]
