"""evaluate.py: estimators against closed forms, brute force and simulation; runs that are killed, continued, regraded,
compared; files that are broken."""
import gzip
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer

from conftest import ROOT, command, make_tokenizer, metrics, run

import data
import evaluate
from rollout import Sample


# ----- estimators

def brute_pass(right, n, k):
    subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
    return sum(any(s) for s in subsets) / len(subsets)


def brute_maj(right, wrong, n, k):
    votes = ["right"] * right + [c for c, size in enumerate(wrong) for _ in range(size)]
    votes += [None] * (n - len(votes))
    won, subsets = 0.0, list(itertools.combinations(votes, k))
    for s in subsets:
        counts = {v: s.count(v) for v in s if v is not None}
        top = [v for v in counts if counts[v] == max(counts.values())]
        won += "right" in top and 1 / len(top)
    return won / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets(n):
    for right in range(n + 1):
        assert evaluate.pass_at_k(right, n) == pytest.approx([brute_pass(right, n, k) for k in range(1, n + 1)])


@given(st.integers(0, 5), st.lists(st.integers(1, 3), max_size=4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_maj_at_k_is_the_share_of_votes_won(right, wrong, silent):
    n = right + sum(wrong) + silent
    if 0 < n <= 11:
        assert evaluate.maj_at_k(right, wrong, n) == pytest.approx([brute_maj(right, wrong, n, k) for k in range(1, n + 1)])


def test_maj_at_k_ties_and_silence():
    assert evaluate.maj_at_k(2, [2], 4)[-1] == pytest.approx(0.5)              # two against two: a coin
    assert evaluate.maj_at_k(2, [2, 2], 6)[-1] == pytest.approx(1 / 3)
    assert evaluate.maj_at_k(1, [1, 1, 1], 4)[-1] == pytest.approx(0.25)
    assert evaluate.maj_at_k(1, [], 8)[-1] == 1.0                              # those without an answer do not vote
    assert evaluate.maj_at_k(0, [], 3) == [0.0] * 3                            # nobody voted
    assert evaluate.maj_at_k(5, [3, 2], 16)[0] == pytest.approx(5 / 16)        # maj@1 is pass@1
    wide = evaluate.maj_at_k(20, [1] * 30 + [14], 64)                          # 64 samples, as on AIME
    assert wide[-1] == 1.0 and all(0 <= x <= 1 + 1e-12 for x in wide) and wide[0] == pytest.approx(20 / 64)


def test_standard_errors_by_simulation():
    """Draw problems and samples many times over: the spread of the score is what the formulas say."""
    rng = np.random.default_rng(0)
    p_hard, n, P = rng.beta(0.5, 0.9, size=5000), 8, 60
    fixed = p_hard[:P]
    new_problems, reruns, se, se_samples = [], [], [], []
    for _ in range(1500):
        right = rng.binomial(n, rng.choice(p_hard, P))
        mean, error = evaluate.mean_and_se(right / n)
        new_problems.append(mean)
        se.append(error)
        right = rng.binomial(n, fixed)
        reruns.append(right.mean() / n)
        se_samples.append(evaluate.sampling_se(right, n))
    assert np.mean(se) == pytest.approx(np.std(new_problems), rel=0.06)
    assert np.mean(se_samples) == pytest.approx(np.std(reruns), rel=0.06)
    naive = math.sqrt(np.mean(new_problems) * (1 - np.mean(new_problems)) / (P * n))
    assert np.std(new_problems) > 1.5 * naive  # what treating the samples as independent would have claimed


def test_standard_error_of_one_problem_or_one_sample_is_unknown():
    assert evaluate.mean_and_se([0.5]) == (0.5, None) and evaluate.sampling_se([1], 1) is None


def test_bootstrap_agrees_with_theory_and_is_calibrated():
    rng = np.random.default_rng(1)
    a, b = rng.random(200), rng.random(200)
    r = evaluate.paired_bootstrap([a], [b])
    assert r["difference"] == pytest.approx((b - a).mean())
    assert r["se"] == pytest.approx((b - a).std(ddof=1) / 200 ** 0.5, rel=0.05)
    assert r == evaluate.paired_bootstrap([a], [b])                            # same seed, same numbers
    ps = [evaluate.paired_bootstrap([x := rng.random(40)], [x + rng.normal(size=40)], draws=400)["p"] for _ in range(300)]
    assert 0.01 < np.mean(np.array(ps) < 0.05) < 0.12                          # no difference: p < 0.05 in about 5 %
    sure = evaluate.paired_bootstrap([a], [a + 0.1])
    assert sure["p"] == 1e-4 and sure["low"] == pytest.approx(0.1)
    assert evaluate.paired_bootstrap([a], [a])["p"] == 1.0
    two = evaluate.paired_bootstrap([[0.0] * 30, [0.5] * 500], [[1.0] * 30, [0.5] * 500])
    assert two["difference"] == pytest.approx(0.5)                             # benchmarks weigh the same, not problems


def test_average_of_benchmarks():
    two = evaluate.average({"x": {"pass@1": 0.2, "se": 0.03}, "y": {"pass@1": 0.6, "se": 0.04}})
    assert two["pass@1"] == pytest.approx(0.4) and two["se"] == pytest.approx(0.025)


# ----- saved transcripts with scores found by hand

def test_hand_checked_transcripts(tmp_path):
    """Two problems x four responses, read by a person: see the comments in the file's `why`."""
    source = ROOT / "tests/data/transcripts.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    blank = [{**r, "reward": 0.0, "extracted": None, "reason": ""} for r in rows]
    with gzip.open(tmp_path / "saved.responses.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in blank)
    protocol = dict(template=None, think=True, stop=[], n=4, style="r1", chat=True, examples="", limit=0, temperature=0.6,
                    top_p=0.95, max_tokens=100, seed=0, engine="torch", dtype="float32", versions={})
    (tmp_path / "saved.json").write_text(json.dumps({"name": "saved", "protocol": protocol}))
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--regrade", str(tmp_path / "saved.json")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "saved.json").read_text())
    b = result["benchmarks"]["hand"]
    assert b["per_problem"] == {"p1": 2, "p2": 1}
    assert b["pass@1"] == pytest.approx(3 / 8)                                 # (2/4 + 1/4) / 2
    assert b["se"] == pytest.approx(0.125)                                     # |2/4 - 1/4| / 2
    assert b["pass@k"] == pytest.approx([3 / 8, (5 / 6 + 3 / 6) / 2, (1 + 3 / 4) / 2, 1.0])
    # p1: 2 right, one wrong vote, one silent -> right wins; p2: one right, 1/2 and 0.5 the same wrong answer twice
    assert b["maj@k"][-1] == pytest.approx((1 + 0) / 2)
    assert b["truncated"] == 2 / 8 and b["answerless"] == 2 / 8
    assert b["tokens"] == pytest.approx(np.mean([10, 30, 20, 100, 12, 14, 16, 100]))
    assert b["tokens_right"] == pytest.approx((10 + 30 + 12) / 3) and b["tokens_wrong"] == pytest.approx(250 / 5)
    assert "3 verdicts changed" in done.stdout and "37.5 ± 12.5" in done.stdout
    assert [r["reward"] for r in evaluate.read_lines(str(tmp_path / "saved.responses.jsonl.gz"))] == [r["right"] for r in rows]


# ----- styles

class Text:
    """A stand-in for a tokenizer: one character, one token."""
    def decode(self, ids):
        return "".join(map(chr, ids))


def row(text, answer="7", style="r1", finish="stop"):
    problem = data.Problem("p", "?", answer)
    return evaluate.sample_row(Text(), Sample([1], [ord(c) for c in text], [0.0] * len(text), finish), problem, 0,
                               evaluate.STYLES[style])


def test_where_each_style_looks_for_the_answer():
    assert row("so \\boxed{7}</think> \\boxed{8}")["extracted"] == "8"
    assert row("\\boxed{7}")["extracted"] is None and row("\\boxed{7}")["reward"] == 0
    assert row("\\boxed{7}", style="plain")["reward"] == 1 and row("\\boxed{7}", style="qwen-math")["reward"] == 1
    r = row("code \\boxed{7}<end_of_answer> and then \\boxed{9} for ever", style="rstar", finish="length")
    assert r["reward"] == 1 and r["finish_reason"] == "stop" and r["response"] == "code \\boxed{7}"
    assert r["response_tokens"] == len("code \\boxed{7}")
    assert row("no end \\boxed{7", style="rstar", finish="length")["finish_reason"] == "length"


def test_prompts_of_the_styles(tmp_path):
    tokenizer, problem = make_tokenizer(), [data.Problem("p", "1+1?", "2")]
    text = lambda style, **k: tokenizer.decode(evaluate.encode(evaluate.load_style(style), problem, tokenizer, 500, **k)[1][0])
    assert text("r1") == "<user>1+1? " + data.INSTRUCTION + "<bot>" == text("plain")
    assert text("qwen-math").startswith("<|im_start|>system\nPlease reason") and "user\n1+1?<|im_end|>" in text("qwen-math")
    assert text("rstar") == "<|user|>:\n1+1?\n<|assistant|>: Let's think step by step and solve the problem with code."
    mine = tmp_path / "mine.txt"
    mine.write_text("Q: {problem} Use {braces} freely.\nA: <think>")
    assert text(str(mine)) == "Q: 1+1? Use {braces} freely.\nA: <think>"
    assert evaluate.load_style(str(mine)).think and not evaluate.load_style("plain").think
    mine.write_text("no place for it")
    with pytest.raises(ValueError, match="exactly once"):
        evaluate.load_style(str(mine))
    with pytest.raises(ValueError, match="r1, qwen-math, rstar, plain"):
        evaluate.load_style("nonsense")


# ----- whole runs

def cmd(model, bench, out, *options, ranks=1):
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 "--nproc_per_node", str(ranks)]
    return [*start, str(ROOT / "evaluate.py"), "--model", model, "--benchmarks", str(bench), "--out", str(out), "--name", "x",
            "--style", "plain", "-n", "5", "--max_tokens", "24", "--engine", "torch", *map(str, options)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "sums.jsonl"
    path.write_text("".join(json.dumps(dict(id=f"s{i}", problem=f"{i}+1?", answer=str(i + 1))) + "\n" for i in range(7)))
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny, bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run(cmd(tiny, bench, out))
    return out


def load(out, name="x"):
    result = json.loads((out / f"{name}.json").read_text())
    return result, evaluate.read_lines(str(out / f"{name}.responses.jsonl.gz"))


def test_a_run_leaves_scores_and_every_response(undisturbed):
    result, rows = load(undisturbed)
    b = result["benchmarks"]["sums"]
    assert len(rows) == 35 and b["problems"] == 7 and b["n"] == 5 and len(b["pass@k"]) == len(b["maj@k"]) == 5
    assert b["tokens"] == pytest.approx(np.mean([r["response_tokens"] for r in rows]))
    assert result["parameters"] > 0 and result["tokens_generated"] == sum(r["response_tokens"] for r in rows)
    for word in ("style plain", "T 0.6", "top_p 0.95", "24 tokens", "n 5", "seed 0", "engine torch", "torch 2.", "problems clustered"):
        assert word in result["protocol_line"]
    assert sorted(p.name for p in undisturbed.iterdir()) == ["x.json", "x.responses.jsonl.gz"]


def test_n_not_divisible_by_ranks(tiny, bench, undisturbed, tmp_path):
    run(cmd(tiny, bench, tmp_path, ranks=2))
    assert [r["response"] for r in load(tmp_path)[1]] == [r["response"] for r in load(undisturbed)[1]]
    assert load(tmp_path)[0]["benchmarks"] == load(undisturbed)[0]["benchmarks"]


@pytest.mark.parametrize("how, again", [(signal.SIGKILL, 2), (signal.SIGTERM, 1)])
def test_interrupted_runs_go_on_sample_by_sample(tiny, bench, undisturbed, tmp_path, how, again):
    """Stopped after a few samples, continued (also with another number of ranks): the same file as undisturbed, and
    nothing generated twice."""
    child = subprocess.Popen(cmd(tiny, bench, tmp_path, "--max_seqs", 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    part = tmp_path / "x.part.0.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (part.exists() and part.read_text().count("\n") > 6):
        time.sleep(0.005)
    child.send_signal(how)
    said = child.communicate(timeout=60)[0]
    assert not (tmp_path / "x.json").exists(), "it finished before the signal"
    if how == signal.SIGTERM:
        assert child.returncode == 1 and "the same command goes on" in said
    kept = [json.loads(x) for x in part.read_text().splitlines()[1:-1]]
    with open(part, "a") as f:
        f.write('{"benchmark": "sums", "id": "s6", "sam')  # a line cut by the crash
    done = run(cmd(tiny, bench, tmp_path, ranks=again))
    assert f"of 35 samples are there already" in done.stdout
    assert load(tmp_path)[0]["benchmarks"] == load(undisturbed)[0]["benchmarks"]
    rows = {(r["id"], r["sample"]): r for r in load(tmp_path)[1]}
    assert len(kept) >= 5 and all(rows[k["id"], k["sample"]] == k for k in kept)
    assert not list(tmp_path.glob("*.part*"))


def test_a_finished_run_is_not_run_again_but_extended(tiny, bench, undisturbed, tmp_path):
    for p in undisturbed.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    before = load(tmp_path)
    done = run(cmd(tiny, bench, tmp_path))
    assert "35 of 35 samples are there already" in done.stdout and load(tmp_path)[0]["benchmarks"] == before[0]["benchmarks"]
    done = run(cmd(tiny, bench, tmp_path, "--n", 6))
    assert "35 of 42 samples" in done.stdout
    assert [r for r in load(tmp_path)[1] if r["sample"] < 5] == before[1]
    fewer = run(cmd(tiny, bench, tmp_path, "--n", 2), check=False)  # would throw computed samples away
    assert fewer.returncode == 2 and "another --name" in fewer.stderr and len(load(tmp_path)[1]) == 42
    other = run(cmd(tiny, bench, tmp_path, "--n", 6, "--temperature", 1), check=False)
    assert other.returncode == 2 and "temperature 0.6 -> 1.0" in other.stderr


def test_the_curve_and_the_table_agree(tiny, problems, tmp_path):
    """In-training evaluation of the last step = evaluate.py on its checkpoint, to the last digit."""
    run(command(tiny, problems, tmp_path / "run", "--steps", 2, "--eval_data", problems, "--eval_every", 2, "--eval_n", 3))
    line = metrics(tmp_path / "run")[-1]
    run(cmd(str(tmp_path / "run/checkpoints/000002/hf"), problems, tmp_path, "--n", 3, "--top_p", 1))
    b = load(tmp_path)[0]["benchmarks"]["sums"]
    assert (line["eval_reward"], line["eval_se"], line["eval_length"]) == (b["pass@1"], b["se"], b["tokens"])


def test_vllm_evaluates(tiny, bench, tmp_path):
    run(cmd(tiny, bench, tmp_path, "--engine", "vllm", "--n", 3), timeout=600)
    result, rows = load(tmp_path)
    assert result["protocol"]["engine"] == "vllm" and len(rows) == 21


def test_a_problem_with_a_prompt_too_long_is_not_silently_dropped(tiny, bench, tmp_path):
    done = run(cmd(tiny, bench, tmp_path, "--max_prompt_len", 20), check=False)
    assert done.returncode == 2 and "raise --max_prompt_len" in done.stderr
    done = run(cmd(tiny, bench, tmp_path, "--max_tokens", 32768), check=False)
    assert done.returncode == 2 and "1024 positions" in done.stderr and "does" in done.stderr


# ----- bad files

def test_empty_and_unknown_benchmarks(tiny, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    done = run(cmd(tiny, empty, tmp_path), check=False)
    assert done.returncode == 2 and "empty.jsonl" in done.stderr
    with pytest.raises(ValueError, match="aime24, aime25, amc23"):
        evaluate.load_benchmarks(["aime23"])
    with pytest.raises(ValueError, match="twice"):
        evaluate.load_benchmarks(["aime24", "aime24"])


@pytest.mark.parametrize("text, says", [("", "is no result"), ("[1]", "lacks"), ('{"name": "x"}', "lacks benchmarks"),
                                        ('{"name": "x", "benchmarks": {"a": {}}, "protocol": {}, "protocol_line": ""}', "broken")])
def test_broken_result_files(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    for option in ("--table", "--regrade"):
        with pytest.raises(SystemExit, match="x.json|responses"):
            evaluate.main([option, str(path)])
    with pytest.raises(ValueError, match=says):
        evaluate.read_result(str(path))


def test_broken_responses_name_the_line(tmp_path):
    path = tmp_path / "x.part.0.jsonl"
    path.write_text('{"protocol": {}}\n{"broken\n{"id": 1}\n')
    with pytest.raises(ValueError, match=r"x.part.0.jsonl:2"):
        evaluate.read_lines(str(path))
    (tmp_path / "y.responses.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate.read_lines(str(tmp_path / "y.responses.jsonl.gz"))


# ----- comparing and tables

def result(name, counts, bench="aime24", n=4, **protocol):
    rows = [{"benchmark": bench, "id": i, "sample": j, "reward": float(j < c), "extracted": str(int(j < c)), "response_tokens": 10,
             "finish_reason": "stop"} for i, c in counts.items() for j in range(n)]
    return {"name": name, "protocol": {"temperature": 0.6, **protocol}, "protocol_line": "T 0.6", **evaluate.scores(rows, n)}


def test_compare_is_paired():
    rng = random.Random(0)
    base = {f"p{i}": rng.randint(0, 3) for i in range(40)}
    a, b = result("A", base), result("B", {p: c + 1 for p, c in base.items()})
    text = evaluate.compare([a, b])
    assert "+25.0 ± 0.0" in text and "0.0001" in text and "CAUTION" not in text  # unpaired, the error would be 8 points
    assert "p0:" in text.split("changed most")[1] and "and 30 more" in text and text.count("(+0.25)") == 10
    assert evaluate.compare([a, b], show=0).count("(+0.25)") == 40
    text = evaluate.compare([a, a, result("C", dict(list(base.items())[:30]), temperature=1.0)])
    assert "+0.0 ± 0.0" in text and "1.0000" in text and "only 30 problems" in text and "temperature 0.6 / 1.0" in text
    with pytest.raises(ValueError, match="no benchmark in common"):
        evaluate.compare([a, result("D", base, bench="math500")])
    with pytest.raises(ValueError, match="no problem in common"):
        evaluate.compare([a, result("D", {"q": 1})])


def test_table_layout():
    a = result("A", {"p": 1, "q": 2})
    b = result("B", {"r": 4, "s": 2}, bench="math500")
    both = {**a, "name": "AB", "benchmarks": {**a["benchmarks"], **b["benchmarks"]}}
    lines = evaluate.table([a, both], published=True).splitlines()
    assert [c.strip() for c in lines[0].split("|")[1:-1]] == ["model", "AIME 2024", "MATH-500", "average"]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["A"] == ["37.5 ± 12.5", "-", "-"] and cells["AB"] == ["37.5 ± 12.5", "75.0 ± 25.0", "56.2 ± 14.0"]
    assert cells["DeepScaleR-1.5B-Preview (published)"] == ["43.1", "87.8", "65.5"]
    assert len({len(line) for line in lines}) == 1
    published = [[x for x in v if x is not None] for v in evaluate.PUBLISHED.values()]
    assert [round(np.mean(v), 1) for v in published if len(v) == 5] == [43.8, 48.9, 50.9, 48.9, 51.6, 56.9]


@pytest.mark.parametrize("options, says", [([], "--model is missing"), (["--compare", "a.json"], "two results"),
                                           (["--model", "m", "--n", "0"], "--n"), (["--model", "m", "--top_p", "0"], "--top_p"),
                                           (["--model", "m", "--temperature", "0"], "--n 1"), (["--model", "m", "--name", "a/b"], "--name")])
def test_bad_options(options, says, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(options)
    assert says in capsys.readouterr().err


def test_names_of_checkpoints():
    assert evaluate.parse_args(["--model", "runs/8k/checkpoints/000120/hf"]).name == "8k-000120"
    assert evaluate.parse_args(["--model", "agentica-org/DeepScaleR-1.5B-Preview"]).name == "DeepScaleR-1.5B-Preview"


def test_benchmarks_by_name_have_their_sizes():
    sizes = {n: len(p) for n, p in evaluate.load_benchmarks([*evaluate.FIVE, "aime25"]).items()}
    assert sizes == {"aime24": 30, "math500": 500, "amc23": 83, "minerva": 272, "olympiad": 675, "aime25": 30}
