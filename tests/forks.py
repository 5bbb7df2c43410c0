"""Starts our programs for the tests in 0.1 instead of 8 seconds: a server imports what they import, and each
program is a fork of it. Several ranks are joined as torchrun would; a failure of one ends the others.

`Fork` has as much of subprocess.Popen as the tests use. What is about starting itself (torchrun, a package
that is missing, variables that count at import) is tested with real starts."""
import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
HERE = str(Path(__file__).resolve().parent)
PACKETS = socket.AF_UNIX, socket.SOCK_SEQPACKET
PRELOAD = ["grpo", "figures", "schedule", "transformers.models.qwen2.modeling_qwen2", "conftest"]


# ----- the server -------------------------------------------------------------------------------------------

def serve(path):
    """Accept requests for ever. Returns in the forks alone -> (program, words)."""
    for name in PRELOAD:
        __import__(name)
    gc.freeze()  # or each fork's collections would touch, and so copy, all that was imported
    listener = socket.socket(*PACKETS)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that join ranks
    while True:
        line, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return join(line)
        line.close()


def join(line):
    """Fork the ranks of a program, tell the number of the first (of this process, if there are several), wait
    for all, tell the exit code."""
    text, streams, _, _ = socket.recv_fds(line, 1 << 20, 2)
    program, words, ranks, environment, folder = json.loads(text)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in map(str, range(ranks)):
        child = os.fork()
        if child == 0:
            line.close()
            os.setsid()
            if ranks > 1:
                os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), MASTER_PORT=port,
                                  MASTER_ADDR="127.0.0.1")
            return program, words
        children.append(child)
    line.send(str(children[0] if ranks == 1 else os.getpid()).encode())
    code, left = 0, set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        code = code or os.waitstatus_to_exitcode(status)
        for other in left if code else ():
            os.kill(other, signal.SIGTERM)
    line.send(str(code if ranks == 1 else int(code != 0)).encode())
    os._exit(0)


# ----- the tests' side --------------------------------------------------------------------------------------

def server(path=[]):  # noqa: B006  one for each process of pytest, started when first asked for
    if not path:
        folder = tempfile.TemporaryDirectory()
        path += [f"{folder.name}/server", folder]
        process = subprocess.Popen([sys.executable, __file__, path[0]], stdin=subprocess.DEVNULL)
        atexit.register(process.kill)
        while not os.path.exists(path[0]) and process.poll() is None:
            select.select([], [], [], 0.05)
    return path[0]


def request(command):
    """(program, its words, ranks) of a command line, None if it cannot be a fork of the server."""
    words, ranks = command[1:], 1
    if words[:3] == TORCHRUN:
        ranks, words = int(words[3].split("=")[1]), words[4:]
    root, program = Path(HERE).parent, Path(words[0])
    ours = program.parent in (root, root / "bench", Path(HERE)) or program.name == "sabotaged.py"
    return (words[0], words[1:], ranks) if command[0] == sys.executable and ours else None


class Fork:
    returncode = None

    def __init__(self, asked, out, err, cwd=None):
        self.line = socket.socket(*PACKETS)
        path = server()
        while self.line.connect_ex(path):  # it is still importing
            select.select([], [], [], 0.05)
        content = json.dumps([*asked, dict(os.environ), str(cwd or os.getcwd())])
        socket.send_fds(self.line, [content.encode()], [out, err])
        self.pid = int(self.line.recv(64))

    def poll(self):
        if self.returncode is None and select.select([self.line], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            self.returncode = int(self.line.recv(64))
            self.line.close()
        return self.returncode

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


if __name__ == "__main__":
    sys.path[:0] = [HERE, os.path.dirname(HERE)]
    sys.argv = list(serve(sys.argv[1]))
    sys.argv[1:] = sys.argv[1]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
