"""schedule.py: the turning point on curves, plans and refusals, kills, two nodes, the ledger.

Most runs use stand_ins/ for grpo.py and evaluate.py, which write the same files in milliseconds."""
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, each_case, launch, metrics, run

import common
import schedule

# ----- the turning point, on curves -------------------------------------------------------------------------

def noisy(seed, length, truncated, reward, sd=(200, 0.008, 0.03), phi=0.0, together=0.7):
    """Curves with AR(1) noise; lengths and truncation move together, as they do in a run."""
    x = np.random.default_rng(seed).normal(size=(3, len(length)))
    for i in range(1, len(length)):
        x[:, i] = phi * x[:, i - 1] + math.sqrt(1 - phi * phi) * x[:, i]
    cut = truncated + sd[1] * (together * x[0] + math.sqrt(1 - together ** 2) * x[1])
    return np.arange(1, len(length) + 1), length + sd[0] * x[0], np.clip(cut, 0, 1), reward + sd[2] * x[2]


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

SCHEDULE = """
import schedule, sys
sys.modules["figures"], schedule.HERE = None, {stand_ins!r}
sys.exit(schedule.main())
"""
STAND_INS = str(ROOT / "tests/stand_ins")
RUN, WHOLE = Path("run"), Path("whole")
START = ("--model", "model", "--stages", "8:6:4,16:5:8")
LONG = ("--model", "model", "--stages", "8:30:4,16:60:8", "--no_eval")
AUTO = ("--model", "model", "--stages", "8:100:4,16:60:4", "--switch", "auto", "--save_every", 5, "--no_eval")


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(*options, code=0) -> what schedule.py printed in this process, which is in a folder with a model.
    The programs that it starts are the stand-ins; their options are checked by the real ones."""
    common.write_atomic(f"{tmp_path}/sabotaged.py", SCHEDULE.format(stand_ins=STAND_INS))
    common.write_atomic(f"{tmp_path}/model/w", "1.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schedule, "HERE", STAND_INS)
    monkeypatch.setattr(common, "catch_signals", list)  # pytest keeps its own
    monkeypatch.setitem(sys.modules, "figures", None)

    def call(*options, code=0, run=RUN):
        try:
            done = schedule.main(["--run", str(run), *map(str, options)])
        except SystemExit as e:
            done = e.code
        out = "".join(capfd.readouterr()) + (done if isinstance(done, str) else "")
        assert (1 if isinstance(done, str) else done or 0) == code and "Traceback" not in out, out
        return out

    return call


def started(*options):
    return launch([sys.executable, f"{os.getcwd()}/sabotaged.py", "--run", "run", *map(str, options)])


def stages_of(run):
    return common.read_json(run / "plan.json")["stages"]


def options_of(stage):
    return common.read_json(stage / "config.json")["options"]


def steps_done(stage):
    return len(schedule.read_metrics(str(stage)))


def wait_for_steps(stage, steps, seconds=60):
    end = time.time() + seconds
    while steps_done(stage) < steps:
        assert time.time() < end, "did not happen"
        time.sleep(0.01)


# ----- plans ------------------------------------------------------------------------------------------------

def test_published_schedules():
    for preset, shapes in (("deepscaler", [(8192, 1040, 8), (16384, 480, 16), (24576, 200, 16)]),
                           ("justrl", [(15360, 4380, 8)]), ("toy", [(40, 70, 8), (80, 50, 8), (120, 30, 8)])):
        args = schedule.parse(["--preset", preset])
        assert [(s["max_len"], s["steps"], s["group"]) for s in schedule.parse_stages(args.stages)] == shapes
        assert (args.model == schedule.MODEL) == (preset != "toy") and args.run == f"runs/{preset}"
        assert args.switch == ("auto" if preset == "toy" else "steps") and args.optimizer == "fresh"
        assert ("justrl" in args.rest) == (preset == "justrl")


def test_two_stages_and_what_may_change_later(call, tmp_path):
    """Weights, moments and options are handed on. Afterwards, what would alter finished work is refused, and
    the plan stays as it was; the rest is told and taken."""
    call("--model", "model", "--stages", "8:6:4:lr=0.25,16:5:8", "--lr", 0.5, "--seed", 7, "--style", "plain",
         "--optimizer", "carry", "--evaluate", "-n 4")
    one, two, handed_on = options_of(RUN / "stage1"), options_of(RUN / "stage2"), "checkpoints/000005"
    assert [s["picked"] for s in stages_of(RUN)] == [6, 5]
    shapes = [(x["max_len"], x["group"], x["lr"]) for x in (one, two)]
    assert shapes == [("8", "4", "0.25"), ("16", "8", "0.5")]
    assert (one["seed"], two["seed"]) == ("7", "8")  # a new data order
    assert two["optimizer_from"] == f"{tmp_path}/run/stage1/checkpoints/000006"
    assert two["model"] == two["optimizer_from"] + "/hf"
    assert (RUN / "stage2" / handed_on / "optim").read_text() == "fresh+stage1+stage2"
    said = common.read_json(RUN / "eval/stage2.json")
    assert said["model"] == f"{tmp_path}/run/stage2/{handed_on}/hf"
    assert "--style=plain" in said["argv"] and said["argv"][-2:] == ["-n", "4"]
    report = (RUN / "report.md").read_text()
    for words in ("a table of", "eval/stage2.json", "stage1: 8 tokens of", "not shown: figures",
                  "| evaluate base"):
        assert words in report
    plan, lines = (RUN / "plan.json").read_text(), metrics(RUN / "stage2")
    for options, words in ((["--model", "run"], "begun with --model"), (["--seed", 3], "begun with --seed 7"),
                           (["--stages", "8:7:4:lr=0.25,16:5:8"], "stage1 was begun"),
                           (["--stages", "8:6:4:lr=0.25"], "stage2 was begun"),
                           (["--evaluate", "-n 3"], "begun with --evaluate"),
                           (["--optimizer", "fresh"], "begun with --optimizer")):
        assert words in call(*options, code=2)
        assert (RUN / "plan.json").read_text() == plan, options
    text = call()
    assert "grpo.py" not in text and "done:" in text
    new = ("--stages", "8:6:4:lr=0.25,16:5:8,32:4:2", "--lr", 0.125, "--gpu_price", 2)
    text = call(*new)
    assert "changed from here on" in text and "32:4:2 --lr 0.125 --gpu_price 2" in text
    assert metrics(RUN / "stage2") == lines and options_of(RUN / "stage2") == two
    three = options_of(RUN / "stage3")
    assert three["lr"] == "0.125" and three["model"] == f"{tmp_path}/run/stage2/{handed_on}/hf"
    plan = (RUN / "plan.json").read_text()
    assert call(*new) and (RUN / "plan.json").read_text() == plan  # said once more, it is nothing new


@each_case("refused_by_schedule")
def test_refused_before_work_starts(call, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert re.search(case["says"], call(*shlex.split(case["options"]), code=2))
    assert not RUN.exists()


def test_relative_paths_hold_from_another_folder(call, tmp_path, monkeypatch):
    call("--model", "model", "--stages", "8:6:4", "--no_eval")
    monkeypatch.chdir(tmp_path / "model")
    call("--stages", "8:6:4,8:7:4", run="../run")
    two = options_of(tmp_path / "run/stage2")
    assert two["model"] == f"{tmp_path}/run/stage1/checkpoints/000006/hf" and not two["optimizer_from"]
    assert not (tmp_path / "run/eval").exists()


@pytest.mark.parametrize("content, words", [('{"options": {}, "stages": [{}]}', "another version"),
                                            ("{", "not JSON")])
def test_a_plan_that_cannot_be_read_is_refused_in_words(call, content, words):
    common.write_atomic("run/plan.json", content)
    assert words in call(*START, code=2)
    assert (RUN / "plan.json").read_text() == content


def test_one_schedule_at_a_time_and_a_failed_program_ends_it(call, tmp_path, monkeypatch):
    with common.lock("run/schedule.lock"):
        assert f"{tmp_path}/run is in use" in call(*START, code=2)
    assert not RUN.exists()  # neither start left anything
    monkeypatch.setenv("EXIT", "3")
    text = call(*START, "--no_eval", code=1)
    assert "grpo.py ended with exit code 3" in text and "goes on from here" in text
    assert stages_of(RUN)[0]["picked"] is None


# ----- kills, signals, two nodes ----------------------------------------------------------------------------

def kill_and_go_on(call, options, *kills):
    """kill -9 when a stage has so many steps, then to the end: plan and numbers of the run `whole`. What a
    killed schedule.py leaves behind is asked to leave."""
    for stage, step in kills:
        p = started(*options)
        wait_for_steps(RUN / stage, step)
        p.send_signal(signal.SIGKILL)
        p.wait()
    text, stages = call(), stages_of(RUN)
    assert f"{stage} is in use" in text and "asked to save and leave" in text
    assert stages == stages_of(WHOLE)
    for stage in stages:
        mine, theirs = (metrics(run / stage["folder"])[:stage["picked"]] for run in (RUN, WHOLE))
        assert mine == theirs and len(mine) == stage["picked"]
    last = f"stage2/checkpoints/{stages[1]['picked']:06d}/optim"
    assert (RUN / last).read_text() == (WHOLE / last).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["fresh", "carry"])
def test_auto_switch_goes_back_to_before_the_turn(call, optimizer):
    """The stand-in turns at step 40 of 100. Kills in either stage change nothing."""
    options = (*AUTO, "--optimizer", optimizer)
    text = call(*options, run=WHOLE)
    (one, two), stage1 = stages_of(WHOLE), WHOLE / "stage1"
    e, picked = one["evidence"], one["picked"]
    assert 33 <= e["turn"] <= 42 and e["seen_at"] < 80 and steps_done(stage1) < 99
    assert picked % 5 == 0 and e["turn"] - 6 < picked < e["turn"]
    assert os.listdir(stage1 / "checkpoints") == [f"{picked:06d}"]
    row = next(r for r in schedule.read_metrics(str(stage1)) if r["step"] == picked)
    assert float((stage1 / f"checkpoints/{picked:06d}/hf/w").read_text()) == row["weights"]
    assert options_of(WHOLE / "stage2")["model"].endswith(f"/whole/stage1/checkpoints/{picked:06d}/hf")
    assert two["evidence"] is None and two["picked"] == 60  # the last stage ends at its steps
    for words in (f"by step {e['turn']} responses had become shorter", "hardly pays"):
        assert words in text and words in (WHOLE / "report.md").read_text()
    kill_and_go_on(call, options, ("stage1", 28), ("stage1", 47), ("stage2", 7), ("stage2", 23))


@pytest.mark.parametrize("picked", [None, 6])
def test_killed_between_two_stages(call, picked):
    """The plan as it is before and after the end of stage 1 is written down. Until then its last validation
    may be missing."""
    call(*START, run=WHOLE)
    shutil.copytree(WHOLE, RUN, ignore=shutil.ignore_patterns("stage2*", "stage1.json"))
    plan = common.read_json(RUN / "plan.json")
    plan["stages"][0]["picked"], plan["stages"][1]["picked"] = picked, None
    common.write_atomic("run/plan.json", json.dumps(plan))
    assert ("--max_len 8 " in call()) == (picked is None)
    assert metrics(RUN / "stage2") == metrics(WHOLE / "stage2") and (RUN / "eval/stage1.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, code, words", [
    (signal.SIGINT, 130, "schedule.py --run {run} goes on"), (None, 1, "stage1 ended at step {done} of 30"),
    (signal.SIGTERM, 143, "schedule.py --run {run} goes on")])
def test_a_signal_or_a_stop_file_ends_it_in_good_order(call, tmp_path, number, code, words):
    p = started(*LONG)
    wait_for_steps(RUN / "stage1", 7)
    if number:
        p.send_signal(number)
    else:
        (RUN / "stage1/stop").touch()
    text = p.stdout.read()
    done = steps_done(RUN / "stage1")
    assert p.wait(60) == code and words.format(run=tmp_path / "run", done=done) in text
    assert done < 30 and f"{done:06d}" in os.listdir(RUN / "stage1/checkpoints")  # saved off the grid
    assert "was begun with 8:30:4" in call("--stages", f"8:{done - 1}:4,16:60:8", code=2)
    call("--stages", "8:35:4,16:10:8")
    assert [s["picked"] for s in stages_of(RUN)] == [35, 10]


@pytest.mark.slow
def test_two_nodes_on_one_host(call):
    """Both decide alike from what is on the disk; node 0 alone writes plan and report."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = f"--nnodes 2 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --node_rank"
    nodes = [started(*START, "--no_eval", "--torchrun", f"{words} {rank}") for rank in (1, 0)]
    texts = [p.stdout.read() for p in nodes]
    assert [p.wait(60) for p in nodes] == [0, 0], "\n".join(texts)[-4000:]
    assert texts[0].count("$ ") == 2 and "--max_len 16" in texts[0]
    assert options_of(RUN / "stage2")["max_len"] == "16"
    assert common.read_json(RUN / "stage2/config.json")["world"] == 2


# ----- the ledger -------------------------------------------------------------------------------------------

def test_ledger_by_hand(tmp_path):
    """A step done again after a crash counts once; half a last line counts nothing."""
    args = schedule.parse(["--gpus", "2", "--gpu_price", "1.5"])
    args.run, args.plan = str(tmp_path), schedule.parse_stages("8:3:2,16:2:2")
    step = {"reward": 0.5, "tokens_trained": 80, "seconds": 600.0, "seconds_generate": 400.0}
    for stage, world, steps in (("stage1", 2, [1, 2, 2, 3]), ("stage2", 4, [1, 2, 2])):
        lines = [{"step": 0, "eval_reward": 0.1, "eval_seconds": 50.0}]
        lines += [{"step": s, "tokens": 100 * s, **step} for s in steps]
        text = common.json_lines(lines) + '{"step": 9, "rew'
        common.write_atomic(f"{tmp_path}/{stage}/metrics.jsonl", text)
        common.write_atomic(f"{tmp_path}/{stage}/config.json", json.dumps({"world": world}))
    result = {"name": "a", "tokens_generated": 5000, "seconds": 360.0}
    common.write_atomic(f"{tmp_path}/eval/a.json", json.dumps(result))
    table = [line.split("|")[1:-1] for line in schedule.ledger(args).splitlines()]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in table}
    assert rows["stage1"][:3] == ["600", "240", "1,200"] and rows["stage1"][8:10] == ["50", "1,800"]
    hours = [(1800 + 50) * 2 / 3600, (1200 + 50) * 4 / 3600, 360 * 2 / 3600]
    for name, wanted in zip(("stage1", "stage2", "evaluate a", "total"), (*hours, sum(hours))):
        assert rows[name][-2:] == [f"{wanted:,.2f}", f"{wanted * 1.5:,.2f}"]
    assert rows["total"][0] == f"{600 + 300 + 5000:,}"


# ----- the real programs ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_real_programs_killed_and_continued(tiny, problems, tmp_path):
    """grpo.py and figures.py themselves on a tiny model: kill -9 in stage 2, continue, and every metric is
    that of a stage 2 which was left alone. Adam's step count goes on where stage 1 left it."""
    one, two, alone = (tmp_path / name for name in ("run/stage1", "run/stage2", "alone"))
    start = [sys.executable, str(ROOT / "schedule.py"), "--run", str(tmp_path / "run")]
    rest = ["--style", "plain", "--engine", "torch", "--prompts", "6", "--lr", "1e-3", "--data", problems,
            "--save_every", "1", "--updates", "1"]
    p = launch([*start, "--model", tiny, "--stages", "16:2:4,24:3:4", "--optimizer", "carry", "--no_eval",
                *rest])
    wait_for_steps(two, 1, seconds=400)
    p.send_signal(signal.SIGKILL)
    p.wait()
    run(start, timeout=600)
    before = one / "checkpoints/000002"
    run([sys.executable, str(ROOT / "grpo.py"), "--model", f"{before}/hf", "--optimizer_from", str(before),
         "--max_len", "24", "--steps", "3", "--group", "4", "--seed", "1", "--out", str(alone), *rest])
    assert len(metrics(two)) == 3 and metrics(two) == metrics(alone)
    assert "![" in (tmp_path / "run/report.md").read_text() and (tmp_path / "run/transcripts.html").exists()
    last = two / "checkpoints/000003"
    names = dcp.FileSystemReader(last).read_metadata().state_dict_metadata
    counts = {name: torch.zeros(()) for name in names if name.endswith(".step")}
    dcp.load(counts, checkpoint_id=last)
    assert set(map(float, counts.values())) == {5.0}
