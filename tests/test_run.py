"""Whole runs of grpo.py on a tiny model: ranks, crashes, signals, broken surroundings, what a run leaves."""
import fcntl
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, each_case, launch, make_model, metrics, run, sabotaged, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def six(problems):
    """Options of a run of six steps."""
    return ["--steps", 6, "--save_every", 2, "--eval_data", problems, "--eval_every", 3, "--eval_n", 2]


@pytest.fixture(scope="module")
def undisturbed(tiny, problems, six, tmp_path_factory):
    """Six steps in one go: what every disturbed run must reproduce to the last bit."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = run(command(tiny, problems, out, *six))
    (out / "console.txt").write_text(done.stdout)
    return out


@pytest.fixture
def start(tiny, problems, tmp_path, monkeypatch):
    """start(*options) -> grpo.py in folder r, to its end or launched. code: what its process runs first."""
    monkeypatch.chdir(tmp_path)

    def start(*options, code=None, model=tiny, data=problems, ranks=1, begin=run, **how):
        program = ROOT / "grpo.py" if code is None else sabotaged("", code)
        return begin(command(model, data, "r", *options, ranks=ranks, program=program), **how)
    return start


@pytest.fixture
def go_on(start, six):
    """The same with the options of `six`, from its newest checkpoint."""
    return lambda *options, **how: start(*six, "--resume", *options, **how)


def lines_with(word, process):
    """Lines of its console, as they come."""
    return (line for line in process.stdout if word in line[:16])


def rollouts(out, step):
    return gzip.decompress(Path(out, f"rollouts/{step:06d}.jsonl.gz").read_bytes())


# ----- what a run is

def test_what_a_run_leaves(undisturbed, tiny):
    lines = metrics(undisturbed, timing=True)
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert {"eval_reward", "eval_se"} <= set(lines[0])
    assert "eval_reward" in lines[3] and "eval_reward" not in lines[4]
    for m in lines[1:]:
        phases = sum(m[f"seconds_{p}"] for p in ("generate", "reward", "logprobs", "update", "sync", "idle"))
        assert 0 < phases <= m["seconds"] and m["tokens"] > 0 and m["updates"] == 2 and m["grad_norm"] > 0
        assert m["length_min"] <= m["length_mean"] <= m["length_max"] <= 24 and m["mismatch_kl"] < 1e-9
        # stored old log-probs: taken from the moving policy, every ratio would be 1
        assert m["approx_kl"] > 1e-7 and m["ratio_mean"] != 1
    table = (ROOT / "docs/metrics.md").read_text()
    assert not [name for line in lines for name in line if f"`{name}`" not in table]
    assert sorted(os.listdir(undisturbed / "rollouts")) == [f"{i:06d}.jsonl.gz" for i in range(1, 7)]
    rows = [json.loads(line) for line in rollouts(undisturbed, 4).splitlines()]
    assert len(rows) == 24 and {r["sample"] for r in rows} == {0, 1, 2, 3}
    assert sum(r["response_tokens"] for r in rows) == lines[4]["tokens"]
    assert abs(sum(r["reward"] for r in rows) / 24 - lines[4]["reward"]) < 1e-6
    assert sorted(os.listdir(undisturbed / "checkpoints")) == ["000004", "000006"]  # --keep 2
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["options"]["max_len"] == 24 and config["versions"]["torch"]
    hf = undisturbed / "checkpoints/000006/hf"
    model, before = AutoModelForCausalLM.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(tiny)
    assert AutoTokenizer.from_pretrained(hf).chat_template and model.dtype == torch.float32
    assert min((a - b).abs().max() for a, b in zip(model.parameters(), before.parameters())) > 0
    console = (undisturbed / "console.txt").read_text().splitlines()
    steps = [line for line in console[console.index(grpo.HEADER) + 1:] if "/6 " in line[:16]]
    assert len(steps) == 7 and all(len(line) <= 120 for line in steps)
    assert [line.index("|") for line in steps[1:]] == [grpo.HEADER.index("|")] * 6  # under their names
    assert "evaluate.py --model" in console[-1] and "000006/hf" in console[-1]


def test_two_ranks_equal_one_and_each_goes_on_from_the_others_checkpoint(undisturbed, go_on):
    """Same samples, same gradient: lengths are uneven, and so is the number of sequences of a rank."""
    for steps, ranks in ((3, 2), (4, 1), (6, 2)):
        go_on("--steps", steps, "--token_budget", 200, ranks=ranks)
    for one, two in zip(metrics(undisturbed), metrics("r"), strict=True):
        for name in one.keys() & {"reward", "length_mean", "tokens", "solve_none", "grad_norm", "loss",
                                  "entropy", "kl_ref", "eval_reward"}:
            assert two[name] == pytest.approx(one[name], rel=2e-4, abs=2e-6), (one["step"], name)
    for step in (1, 2, 3):  # seeds do not depend on the number of ranks: the very same responses
        assert rollouts(undisturbed, step) == rollouts("r", step)


def test_more_ranks_than_sequences(start):
    """Two samples in each mini-batch: some rank has nothing to train on, and must not hang."""
    start("--steps", 2, "--prompts", 2, "--group", 2, "--updates", 2, ranks=3)
    assert len(metrics("r")) == 2


def test_learns_to_raise_its_reward(start, tmp_path):
    """The loop has the right sign: a random model learns to write a character. Reward and instruction are
    one's own, problems have no answers, and the model has no chat template."""
    Path("mine.py").write_text("def a(response, problem):\n    return float('a' in response) / 2 + 0.25\n")
    Path("d.jsonl").write_text("\n".join(json.dumps({"problem": f"{i}"}) for i in range(16)))
    model = save_model(tmp_path / "m", kind="llama", template=False, initializer_range=0.02)
    done = start("--steps", 25, "--prompts", 8, "--group", 8, "--max_len", 12, "--temperature", 1.0, "--lr",
                 "3e-3", "--save_every", 100, "--no_chat", "--instruction", "Say it.", "--reward", "mine:a",
                 "--loss", "cispo", data="d.jsonl", model=model)
    r = [m["reward"] for m in metrics("r")]
    assert sum(r[-5:]) / 5 > sum(r[:5]) / 5 + 0.15 and all(0.25 <= x <= 0.75 for x in r), r
    assert f"{r[0]:.3f}" in done.stdout
    assert json.loads(Path("r/config.json").read_text())["options"]["reward"] == "mine:a"
    row = json.loads(rollouts("r", 1).splitlines()[0])
    assert row["prompt_tokens"] == len(row["problem"] + " Say it.")


# ----- interruptions

@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_resumes_to_the_same_numbers(undisturbed, go_on, seed):
    """kill -9 at random moments, again and again, until the run gets through: every metric is that of the run
    that was left alone, bit for bit (CPU, torch engine, fp32)."""
    dice, kills = random.Random(seed), 0
    while kills < 4:
        p = go_on(begin=launch, real=seed == 1 and kills == 0)
        for _ in range(dice.randint(1, 3)):
            next(lines_with("/6 ", p), None)
        time.sleep(dice.random() * 0.4)
        p.send_signal(signal.SIGKILL)
        p.stdout.close()
        if p.wait() == 0:
            break
        kills += 1
    assert kills
    go_on()
    assert metrics("r") == metrics(undisturbed)


# a save calls the first four in this order; its second call is in step 4, the second validation in step 3
@pytest.mark.parametrize("name, call, given, number", [
    ("policy.dcp.save", 2, "", signal.SIGKILL), ("policy.write_atomic", 2, "", signal.SIGKILL),
    ("os.scandir", 2, ".tmp/hf", signal.SIGKILL), ("policy.prune", 2, "", signal.SIGKILL),
    ("grpo.rollout", 2, "'eval'", signal.SIGTERM), ("grpo.rollout", 3, "'eval'", signal.SIGTERM),
    ("grpo.rollout", 3, "'eval'", signal.SIGKILL)])
def test_ended_during_a_save_or_a_validation(undisturbed, go_on, name, call, given, number):
    """No half passes for a checkpoint, whole or not, before its last rename. A validation is made up for."""
    code = f"breaks({name!r}, {int(number)}, [{call}], {given!r})"
    assert go_on(code=code, check=False).returncode == (143 if number == signal.SIGTERM else -9)
    go_on()
    assert metrics("r") == metrics(undisturbed)
    assert sorted(os.listdir("r/checkpoints")) == ["000004", "000006"]


@pytest.mark.parametrize("number, ranks, code", [
    (signal.SIGINT, 1, 130), (signal.SIGTERM, 1, 143), (None, 1, 0), (signal.SIGINT, 2, None),
    (signal.SIGTERM, 2, None)], ids=["ctrl-c", "sigterm", "stop file", "ctrl-c, 2 ranks", "sigterm, 2 ranks"])
def test_a_signal_or_a_stop_file_saves_and_leaves(undisturbed, go_on, number, ranks, code):
    """All ranks leave after all have saved; what their torchrun ends with is its own."""
    p = go_on("--save_every", 100, ranks=ranks, begin=launch, real=ranks == 2)
    next(lines_with(" 2/6 ", p))
    if number:
        os.killpg(p.pid, number)
    else:
        Path("r/stop").touch()
    rest = p.stdout.read()
    assert "stopped after step" in rest and "--resume" in rest and len(os.listdir("r/checkpoints")) == 1, rest
    assert p.wait(timeout=120) == code or ranks == 2
    said = go_on("--save_every", 100).stdout
    assert number or "stop was there from before and has been removed" in said
    assert metrics("r") == metrics(undisturbed) or ranks == 2


# ----- one run in one folder

def test_one_run_in_a_folder(start):
    """A second start is refused while any worker of the first lives, even one whose torchrun was killed."""
    p = start("--steps", 10**6, "--save_every", 10**6, ranks=2, begin=launch, real=True)
    next(lines_with(" 1/1000000 ", p))
    workers = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, check=True).stdout.split()
    assert "/r is in use" in start("--resume", "--steps", 1, check=False).stderr
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)  # or they would notice at once
    p.kill()
    p.wait()
    refused = start("--resume", "--steps", 1, check=False)
    assert refused.returncode == 2 and "/r is in use" in refused.stderr
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    p.stdout.close()
    with open("r/lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits: a killed process lives on until the kernel has let it go
    start("--resume", "--steps", 1)


def test_what_cannot_go_on_is_refused_and_stays(undisturbed, start, tiny, tmp_path):
    """A run that is there, without --resume; another model; a checkpoint that was cut short."""
    shutil.copytree(undisturbed, "r")
    os.truncate("r/checkpoints/000006/__0_0.distcp", 100)
    other = save_model(tmp_path / "other", hidden_size=96, num_attention_heads=3)
    for model, more, words in ((tiny, [], "--resume"), (other, ["--resume"], "of another model"),
                               (tiny, ["--resume"], "000006")):
        done = start("--steps", 7, *more, model=model, check=False)
        assert done.returncode == 2 and words in done.stderr and "elete" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        for name in ("config.json", "metrics.jsonl"):
            assert Path("r", name).read_text() == (undisturbed / name).read_text(), words


def test_a_run_of_the_old_format_with_a_bad_line_goes_on(undisturbed, go_on):
    """Checkpoints of earlier versions have a file `latest`, and other names in trainer.json. The bad line in
    the middle is named, and the others are kept."""
    shutil.copytree(undisturbed, "r")
    shutil.rmtree("r/checkpoints/000006")
    Path("r/checkpoints/latest").write_text("000002\n")  # stale: must neither be followed nor delete anything
    path = Path("r/checkpoints/000004/trainer.json")
    state = json.loads(path.read_text())
    del state["unwritten"]
    state |= {"skipped_in_a_row": 0, "reward_seen": True, "data_position": 24}
    state["config"] |= {"show_every": 0, "difficulty": None}
    path.write_text(json.dumps(state))
    lines = Path("r/metrics.jsonl").read_text().splitlines()
    lines[2] = '{"step": 2, "rew'
    Path("r/metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "metrics.jsonl, line 3" in go_on().stdout
    assert metrics("r") == [line for line in metrics(undisturbed) if line["step"] != 2]


# ----- disks

def test_full_disk_costs_the_checkpoint_not_the_run(start):
    """Not even when every checkpoint finds it full, the last one too."""
    full = "breaks('policy.dcp.FileSystemWriter.write_data', OSError(28, 'No space left on device'))"
    done = start("--steps", 2, "--save_every", 1, code=full)
    assert done.stdout.count("ALARM checkpoint") >= 2 and len(metrics("r")) == 2
    assert os.listdir("r/checkpoints") == []


FULL = """
full = OSError(28, "No space left on device")
breaks("common.write_atomic", full, calls=[4, 5, 6], given="metrics.jsonl")  # lines 2, 3 and 4
breaks("common.write_atomic", 9, calls=[7], given="metrics.jsonl")
breaks("policy.dcp.FileSystemWriter.write_data", full, calls=[1], rank=1)
"""


def test_full_disk_for_metrics_and_one_rank_that_cannot_save(undisturbed, go_on):
    """Lines 2 to 4 find no room; rank 1 cannot write its part of checkpoint 2; then the run is killed. The
    lines come back from checkpoint 4."""
    done = go_on(ranks=2, code=FULL, check=False)
    assert "are kept and written later" in done.stdout and done.stdout.count("ALARM checkpoint") == 1
    assert "No space left on device" in done.stdout and os.listdir("r/checkpoints") == ["000004"]
    assert [m["step"] for m in metrics("r")] == [0, 1]
    go_on(ranks=2)
    for whole, parts in zip(metrics(undisturbed), metrics("r"), strict=True):
        assert whole["step"] == parts["step"] and ("eval_se" in whole) == ("eval_se" in parts)
        assert whole.get("reward") == pytest.approx(parts.get("reward"))


def test_disk_too_small_is_refused_first_but_not_for_what_is_there(undisturbed, start):
    free = 20 * sum(p.numel() for p in make_model().parameters())
    code = f"import types\ngrpo.shutil.disk_usage = lambda path: types.SimpleNamespace(free={free})"
    done = start(code=code, check=False)
    assert done.returncode == 2 and "GiB free" in done.stderr and not Path("r").exists()
    shutil.copytree(undisturbed, "r")  # two are there: only one more at a time is needed
    start("--resume", "--steps", 7, code=code)


# ----- failures

def test_non_finite_updates_are_skipped_counted_and_stop_the_run(start):
    """A learning rate of 1e30 makes NaN weights in one update. The run stops, and no checkpoint has them."""
    done = start("--steps", 9, "--lr", "1e30", "--updates", 6, "--save_every", 1, check=False)
    assert done.returncode and "5 updates in a row" in done.stderr + done.stdout
    assert done.stdout.count("ALARM update skipped") == 5 and not Path("r/checkpoints").exists()


BREAKING = """
import torch
real = grpo.Learner.update
def update(self, step, *rest):
    real(self, step, *rest)
    if step == 2:
        with torch.no_grad():
            next(self.policy.parameters()).fill_(float("nan"))
grpo.Learner.update = update
"""


@pytest.mark.parametrize("save_every, words", [(1, "weight is not finite"), (2, "log-probs are not finite")])
def test_damaged_weights_are_noticed_when_every_group_is_dropped(start, save_every, words):
    """NaN weights earn 0, so `improved` drops every group and no update fails. Step 3 breaks them."""
    done = start("--steps", 9, "--recipe", "improved", "--save_every", save_every, code=BREAKING, check=False)
    assert done.returncode and words in done.stderr and "--lr" in done.stderr, done.stderr[-2000:]
    assert max(os.listdir("r/checkpoints")) == "000002"


MEMORY = "RuntimeError('CUDA Error: out of memory at cumem_allocator.cpp:62')"


@pytest.mark.parametrize("code, ranks, words", [
    ("breaks('grpo.evaluate.load_style', ValueError('no such style'), rank=1)", 2, "no such style (rank 1)"),
    ("breaks('policy.Policy', RuntimeError('half a file'), rank=1)", 2, "half a file (rank 1)"),
    ("breaks('grpo.evaluate.reward.explain', IndexError('broken'), rank=1)", 2, "broken (rank 1)"),
    (f"breaks('rollout.TorchEngine.generate', {MEMORY})", 1, "lower --token_budget"),
    ("def mine(response, problem):\n    1 / 0\nsys.argv += ['--reward', '__main__:mine']", 1,
     "--reward __main__:mine failed")], ids=["start", "model", "grader", "memory", "own reward"])
def test_a_failure_ends_all_ranks_with_its_words(start, code, ranks, words):
    done = start(code=code, ranks=ranks, check=False, timeout=120)
    assert done.returncode and done.stderr.count(words) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


# ----- refusals, warnings, alarms

UNREADABLE = [json.dumps({"problem": f"{i}?", "answer": "\\frac{" if i % 2 else "1"}) for i in range(40)]


@each_case("refused_by_grpo")
def test_refused_before_work_starts(start, case):
    Path("bad.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?"}\n')
    Path("golds.jsonl").write_text("\n".join(UNREADABLE))
    done = start(*case["options"].split(), check=False)
    assert done.returncode == 2 and re.search(case["says"], done.stderr), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not Path("r").exists()  # a failed start leaves nothing


def test_alarms_say_what_is_wrong_once(start, problems, monkeypatch):
    """Also said: how many prompts are too long, and that srun is no torchrun."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    long, tensorboard = {"problem": "1+" * 50 + "1?", "answer": "51"}, importlib.util.find_spec("tensorboard")
    Path("d.jsonl").write_text(Path(problems).read_text() + json.dumps(long) + "\n")
    done = start("--steps", 2, "--style", "r1", "--max_len", 4, "--max_prompt_len", 100, "--report_to",
                 "tensorboard" if tensorboard else "none", data="d.jsonl")
    assert done.stdout.count("ALARM no reward in 1 step") == 1 and "--style plain" in done.stdout
    assert done.stdout.count("were cut off at --max_len 4") == 1
    assert "1 of 37 prompts have over 100 tokens: dropped" in done.stdout
    assert "torchrun" in done.stderr and "warning" in done.stderr
    assert not tensorboard or os.listdir("r/tensorboard")


def test_unreadable_golds_are_blamed_before_the_model(start):
    Path("d.jsonl").write_text("\n".join(UNREADABLE))
    said = start("--steps", 1, "--allow_unreadable", data="d.jsonl").stdout
    assert "ALARM the grader cannot read" in said and "ALARM no reward" not in said


def test_stale_engine_raises_the_alarm(start):
    """An engine whose push does nothing after the first: the trainer must notice within a step or two."""
    code = ("real, pushed = rollout.TorchEngine.push, []\n"
            "def push(self, weights):\n"
            "    pushed.append(1)\n"
            "    return real(self, weights) if len(pushed) == 1 else list(weights) and None\n"
            "rollout.TorchEngine.push = push")
    done = start("--steps", 3, "--lr", "2e-2", code=code)
    assert "ALARM engine and trainer disagree" in done.stdout and "stale" in done.stdout


def test_a_tracker_gets_groups_and_the_same_run_on_resume(start, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    Path("wandb.py").write_text("import json\n"
                                "def init(**kw):\n    print('INIT', json.dumps(kw))\n"
                                "def log(numbers, step):\n    print('LOG', json.dumps([step, *numbers]))\n")
    said = [start("--steps", steps, "--report_to", "wandb", "--resume", code="").stdout for steps in (1, 2)]
    first, second = (json.loads(text) for text in re.findall("^INIT (.*)", "".join(said), re.MULTILINE))
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["project"] == "mine"
    assert first["config"]["max_len"] == 24
    logged = [json.loads(text) for text in re.findall("^LOG (.*)", "".join(said), re.MULTILINE)]
    assert [step for step, *_ in logged] == [1, 2]
    assert {"reward/reward", "length/length_mean", "policy/grad_norm", "mismatch/mismatch_kl",
            "time/seconds_update", "length/truncated", "reward/solve_all"} <= set(logged[0])
