"""Problems for training and evaluation: load, format, shuffle, select."""

import argparse
import csv
import functools
import gzip
import hashlib
import json
import math
import os
import re
import sys
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
MAX_ROW = 16 * 2**20  # bytes; a longer line is not a maths problem but a broken file

# Field names seen in the sources of the recipe, best first; compared in lower case.
FIELDS = {
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "ground_truth", "expected_answer", "reward_model"),
    "solution": ("solution", "solutions", "generated_solution"),
    "source": ("source", "data_source"),
    "difficulty": ("difficulty", "level"),
    "id": ("id", "unique_id", "problem_id"),
    "solve_rate": ("solve_rate",),
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
    difficulty: float | None = None  # AoPS scale 1-10 or MATH level 1-5, as the source has it
    solve_rate: float | None = None  # measured share of right samples, 0..1


# --- reading ------------------------------------------------------------------------------


def open_bytes(path):
    """Open a file for reading bytes, unpacking .gz; a missing file is a DataError."""
    if not path.is_file():
        hint = "is a folder, give one file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {hint}")
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def read_jsonl(path):
    """Yield (line, row or DataError) in memory bounded by MAX_ROW, whatever the file holds."""
    with open_bytes(path) as file:
        line = 0
        while raw := file.readline(MAX_ROW + 1):
            line += 1
            if len(raw) > MAX_ROW:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW)
                yield line, DataError(f"line is longer than {MAX_ROW >> 20} MB")
                continue
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    yield line, json.loads(text)
            except UnicodeDecodeError:
                yield line, DataError("not UTF-8 text")
            except (ValueError, RecursionError) as error:
                yield line, DataError(f"not JSON ({str(error)[:80]})")


def read_json(path):
    """Yield (line, row or DataError) of a file holding one JSON list of objects.

    The list is decoded element by element, so that a row that is not text or not JSON is
    reported at its own line and, where the list can still be followed, the rest is read.
    """
    with open_bytes(path) as file:
        text = file.read().decode("utf-8-sig", errors="surrogateescape")
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    at = text.index("[") + 1
    line, counted = 1, 0
    while True:
        at = space.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            yield line, DataError("the JSON list is not closed; the file looks cut off")
            return
        if text[at] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, DataError(f"not JSON, the rest of the file is lost ({str(error)[:80]})")
            return
        yield line, row


def read_csv(path):
    """Yield (line, row or DataError) of a CSV file whose first line names the fields."""
    csv.field_size_limit(MAX_ROW)
    opener = gzip.open if path.suffix == ".gz" else open
    open_bytes(path).close()
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, DataError(f"not CSV ({error})")
                continue
            if None in row:
                yield reader.line_num, DataError("more fields than the header names")
            else:
                yield reader.line_num, row


def read_parquet(path):
    """Yield (row number, row) of a parquet file; needs pyarrow."""
    open_bytes(path).close()
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        yield number + 1, DataError(f"not parquet ({str(error)[:80]})")


def read_rows(path):
    """Yield (line, row or DataError) of one file, by its name: .json .jsonl .csv (.gz) .parquet.

    Damage that ends the reading (a cut .gz) is yielded as a last DataError.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    line = 0
    try:
        if name.endswith(".parquet"):
            reader = read_parquet
        elif name.endswith(".csv"):
            reader = read_csv
        else:
            with open_bytes(path) as file:
                head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            # A .json file is often JSON lines under the wrong name: look instead of trusting.
            is_list = head.startswith(b"[") and not name.endswith(".jsonl")
            reader = read_json if is_list else read_jsonl
        for line, row in reader(path):
            yield line, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield line + 1, DataError(f"damaged .gz file ({error})")


# --- one row ------------------------------------------------------------------------------


def clean_text(value, name):
    """A field as stripped text; DataError unless it is a string without broken characters."""
    if not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}, expected text")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{name} holds bytes that are not UTF-8 text")
    return value.strip()


def clean_answer(value):
    """An answer as text, or as a list of texts of which any is right.

    >>> clean_answer(142.0), clean_answer(["9.6\\n"]), clean_answer([1, "one"])
    ('142', '9.6', ['1', 'one'])
    """
    if isinstance(value, (list, tuple)):
        texts = list(dict.fromkeys(t for t in map(clean_answer, value) if t))
        if any(isinstance(t, list) for t in texts):
            raise DataError("answer is a list of lists, expected text")
        return texts[0] if len(texts) == 1 else texts
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"answer is {value}, expected a finite number or text")
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)
    return clean_text(value, "answer")


def clean_number(value, name, low, high):
    """A number in low..high, also out of text such as "Level 5"; None stays None."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        match = re.search(r"-?\d+(\.\d+)?", value)
        value = float(match.group()) if match else None  # "Level ?" is a known hole in MATH
        if value is None:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise DataError(f"{name} is {value!r}, expected a number from {low} to {high}")
    return float(value)


def pick_fields(row):
    """Map a source's own field names to ours: a dict with the keys of FIELDS, missing ones None.

    Knows chat-style prompts ([{"role": "user", "content": ...}]) and verl's reward_model.

    >>> pick_fields({"Question": "1+1?", "Answer": 2})["problem"]
    '1+1?'
    """
    if not isinstance(row, dict):
        raise DataError(f"row is a {type(row).__name__}, expected an object with fields")
    lower = {str(k).strip().lower(): v for k, v in row.items()}
    found = {f: next((lower[n] for n in names if lower.get(n) is not None), None)
             for f, names in FIELDS.items()}
    if isinstance(found["problem"], list) and found["problem"]:
        turn = found["problem"][-1]
        found["problem"] = turn.get("content") if isinstance(turn, dict) else turn
    if isinstance(found["answer"], dict):
        found["answer"] = found["answer"].get("ground_truth")
    return found


def row_to_problem(row):
    """One row of any known source as a Problem; id is "" when the row has none.

    Raises DataError saying what is missing, empty or of the wrong type.
    """
    found = pick_fields(row)
    if found["problem"] is None:
        raise DataError(f"no problem text: needs one of {', '.join(FIELDS['problem'])}")
    problem = clean_text(found["problem"], "problem").removesuffix(INSTRUCTION).rstrip()
    if not problem:
        raise DataError("empty problem text")
    if found["answer"] is None:
        raise DataError(f"no answer: needs one of {', '.join(FIELDS['answer'])}")
    answer = clean_answer(found["answer"])
    if not answer:
        raise DataError("empty answer")
    given = "" if found["id"] is None else found["id"]
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    return Problem(
        id=clean_text(given, "id"), problem=problem, answer=answer,
        source=clean_text(found["source"] or "", "source"),
        difficulty=clean_number(found["difficulty"], "difficulty", 0, 100),
        solve_rate=clean_number(found["solve_rate"], "solve_rate", 0, 1))


def text_id(text):
    """A stable id for a problem text: 16 hexadecimal digits.

    >>> text_id("What is 1+1?")
    '31adf3e245f99d7b'
    """
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def load_problems(path, limit=None):
    """Read a data set into a list of Problem, in file order.

    path: .json (a list), .jsonl or .csv, each also .gz, or .parquet. Ids are the rows' own or a
    hash of the text, so they do not depend on the order. limit: read only the first so many.
    Raises DataError with file, line and cause at the first bad row: training on a file with
    holes should be somebody's decision (python data.py build drops and lists them).
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or None for all rows")
    problems, first_line = [], {}
    for line, row in read_rows(path):
        if limit is not None and len(problems) >= limit:
            break
        try:
            if isinstance(row, DataError):
                raise row
            item = row_to_problem(row)
            if item.id in first_line and item.id:
                raise DataError(f"duplicate id {item.id!r}, first on line {first_line[item.id]}")
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        if not item.id:
            base, copy = text_id(item.problem), 1
            name = base
            while name in first_line:  # the same text twice is allowed, the same id is not
                copy += 1
                name = f"{base}-{copy}"
            item = replace(item, id=name)
        first_line[item.id] = line
        problems.append(item)
    if not problems:
        raise DataError(f"{path}: no problems in it (the file is empty)")
    return problems


# --- serving training ---------------------------------------------------------------------


def encode_prompt(tokenizer, problem_text, instruction=INSTRUCTION, chat=True):
    """Token ids [T] of one prompt: problem, one space, instruction, in the model's chat format.

    The template writes the special tokens itself, so none are added a second time. chat=False
    encodes the plain text for base models. DataError if the tokenizer has no template.
    """
    text = f"{problem_text} {instruction}" if instruction else problem_text
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "this tokenizer has no chat template: use an instruction-tuned model, put a "
            "chat_template in its tokenizer_config.json, or pass --no_chat (chat=False) to "
            "encode the plain problem text")
    return list(tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True,
        return_dict=False))


def encode_problems(problems, tokenizer, max_prompt_len, instruction=INSTRUCTION, chat=True):
    """Encode every problem and leave out those longer than max_prompt_len tokens.

    Returns (kept problems, their token ids, number left out). DataError if nothing is left.
    """
    kept, ids = [], []
    for item in tqdm(problems, desc="encode prompts", disable=len(problems) < 2000, leave=False):
        tokens = encode_prompt(tokenizer, item.problem, instruction, chat)
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

    Every epoch is shuffled anew and its incomplete last batch left out. A pure function of the
    step: a run that resumes at step k sees exactly the batches it would have seen, on any
    number of GPUs.

    >>> first, second = batch_indices(5, 0, 2, seed=0), batch_indices(5, 1, 2, seed=0)
    >>> len(set(first) | set(second)), batch_indices(5, 0, 2, seed=0) == first
    (4, True)
    """
    if batch < 1 or step < 0:
        raise DataError(f"batch is {batch} and step {step}; need batch >= 1 and step >= 0")
    if n < batch:
        raise DataError(f"{n} problems cannot fill a step of {batch} prompts: take fewer prompts "
                        "per step or more data")
    epoch, k = divmod(step, n // batch)
    return list(epoch_order(n, epoch, seed)[k * batch:(k + 1) * batch])
