"""Whole runs of grpo.py on a tiny model: ranks, crashes, signals, broken surroundings, and what a run leaves behind."""
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, command, metrics, run, save_model

import grpo

CLOSE = dict(rel=2e-4, abs=2e-6)


@pytest.fixture(scope="module")
def undisturbed(tiny, problems, tmp_path_factory):
    """Six steps in one go: what every disturbed run must reproduce to the last bit."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(command(tiny, problems, out, "--steps", 6, "--save_every", 2, "--eval_data", problems, "--eval_every", 3,
                "--eval_n", 2))
    return out


def test_what_a_run_leaves(undisturbed, tiny):
    lines = metrics(undisturbed, timing=True)
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert {"eval_reward", "eval_se"} <= set(lines[0]) and "eval_reward" in lines[3] and "eval_reward" not in lines[4]
    for m in lines[1:]:
        phases = sum(m[f"seconds_{p}"] for p in ("generate", "reward", "logprobs", "update", "sync", "idle"))
        assert 0 < phases <= m["seconds"] and m["tokens"] > 0 and m["updates"] == 2 and m["grad_norm"] > 0
        assert m["length_min"] <= m["length_mean"] <= m["length_max"] <= 24
        assert m["mismatch_kl"] < 1e-9
    assert sorted(os.listdir(undisturbed / "rollouts")) == [f"{i:06d}.jsonl.gz" for i in range(1, 7)]
    with gzip.open(undisturbed / "rollouts/000004.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 24 and {r["sample"] for r in rows} == {0, 1, 2, 3}
    assert sum(r["response_tokens"] for r in rows) == lines[4]["tokens"]
    assert abs(sum(r["reward"] for r in rows) / 24 - lines[4]["reward"]) < 1e-6
    assert sorted(os.listdir(undisturbed / "checkpoints")) == ["000004", "000006", "latest"]  # --keep 2
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["options"]["max_len"] == 24 and config["versions"]["torch"]
    hf = undisturbed / "checkpoints/000006/hf"
    model = AutoModelForCausalLM.from_pretrained(hf)
    assert AutoTokenizer.from_pretrained(hf).chat_template
    start = AutoModelForCausalLM.from_pretrained(tiny)
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), start.parameters())]
    assert min(moved) > 0 and model.dtype == torch.float32


def test_two_ranks_equal_one(undisturbed, tiny, problems, tmp_path):
    """Same samples, same gradient: lengths are uneven, and with a budget of 200 so is the number of sequences a
    rank has in a micro-batch."""
    run(command(tiny, problems, tmp_path / "two", "--steps", 3, "--token_budget", 200, "--eval_data", problems,
                "--eval_every", 3, "--eval_n", 2, ranks=2))
    for one, two in zip(metrics(undisturbed), metrics(tmp_path / "two")):
        for name in ("reward", "length_mean", "tokens", "solve_none", "grad_norm", "loss", "entropy", "kl_ref", "eval_reward"):
            if name in one:
                assert two[name] == pytest.approx(one[name], **CLOSE), (one["step"], name)
    for step in (1, 2, 3):  # seeds do not depend on the number of ranks: the very same responses
        one, two = (gzip.open(r / f"rollouts/{step:06d}.jsonl.gz", "rt").read() for r in (undisturbed, tmp_path / "two"))
        assert one == two


def test_more_ranks_than_sequences(tiny, problems, tmp_path):
    """Two samples in each mini-batch and a dropped group: some rank has nothing to train on, and must not hang."""
    run(command(tiny, problems, tmp_path / "r", "--steps", 2, "--prompts", 2, "--group", 2, "--updates", 2, ranks=3),
        timeout=300)
    assert len(metrics(tmp_path / "r")) == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_resumes_to_the_same_numbers(undisturbed, tiny, problems, tmp_path, seed):
    """kill -9 at random moments, again and again, until the run gets through: every metric is that of the run that
    was left alone, bit for bit (CPU, torch engine, fp32)."""
    cmd = command(tiny, problems, tmp_path / "r", "--steps", 6, "--save_every", 2, "--eval_data", problems,
                  "--eval_every", 3, "--eval_n", 2, "--resume")
    dice, kills = random.Random(seed), 0
    while kills < 4:
        p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        seen, wanted = 0, dice.randint(1, 3)
        for line in p.stdout:
            seen += "| reward" in line
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


@pytest.mark.parametrize("moment", ["dcp.save(", "torch.save(", "save_pretrained(", "os.rename(tmp, final)", "write_atomic(os.path.join(folder"])
def test_killed_during_a_save(undisturbed, tiny, problems, tmp_path, moment):
    """Killed right before and right after each thing a save does; the temporary folder never passes for a checkpoint."""
    for after in (False, True):
        out = tmp_path / f"r{int(after)}"
        work = tmp_path / f"code{int(after)}"
        work.mkdir()
        for name in ("grpo.py", "evaluate.py", "rollout.py", "reward.py", "data.py", "policy.py"):
            shutil.copy(ROOT / name, work)
        lines, done = (work / "policy.py").read_text().splitlines(), False
        start = next(i for i, x in enumerate(lines) if x.startswith("def save_checkpoint"))
        for i in range(start, len(lines)):
            if moment in lines[i] and not done:
                indent = lines[i][:len(lines[i]) - len(lines[i].lstrip())]
                kill = f"{indent}if step == 4: os.kill(os.getpid(), 9)"
                end = i  # a call may go over several lines
                while lines[i:end + 1] and "".join(lines[i:end + 1]).count("(") > "".join(lines[i:end + 1]).count(")"):
                    end += 1
                lines.insert(end + 1 if after else i, kill)
                done = True
        assert done
        (work / "policy.py").write_text("\n".join(lines))
        options = ("--steps", 6, "--save_every", 2, "--eval_data", problems, "--eval_every", 3, "--eval_n", 2, "--resume")
        cmd = command(tiny, problems, out, *options)
        killed = run([str(work / "grpo.py") if c == str(ROOT / "grpo.py") else c for c in cmd], check=False)
        assert killed.returncode == -9
        run(cmd)
        assert metrics(out) == metrics(undisturbed)
        assert not [n for n in os.listdir(out / "checkpoints") if "tmp" in n]


def test_resume_on_another_number_of_ranks(undisturbed, tiny, problems, tmp_path):
    """Saved by one rank, continued by two, then by one: the checkpoint is not tied to the ranks that wrote it."""
    eval_options = ("--save_every", 2, "--eval_data", problems, "--eval_every", 3, "--eval_n", 2)
    out = tmp_path / "r"
    run(command(tiny, problems, out, "--steps", 2, *eval_options))
    run(command(tiny, problems, out, "--steps", 4, "--resume", *eval_options, ranks=2))
    run(command(tiny, problems, out, "--steps", 6, "--resume", *eval_options))
    for whole, parts in zip(metrics(undisturbed), [m for m in metrics(out)]):
        for name in ("reward", "tokens", "grad_norm", "loss", "entropy"):
            if name in whole:
                assert parts[name] == pytest.approx(whole[name], **CLOSE), (whole["step"], name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_saves_and_leaves(undisturbed, tiny, problems, tmp_path, number, ranks):
    options = ("--steps", 6, "--save_every", 100, "--eval_data", problems, "--eval_every", 3, "--eval_n", 2)
    cmd = command(tiny, problems, tmp_path / "r", *options, ranks=ranks)
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    seen = ""
    for line in p.stdout:
        seen += line
        if line.lstrip().startswith("2 |"):
            os.killpg(p.pid, number)
            break
    seen += p.stdout.read()
    p.wait(timeout=120)
    if ranks == 1:
        assert p.returncode == 0 and "--resume continues after step" in seen, seen[-3000:]
    done = json.loads((tmp_path / "r/checkpoints" / (tmp_path / "r/checkpoints/latest").read_text().strip() / "trainer.json").read_text())
    assert done["step"] >= 2
    if ranks == 1:
        run(command(tiny, problems, tmp_path / "r", *options, "--resume"))
        assert metrics(tmp_path / "r") == metrics(undisturbed)


def test_non_finite_updates_are_skipped_counted_and_stop_the_run(tiny, problems, tmp_path):
    """A learning rate of 1e30 makes NaN weights in one update; the updates after it are all skipped."""
    done = run(command(tiny, problems, tmp_path / "r", "--steps", 9, "--lr", "1e30", "--max_skips", 3), check=False)
    assert done.returncode == 1 and "3 updates in a row had a non-finite loss or gradient" in done.stderr
    assert done.stdout.count("ALARM update skipped") == 3


def test_two_updates_use_the_stored_old_logprobs(undisturbed):
    """With old log-probs taken from the moving policy every ratio would be 1: clip fraction and approx_kl exactly 0."""
    assert all(m["approx_kl"] > 1e-7 and m["ratio_mean"] != 1 for m in metrics(undisturbed)[1:])


def test_improved_recipe_and_overrides(tiny, problems, tmp_path):
    out = tmp_path / "r"
    run(command(tiny, problems, out, "--steps", 1, "--recipe", "improved", "--clip_high", 0.4))
    options = json.loads((out / "config.json").read_text())["options"]
    assert (options["temperature"], options["clip_low"], options["clip_high"]) == (1.0, 0.2, 0.4)
    assert options["kl_coef"] == options["entropy_coef"] == 0 and options["drop_zero_variance"] == 1
    assert metrics(out)[0]["kl_ref"] is None  # no reference was loaded


def test_defaults_are_the_published_first_stage():
    a = grpo.parse_args([])
    assert (a.model, a.prompts, a.group, a.updates, a.max_len, a.max_prompt_len, a.steps) == \
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 128, 8, 2, 8192, 1024, 1040)
    assert (a.temperature, a.lr, a.clip_low, a.clip_high, a.kl_coef, a.entropy_coef, a.grad_clip, a.weight_decay) == \
        (0.6, 1e-6, 0.2, 0.2, 0.001, 0.001, 1.0, 0.01)
    assert a.loss_agg == "token" and not a.drop_zero_variance and a.tis_cap == 0 and a.eval_data.endswith("aime24.jsonl")


@pytest.mark.parametrize("options, words", [
    (["--group", 1], "--group must be at least 2"),
    (["--max_len", 1024], "leaves no room for a prompt"),
    (["--max_prompt_len", 2], "raise --max_prompt_len"),
    (["--prompts", 5], "cannot be cut into 2 equal mini-batches"),
    (["--prompts", 64], "problems"),
    (["--token_budget", 20], "--token_budget 20 holds no full sequence"),
    (["--temperature", 0], "--temperature"),
    (["--model", "no/such-model"], "--model no/such-model cannot be opened"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--report_to", "trackio"], "pip install trackio"),
], ids=lambda x: str(x[0]).strip("-") if isinstance(x, list) else "")
def test_refused_before_work_starts(tiny, problems, tmp_path, options, words):
    if "trackio" in options:
        try:
            import trackio  # noqa: F401
            options, words = ["--report_to", "none", "--group", 1], "--group"
        except ImportError:
            pass
    done = run(command(tiny, problems, tmp_path / "r", *options), check=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "r/metrics.jsonl").exists()


def test_malformed_data_names_file_and_line(tiny, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?"}\n')
    done = run(command(tiny, str(bad), tmp_path / "r"), check=False)
    assert done.returncode == 2 and "bad.jsonl, line 2" in done.stderr and "Traceback" not in done.stderr


def test_no_chat_template(problems, tmp_path):
    model = save_model(tmp_path / "base", template=False)
    done = run(command(model, problems, tmp_path / "r", "--steps", 1), check=False)
    assert done.returncode == 2 and "--no_chat" in done.stderr
    run(command(model, problems, tmp_path / "r", "--steps", 1, "--no_chat"))


def test_long_prompts_are_dropped_and_counted(tiny, problems, tmp_path):
    data = tmp_path / "some_long.jsonl"
    data.write_text(Path(problems).read_text() + json.dumps(dict(problem="1+" * 50 + "1?", answer="51")) + "\n")
    done = run(command(tiny, str(data), tmp_path / "r", "--steps", 1, "--max_prompt_len", 100))
    assert "1 of 37 prompts are longer than 100 tokens and were dropped" in done.stdout


def test_existing_run_is_not_overwritten(undisturbed, tiny, problems):
    before = (undisturbed / "metrics.jsonl").read_text()
    done = run(command(tiny, problems, undisturbed, "--steps", 1), check=False)
    assert done.returncode == 2 and "--resume" in done.stderr and (undisturbed / "metrics.jsonl").read_text() == before


def test_unreadable_checkpoint(undisturbed, tiny, problems, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(undisturbed, out)
    for f in (out / "checkpoints/000006").glob("*.distcp"):
        f.write_bytes(f.read_bytes()[:100])
    done = run(command(tiny, problems, out, "--steps", 7, "--resume"), check=False)
    assert done.returncode == 2 and "000006 cannot be read" in done.stderr and "Delete that folder" in done.stderr
    shutil.rmtree(out / "checkpoints/000006")
    assert "resuming from" in run(command(tiny, problems, out, "--steps", 5, "--resume")).stdout


def test_full_disk_costs_the_checkpoint_not_the_run(tiny, problems, tmp_path):
    """A file-size limit makes every large write fail as a full disk does."""
    cmd = command(tiny, problems, tmp_path / "r", "--steps", 2, "--save_every", 1)
    done = run(["bash", "-c", "trap '' XFSZ; ulimit -f 200; exec \"$@\"", "_", *cmd], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ALARM checkpoint") >= 2 and len(metrics(tmp_path / "r")) == 2
    assert os.listdir(tmp_path / "r/checkpoints") == []


def test_disk_too_small_is_refused_first(tiny, problems, tmp_path):
    done = run(command(tiny, problems, tmp_path / "r", "--keep", 10**9), check=False)
    assert done.returncode == 2 and "GiB free" in done.stderr


def test_alarms(tiny, problems, tmp_path):
    done = run(command(tiny, problems, tmp_path / "r", "--steps", 1, "--style", "r1", "--max_len", 4))
    assert "ALARM no reward in the first 1 step" in done.stdout and "--style plain" in done.stdout
    assert "were cut off at --max_len 4" in done.stdout


def test_stale_engine_raises_the_alarm(tiny, problems, tmp_path):
    """An engine whose push does nothing: the trainer must notice within a step or two."""
    code = ("import sys, runpy; sys.path.insert(0, sys.argv[1]); import rollout; "
            "rollout.TorchEngine.push = lambda self, weights: [w for w in weights] and None; "
            "sys.argv = sys.argv[2:]; import grpo; grpo.main()")
    cmd = command(tiny, problems, tmp_path / "r", "--steps", 3, "--lr", "2e-2")
    done = run([sys.executable, "-c", code, str(ROOT), *cmd[1:]])
    assert "ALARM engine and trainer disagree" in done.stdout and "stale" in done.stdout


def test_learns_to_raise_its_reward(tmp_path):
    """The whole loop has the right sign: rewarded for answering at all, a random model writes that one token more."""
    model = save_model(tmp_path / "m", initializer_range=0.02)
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps(dict(id=str(i), problem=f"{i}", answer="7")) for i in range(16)))
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import reward; "
            "reward.compute_reward = lambda text, gold: float('a' in text); "
            "sys.argv = sys.argv[2:]; import grpo; grpo.main()")
    cmd = command(str(model), str(data), tmp_path / "r", "--steps", 25, "--prompts", 8, "--group", 8, "--max_len", 12,
                  "--temperature", 1.0, "--lr", "3e-3", "--save_every", 100)
    run([sys.executable, "-c", code, str(ROOT), *cmd[1:]])
    r = [m["reward"] for m in metrics(tmp_path / "r")]
    assert sum(r[-5:]) / 5 > sum(r[:5]) / 5 + 0.3, r


def test_tensorboard_mirror(tiny, problems, tmp_path):
    pytest.importorskip("tensorboard")
    run(command(tiny, problems, tmp_path / "r", "--steps", 1, "--report_to", "tensorboard"))
    assert list(Path(tmp_path / "r/tensorboard").iterdir())
