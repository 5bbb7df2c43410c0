"""evaluate.py: estimators against closed forms, brute force and simulation; runs that are killed, continued,
regraded, compared; rewards of one's own; files, disks and weights that are broken."""
import fcntl
import gzip
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, launch, make_tokenizer, metrics, python, run, save_model
from transformers import AutoModelForCausalLM

import common
import data
import evaluate
import rollout

# ----- Estimators ------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets():
    for n, right in [(1, 0), (1, 1), (2, 1), (5, 0), (5, 2), (5, 5), (8, 1), (8, 6)]:
        for k, value in enumerate(evaluate.pass_at_k(right, n), 1):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert value == pytest.approx(sum(map(any, subsets)) / len(subsets))


def rows_of(rewards):
    """rewards [P, n] -> rows as evaluate.py keeps them."""
    common = {"benchmark": "sums", "reason": "", "response_tokens": 10, "finish_reason": "stop"}
    return [{"id": f"p{i}", "sample": j, "reward": float(r), **common}
            for i, row in enumerate(rewards) for j, r in enumerate(row)]


def test_the_standard_error_by_simulation():
    """Draw problems and samples many times over: the spread of the score is what the formula says."""
    rng = np.random.default_rng(0)
    n, P, scores, se = 8, 60, [], []
    for _ in range(400):
        b = evaluate.summarize(rows_of(rng.random((P, n)) < rng.beta(0.5, 0.9, (P, 1))), n)
        scores.append(b["pass@1"])
        se.append(b["se"])
    assert np.mean(se) == pytest.approx(np.std(scores), rel=0.12)
    naive = math.sqrt(np.mean(scores) * (1 - np.mean(scores)) / (P * n))
    assert np.std(scores) > 1.5 * naive  # what treating the samples as independent would have claimed


def test_scores_of_0_and_100_percent_get_a_bound_over_problems():
    """Rule of three: 30 problems without a success, at most 10 %, however many samples each has."""
    none, every = (evaluate.summarize(rows_of(np.full((30, 16), r)), 16) for r in (0, 1))
    assert evaluate.percent(none["pass@1"], none["se"]) == "0.0 (at most 10.0)"
    assert evaluate.percent(every["pass@k"][-1], every["pass@k_se"][-1]) == "100.0 (at least 90.0)"
    for p in (2, 30, 200):  # the exact bound, 1 - 0.05 ** (1 / p), is never above it
        assert min(1, 2 * evaluate.mean_and_se([0.0] * p)[1]) >= 1 - 0.05 ** (1 / p)
    both = evaluate.average([none, none])
    assert evaluate.percent(both["pass@1"], both["se"]) == "0.0 (at most 7.1)"
    mixed = evaluate.average([none, every])
    assert mixed["pass@1"] == 0.5 and mixed["se"] == pytest.approx(0.05 / 2 ** 0.5)
    assert evaluate.mean_and_se([0.5]) == (0.5, None) and evaluate.mean_and_se([0.0]) == (0.0, 0.5)
    two = evaluate.average([{"pass@1": 0.2, "se": 0.03}, {"pass@1": 0.6, "se": 0.04}])
    assert two == {"pass@1": pytest.approx(0.4), "se": pytest.approx(0.025)}


def test_bootstrap_agrees_with_theory_and_is_calibrated():
    rng = np.random.default_rng(1)
    a, b = rng.random(200), rng.random(200)
    r = evaluate.paired_bootstrap([a], [b])
    assert r["difference"] == pytest.approx((b - a).mean())
    assert r["se"] == pytest.approx((b - a).std(ddof=1) / 200 ** 0.5, rel=0.05)
    assert r == evaluate.paired_bootstrap([a], [b])  # same seed, same numbers
    ps = [evaluate.paired_bootstrap([x := rng.random(40)], [x + rng.normal(size=40)], draws=400)["p"]
          for _ in range(300)]
    assert 0.01 < np.mean(np.array(ps) < 0.05) < 0.12  # no difference: p < 0.05 in about 5 %
    sure = evaluate.paired_bootstrap([a], [a + 0.1])
    assert sure["p"] == 1e-4 and sure["low"] == pytest.approx(0.1)
    assert evaluate.paired_bootstrap([a], [a])["p"] == 1.0
    two = evaluate.paired_bootstrap([[0.0] * 30, [0.5] * 500], [[1.0] * 30, [0.5] * 500])
    assert two["difference"] == pytest.approx(0.5)  # benchmarks weigh the same, not problems


def test_hand_checked_transcripts(tmp_path, capsys):
    """Two problems x four responses, read by a person: see the comments in the file's `why`."""
    rows = [json.loads(line) for line in (ROOT / "tests/data/transcripts.jsonl").read_text().splitlines()]
    blank = [{**r, "reward": 0.0, "extracted": None, "reason": ""} for r in rows]
    (tmp_path / "saved.responses.jsonl.gz").write_bytes(gzip.compress(common.json_lines(blank).encode()))
    protocol = {"template": None, "think": True, "stop": [], "n": 4, "style": "r1", "versions": {}}
    path = tmp_path / "saved.json"
    path.write_text(json.dumps({"name": "saved", "protocol": protocol, "benchmarks": {}}))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--regrade", str(path)])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "3 verdicts changed" in said and "37.5 ± 12.5" in said
    b = json.loads(path.read_text())["benchmarks"]["hand"]
    assert b["per_problem"] == {"p1": 2, "p2": 1}
    assert b["pass@1"] == pytest.approx(3 / 8)   # (2/4 + 1/4) / 2
    assert b["se"] == pytest.approx(0.125)       # |2/4 - 1/4| / 2
    assert b["pass@k"] == pytest.approx([3 / 8, (5 / 6 + 3 / 6) / 2, (1 + 3 / 4) / 2, 1.0])
    assert b["truncated"] == 2 / 8 and b["verdicts"]["no_close"] + b["verdicts"].get("no_box", 0) == 2
    assert b["tokens"] == pytest.approx(np.mean([10, 30, 20, 100, 12, 14, 16, 100]))
    assert b["tokens_right"] == pytest.approx((10 + 30 + 12) / 3) and b["tokens_wrong"] == pytest.approx(50)
    again = common.read_lines(str(tmp_path / "saved.responses.jsonl.gz"))
    assert [r["reward"] for r in again] == [r["right"] for r in rows]


# ----- Styles and rewards ----------------------------------------------------------------------------------

SEVEN = data.Problem("p", "?", "7")


def grade(text, style="r1", reward=None, problem=SEVEN):
    return evaluate.load_reward(reward, evaluate.STYLES[style])(problem, SimpleNamespace(text=text))


def test_where_each_style_looks_for_the_answer():
    assert grade("so \\boxed{8}</think> \\boxed{7}")[0] == 1
    assert grade("so \\boxed{7}</think> \\boxed{8}")[0] == 0
    assert grade("\\boxed{7}") == (0.0, "no_close") and grade("</think> 7") == (0.0, "no_box")
    assert grade("\\boxed{7}", "plain")[0] == grade("\\boxed{7}", "qwen-math")[0] == 1
    assert grade("code \\boxed{7}<end_of_answer> and \\boxed{9} for ever", "rstar")[0] == 1
    tokenizer, text = make_tokenizer(), "code \\boxed{7}<end_of_answer> and \\boxed{9}"
    item, style = evaluate.Item("sums", "p", 3, SEVEN, [1, 2]), evaluate.STYLES["rstar"]
    sample = rollout.Sample([1, 2], np.array(tokenizer(text)["input_ids"]), np.zeros(9), "length", text=text)
    job = SimpleNamespace(style=style, grade=evaluate.load_reward(None, style), tokenizer=tokenizer)
    row = evaluate.Evaluation.row(job, item, sample)
    assert (row["response"], row["finish_reason"], row["reward"]) == ("code \\boxed{7}", "stop", 1)
    assert row["response_tokens"] == len(tokenizer("code \\boxed{7}")["input_ids"]) and row["sample"] == 3


def test_prompts_of_the_styles(tmp_path):
    tokenizer, problem = make_tokenizer(), [data.Problem("p", "1+1?", "2")]

    def text(name, **options):
        style = evaluate.load_style(name)
        return tokenizer.decode(evaluate.encode(style, problem, tokenizer, 500, **options)[1][0])
    assert text("r1") == "<user>1+1? " + data.INSTRUCTION + "<bot>" == text("plain")
    assert text("plain", instruction="Box it.") == "<user>1+1? Box it.<bot>"
    assert text("qwen-math").startswith("<|im_start|>system\nPlease reason")
    assert text("rstar").startswith("<|user|>:\n1+1?\n<|assistant|>: Let's think step by step")
    mine = tmp_path / "mine.txt"
    mine.write_text("Q: {problem} Use {braces} freely.\nA: <think>")
    assert text(str(mine)) == "Q: 1+1? Use {braces} freely.\nA: <think>"
    assert evaluate.load_style(str(mine)).think and not evaluate.load_style("plain").think
    with pytest.raises(ValueError, match="--instruction"):
        text(str(mine), instruction="Box it.")
    with pytest.raises(ValueError, match="longer than 3 tokens"):
        evaluate.encode(evaluate.load_style(str(mine)), problem, tokenizer, 3)
    mine.write_text("no place for it")
    with pytest.raises(ValueError, match="exactly once"):
        evaluate.load_style(str(mine))
    with pytest.raises(ValueError, match="r1, plain, qwen-math, rstar"):
        evaluate.load_style("nonsense")


def test_a_tokenizer_that_loses_a_part_of_the_prompt_is_refused():
    """All that the model should read counts, not the problem alone: here it has no blank to lose."""
    from tokenizers import normalizers
    tokenizer, problem, plain = make_tokenizer(), [data.Problem("p", "1+1?", "2")], evaluate.STYLES["plain"]
    assert evaluate.encode(plain, problem, tokenizer, 500, vocabulary=106)
    with pytest.raises(ValueError, match="the model has 90 embeddings"):
        evaluate.encode(plain, problem, tokenizer, 500, vocabulary=90)
    tokenizer._tokenizer.normalizer = normalizers.Replace(" ", "")
    for style, given in ((plain, {}), (plain, {"chat": False}), (evaluate.STYLES["qwen-math"], {})):
        with pytest.raises(ValueError, match=r"does not give text back.*becomes"):
            evaluate.encode(style, problem, tokenizer, 500, **given)
    assert evaluate.encode(plain, problem, tokenizer, 500, instruction="")[1]


@pytest.mark.parametrize("template", ["<bos>Q: {problem}", "\n<bos>Q: {problem}", "Q: {problem}"])
def test_a_style_file_with_the_begin_of_text_token_gets_no_second_one(template, tmp_path):
    from tokenizers.processors import TemplateProcessing
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    (tmp_path / "style.txt").write_text(template)
    style = evaluate.load_style(str(tmp_path / "style.txt"))
    ids = evaluate.encode(style, [data.Problem("p", "1+1?", "2")], tokenizer, 100)[1][0]
    assert ids.count(tokenizer.bos_token_id) == 1


OWN = """
import math
def short(response, problem):
    return 0.37 if problem.id == "s0" else 1.0 / (1 + len(response) % 3)
def none(response, problem):
    return None if problem.id == "s2" else 0.5
def nan(response, problem):
    return math.nan
def wrong(response, problem):
    return problem.nothing
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "ownreward.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "ownreward:"
    sys.modules.pop("ownreward", None)


def test_a_reward_of_ones_own(own):
    problem = data.Problem("s0", "?", "", "here")
    assert grade("x", reward=own + "short", problem=problem) == (0.37, "scored")
    for name, says in (("nan", "on s2.*nan"), ("none", "on s2.*TypeError"), ("wrong", "s2.*AttributeError")):
        with pytest.raises(ValueError, match=f"--reward ownreward:{name}.*{says}"):
            grade("x", reward=own + name, problem=data.Problem("s2", "?", ""))
    for name in ("missing", "math"):
        with pytest.raises(ValueError, match=f"--reward ownreward:{name}: nothing to import"):
            grade("x", reward=own + name)
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        grade("x", reward="nowhere:f")
    b = evaluate.summarize(rows_of([[0.37, 0.7], [0.2, 0.1]]), 2)
    assert b["pass@1"] == pytest.approx(0.3425) and b["per_problem"] == {"p0": 1, "p1": 0}
    assert b["rewards"]["p0"] == pytest.approx(0.535) and b["pass@k"] == [0.25, 0.5]


# ----- Whole runs ------------------------------------------------------------------------------------------

def options(model, bench, out, *more):
    return ["--model", str(model), "--benchmarks", str(bench), "--out", str(out), "--name", "x", "--style",
            "plain", "-n", "5", "--max_tokens", "24", "--engine", "torch", *map(str, more)]


def cmd(*given, ranks=1):
    return [*python(ranks), str(ROOT / "evaluate.py"), *options(*given)]


@pytest.fixture
def here(capfd, monkeypatch):
    """Run evaluate.py in this process -> (exit code, what it said)."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def run_here(*argv):
        with pytest.raises(SystemExit) as end:
            evaluate.main(list(argv))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return end.value.code, "".join(capfd.readouterr())
    yield run_here
    signal.signal(signal.SIGINT, handlers[0])
    signal.signal(signal.SIGTERM, handlers[1])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "sums.jsonl"
    path.write_text("".join(json.dumps({"id": f"s{i}", "problem": f"{i}+1?", "answer": str(i + 1)}) + "\n"
                            for i in range(7)))
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny, bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run(cmd(tiny, bench, out))
    return out


def load(out):
    return (json.loads((out / "x.json").read_text()),
            list(common.read_lines(str(out / "x.responses.jsonl.gz"))))


def test_a_run_leaves_scores_and_every_response(undisturbed):
    result, rows = load(undisturbed)
    b = result["benchmarks"]["sums"]
    assert len(rows) == 35 and b["problems"] == 7 and b["n"] == 5 == len(b["pass@k"])
    assert b["per_problem"] == {f"s{i}": 0 for i in range(7)}  # what data.py select --rates reads
    assert b["tokens"] == pytest.approx(np.mean([r["response_tokens"] for r in rows]))
    assert result["parameters"] > 0 and result["tokens_generated"] == sum(r["response_tokens"] for r in rows)
    for word in ("style plain", "temperature 0.6", "top_p 0.95", "max_tokens 24", "n 5", "seed 0",
                 "engine torch", "torch 2.", "instruction Let's think", "problems clustered"):
        assert word in evaluate.protocol_line(result["protocol"])
    assert sorted(p.name for p in undisturbed.iterdir()) == ["x.json", "x.lock", "x.responses.jsonl.gz"]


@pytest.mark.slow
@pytest.mark.parametrize("how, again", [(signal.SIGKILL, 2), (signal.SIGTERM, 1), (signal.SIGINT, 3)])
def test_interrupted_runs_go_on_sample_by_sample(tiny, bench, undisturbed, tmp_path, how, again):
    """Stopped after a few samples, continued on another number of ranks: the same rows as undisturbed, and
    nothing generated twice."""
    child = launch(cmd(tiny, bench, tmp_path, "--max_seqs", 1))
    deadline, kept = time.time() + 120, []
    while time.time() < deadline and len(kept) < 7:
        time.sleep(0.005)
        kept = [line for p in tmp_path.glob("x.part.*") for line in p.read_text().splitlines()]
    child.send_signal(how)
    said, code = child.stdout.read(), child.wait(60)
    assert not (tmp_path / "x.json").exists(), "it finished before the signal"
    if how != signal.SIGKILL:
        assert code == 128 + how and "the same command goes on" in said
    part, = tmp_path.glob("x.part.*")
    rows = [json.loads(line) for line in part.read_text().splitlines()[1:]]
    with open(part, "a") as f:
        f.write('{"benchmark": "sums", "id": "s6", "sam')  # a line cut by the crash
    done = run(cmd(tiny, bench, tmp_path, ranks=again))
    assert f"{len(rows)} of 35 samples are there already" in done.stdout
    assert load(tmp_path)[0]["benchmarks"] == load(undisturbed)[0]["benchmarks"]
    assert load(tmp_path)[1] == load(undisturbed)[1] and all(row in load(tmp_path)[1] for row in rows)
    assert not list(tmp_path.glob("*.part*"))


def test_a_finished_run_is_not_run_again_but_extended(tiny, bench, undisturbed, tmp_path, here):
    for p in undisturbed.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    before = load(tmp_path)
    code, said = here(*options(tiny, bench, tmp_path))
    assert code == 0 and "35 of 35 samples are there already" in said and load(tmp_path)[1] == before[1]
    assert "35 of 42 samples" in here(*options(tiny, bench, tmp_path, "--n", 6))[1]
    assert [r for r in load(tmp_path)[1] if r["sample"] < 5] == before[1]
    for more, says in ((["--n", 2], "would be lost"), (["--temperature", 1], "temperature 0.6 -> 1.0"),
                       (["--reward", "math:sqrt"], "reward None -> 'math:sqrt'")):
        code, said = here(*options(tiny, bench, tmp_path, *more))
        assert code == 2 and says in said
    changed = tmp_path / "sums.jsonl"
    changed.write_text(bench.read_text().replace('"answer": "1"', '"answer": "11"'))
    code, said = here(*options(tiny, changed, tmp_path, "--n", 6))
    assert code == 2 and "sums s0, sample 0 has changed" in said and len(load(tmp_path)[1]) == 42


@pytest.mark.slow
def test_a_full_disk_ends_the_generation_at_once(tiny, bench, tmp_path, undisturbed):
    """A limit on the size of files stands for it. The same command with room gives the undisturbed result."""
    small = (resource.RLIMIT_FSIZE, (4000, 4000))
    done = subprocess.run(cmd(tiny, bench, tmp_path, "--max_seqs", 1), check=False, capture_output=True,
                          text=True, preexec_fn=lambda: resource.setrlimit(*small))
    assert done.returncode == 2 and "cannot be written" in done.stderr and "goes on" in done.stderr
    part, = tmp_path.glob("x.part.*")
    assert 1 < part.read_text().count("\n") < 15 and "Traceback" not in done.stderr
    run(cmd(tiny, bench, tmp_path))
    assert load(tmp_path)[1] == load(undisturbed)[1]


def test_a_failed_start_leaves_nothing(tiny, bench, tmp_path, here, monkeypatch):
    out = tmp_path / "a" / "b"
    (tmp_path / "empty.jsonl").write_text("")
    for model, data_file, more, says in (
            (tmp_path / "nowhere", bench, [], "nowhere"), (tiny, "aime23", [], "aime23"),
            (tiny, tmp_path / "empty.jsonl", [], "empty.jsonl"),
            (tiny, bench, ["--max_prompt_len", 20], "raise --max_prompt_len"),
            (tiny, bench, ["--max_tokens", 32768], "1024 positions")):
        code, said = here(*options(model, data_file, out, *more))
        assert code == 2 and says in said and not out.exists()

    def fails(*_, **__):
        raise common.RankError("vLLM: out of memory")
    monkeypatch.setattr(rollout, "make_engine", fails)
    code, said = here(*options(tiny, bench, out))
    assert code == 2 and "Lower --gpu_memory" in said and not out.exists()
    out.mkdir(parents=True)
    with open(out / "x.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        code, said = here(*options(tiny, bench, out))
    assert code == 2 and f"{out} is in use" in said


def test_damaged_or_exchanged_weights_are_told(bench, tmp_path, here):
    save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert here(*options(tmp_path / "model", bench, tmp_path / "out"))[0] == 0
    model.lm_head.weight.data *= 1.01
    model.save_pretrained(tmp_path / "model")
    code, said = here(*options(tmp_path / "model", bench, tmp_path / "out", "--n", 6))
    assert code == 2 and "weights '" in said
    model.lm_head.weight.data[3] = math.nan
    model.save_pretrained(tmp_path / "model")
    code, said = here(*options(tmp_path / "model", bench, tmp_path / "nan"))
    assert code == 2 and "NaN" in said and "damaged" in said and not (tmp_path / "nan/x.json").exists()


def test_a_run_with_a_reward_of_ones_own(tiny, tmp_path, own, here):
    bench = tmp_path / "open.jsonl"
    bench.write_text("".join(json.dumps({"id": f"s{i}", "problem": f"{i}+1?"}) + "\n" for i in range(4)))
    code, said = here(*options(tiny, bench, tmp_path, "--reward", own + "short"))
    assert code == 0 and "reward ownreward:short, " in said and "pass@n: from 0.5 on" in said
    result, rows = load(tmp_path)
    b = result["benchmarks"]["open"]
    assert b["rewards"]["s0"] == pytest.approx(0.37) and b["per_problem"]["s0"] == 0
    assert b["pass@1"] == pytest.approx(np.mean([r["reward"] for r in rows]))
    assert result["protocol"]["reward"] == "ownreward:short"
    text = evaluate.compare(result, {**result, "protocol": {**result["protocol"], "reward": None}})
    assert "CAUTION" in text and "reward 'ownreward:short' -> None" in text
    assert "0 verdicts changed" in here("--regrade", str(tmp_path / "x.json"))[1]
    code, said = here(*options(tiny, bench, tmp_path / "none", "--reward", own + "none"))
    assert code == 2 and "ownreward:none failed on s2" in said and not (tmp_path / "none/x.json").exists()


def test_alarms(tiny, bench, tmp_path, here):
    """Nothing can be earned, and it is not the model's fault: no </think>, no box, unreadable golds."""
    code, said = here(*options(tiny, bench, tmp_path, "--style", "r1", "--n", 1, "--max_tokens", 1))
    assert code == 0 and "7 of 7 responses have no </think>" in said and "--style plain" in said
    assert "0.0 (at most 42.9)" in said and "± 0.0" not in said
    code, said = here("--table", str(tmp_path / "x.json"))
    assert "ALARM" in said
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"id": "b", "problem": "1+1?", "answer": "1" * 9000}) + "\n")
    code, said = here(*options(tiny, bad, tmp_path / "bad"))
    assert code == 2 and "--allow_unreadable" in said and not (tmp_path / "bad").exists()
    said = here(*options(tiny, bad, tmp_path / "bad", "--allow_unreadable"))[1]
    assert said.index("1 of 1 golds cannot be read") < said.index("| model") and "of problem b" in said

    def about(truncated, **verdicts):
        b = {"problems": 10, "n": 10, "truncated": truncated, "verdicts": verdicts}
        return list(evaluate.alarms({"name": "x", "benchmarks": {"sums": b}}))
    assert not about(0.6, no_close=60, equal=40) and not about(0.0, no_box=30, different=70)
    assert "no </think>" in about(0.6, no_close=90, equal=10)[0]  # 30 of the 40 that ended
    assert "gold" in about(0.0, unparsed_gold=60, no_box=40)[0] and "boxed" in about(0.0, no_box=60)[0]


@pytest.mark.slow
def test_the_curve_and_the_table_agree(tiny, problems, tmp_path, here):
    """Validation at the last step = evaluate.py on its checkpoint, to the last digit; it says when it is
    not."""
    run(command(tiny, problems, tmp_path / "run", "--steps", 2, "--eval_data", problems, "--eval_every", 2,
                "--eval_n", 3))
    line, hf = metrics(tmp_path / "run")[-1], tmp_path / "run/checkpoints/000002/hf"
    assert "so the same number" in here(*options(hf, problems, tmp_path, "--n", 3, "--top_p", 1))[1]
    b = load(tmp_path)[0]["benchmarks"]["sums"]
    assert (line["eval_reward"], line["eval_se"], line["eval_length"]) == (b["pass@1"], b["se"], b["tokens"])
    said = here(*options(hf, problems, tmp_path / "other", "--n", 3))[1]
    assert "not the number of the validation in training: top_p 1.0 -> 0.95" in said


@pytest.mark.slow
def test_vllm_evaluates(tiny, bench, tmp_path):
    run(cmd(tiny, bench, tmp_path, "--engine", "vllm", "--n", 3), timeout=600)
    result, rows = load(tmp_path)
    assert result["protocol"]["engine"] == "vllm" and len(rows) == 21


# ----- Files, comparison, options --------------------------------------------------------------------------

def test_the_shipped_benchmarks():
    sizes = {name: len(data.load_problems(path)) for name, path in evaluate.BENCHMARKS.items()}
    assert sizes | {"aime24": 30, "math500": 500, "amc23": 83, "minerva": 272, "olympiad": 675} == sizes
    assert {*evaluate.FIVE} < {*sizes}


PROTOCOL = {"template": None, "think": True, "stop": [], "n": 4, "versions": {}, "temperature": 0.6}


@pytest.mark.parametrize("text, says", [
    ("", "not JSON"), ("[1]", "TypeError"), ('{"name": "x"}', "protocol"),
    (json.dumps({"name": "x", "benchmarks": {}, "protocol": {}}), "template"),
    (json.dumps({"name": "x", "benchmarks": {"a": {"n": 1, "problems": 1}}, "protocol": PROTOCOL}),
     "per_problem")])
def test_broken_result_files(tmp_path, text, says, here):
    (tmp_path / "x.json").write_text(text)
    for option in ("--table", "--regrade"):
        code, said = here(option, str(tmp_path / "x.json"))
        assert code == 2 and "x.json is no result" in said and says in said


def test_broken_part_files_name_the_line(tiny, bench, tmp_path, undisturbed, here):
    protocol = json.dumps({"protocol": load(undisturbed)[0]["protocol"]})
    (tmp_path / "x.part.0.jsonl").write_text(protocol + '\n{"broken\n{"id": 1}\n')
    code, said = here(*options(tiny, bench, tmp_path))
    assert code == 2 and "x.part.0.jsonl, line 2" in said


def result(name, counts, bench="aime24", n=4, **protocol):
    rows = [{**row, "benchmark": bench, "id": i} for i, c in counts.items()
            for row in rows_of([[j < c for j in range(n)]])]
    return {"name": name, "protocol": {**PROTOCOL, **protocol},
            "benchmarks": {bench: evaluate.summarize(rows, n)}}


def test_compare_is_paired():
    rng = random.Random(0)
    base = {f"p{i}": rng.randint(0, 3) for i in range(40)}
    a, b = result("A", base), result("B", {p: c + 1 for p, c in base.items()})
    text = evaluate.compare(a, b)
    assert "+25.0 ± 0.0" in text and "0.0001" in text and "CAUTION" not in text  # unpaired: ± 8
    assert "+0.0 ± 0.0" in (text := evaluate.compare(a, a)) and "1.0000" in text
    text = evaluate.compare(a, result("C", dict(list(base.items())[:30]), temperature=1.0))
    assert "only 30 problems" in text and "temperature 0.6 -> 1.0" in text and "CAUTION" in text
    for strange in (result("D", base, bench="math500"), result("D", {"q": 1})):
        with pytest.raises(ValueError, match="in common"):
            evaluate.compare(a, strange)


def test_table_layout():
    a, b = result("A", {"p": 1, "q": 2}), result("B", {"r": 4, "s": 2}, bench="math500")
    both = {**a, "name": "AB", "benchmarks": {**a["benchmarks"], **b["benchmarks"]}}
    lines = evaluate.report([a, both], published=True).split("\n\n")[0].splitlines()
    assert [c.strip() for c in lines[0].split("|")[1:-1]] == ["model", "aime24", "math500", "average"]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["A"] == ["37.5 ± 12.5", "-", "-"]
    assert cells["AB"] == ["37.5 ± 12.5", "75.0 ± 25.0", "56.2 ± 14.0"]
    assert cells["DeepScaleR-1.5B-Preview (published)"] == ["43.1", "87.8", "65.5"]
    published = common.read_json(evaluate.ASSETS / "published.json").values()
    means = [round(np.mean(list(v.values())), 1) for v in published if len(v) == 5]
    assert means == [43.8, 48.9, 50.9, 48.9, 51.6, 56.9]


@pytest.mark.parametrize("argv, says", [
    ([], "--model is missing"), (["--compare", "a.json"], "two results"), (["--limit", "-1"], "--limit"),
    (["--benchmarks", "aime24", "x/aime24.jsonl", "--table", "a"], "twice"),
    (["--model", "m", "--top_p", "0"], "--top_p"), (["--model", "m", "--temperature", "0"], "--n 1"),
    (["--model", "m", "--name", "a/b"], "--name"), (["--benchmark", "x"], "did you mean --benchmarks")])
def test_bad_options(argv, says, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(argv)
    assert says in capsys.readouterr().err


def test_names_of_checkpoints():
    assert evaluate.parse_args(["--model", "runs/8k/checkpoints/000120/hf"]).name == "8k-000120"
    args = evaluate.parse_args(["--model", "agentica-org/DeepScaleR-1.5B-Preview", "-n", "3"])
    assert args.name == "DeepScaleR-1.5B-Preview" and args.n == 3
