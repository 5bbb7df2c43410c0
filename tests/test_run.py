"""Whole runs of grpo.py on a tiny model: ranks, crashes, signals, broken surroundings, what a run leaves."""
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, launch, make_model, metrics, run, sabotaged, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo

pytestmark = pytest.mark.slow
CLOSE = {"rel": 2e-4, "abs": 2e-6}


@pytest.fixture(scope="module")
def options(problems):
    return ["--steps", 6, "--save_every", 2, "--eval_data", problems, "--eval_every", 3, "--eval_n", 2]


@pytest.fixture(scope="module")
def undisturbed(tiny, problems, options, tmp_path_factory):
    """Six steps in one go: what every disturbed run must reproduce to the last bit."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = run(command(tiny, problems, out, *options))
    (out / "console.txt").write_text(done.stdout)
    return out


def wait_for(process, word):
    """Read the console until a line holds `word` -> all lines so far."""
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"never said {word!r}:\n{seen[-3000:]}")


# ----- what a run is

def test_what_a_run_leaves(undisturbed, tiny):
    lines = metrics(undisturbed, timing=True)
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert {"eval_reward", "eval_se"} <= set(lines[0])
    assert "eval_reward" in lines[3] and "eval_reward" not in lines[4]
    for m in lines[1:]:
        phases = sum(m[f"seconds_{p}"] for p in ("generate", "reward", "logprobs", "update", "sync", "idle"))
        assert 0 < phases <= m["seconds"] and m["tokens"] > 0 and m["updates"] == 2 and m["grad_norm"] > 0
        assert m["length_min"] <= m["length_mean"] <= m["length_max"] <= 24
        assert m["mismatch_kl"] < 1e-9
        # stored old log-probs: taken from the moving policy, every ratio would be 1
        assert m["approx_kl"] > 1e-7 and m["ratio_mean"] != 1
    assert sorted(os.listdir(undisturbed / "rollouts")) == [f"{i:06d}.jsonl.gz" for i in range(1, 7)]
    with gzip.open(undisturbed / "rollouts/000004.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
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


def test_console(undisturbed):
    lines = (undisturbed / "console.txt").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line == grpo.HEADER)
    steps = [line for line in lines[head + 1:] if "/6 " in line[:16]]
    assert len(steps) == 7 and all(len(line) <= 120 for line in steps)
    assert [line.index("|") for line in steps[1:]] == [grpo.HEADER.index("|")] * 6  # under their names
    assert "evaluate.py --model" in lines[-3] and "000006/hf" in lines[-3]


def test_every_metric_is_in_the_table(undisturbed):
    table = (ROOT / "docs/metrics.md").read_text()
    names = {name for line in metrics(undisturbed, timing=True) for name in line}
    assert not [name for name in names if f"`{name}`" not in table]


def test_two_ranks_equal_one(undisturbed, tiny, problems, tmp_path):
    """Same samples, same gradient: lengths are uneven, and so is the number of sequences of a rank."""
    run(command(tiny, problems, tmp_path / "two", "--steps", 3, "--token_budget", 200,
                "--eval_data", problems, "--eval_every", 3, "--eval_n", 2, ranks=2))
    for one, two in zip(metrics(undisturbed), metrics(tmp_path / "two")):
        for name in ("reward", "length_mean", "tokens", "solve_none", "grad_norm", "loss", "entropy",
                     "kl_ref", "eval_reward"):
            if name in one:
                assert two[name] == pytest.approx(one[name], **CLOSE), (one["step"], name)
    for step in (1, 2, 3):  # seeds do not depend on the number of ranks: the very same responses
        files = [gzip.decompress((r / f"rollouts/{step:06d}.jsonl.gz").read_bytes())
                 for r in (undisturbed, tmp_path / "two")]
        assert files[0] == files[1]


def test_more_ranks_than_sequences(tiny, problems, tmp_path):
    """Two samples in each mini-batch: some rank has nothing to train on, and must not hang."""
    run(command(tiny, problems, tmp_path / "r", "--steps", 2, "--prompts", 2, "--group", 2, "--updates", 2,
                ranks=3))
    assert len(metrics(tmp_path / "r")) == 2


def test_learns_to_raise_its_reward(tmp_path):
    """The loop has the right sign, with a reward of one's own: a random model learns to write a character."""
    (tmp_path / "mine.py").write_text("def has_a(response, problem):\n"
                                      "    return float('a' in response) / 2 + 0.25\n")
    model = save_model(tmp_path / "m", initializer_range=0.02)
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"problem": f"{i}"}) for i in range(16)))  # without answers
    cmd = command(str(model), str(data), tmp_path / "r", "--steps", 25, "--prompts", 8, "--group", 8,
                  "--max_len", 12, "--temperature", 1.0, "--lr", "3e-3", "--save_every", 100,
                  "--reward", "mine:has_a", "--loss", "cispo")
    done = run(cmd, cwd=tmp_path)
    r = [m["reward"] for m in metrics(tmp_path / "r")]
    assert sum(r[-5:]) / 5 > sum(r[:5]) / 5 + 0.15 and all(0.25 <= x <= 0.75 for x in r), r
    assert f"{r[0]:.3f}" in done.stdout
    config = json.loads((tmp_path / "r/config.json").read_text())["options"]
    assert config["reward"] == "mine:has_a"


@pytest.mark.parametrize("body", ["1 / 0", "float('nan')", "None"])
def test_own_reward_that_fails_is_named(tiny, problems, tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def broken(response, problem):\n    return {body}\n")
    cmd = command(tiny, problems, tmp_path / "r", "--reward", "mine:broken")
    done = run(cmd, check=False, cwd=tmp_path)
    assert done.returncode and "mine:broken" in done.stderr and "Traceback" not in done.stderr


# ----- interruptions

@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_resumes_to_the_same_numbers(undisturbed, tiny, problems, options, tmp_path, seed):
    """kill -9 at random moments, again and again, until the run gets through: every metric is that of the run
    that was left alone, bit for bit (CPU, torch engine, fp32)."""
    cmd = command(tiny, problems, tmp_path / "r", *options, "--resume")
    dice, kills = random.Random(seed), 0
    while kills < 4:
        p = launch(cmd, real=seed == 1)
        seen, wanted = 0, dice.randint(1, 3)
        for line in p.stdout:
            seen += "/6 " in line[:16]
            if seen >= wanted:
                time.sleep(dice.random() * 0.4)
                break
        p.send_signal(signal.SIGKILL)
        p.stdout.close()
        if p.wait() == 0:
            break
        kills += 1
    assert kills
    run(cmd)
    assert metrics(tmp_path / "r") == metrics(undisturbed)


@pytest.mark.parametrize("name", ["policy.dcp.save", "policy.os.rename", "policy.os.fsync", "policy.prune"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_during_a_save(undisturbed, tiny, problems, options, tmp_path, name, after):
    """Killed right before or after each thing that the second save does: no half passes for a checkpoint."""
    code = (f"real, original = grpo.Learner.save, {name}\n"
            "def killing(*a, **kw):\n"
            f"    value = original(*a, **kw) if {after} else None\n"
            "    os.kill(os.getpid(), 9)\n"
            "def save(self, step, *rest):\n"
            "    if step == 4:\n"
            f"        {name} = killing\n"
            "    return real(self, step, *rest)\n"
            "grpo.Learner.save = save")
    cmd = command(tiny, problems, tmp_path / "r", *options, "--resume", program=sabotaged(tmp_path, code))
    assert run(cmd, check=False).returncode == -9
    run(command(tiny, problems, tmp_path / "r", *options, "--resume"))
    assert metrics(tmp_path / "r") == metrics(undisturbed)
    assert sorted(os.listdir(tmp_path / "r/checkpoints")) == ["000004", "000006"]


def test_resume_on_another_number_of_ranks(undisturbed, tiny, problems, options, tmp_path):
    """Saved by one rank, continued by two, then by one: a checkpoint is not tied to its ranks."""
    for steps, ranks in ((2, 1), (4, 2), (6, 1)):
        run(command(tiny, problems, tmp_path / "r", *options, "--resume", "--steps", steps, ranks=ranks))
    for whole, parts in zip(metrics(undisturbed), metrics(tmp_path / "r")):
        for name in ("reward", "tokens", "grad_norm", "loss", "entropy"):
            if name in whole:
                assert parts[name] == pytest.approx(whole[name], **CLOSE), (whole["step"], name)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_saves_and_leaves(undisturbed, tiny, problems, options, tmp_path, number, code, ranks):
    cmd = command(tiny, problems, tmp_path / "r", *options, "--save_every", 100, ranks=ranks)
    p = launch(cmd, real=True)
    wait_for(p, " 2/6 ")
    os.killpg(p.pid, number)
    rest = p.stdout.read()
    p.wait(timeout=120)
    assert "stopped after step" in rest and "--resume" in rest, rest[-3000:]
    if ranks == 1:
        assert p.returncode == code
        run(command(tiny, problems, tmp_path / "r", *options, "--save_every", 100, "--resume"))
        assert metrics(tmp_path / "r") == metrics(undisturbed)
    else:
        assert len(os.listdir(tmp_path / "r/checkpoints")) == 1


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "kill"])
def test_interrupted_validation_is_made_up_for(undisturbed, tiny, problems, options, tmp_path, step, number):
    code = (f"real, wanted = grpo.rollout, {{'eval': {step}, 'now': 0}}\n"
            "def rollout_(*a, **kw):\n"
            "    if a[5] != 'eval':\n"
            "        wanted['now'] = a[5]\n"
            "    elif wanted['now'] == wanted['eval']:\n"
            f"        os.kill(os.getpid(), {int(number)})\n"
            "    return real(*a, **kw)\n"
            "grpo.rollout = rollout_")
    cmd = command(tiny, problems, tmp_path / "r", *options, "--resume", program=sabotaged(tmp_path, code))
    assert run(cmd, check=False).returncode in (143, -9)
    run(command(tiny, problems, tmp_path / "r", *options, "--resume"))
    assert metrics(tmp_path / "r") == metrics(undisturbed)


def test_a_stop_file_saves_and_leaves(undisturbed, tiny, problems, options, tmp_path):
    p = launch(command(tiny, problems, tmp_path / "r", *options, "--save_every", 100))
    wait_for(p, " 1/6 ")
    (tmp_path / "r/stop").touch()
    assert "stopped after step" in p.stdout.read() and p.wait(timeout=60) == 0
    done = run(command(tiny, problems, tmp_path / "r", *options, "--save_every", 100, "--resume"))
    assert "stop was there from before and has been removed" in done.stdout
    assert metrics(tmp_path / "r") == metrics(undisturbed)


# ----- one run in one folder

def test_one_run_in_a_folder(tiny, problems, tmp_path):
    """A second start is refused while any worker of the first lives, even one whose torchrun was killed."""
    cmd = command(tiny, problems, tmp_path / "r", "--steps", 10**6, "--save_every", 10**6, ranks=2)
    p = launch(cmd, real=True)
    wait_for(p, " 1/1000000 ")
    children = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True, check=True).stdout
    workers = [int(w) for w in children.split()]
    again = command(tiny, problems, tmp_path / "r", "--resume", "--steps", 1)
    assert f"{tmp_path / 'r'} is in use" in run(again, check=False).stderr
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # or they would notice at once
    p.kill()
    p.wait()
    refused = run(again, check=False)
    assert refused.returncode == 2 and f"{tmp_path / 'r'} is in use" in refused.stderr
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    p.stdout.close()
    run(again)


def test_existing_run_is_not_overwritten(undisturbed, tiny, problems):
    before = (undisturbed / "metrics.jsonl").read_text()
    done = run(command(tiny, problems, undisturbed, "--steps", 1), check=False)
    assert done.returncode == 2 and "--resume" in done.stderr
    assert (undisturbed / "metrics.jsonl").read_text() == before


# ----- disks

def test_full_disk_costs_the_checkpoint_not_the_run(tiny, problems, tmp_path):
    """A file-size limit makes every large write fail as a full disk does."""
    cmd = command(tiny, problems, tmp_path / "r", "--steps", 2, "--save_every", 1)
    done = run(["bash", "-c", "trap '' XFSZ; ulimit -f 200; exec \"$@\"", "_", *cmd], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ALARM checkpoint") >= 2 and len(metrics(tmp_path / "r")) == 2
    assert os.listdir(tmp_path / "r/checkpoints") == []


def test_full_disk_for_metrics_and_one_rank_that_cannot_save(undisturbed, tiny, problems, options, tmp_path):
    """Lines 2 to 4 find no room; rank 1 cannot write its part of checkpoint 2; then the run is killed. The
    lines come back from checkpoint 4."""
    code = ("writer = policy.dcp.FileSystemWriter\n"
            "real_write, real_data = common.write_atomic, writer.write_data\n"
            "real_update = grpo.Learner.update\n"
            "state = {'step': 0}\n"
            "def write(path, content):\n"
            "    if path.endswith('metrics.jsonl') and state['step'] in (2, 3, 4):\n"
            "        raise OSError(28, 'No space left on device')\n"
            "    if path.endswith('metrics.jsonl') and state['step'] == 5:\n"
            "        os.kill(os.getpid(), 9)\n"
            "    real_write(path, content)\n"
            "def write_data(self, *a):\n"
            "    if RANK == 1 and state['step'] == 2:\n"
            "        raise OSError(28, 'No space left on device')\n"
            "    return real_data(self, *a)\n"
            "def update(self, step, *rest):\n"
            "    state['step'] = step + 1\n"
            "    return real_update(self, step, *rest)\n"
            "common.write_atomic, writer.write_data, grpo.Learner.update = write, write_data, update")
    program = sabotaged(tmp_path, code)
    done = run(command(tiny, problems, tmp_path / "r", *options, ranks=2, program=program), check=False)
    assert "are kept and written later" in done.stdout and done.stdout.count("ALARM checkpoint") == 1
    assert "No space left on device" in done.stdout and os.listdir(tmp_path / "r/checkpoints") == ["000004"]
    assert [m["step"] for m in metrics(tmp_path / "r")] == [0, 1]
    run(command(tiny, problems, tmp_path / "r", *options, "--resume", ranks=2))
    assert [m["step"] for m in metrics(tmp_path / "r")] == [0, 1, 2, 3, 4, 5, 6]
    for whole, parts in zip(metrics(undisturbed), metrics(tmp_path / "r")):
        assert whole.get("reward") == pytest.approx(parts.get("reward"))
        assert ("eval_se" in whole) == ("eval_se" in parts)


def test_disk_too_small_is_refused_first_but_not_for_what_is_there(undisturbed, tiny, problems, tmp_path):
    code = ("import types\n"
            "grpo.shutil.disk_usage = lambda path: types.SimpleNamespace(free={free})")
    parameters = sum(p.numel() for p in make_model().parameters())
    small = sabotaged(tmp_path, code.format(free=20 * parameters))
    done = run(command(tiny, problems, tmp_path / "r", program=small), check=False)
    assert done.returncode == 2 and "GiB free" in done.stderr and not (tmp_path / "r").exists()
    shutil.copytree(undisturbed, tmp_path / "old")  # two are there: only one more at a time is needed
    run(command(tiny, problems, tmp_path / "old", "--resume", "--steps", 7, program=small))


def test_a_bad_line_in_the_middle_is_named_and_the_rest_kept(undisturbed, tiny, problems, options, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(undisturbed, out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines[:3], '{"step": 3, "rew', *lines[4:]]) + "\n")
    done = run(command(tiny, problems, out, *options, "--resume"))
    assert "metrics.jsonl, line 4" in done.stdout
    assert [m["step"] for m in metrics(out)] == [0, 1, 2, 4, 5, 6]


# ----- damage

def test_non_finite_updates_are_skipped_counted_and_stop_the_run(tiny, problems, tmp_path):
    """A learning rate of 1e30 makes NaN weights in one update. The run stops, and no checkpoint has them."""
    done = run(command(tiny, problems, tmp_path / "r", "--steps", 9, "--lr", "1e30", "--updates", 6,
                       "--save_every", 1),
               check=False)
    assert done.returncode and "5 updates in a row" in done.stderr + done.stdout
    assert done.stdout.count("ALARM update skipped") == 5 and not (tmp_path / "r/checkpoints").exists()


def test_damaged_weights_are_noticed_when_every_group_is_dropped(tiny, problems, tmp_path):
    """NaN weights earn 0, so `improved` drops every group and no update fails. Step 3 breaks them."""
    code = ("import torch\nreal = grpo.Learner.update\n"
            "def update(self, step, *rest):\n"
            "    real(self, step, *rest)\n"
            "    if step == 2:\n"
            "        with torch.no_grad():\n"
            "            next(self.policy.parameters()).fill_(float('nan'))\n"
            "grpo.Learner.update = update")
    for save_every, words in ((1, "a weight is not finite"), (2, "log-probs are not finite")):
        out = tmp_path / f"r{save_every}"
        done = run(command(tiny, problems, out, "--steps", 9, "--recipe", "improved",
                           "--save_every", save_every, program=sabotaged(tmp_path, code)), check=False)
        assert done.returncode and words in done.stderr and "--lr" in done.stderr, done.stderr[-2000:]
        assert max(os.listdir(out / "checkpoints")) == "000002"


def test_unreadable_checkpoint_and_another_model(undisturbed, tiny, problems, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(undisturbed, out)
    other = save_model(tmp_path / "other", hidden_size=96, num_attention_heads=3)
    config = (out / "config.json").read_text()
    done = run(command(other, problems, out, "--steps", 7, "--resume"), check=False)
    assert done.returncode == 2 and "of another model" in done.stderr, done.stderr
    assert "elete" not in done.stderr
    assert (out / "config.json").read_text() == config
    for f in (out / "checkpoints/000006").glob("*.distcp"):
        f.write_bytes(f.read_bytes()[:100])
    done = run(command(tiny, problems, out, "--steps", 7, "--resume"), check=False)
    assert done.returncode == 2 and "000006" in done.stderr and "Traceback" not in done.stderr


def test_a_generation_config_that_cannot_be_saved(problems, tmp_path):
    """do_sample: false beside a temperature, as some models have it: save_pretrained refuses, not a run."""
    model = save_model(tmp_path / "m")
    path = Path(model) / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 0}))
    run(command(model, problems, tmp_path / "r", "--steps", 1))
    assert (tmp_path / "r/checkpoints/000001/hf/model.safetensors").exists()


def test_a_run_of_the_old_format_goes_on(undisturbed, tiny, problems, options, tmp_path):
    """Checkpoints of earlier versions have a file `latest`, and other names in trainer.json."""
    out = tmp_path / "r"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoints/000006")
    (out / "checkpoints/latest").write_text("000002\n")  # stale: must neither be followed nor delete anything
    path = out / "checkpoints/000004/trainer.json"
    state = json.loads(path.read_text())
    del state["unwritten"]
    state |= {"skipped_in_a_row": 0, "reward_seen": True, "data_position": 24}
    state["config"] |= {"show_every": 0, "difficulty": None}
    path.write_text(json.dumps(state))
    run(command(tiny, problems, out, *options, "--resume"))
    assert metrics(out) == metrics(undisturbed)


# ----- one rank of two fails

FAILS = "if RANK == 1:\n    def fail(*a, **kw):\n        raise {}\n    {} = fail"


@pytest.mark.parametrize("code, words", [
    (FAILS.format("ValueError('no such style here')", "grpo.evaluate.load_style"),
     "no such style here (rank 1)"),
    (FAILS.format("RuntimeError('half a weight file')", "policy.Policy"),
     "half a weight file (rank 1)"),
    (FAILS.format("IndexError('grader broke')", "grpo.evaluate.reward.explain"),
     "grader broke (rank 1)"),
], ids=["start", "model", "grader"])
def test_a_failure_of_one_rank_ends_all_with_its_words(tiny, problems, tmp_path, code, words):
    program = sabotaged(tmp_path, code)
    done = run(command(tiny, problems, tmp_path / "r", ranks=2, program=program), check=False, timeout=120,
               real=True)
    assert done.returncode and done.stderr.count(words) == 1, done.stderr[-3000:]


# ----- refusals, warnings, alarms

@pytest.mark.parametrize("options, words", [
    (["--max_len", 1024], "leaves no room for a prompt"),
    (["--max_prompt_len", 2], "raise --max_prompt_len"),
    (["--prompts", 64], "problems"),
    (["--token_budget", 20], "--token_budget 20 holds no full sequence"),
    (["--model", "assets/no-such-model"], "no-such-model"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--report_to", "wandb"], "pip install wandb"),
    (["--style", "none"], "--style none"),
    (["--reward", "nowhere:f"], "--reward nowhere:f"),
], ids=lambda x: str(x[0]).strip("-") if isinstance(x, list) else "")
def test_refused_before_work_starts(tiny, problems, tmp_path, options, words):
    done = run(command(tiny, problems, tmp_path / "r", *options), check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()  # a failed start leaves nothing


def test_malformed_data_names_file_and_line(tiny, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?"}\n')
    done = run(command(tiny, str(bad), tmp_path / "r"), check=False)
    assert done.returncode == 2 and "bad.jsonl, line 2" in done.stderr and "Traceback" not in done.stderr


def test_no_chat_template(problems, tmp_path):
    model = save_model(tmp_path / "base", kind="llama", template=False)
    done = run(command(model, problems, tmp_path / "r", "--steps", 1), check=False)
    assert done.returncode == 2 and "--no_chat" in done.stderr
    run(command(model, problems, tmp_path / "r", "--steps", 1, "--no_chat", "--instruction", "Say it."))
    with gzip.open(tmp_path / "r/rollouts/000001.jsonl.gz", "rt") as f:
        assert json.loads(f.readline())["prompt_tokens"] == len("1+1? Say it.")


def test_long_prompts_are_dropped_and_counted(tiny, problems, tmp_path):
    data = tmp_path / "some_long.jsonl"
    long = json.dumps({"problem": "1+" * 50 + "1?", "answer": "51"})
    data.write_text(Path(problems).read_text() + long + "\n")
    done = run(command(tiny, str(data), tmp_path / "r", "--steps", 1, "--max_prompt_len", 100))
    assert "1 of 37 prompts are longer than 100 tokens and were dropped" in done.stdout


def test_alarms_say_what_is_wrong_once(tiny, problems, tmp_path):
    done = run(command(tiny, problems, tmp_path / "r", "--steps", 2, "--style", "r1", "--max_len", 4))
    assert done.stdout.count("ALARM no reward in 1 step") == 1 and "--style plain" in done.stdout
    assert done.stdout.count("were cut off at --max_len 4") == 1


def test_unreadable_golds_are_blamed_before_the_model(tiny, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"problem": f"{i}?", "answer": "\\frac{" if i % 2 else "1"} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    done = run(command(tiny, str(data), tmp_path / "r", "--steps", 1), check=False)
    assert done.returncode == 2 and "\\frac{" in done.stderr and "--allow_unreadable" in done.stderr
    done = run(command(tiny, str(data), tmp_path / "r", "--steps", 1, "--allow_unreadable"))
    assert "cannot read" in done.stdout and "ALARM no reward" not in done.stdout


def test_stale_engine_raises_the_alarm(tiny, problems, tmp_path):
    """An engine whose push does nothing after the first: the trainer must notice within a step or two."""
    code = ("real, pushed = rollout.TorchEngine.push, []\n"
            "def push(self, weights):\n"
            "    pushed.append(1)\n"
            "    return real(self, weights) if len(pushed) == 1 else list(weights) and None\n"
            "rollout.TorchEngine.push = push")
    program = sabotaged(tmp_path, code)
    done = run(command(tiny, problems, tmp_path / "r", "--steps", 3, "--lr", "2e-2", program=program))
    assert "ALARM engine and trainer disagree" in done.stdout and "stale" in done.stdout


def test_out_of_memory_says_what_to_lower(tiny, problems, tmp_path):
    code = ("def generate(self, *a, **kw):\n"
            "    raise RuntimeError('CUDA Error: out of memory at cumem_allocator.cpp:62')\n"
            "rollout.TorchEngine.generate = generate")
    done = run(command(tiny, problems, tmp_path / "r", program=sabotaged(tmp_path, code)), check=False)
    assert done.returncode and "out of memory" in done.stderr and "--token_budget" in done.stderr
    assert "Traceback" not in done.stderr


def test_srun_without_torchrun_is_told(tiny, problems, tmp_path):
    done = run(command(tiny, problems, tmp_path / "r", "--steps", 1), SLURM_NTASKS="2")
    assert "torchrun" in done.stderr and "warning" in done.stderr


def test_a_tracker_gets_groups_and_the_same_run_on_resume(tiny, problems, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "import json\n"
        "def keep(**kw):\n    open('calls.jsonl', 'a').write(json.dumps(kw, default=str) + '\\n')\n"
        "def init(**kw):\n    keep(init=kw)\n"
        "def log(numbers, step):\n    keep(log=numbers, step=step)\n")
    for steps in (1, 2):
        run(command(tiny, problems, tmp_path / "r", "--steps", steps, "--report_to", "wandb", "--resume"),
            cwd=tmp_path, WANDB_PROJECT="mine", PYTHONPATH=str(tmp_path))
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    first, second = (c["init"] for c in calls if "init" in c)
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["project"] == "mine"
    assert first["config"]["max_len"] == 24
    logged = [c for c in calls if "log" in c]
    assert [c["step"] for c in logged] == [1, 2]
    assert {"reward/reward", "length/length_mean", "policy/grad_norm", "mismatch/mismatch_kl",
            "time/seconds_update", "length/truncated", "reward/solve_all"} <= set(logged[0]["log"])


def test_tensorboard_mirror(tiny, problems, tmp_path):
    pytest.importorskip("tensorboard")
    run(command(tiny, problems, tmp_path / "r", "--steps", 1, "--report_to", "tensorboard"))
    assert list(Path(tmp_path / "r/tensorboard").iterdir())
