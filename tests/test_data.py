"""data.py on small made cases with hand-known answers, on hostile files, and after a kill."""

import csv
import doctest
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import DataError, Problem  # noqa: E402


def test_doctests():
    assert doctest.testmod(data).failed == 0


def write_jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def read_gz(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def row(problem, answer, source="s", where="f, line 1, row 0", solutions=()):
    return {"problem": problem, "answer": answer, "source": source, "where": where, "solutions": list(solutions)}


# --- reading ------------------------------------------------------------------------------

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2 = ?", "answer": "4"}]


def as_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["problem", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {
    "a.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "oneline.json": lambda p: p.write_text(json.dumps(ROWS)),
    "lines.json": lambda p: write_jsonl(p, ROWS),
    "a.jsonl": lambda p: write_jsonl(p, ROWS),
    "windows.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n\r\n"),
    "a.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "a.csv": as_csv,
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path, name):
    WRITERS[name](tmp_path / name)
    problems = data.load_problems(tmp_path / name)
    assert [(p.problem, p.answer) for p in problems] == [("1+1?", "2"), ("2+2 = ?", "4")]
    assert [p.id for p in problems] == [data.text_id("1+1?"), data.text_id("2+2 = ?")]
    assert len(data.load_problems(tmp_path / name, limit=1)) == 1


@pytest.mark.parametrize("given_row, problem, answer", [
    ({"problem": "p", "solution": "s", "answer": "60", "year": "1983", "difficulty": "4.0"}, "p", "60"),  # AIME
    ({"problem": "p", "answer": 142.0, "url": "u", "difficulty": 2.0}, "p", "142"),  # AMC
    ({"problem": "p", "answer": "q", "difficulty": 5.0, "unique_id": "test/1.json"}, "p", "q"),  # MATH-500
    ({"problem": "p", "solution": "s", "type": "t", "idx": 9, "answer": ["9.6\n"]}, "p", "9.6"),  # Minerva
    ({"problem": "p", "answer": ["1", "2"]}, "p", ["1", "2"]),
    ({"id": 1606, "context": None, "solution": ["s"], "problem": "p", "answer": ["$2$"]}, "p", "$2$"),  # Olympiad
    ({"prompt": "p", "answer": 70}, "p", "70"),  # AIME 2025
    ({"question": "p", "answer": "7"}, "p", "7"),  # STILL
    ({"ID": "2020-I-1", "Question": "p", "Answer": 547}, "p", "547"),  # AIME as CSV
    ({"problem": "p", "solution": "s", "final_answer": "3", "level": "Level 5"}, "p", "3"),
    ({"prompt": [{"role": "user", "content": "p " + data.INSTRUCTION}], "data_source": "",
      "reward_model": {"style": "rule", "ground_truth": "5"}}, "p", "5"),  # verl
])
def test_field_names_of_the_known_sources(given_row, problem, answer):
    item = data.row_to_problem(given_row)
    assert (item.problem, item.answer) == (problem, answer)


@pytest.mark.parametrize("bad, words", [
    ('{"answer": "1"}', "no problem text"), ('{"problem": "x"}', "no answer"),
    ('{"problem": "x", "answer": ""}', "empty answer"), ('{"problem": " ", "answer": "1"}', "empty problem"),
    ('{"problem": "x", "answer": []}', "empty answer"), ('{"problem": "x", "answer": null}', "no answer"),
    ('{"problem": "x", "answer": true}', "bool"), ('{"problem": "x", "answer": {"a": 1}}', "no answer"),
    ('{"problem": 5, "answer": "1"}', "problem is a int"), ('{"problem": "x", "answer": NaN}', "finite"),
    ('{"problem": "x", "answer": [["1"]]}', "list"), ('{"problem": "x", "answer": [1, null]}', "NoneType"),
    ('{"problem": "x", "answer": "1", "id": 1.5}', "id is a float"),
    ('{"problem": "x", "answer": "1", "solve_rate": 2}', "solve_rate"),
    ('{"problem": "x \\ud800", "answer": "1"}', "not UTF-8"), ('{"problem": "x \\u0000", "answer": "1"}', "not UTF-8"),
    ("[1, 2]", "row is a list"), ("7", "row is a int"), ("{", "not JSON"), ("\x00\x01\x02", "not JSON"),
    ("[" * 100_000, "not JSON"), ('{"problem": "x", "answer": "1", "solution": {}, "id": [1]}', "id is a list"),
    ('{"problem": "x", "answer": ' + "9" * 5000 + "}", "not JSON"),
])
def test_bad_row_names_file_line_and_cause(tmp_path, bad, words):
    path = write_jsonl(tmp_path / "f.jsonl", [{"problem": "ok", "answer": "1"}, bad])
    with pytest.raises(DataError, match=r"f\.jsonl, line 2: ") as caught:
        data.load_problems(path)
    assert words in str(caught.value)


def test_hostile_texts_stay_cheap():
    start = time.time()
    assert data.read_answer("\\boxed{" * 200_000) is None and data.boxes("{" * 10**6 + "\\boxed{1}")
    assert data.tidy_answer("1" + " " * 10**6 + "2") and data.why_not_gradable("\\boxed{" * 10**5, "x " * 10**6)
    assert data.clean_answer(10**400) == "1" + "0" * 400
    assert time.time() - start < 5


def test_duplicate_ids_missing_and_empty_files(tmp_path):
    same = write_jsonl(tmp_path / "d.jsonl", [{"id": 1, "problem": "a", "answer": "1"}, {"id": "1", "problem": "b", "answer": "2"}])
    with pytest.raises(DataError, match="line 2: duplicate id '1', first on line 1"):
        data.load_problems(same)
    twice = write_jsonl(tmp_path / "t.jsonl", [ROWS[0], ROWS[0]])  # the same text is not the same id
    assert len({p.id for p in data.load_problems(twice)}) == 2
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "e.json").write_text("[]")
    for path, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "folder"),
                        (tmp_path / "e.jsonl", "empty"), (tmp_path / "e.json", "empty")):
        with pytest.raises(DataError, match=words):
            data.load_problems(path)


def outcomes(path):
    """Good problems and the messages of the bad rows."""
    rows, dropped = data.read_sources([("", [path], 0, None)], strict=False)
    return [r["problem"] for r in rows], [d["detail"] for d in dropped]


def test_hundred_megabyte_line_is_reported_and_passed_over(tmp_path):
    path = tmp_path / "f.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"problem": "a", "answer": "1"}\n{"problem": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'", "answer": "1"}\n{"problem": "b", "answer": "2"}\n')
    good, bad = outcomes(path)
    assert good == ["a", "b"] and bad == ["line is longer than 16 MB"]
    with pytest.raises(DataError, match="line 2: line is longer"):
        data.load_problems(path)
    (tmp_path / "f.csv").write_text('problem,answer\na,1\n"' + "x" * 20 * 2**20 + '",1\nb,2\n')
    good, bad = outcomes(tmp_path / "f.csv")
    assert good == ["a", "b"] and len(bad) == 1
    (tmp_path / "f.json").write_text(json.dumps([{"problem": "x" * 10**6, "answer": "1"}, {"problem": "b", "answer": "2"}]))
    good, bad = outcomes(tmp_path / "f.json")
    assert good == ["b"] and "1,000,000 characters" in bad[0]


def test_binary_and_invalid_text_are_reported_and_passed_over(tmp_path):
    good = b'{"problem": "a", "answer": "1"}\n'
    noise = random.Random(0).randbytes(50_000).replace(b"\n", b"\xff") + b"\n"
    (tmp_path / "b.jsonl").write_bytes(noise + good + b'{"problem": "\xff", "answer": "1"}\n' + good.replace(b"a", b"c", 1))
    texts, bad = outcomes(tmp_path / "b.jsonl")
    assert texts[0] == "a" and len(bad) >= 2
    (tmp_path / "l.json").write_bytes(b'[{"problem": "\xff", "answer": "1"},\n {"problem": "b", "answer": "2"},\n {"problem"')
    texts, bad = outcomes(tmp_path / "l.json")
    assert texts == ["b"] and "not UTF-8" in bad[0] and "not JSON" in bad[1]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(good * 5000)[:-20])
    texts, bad = outcomes(tmp_path / "z.jsonl.gz")
    assert "damaged .gz" in bad[-1]
    (tmp_path / "p.parquet").write_bytes(noise)
    if "pyarrow" in sys.modules:
        assert "not parquet" in outcomes(tmp_path / "p.parquet")[1][0]


def test_csv_rows_with_wrong_number_of_fields(tmp_path):
    (tmp_path / "a.csv").write_text('problem,answer\n"a, b",1\nc,2,3\nd\n"e\nf",5\n')
    texts, bad = outcomes(tmp_path / "a.csv")
    assert texts == ["a, b", "e\nf"] and len(bad) == 2


# --- serving training ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<s>", "<u>", "<a>", "?"] + sorted(set(("What is 1 + 2 long " + data.INSTRUCTION).split()))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="?",
                                   additional_special_tokens=["<u>", "<a>"])
    made.chat_template = ("{{ bos_token }}{% for m in messages %} <u> {{ m['content'] }}{% endfor %}"
                          "{% if add_generation_prompt %} <a>{% endif %}")
    return made


def test_prompt_is_problem_space_instruction_in_the_chat_format(tokenizer):
    ids = data.encode_prompt(tokenizer, "What is 1 + 2")
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "<u>", *("What is 1 + 2 " + data.INSTRUCTION).split(), "<a>"]
    assert ids.count(tokenizer.bos_token_id) == 1  # the template writes it, the tokenizer must not add another
    plain = data.encode_prompt(tokenizer, "What is 1 + 2", chat=False)
    assert tokenizer.convert_ids_to_tokens(plain) == ["<s>", *("What is 1 + 2 " + data.INSTRUCTION).split()]


def test_tokenizer_without_template_says_what_to_do(tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match="--no_chat"):
            data.encode_prompt(tokenizer, "What is 1 + 2")
    finally:
        tokenizer.chat_template = template


def test_long_prompts_are_dropped_and_counted(tokenizer):
    items = [Problem("a", "1 + 2", "3"), Problem("b", "long " * 50, "1"), Problem("c", "2 + 2", "4")]
    kept, ids, dropped = data.encode_problems(items, tokenizer, 30)
    assert [p.id for p in kept] == ["a", "c"] and dropped == 1
    assert ids[0] == data.encode_prompt(tokenizer, "1 + 2")
    assert data.encode_problems(items[:1], tokenizer, len(ids[0]))[2] == 0  # the limit itself still fits
    with pytest.raises(DataError, match="--max_prompt_len"):
        data.encode_problems(items, tokenizer, 5)


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


def test_order_depends_on_seed_and_epoch_only():
    orders = {tuple(data.batch_indices(50, step, 50, seed)) for seed in (0, 1) for step in (0, 1)}
    assert len(orders) == 4
    code = "import data; print(data.batch_indices(40315, 1000, 4, 7))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    data.epoch_order.cache_clear()
    assert json.loads(told.stdout) == data.batch_indices(40315, 1000, 4, 7)


# --- extraction ---------------------------------------------------------------------------

LIST = "Pick one. $\\textbf{(A)}\\ 12 \\qquad \\textbf{(B)}\\ \\frac{1}{2} \\qquad \\textbf{(C) } 20\\%\\qquad\\mathrm{(D)\\ }x^2 \\qquad\\text{(E)}\\ 5$"


@pytest.mark.parametrize("solution, problem, expected", [
    ("First \\boxed{3}, then \\boxed{\\frac{1}{2}}.", "", "\\frac{1}{2}"),
    ("So \\boxed{\\{1, 2\\}}", "", "\\{1, 2\\}"),
    ("\\fbox{7} is it", "", "7"),
    ("\\boxed{25+312 = 337}", "", "337"),
    ("\\boxed{2x+y = 7}", "", "2x+y = 7"), ("\\boxed{3 = x}", "", "3 = x"), ("The answer is 0.333...", "", "0.333..."),
    ("\\boxed{\\textbf{(C)}\\ 6.5}", "", "6.5"),
    ("\\boxed{\\frac{n^2}{4}\\textbf{ (E)}}", "", "\\frac{n^2}{4}"),
    ("\\boxed{\\textbf{(051)}}", "", "051"),
    ("open \\boxed{3 and the answer is 4.", "", "4"),
    ("Hence the answer is $17$.", "", "17"),
    ("The final answer is: \\(x+1\\)", "", "x+1"),
    ("the answer is therefore 1,024 apples, as claimed. Bye.", "", "1,024 apples"),
    ("The answer is 3.5. Nice.", "", "3.5"),
    ("Thus $\\boxed{B}$.", LIST, "\\frac{1}{2}"),
    ("Thus $\\boxed{\\textbf{(C)}}$.", LIST, "20\\%"),
    ("So the answer is (D).", LIST, "x^2"),
    ("which gives choice E", LIST, "5"),
    ("Thus \\boxed{\\text{B}}", "Pick: (A) 10 (B) 20 (C) 30", "20"),
    ("Thus \\boxed{B}", "Pick: A) 10 B) 20 C) 30", "20"),
    ("The sum is $8$, choice (C).\n\n\\boxed{C}", "What is the sum?", "8"),
    ("\\boxed{B}", "Who wins?", None),
    ("We are done.", "", None),
    ("", "", None),
])
def test_read_answer(solution, problem, expected):
    assert data.read_answer(solution, problem) == expected


def test_solutions_vote_and_an_extractor_reads_the_rest(tmp_path, monkeypatch):
    assert data.vote(["\\frac12", "3", "0.5", None]) == "\\frac12"
    script = tmp_path / "x.py"
    script.write_text("import json, sys\nprint('$' + str(len(json.load(sys.stdin)['solution'])) + '$')\n")
    rows = [row("p", "", solutions=["\\boxed{1}", "\\boxed{2}", "\\boxed{2}"]), row("q", "", solutions=["abc"]),
            row("r", "\\[ \\boxed{n=3} \\]"), row("s", "")]
    command = f"{sys.executable} {script}"
    filled, _ = data.fill_answers(rows, tmp_path / "w", (command, data.command_extractor(command)))
    assert [r["answer"] for r in filled] == ["2", "3", "n=3", ""]
    monkeypatch.setattr(data, "make_sampler", lambda model, **options: lambda texts, n: [
        [f"</think> \\boxed{{{'4' if 'abc' in t else ''}}}"] for t in texts])
    rows = [row("q", "", solutions=["abc"]), row("r", "", solutions=["xyz"])]
    filled, _ = data.fill_answers(rows, tmp_path / "w", data.model_extractor("models/m"))
    assert [r["answer"] for r in filled] == ["4", ""]
    with pytest.raises(DataError, match="no such program"):
        data.command_extractor("/no/such/program")(["{}"])


# --- duplicates ---------------------------------------------------------------------------


def test_exact_duplicates_and_conflicts():
    rows = [row("Find $x + 1$.", "2", "still"), row("find  $x+1$", "2", "aime"), row("Same?", "1", "still"),
            row("same", "5", "aime"), row("Clash", "1", "math"), row("clash", "2", "math"), row("alone", "9"),
            row("Hole", "", "aime"), row("hole", "4", "still")]
    kept, dropped = data.merge_exact(rows, {"aime": 0, "math": 1, "still": 2, "s": 3})
    assert {(r["problem"], r["answer"], r["source"]) for r in kept} == {
        ("find  $x+1$", "2", "aime"), ("same", "5", "aime"), ("alone", "9", "s"), ("hole", "4", "still")}
    assert sorted((d["problem"], d["reason"]) for d in dropped) == [
        ("Clash", "conflict unresolved"), ("Find $x + 1$.", "duplicate"), ("Hole", "duplicate"),
        ("Same?", "conflict, other source kept"), ("clash", "conflict unresolved")]
    assert len(kept) + len(dropped) == len(rows)


def test_spaces_between_numbers_and_factorials_matter():
    assert data.normal_text("digits 1 23") != data.normal_text("digits 12 3")
    assert data.normal_text("Compute $5!$") != data.normal_text("Compute $5$")


def unit_rows(seed, n, d=4):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocked_search_equals_brute_force(block):
    a, b = unit_rows(0, 50), unit_rows(1, 40)
    cosine, where = data.nearest(a, b, block)
    full = a @ b.T
    assert np.allclose(cosine, full.max(1), atol=1e-6) and (where == full.argmax(1)).all()
    match, score = data.keep_first(a, 0.9, block)
    kept = []
    for i in range(len(a)):  # the definition: keep what is far from everything kept before
        near = [j for j in kept if a[i] @ a[j] >= 0.9]
        if near:
            assert match[i] in near and abs(score[i] - a[i] @ a[match[i]]) < 1e-5
        else:
            assert match[i] == -1
            kept.append(i)
    assert 0 < len(kept) < 50
    assert (data.keep_first(a[kept], 0.9, block)[0] == -1).all()


def test_near_duplicates_and_conflicts():
    vectors = np.eye(6, dtype=np.float32)[[0, 0, 1, 1, 2, 2, 3, 3, 4]]
    rows = [row("7 apples", "1", "still"), row("seven: 7", "1", "aime"),  # reworded, same answer
            row("2 cats", "3", "still"), row("two 2", "4", "aime"),  # answers differ: AIME is trusted
            row("5 pears", "1", "math"), row("five 5", "2", "math"),  # equal trust: nobody knows
            row("9 nuts", "1", "math"), row("8 nuts", "2", "math"),  # other numbers: another problem, not a conflict
            row("alone", "1")]
    kept, dropped = data.merge_near(rows, {"aime": 0, "math": 1, "still": 2, "s": 3}, vectors, 0.9)
    assert [r["problem"] for r in kept] == ["seven: 7", "two 2", "9 nuts", "alone"]
    assert sorted((d["problem"], d["reason"]) for d in dropped) == [
        ("2 cats", "conflict, other source kept"), ("5 pears", "conflict unresolved"), ("7 apples", "near duplicate"),
        ("8 nuts", "near duplicate"), ("five 5", "conflict unresolved")]
    assert next(d for d in dropped if d["problem"] == "2 cats")["match"]["cosine"] == 1.0


def test_minilm_finds_a_reworded_problem_and_no_other():
    if data.minilm_folder() is None:
        pytest.skip("the MiniLM package is not installed")
    embed = data.transformer_embedder(data.minilm_folder())
    texts = ["How many positive integers less than 100 are divisible by 7?",
             "How many positive integers smaller than 100 are divisible by 7?",
             "Find the area of a triangle with sides 3, 4 and 5."]
    vectors = embed(texts)
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.9 > vectors[0] @ vectors[2]
    assert np.allclose(embed(texts[2:]), vectors[2:], atol=1e-5)  # padding does not leak


# --- benchmarks, gradability --------------------------------------------------------------


def test_benchmark_problems_are_removed_and_their_match_listed():
    text = "A train leaves the station at noon and travels at sixty miles per hour toward the coast until sunset"
    tests = [Problem("b1", text + ". How far?", "1", source="bench"), Problem("b2", "Evaluate $\\sin 60$.", "2", source="bench")]
    rows = [row("Yesterday, " + text.upper() + "! Where does it stop?", "7"), row("Reworded beyond words", "2"),
            row("evaluate  $\\sin 60$", "2"), row("A train leaves at noon. Find its speed.", "3"),
            row("A train leaves the station at noon and travels at sixty miles", "3")]  # 3 of 9 10-grams: a phrase
    v = np.eye(4, dtype=np.float32)
    kept, dropped = data.decontaminate(rows, tests, v[[2, 0, 2, 2, 2]], v[[0, 1]], 0.9)
    assert kept == rows[3:]
    assert [(d["match"]["id"], d["reason"]) for d in dropped] == [
        ("b1", "benchmark, 10-grams"), ("b1", "benchmark, embedding"), ("b2", "benchmark, 10-grams")]
    assert dropped[0]["match"]["problem"] == tests[0].problem


@pytest.mark.parametrize("problem, answer, reason", [
    ("Find x.", "", "empty answer"), ("Find x.", [], "empty answer"), ("Find x.", "see solution", "no answer in it"),
    ("Find x.", "\\text{Proof omitted}", "no answer in it"), ("Find x.", "N/A", "no answer in it"),
    ("Find x.", "Answers may vary", "no answer in it"), ("Find x.", "(a) 3; (b) 4", "several parts"),
    ("Find x.", "1) 3 2) 4", "several parts"), ("Find x.", "(i) yes (ii) no", "several parts"),
    ("Show that 1 < 2.", "1", "proof"), ("Find x.", "1" * 301, "answer longer than 300 characters"),
    ("Then $n=\\boxed{120}$.", "120", "the problem gives its answer away"),
    ("How many? Answer: 28182.", "28182", "the problem gives its answer away"),
    ("Find the key $\\boxed{x^2}$.", "4", None), ("Prove or find x.", "(a, b)", None), ("Find x.", "n/a", "no answer in it"),
    ("Find x.", "\\text{no solution}", None), ("Find x.", "(1, 2), (2, 1)", None), ("Find x.", ["1", "2"], None),
])
def test_rules_for_answers_nobody_can_grade(problem, answer, reason):
    assert data.why_not_gradable(problem, answer) == reason


def test_gradable_asks_the_real_grader(tmp_path):
    rows = [row("a", "\\frac{1}{2}"), row("b", "\\frac{1}{2"), row("c", "(3, \\frac{\\pi}{2})"), row("d", ["1", "one"]),
            row("e", "9^{9^{9^9}}"), row("f", "3 \\mid a_0")]
    start = time.time()
    kept, dropped = data.keep_gradable(rows, tmp_path)
    assert [r["problem"] for r in kept][:3] == ["a", "c", "d"] and {"b", "f"} <= {d["problem"] for d in dropped}
    assert time.time() - start < 20


# --- the whole build ----------------------------------------------------------------------


def small_world(folder):
    """Sources with every flaw once, and a benchmark: 30 good problems among 38 rows."""
    nouns = random.Random(1).sample([a + b for a in ("red", "tin", "old", "wet", "raw") for b in (
        "fox", "pan", "map", "hat", "jug", "rod", "cow", "bee")], 30)
    good = [{"problem": f"A {w} of weight {k + 3} costs twice its {w[::-1]}. Find the {w * 2} price.", "answer": str(k)}
            for k, w in enumerate(nouns)]
    test = {"problem": "Nine knights sit at a round table and each of them shakes hands with both neighbours once", "answer": "9"}
    aime = good[:10] + [{"problem": "Seven sages solve it", "solution": "So \\boxed{12}."}]
    still = good[10:] + [good[0] | {"answer": "999"}, good[12], test, {"problem": "Say why", "answer": "see solution"},
                         {"problem": "x"}, 7]
    write_jsonl(folder / "aime.jsonl", aime)
    (folder / "still.json").write_text(json.dumps(still))
    write_jsonl(folder / "bench.jsonl", [test])


BUILD = ["aime.jsonl", "still.json", "--out", "out/train.jsonl.gz", "--against", "bench.jsonl", "--embedder", "ngram"]


def build_in(folder, *args, check=True):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), "build", *args], cwd=folder, capture_output=True,
                          text=True, check=check)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "out").iterdir()) if p.is_file()}


def test_build_removes_each_flaw_and_is_idempotent(tmp_path):
    small_world(tmp_path)
    build_in(tmp_path, *BUILD)
    rows, dropped = read_gz(tmp_path / "out/train.jsonl.gz"), read_gz(tmp_path / "out/dropped.jsonl.gz")
    assert len(rows) == 31 and list(rows[0]) == ["id", "problem", "answer", "source"]
    assert [r["id"] for r in rows] == sorted(data.text_id(r["problem"]) for r in rows)
    assert {r["answer"] for r in rows} == {str(k) for k in range(30)} | {"12"}
    assert sorted((d["step"], d["reason"]) for d in dropped) == [
        ("decontaminate", "benchmark, 10-grams and embedding"), ("exact", "conflict, other source kept"),
        ("exact", "duplicate"), ("gradable", "no answer in it"), ("read", "bad row"), ("read", "bad row")]
    assert all(d["where"] for d in dropped)
    sheet = (tmp_path / "out/DATASHEET.md").read_text()
    assert "| gradable | 32 | 31 | 1 |" in sheet and "| integer | 31 | 100.0% |" in sheet
    first = contents(tmp_path)
    build_in(tmp_path, *BUILD)  # again, from the cached steps
    assert contents(tmp_path) == first
    build_in(tmp_path, *BUILD, "--work", "elsewhere")  # again, from nothing
    assert contents(tmp_path) == first
    build_in(tmp_path, "out/train.jsonl.gz", *BUILD[2:])  # from its own output
    assert contents(tmp_path) == first


def test_build_is_resumed_after_a_kill(tmp_path):
    small_world(tmp_path)
    (tmp_path / "slow.py").write_text(f"""
import functools, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data
data.cached_map = functools.partial(data.cached_map, chunk=8)
plain = data.ngram_embedder()
def embed(texts):
    time.sleep(float(sys.argv[2]))
    with open(sys.argv[1], "a") as log:
        log.writelines(t + "\\n" for t in texts)
    return plain(texts)
data.make_embedder = lambda name: ("slow", embed)
data.build(["aime.jsonl", "still.json"], sys.argv[3], against=["bench.jsonl"])
""")
    command = [sys.executable, "slow.py", "log", "0.5", "out/train.jsonl.gz"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(tmp_path.glob("out/.train.jsonl.gz.work/vectors-*/*.npz")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/train.jsonl.gz").exists()
    before = (tmp_path / "log").read_text().splitlines()
    saved = 8 * len(list(tmp_path.glob("out/.train.jsonl.gz.work/vectors-*/*.npz")))
    assert 8 <= saved <= len(before) < 30
    subprocess.run(command[:3] + ["0"] + command[4:], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    after = (tmp_path / "log").read_text().splitlines()[len(before):]
    assert not set(after) & set(before[:saved])  # nothing finished is computed twice
    subprocess.run([sys.executable, "slow.py", "log2", "0", "fresh/train.jsonl.gz"], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "out/train.jsonl.gz").read_bytes() == (tmp_path / "fresh/train.jsonl.gz").read_bytes()
    assert (tmp_path / "out/dropped.jsonl.gz").read_bytes() == (tmp_path / "fresh/dropped.jsonl.gz").read_bytes()


def test_strict_labels_ranges_and_bad_sources(tmp_path):
    small_world(tmp_path)
    told = build_in(tmp_path, *BUILD, "--strict", check=False)
    assert told.returncode != 0 and "still.json, line 1, row 24" in told.stderr and "Traceback" not in told.stderr
    build_in(tmp_path, "amc=aime.jsonl@2:5", "--out", "o/t.jsonl", "--embedder", "none")
    rows = [json.loads(line) for line in (tmp_path / "o/t.jsonl").read_text().splitlines()]
    assert [r["source"] for r in rows] == ["amc"] * 3
    for source, words in (("none.json", "no such file"), ("aime.jsonl@x:y", "START:STOP")):
        told = build_in(tmp_path, source, "--out", "o/u.jsonl", check=False)
        assert told.returncode != 0 and words in told.stderr and "Traceback" not in told.stderr


def test_hub_dataset_by_name(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(name, repo_type, local_dir, allow_patterns):
        assert (name, repo_type) == ("someone/maths", "dataset")
        for split in ("train", "test"):
            (Path(local_dir) / "data").mkdir(parents=True, exist_ok=True)
            write_jsonl(Path(local_dir) / f"data/{split}-0.jsonl", [{"question": f"{split}?", "answer": "1"}])
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", download)
    label, paths, *_ = data.parse_source("someone/maths", tmp_path)
    assert (label, [p.name for p in paths]) == ("maths", ["train-0.jsonl"])
    assert [p.name for p in data.parse_source("someone/maths@test", tmp_path)[1]] == ["test-0.jsonl"]

    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="offline"):
        data.parse_source("someone/maths", tmp_path)


# --- solve rates and selection ------------------------------------------------------------


def test_solve_rates_are_resumed_and_select(tmp_path):
    items = [{"id": k, "problem": f"{k}+0?", "answer": str(k)} for k in range(6)]
    source, out = write_jsonl(tmp_path / "p.jsonl", items), tmp_path / "rates.jsonl"
    asked = []

    def sample(texts, n):  # problem k is solved by k of 4 samples, 5 by all
        asked.extend(texts)
        return [[f"</think> \\boxed{{{t[0] if j < int(t[0]) else 77}}}" for j in range(n)] for t in texts]

    data.difficulty("models/m", source, out, n=4, batch=2, limit=2, sample=sample)
    with open(out, "a") as file:
        file.write('{"id": "2", "sol')  # a kill in the middle of a line
    data.difficulty("models/m", source, out, n=4, batch=2, sample=sample)
    assert sorted(asked) == [i["problem"] for i in items]
    rates = data.load_solve_rates(out)
    assert rates == {"0": 0, "1": 0.25, "2": 0.5, "3": 0.75, "4": 1, "5": 1}
    kept, left = data.select_problems(data.load_problems(source), rates)
    assert [p.id for p in kept] == ["1", "2", "3"] and left == {"too hard": 1, "too easy": 2}
    with pytest.raises(DataError, match="another model"):
        data.difficulty("models/m", source, out, n=8, sample=sample)
    data.main(["select", str(source), "--out", str(tmp_path / "s.jsonl"), "--difficulty", str(out), "--min_rate", "0.3"])
    assert [(p.id, p.solve_rate) for p in data.load_problems(tmp_path / "s.jsonl")] == [("2", 0.5), ("3", 0.75)]


def test_difficulty_asks_a_real_model_through_the_engine(tmp_path, tokenizer, monkeypatch):
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    # Loaded for a Qwen2 model, a word-level tokenizer would be rebuilt as a byte-level one.
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: tokenizer)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=2)).save_pretrained(tmp_path / "m")
    source = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "problem": "1 + 2", "answer": "3"},
                                                {"id": "b", "problem": "long " * 60, "answer": "3"}])
    data.main(["difficulty", "--model", str(tmp_path / "m"), "--data", str(source), "--out", str(tmp_path / "r.jsonl"),
               "--n", "2", "--max_len", "4", "--max_prompt_len", "40", "--engine", "torch"])
    assert data.load_solve_rates(tmp_path / "r.jsonl") == {"a": 0.0}  # a random model; the long prompt is left out


def test_select_by_length():
    items = [Problem(str(n), "x" * n, "1") for n in (100, 247, 248)]
    assert [p.id for p in data.select_problems(items, max_chars=247)[0]] == ["100", "247"]
    assert [p.id for p in data.select_problems(items, min_chars=248)[0]] == ["248"]
    with pytest.raises(DataError, match="--max_chars"):
        data.select_problems(items, max_chars=10)


# --- what is committed --------------------------------------------------------------------

SIZES = {"aime24": 30, "aime25": 30, "amc23": 83, "math500": 500, "minerva": 272, "olympiad": 675}


def test_committed_training_set_is_clean():
    train = data.load_problems(ROOT / "assets/train.jsonl.gz")
    tests = [t for name, size in SIZES.items() for t in data.load_problems(ROOT / f"assets/benchmarks/{name}.jsonl")]
    assert len(tests) == sum(SIZES.values()) and len(train) > 30_000
    assert [p.id for p in train] == sorted(data.text_id(p.problem) for p in train)
    texts = [data.normal_text(p.problem) for p in train]
    assert len(set(texts)) == len(texts) and not set(texts) & {data.normal_text(t.problem) for t in tests}
    assert (data.overlaps([{"problem": p.problem} for p in train], tests)[1] == -1).all()
    assert all(data.why_not_gradable(p.problem, p.answer) is None for p in train)
    assert (data.grading_verdicts([json.dumps(p.answer) for p in train]) == "").all()
