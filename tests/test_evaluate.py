"""evaluate.py: estimators against closed forms, brute force and simulation; runs that are stopped, continued,
regraded, compared; rewards of one's own; files, disks and weights that are broken."""
import gzip
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
import tracemalloc
from types import SimpleNamespace
from unittest import mock

import conftest
import numpy as np
import pytest
import torch.distributed as dist
from conftest import ROOT, each_case, launch, make_model, make_tokenizer, python, run, save_model
from tokenizers import normalizers, processors

import common
import data
import evaluate
import rollout

SEVEN = data.Problem("p", "3+4?", "7")
PROTOCOL = {"template": None, "think": True, "stop": [], "n": 4, "versions": {}, "temperature": 0.6}


@pytest.fixture
def here(capfd, monkeypatch):
    """Run evaluate.py in this process, to this exit code -> what it said."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(common, "catch_signals", list)  # those of pytest stay

    def run_here(*words, code=0):
        with pytest.raises(SystemExit) as end:
            evaluate.main(list(map(str, words)))
        if dist.is_initialized():
            dist.destroy_process_group()
        said = "".join(capfd.readouterr())
        assert end.value.code == code, said
        return said
    return run_here


def load(out):
    """The result and the responses that a run left."""
    return common.read_json(out / "x.json"), list(common.read_lines(f"{out}/x.responses.jsonl.gz"))


# ----- Estimators ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (2, 1), (5, 0), (5, 2), (5, 5), (8, 1), (8, 6)])
def test_pass_at_k_is_the_share_of_subsets(n, right):
    for k, value in enumerate(evaluate.pass_at_k(right, n), 1):
        subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert value == pytest.approx(sum(map(any, subsets)) / len(subsets)), k


def rows_of(rewards, ids=None):
    """rewards [P, n] -> rows as evaluate.py keeps them."""
    same = {"reason": "", "response_tokens": 10, "finish_reason": "stop"}
    return [{"id": i, "sample": j, "reward": float(r), **same}
            for i, row in zip(ids or itertools.count(), rewards) for j, r in enumerate(row)]


def test_the_standard_error_by_simulation():
    """Draw problems and samples many times over: the spread of the score is what the formula says."""
    rng, n, P = np.random.default_rng(0), 8, 60
    drawn = [evaluate.summarize(rows_of(rng.random((P, n)) < rng.beta(0.5, 0.9, (P, 1))), n)
             for _ in range(400)]
    scores, se = ([b[key] for b in drawn] for key in ("pass@1", "se"))
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
    assert evaluate.mean_and_se([0.5]) == (0.5, None) and evaluate.mean_and_se([0.0]) == (0.0, 0.5)
    two = evaluate.average([{"pass@1": 0.2, "se": 0.03}, {"pass@1": 0.6, "se": 0.04}])
    assert two == {"pass@1": pytest.approx(0.4), "se": pytest.approx(0.025)}


@pytest.mark.slow
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
    tracemalloc.start()
    evaluate.paired_bootstrap([rng.random(20_000)], [rng.random(20_000)], draws=500)
    assert tracemalloc.get_traced_memory()[1] < 20e6  # however many problems
    tracemalloc.stop()
    two = evaluate.paired_bootstrap([[0.0] * 30, [0.5] * 500], [[1.0] * 30, [0.5] * 500])
    assert two["difference"] == pytest.approx(0.5)  # benchmarks weigh the same, not problems


def test_hand_checked_transcripts(tmp_path, here):
    """Two problems x four responses, read by a person: see the comments in the file's `why`."""
    rows = list(common.read_lines(str(ROOT / "tests/data/transcripts.jsonl")))
    blank = common.json_lines([{**r, "reward": 0.0, "reason": ""} for r in rows])
    (tmp_path / "x.responses.jsonl.gz").write_bytes(gzip.compress(blank.encode()))
    (tmp_path / "x.json").write_text(json.dumps({"name": "x", "protocol": PROTOCOL, "benchmarks": {}}))
    said = here("--regrade", tmp_path / "x.json")
    assert "3 verdicts changed" in said and "37.5 ± 12.5" in said
    result, again = load(tmp_path)
    assert [r["reward"] for r in again] == [r["right"] for r in rows]
    b = result["benchmarks"]["hand"]
    assert b["per_problem"] == {"p1": 2, "p2": 1}
    assert b["pass@1"] == pytest.approx(3 / 8)   # (2/4 + 1/4) / 2
    assert b["se"] == pytest.approx(0.125)       # |2/4 - 1/4| / 2
    assert b["pass@k"] == pytest.approx([3 / 8, (5 / 6 + 3 / 6) / 2, (1 + 3 / 4) / 2, 1.0])
    assert b["truncated"] == 2 / 8 and b["verdicts"]["no_close"] + b["verdicts"].get("no_box", 0) == 2
    assert b["tokens"] == pytest.approx(np.mean([10, 30, 20, 100, 12, 14, 16, 100]))
    assert b["tokens_right"] == pytest.approx((10 + 30 + 12) / 3) and b["tokens_wrong"] == pytest.approx(50)
    no_text = [{k: v for k, v in again[0].items() if k != "response"}, *again[1:]]
    for lost in (again[:4], again[:-1], [*again[4:], *again[:4]], again[::2] + again[1::2], no_text, []):
        (tmp_path / "x.responses.jsonl.gz").write_bytes(gzip.compress(common.json_lines(lost).encode()))
        assert "not 4 whole responses to each problem" in here("--regrade", tmp_path / "x.json", code=2)
        assert common.read_json(tmp_path / "x.json") == result


# ----- Styles and rewards ----------------------------------------------------------------------------------

def grade(text, style="r1", reward=None):
    return evaluate.load_reward(reward, evaluate.STYLES[style])(SEVEN, SimpleNamespace(text=text))


def test_where_each_style_looks_for_the_answer():
    assert grade("so \\boxed{8}</think> \\boxed{7}")[0] == 1
    assert grade("so \\boxed{7}</think> \\boxed{8}")[0] == 0
    assert grade("\\boxed{7}") == (0.0, "no_close") and grade("</think> 7") == (0.0, "no_box")
    assert grade("\\boxed{7}", "plain")[0] == grade("\\boxed{7}", "qwen-math")[0] == 1
    tokenizer, text = make_tokenizer(), "code \\boxed{7}<end_of_answer> and \\boxed{9} for ever"
    item, style = evaluate.Item("sums", "p", 3, SEVEN, [1, 2]), evaluate.STYLES["rstar"]
    sample = rollout.Sample([1, 2], np.array(tokenizer(text)["input_ids"]), np.zeros(9), "length", text=text)
    job = SimpleNamespace(style=style, grade=evaluate.load_reward(None, style), tokenizer=tokenizer)
    row = evaluate.Evaluation.row(job, item, sample)
    assert (row["response"], row["finish_reason"], row["reward"]) == ("code \\boxed{7}", "stop", 1)
    assert row["response_tokens"] == len(tokenizer("code \\boxed{7}")["input_ids"]) and row["sample"] == 3


@each_case("prompts")
def test_prompts_of_the_styles(tmp_path, case):
    """What cannot be asked is refused: all that the model should read counts, not the problem alone, which
    here has no blank to lose. No prompt begins with two begin-of-text tokens."""
    kind, examples = case.get("tokenizer"), [data.Problem(**one) for one in case.get("examples", [])]
    options = case.get("options", {}) | {"examples": examples}
    tokenizer, name = make_tokenizer(kind != "no template"), case.get("style", f"{tmp_path}/mine.txt")
    (tmp_path / "mine.txt").write_text(case.get("template", ""))
    if kind == "loses blanks":
        tokenizer._tokenizer.normalizer = normalizers.Replace(" ", "")
    elif kind == "begins a text":
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    try:
        style = evaluate.load_style(name)
        asked = evaluate.encode(style, [SEVEN], tokenizer, case.get("room", 500), **options)
    except ValueError as error:
        assert re.search(case["refused"], str(error))
    else:
        assert tokenizer.decode(asked[1][0]) == case["prompt"]
        assert style.think == case.get("think", style.think)


# ----- Whole runs ------------------------------------------------------------------------------------------

def options(model, bench, out, *more):
    return ["--model", str(model), "--benchmarks", str(bench), "--out", str(out), "--name", "x", "--style",
            "plain", "-n", "5", "--max_tokens", "24", "--engine", "torch", *map(str, more)]


def cmd(*given, ranks=1):
    return [*python(ranks), str(ROOT / "evaluate.py"), *options(*given)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "sums.jsonl"
    rows = [{"id": f"s{i}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(7)]
    path.write_text(common.json_lines(rows))
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny, bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run(cmd(tiny, bench, out))
    return out


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
@pytest.mark.parametrize("how, code, words, again", [
    (signal.SIGKILL, -9, "", 2), (signal.SIGTERM, 143, "the same command goes on", 1),
    (signal.SIGINT, 130, "the same command goes on", 3), ("full disk", 2, "cannot be written", 1)],
    ids=["kill", "sigterm", "ctrl-c", "full disk"])
def test_stopped_runs_go_on_sample_by_sample(tiny, bench, undisturbed, tmp_path, how, code, words, again):
    """Stopped after a few samples, by a signal or at once by a full disk (a limit on the size of files stands
    for it), continued on another number of ranks: the rows of the undisturbed run, none generated twice."""
    full, kept = how == "full disk", []
    limit = ["bash", "-c", 'ulimit -f 4; exec "$@"', "_"]
    child = launch([*limit * full, *cmd(tiny, bench, tmp_path, "--max_seqs", 1)])
    deadline = time.time() + 120
    while not full and time.time() < deadline and len(kept) < 7:
        time.sleep(0.005)
        kept = [line for p in tmp_path.glob("x.part.*") for line in p.read_text().splitlines()]
    if not full:
        child.send_signal(how)
    said = child.stdout.read()
    assert child.wait(60) == code and words in said and "Traceback" not in said, said
    assert not (tmp_path / "x.json").exists(), "it finished before the signal"
    part, = tmp_path.glob("x.part.*")
    rows = list(common.read_lines(str(part)))[1:]
    assert 0 < len(rows) < (14 if full else 35)
    with open(part, "a") as f:
        f.write('{"benchmark": "sums", "id": "s6", "sam')  # a line cut by the crash
    done = run(cmd(tiny, bench, tmp_path, ranks=again))
    assert f"{len(rows)} of 35 samples are there already" in done.stdout
    result, whole = load(tmp_path)
    assert result["benchmarks"] == load(undisturbed)[0]["benchmarks"] and whole == load(undisturbed)[1]
    assert all(row in whole for row in rows) and not list(tmp_path.glob("*.part*"))


def test_a_finished_run_is_not_run_again_but_extended(tiny, bench, undisturbed, tmp_path, here):
    """With the same settings and problems alone; a part file that is broken is named with its line."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    result, before = load(tmp_path)
    assert "35 of 35 samples are there already" in here(*options(tiny, bench, tmp_path))
    assert load(tmp_path)[1] == before
    assert "35 of 42 samples" in here(*options(tiny, bench, tmp_path, "--n", 6))
    assert [r for r in load(tmp_path)[1] if r["sample"] < 5] == before
    for more, says in ((["--n", 2], "would be lost"), (["--temperature", 1], "temperature 0.6 -> 1.0"),
                       (["--reward", "math:sqrt"], "reward None -> 'math:sqrt'")):
        assert says in here(*options(tiny, bench, tmp_path, *more), code=2)
    changed = tmp_path / "sums.jsonl"
    changed.write_text(bench.read_text().replace('"answer": "1"', '"answer": "11"'))
    assert "sums s0, sample 0 has changed" in here(*options(tiny, changed, tmp_path, "--n", 6), code=2)
    protocol = json.dumps({"protocol": result["protocol"]})
    (tmp_path / "x.part.0.jsonl").write_text(protocol + '\n{"broken\n{"id": 1}\n')
    assert "x.part.0.jsonl, line 2" in here(*options(tiny, bench, tmp_path), code=2)
    assert len(load(tmp_path)[1]) == 42


def test_a_failed_start_leaves_nothing(tiny, bench, tmp_path, here, monkeypatch):
    out = tmp_path / "a" / "b"
    (tmp_path / "empty.jsonl").write_text("")
    for model, data_file, more, says in (
            (tmp_path / "nowhere", bench, [], "nowhere"), (tiny, "aime23", [], "aime23"),
            (tiny, tmp_path / "empty.jsonl", [], "empty.jsonl"),
            (tiny, bench, ["--max_prompt_len", 20], "raise --max_prompt_len"),
            (tiny, bench, ["--max_tokens", 32768], "1024 positions")):
        assert says in here(*options(model, data_file, out, *more), code=2)
        assert not out.exists()
    fails = mock.Mock(side_effect=common.RankError("vLLM: out of memory"))
    monkeypatch.setattr(rollout, "make_engine", fails)
    assert "Lower --gpu_memory" in here(*options(tiny, bench, out), code=2)
    assert not out.exists()
    with common.lock(f"{out}/x.lock"):
        assert f"{out} is in use" in here(*options(tiny, bench, out), code=2)


def test_damaged_or_exchanged_weights_are_told(bench, tmp_path, here):
    path, model = save_model(tmp_path / "model"), make_model()
    here(*options(path, bench, tmp_path / "out"))
    model.lm_head.weight.data *= 1.01
    model.save_pretrained(path)
    assert "weights '" in here(*options(path, bench, tmp_path / "out", "--n", 6), code=2)
    model.lm_head.weight.data[3] = math.nan
    model.save_pretrained(path)
    said = here(*options(path, bench, tmp_path / "nan"), code=2)
    assert "NaN" in said and "damaged" in said and not (tmp_path / "nan/x.json").exists()


OWN = """
def short(response, problem):
    return 0.37 if problem.id == "s0" else 1.0 / (1 + len(response) % 3)
def broken(response, problem):
    return {"p": float("nan"), "s2": None}.get(problem.id, 0.5)
"""


def test_a_reward_of_ones_own(tiny, tmp_path, here, monkeypatch):
    """Graded rewards count as they are, in pass@k from 0.5 on. Problems need no answer. What fails is named
    with its problem."""
    (tmp_path / "ownreward.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    for name, says in (("ownreward:broken", "on p.*nan is no"), ("operator:sub", "on p.*TypeError"),
                       ("nowhere:f", "No module"), ("ownreward:f", "nothing to"), ("math:pi", "nothing to")):
        with pytest.raises(ValueError, match=f"--reward {name}.*{says}"):
            grade("x", reward=name)
    b = evaluate.summarize(rows_of([[0.37, 0.7], [0.2, 0.1]]), 2)
    assert b["pass@1"] == pytest.approx(0.3425) and b["per_problem"] == {0: 1, 1: 0}
    assert b["rewards"][0] == pytest.approx(0.535) and b["pass@k"] == [0.25, 0.5]
    bench = tmp_path / "open.jsonl"
    bench.write_text(common.json_lines({"id": f"s{i}", "problem": f"{i}+1?"} for i in range(4)))
    said = here(*options(tiny, bench, tmp_path, "--reward", "ownreward:short"))
    assert "reward ownreward:short, " in said and "pass@n: from 0.5 on" in said
    result, rows = load(tmp_path)
    b = result["benchmarks"]["open"]
    assert b["rewards"]["s0"] == pytest.approx(0.37) and b["per_problem"]["s0"] == 0
    assert b["pass@1"] == pytest.approx(np.mean([r["reward"] for r in rows]))
    assert b["verdicts"] == {"scored": 20} and result["protocol"]["reward"] == "ownreward:short"
    assert "0 verdicts changed" in here("--regrade", tmp_path / "x.json")
    said = here(*options(tiny, bench, tmp_path / "none", "--reward", "ownreward:broken"), code=2)
    assert "ownreward:broken failed on s2" in said and not (tmp_path / "none/x.json").exists()


def test_alarms(tiny, bench, tmp_path, here):
    """Nothing can be earned, and it is not the model's fault: no </think>, no box, unreadable golds."""
    said = here(*options(tiny, bench, tmp_path, "--style", "r1", "--n", 1, "--max_tokens", 1))
    assert "7 of 7 responses have no </think>" in said and "--style plain" in said
    assert "0.0 (at most 42.9)" in said and "± 0.0" not in said
    assert "ALARM" in here("--table", tmp_path / "x.json")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"id": "b", "problem": "1+1?", "answer": "1" * 9000}) + "\n")
    assert "--allow_unreadable" in here(*options(tiny, bad, tmp_path / "bad"), code=2)
    assert not (tmp_path / "bad").exists()
    said = here(*options(tiny, bad, tmp_path / "bad", "--allow_unreadable"))
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
    evaluated = ["--eval_data", problems, "--eval_every", 2, "--eval_n", 3]
    run(conftest.command(tiny, problems, tmp_path / "run", "--steps", 2, *evaluated))
    line, hf = conftest.metrics(tmp_path / "run")[-1], tmp_path / "run/checkpoints/000002/hf"
    assert "so the same number" in here(*options(hf, problems, tmp_path, "--n", 3, "--top_p", 1))
    b = load(tmp_path)[0]["benchmarks"]["sums"]
    assert (line["eval_reward"], line["eval_se"], line["eval_length"]) == (b["pass@1"], b["se"], b["tokens"])
    said = here(*options(hf, problems, tmp_path / "other", "--n", 3))
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


@each_case("broken_results")
def test_broken_result_files(tmp_path, case, here):
    (tmp_path / "x.json").write_text(case["content"] and json.dumps(case["content"]))
    for option in ("--table", "--regrade"):
        said = here(option, tmp_path / "x.json", code=2)
        assert "x.json is no result" in said and case["says"] in said


def result(name, counts, bench="aime24", **protocol):
    """The result of {problem id: number of right samples of four}."""
    rows = rows_of([[j < right for j in range(4)] for right in counts.values()], counts)
    return {"name": name, "protocol": {**PROTOCOL, **protocol},
            "benchmarks": {bench: evaluate.summarize(rows, 4)}}


def test_compare_is_paired():
    base = {f"p{i}": i % 4 for i in range(40)}
    a, b = result("A", base), result("B", {p: c + 1 for p, c in base.items()})
    text = evaluate.compare(a, b)
    assert "+25.0 ± 0.0" in text and "+25.0 to +25.0" in text and "0.0001" in text  # unpaired: ± 8
    assert "+0.0 ± 0.0" in (same := evaluate.compare(a, a)) and "1.0000" in same and "CAUTION" not in text
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


def test_names_of_checkpoints():
    assert evaluate.parse_args(["--model", "runs/8k/checkpoints/000120/hf"]).name == "8k-000120"
    assert evaluate.parse_args(["--model", "org/DeepScaleR-1.5B"]).name == "DeepScaleR-1.5B"
