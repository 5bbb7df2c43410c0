"""Starts our programs for the tests in 0.1 instead of 8 seconds: Python's fork server imports what they
import, and each program is a fork of it. Ranks are joined as torchrun does; a failure of one ends the others.

What is about starting itself (torchrun, a package that is missing, variables that count at import) is tested
with real starts."""
import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["grpo", "figures", "schedule", "transformers.models.qwen2.modeling_qwen2",
                               "conftest"])


@atexit.register
def end_what_still_runs():
    for process in multiprocessing.active_children():
        process.kill()


def begin(command, out, err, real=False, cwd=None, **env):
    """A program that runs: a fork of the server if it can be one, or a real start."""
    words, ranks = command[1:], 1
    if words[:3] == TORCHRUN:
        ranks, words = int(words[3].split("=")[1]), words[4:]
    program = Path(words[0])
    ours = program.parent in (HERE.parent, HERE.parent / "bench", HERE) or program.name == "sabotaged.py"
    if command[0] == sys.executable and ours and not real and not env:
        return Fork(words, ranks, (out, err), str(cwd or os.getcwd()))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd,
                            start_new_session=True, env={**os.environ, **env})


class Fork(SERVER.Process):
    """As much of subprocess.Popen as the tests use."""

    def __init__(self, words, ranks, streams, folder):
        super().__init__()
        self.words, self.ranks, self.folder, self.environment = words, ranks, folder, dict(os.environ)
        self.streams = [Connection(os.dup(stream), readable=False) for stream in streams]
        with mock.patch.dict(os.environ, PYTHONPATH=f"{HERE.parent}:{HERE}"):  # the server finds modules
            self.start()
        for stream in self.streams:
            stream.close()

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self.exitcode

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def run(self):
        """In the fork: become the program."""
        gc.freeze()  # or its collections would touch, and so copy, all that was imported
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        for number, stream in enumerate(self.streams, 1):
            os.dup2(stream.fileno(), number)
            stream.close()
        os.setsid()
        if self.ranks > 1:
            split(self.ranks)
        sys.argv, sys.path[0] = self.words, os.path.dirname(self.words[0])
        try:
            runpy.run_path(self.words[0], run_name="__main__")
        finally:
            atexit._run_exitfuncs()  # multiprocessing leaves them out


def split(ranks):
    """Fork the ranks of a program. It returns in them alone; this process waits for all of them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    left, code = set(), 0
    for rank in map(str, range(ranks)):
        child = os.fork()
        if child == 0:
            os.setsid()
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
            return
        left.add(child)
    while left:
        child, status = os.wait()
        left.discard(child)
        code = code or int(status != 0)
        for other in left if code else ():
            os.kill(other, signal.SIGTERM)
    os._exit(code)
