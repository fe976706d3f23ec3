"""The project's scripts, run by tests: each in a process of its own, forked from one that has torch and transformers
already, since importing them is most of a start. It has nothing of the project: a script imports that itself, from its
own folder. What is about the start as such (Ctrl-C, a terminal's encoding, PYTHONPATH, torchrun) starts an interpreter,
and so does the last of the runs that were killed, since forked programs have the order of their sets in common.

    run(words, ...)      as subprocess.run([sys.executable, *words], capture_output=True, text=True, ...)
    start(words, ...)    as subprocess.Popen; communicate(), wait(), pid, returncode
    started_by, alive    what a program has started, and whether that is still there
"""
import atexit
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVE = "import sys; sys.path[0] = sys.argv[1]; import programs; programs.serve(int(sys.argv[2]))"


# ---------------------------------------------------------------------------------------- in the process that forks
def serve(number: int) -> None:
    """Fork a process for each program that is asked for, and say how it ended, until nobody can ask any more."""
    import torch.distributed                                             # noqa: F401
    import transformers.models.llama.modeling_llama                      # noqa: F401
    gc.freeze()                                                          # nor look through all of that at each end
    asked, ends = socket.socket(fileno=number), {}
    while True:
        for ready in select.select([asked, *ends], [], [])[0]:
            if ready is not asked:                                       # a program has ended
                pid, told = ends.pop(ready)
                os.close(ready)
                told.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                told.close()
                continue
            job, files, *_ = socket.recv_fds(asked, 1 << 20, 4)
            if not job:
                return
            told, pid = socket.socket(fileno=files.pop()), os.fork()
            if not pid:
                return become(json.loads(job), files)                    # its end is this interpreter's
            for file in files:
                os.close(file)
            told.sendall(b"%d\n" % pid)
            ends[os.pidfd_open(pid)] = pid, told


def become(job: dict, files: list[int]) -> None:
    """What an interpreter does that was started with these words, there, with this environment and these streams, in
    a process group of its own."""
    import torch
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 1 << 10)
    for number, (name, mode) in enumerate(dict(stdin="r", stdout="w", stderr="w").items()):
        stream = open(number, mode, 1 if number == 2 else -1, errors="backslashreplace" if number == 2 else None, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    word, *sys.argv = job["words"]
    if word == "-m":
        sys.path[0] = job["cwd"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv.insert(0, word)
        sys.path[0] = str(Path(word).resolve().parent)
        runpy.run_path(word, run_name="__main__")


# ---------------------------------------------------------------------------------------- in the tests' process
@lru_cache
def server() -> socket.socket:
    """The one process that forks, of this process of tests; it ends with it."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(Path(__file__).parent), str(theirs.fileno())],
                               pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               start_new_session=True)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


class start:
    """A program under way; what it says goes to files, so that it never waits for its reader."""
    def __init__(self, words, cwd=ROOT, env=None, typed="", text=True, terminal=None):
        self.args, self.text, self.returncode = words, text, None
        self.files = [tempfile.TemporaryFile() for _ in range(3)]          # what it reads, what it says
        self.files[0].write(typed.encode())
        self.files[0].seek(0)
        self.told, theirs = socket.socketpair()
        job = dict(words=[str(word) for word in words], cwd=str(cwd), env=dict(env or os.environ))
        streams = [file.fileno() for file in self.files]
        if terminal is not None:                                         # the end of a pseudo-terminal
            streams[:2] = terminal, terminal
        with theirs:
            socket.send_fds(server(), [json.dumps(job).encode()], [*streams, theirs.fileno()])
        self.answer = self.told.makefile()
        self.pid = int(self.answer.readline())

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.answer.read())
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        for file in self.files[1:]:
            file.seek(0)
        return tuple((io.TextIOWrapper(file, "utf-8") if self.text else file).read() for file in self.files[1:])


def started_by(pid):
    """The processes that it started, and those that they did."""
    told = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    own = [int(child) for child, parent in map(str.split, told.splitlines()) if int(parent) == pid]
    return own + [pid for child in own for pid in started_by(child)]


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run(words, timeout=600, **more):
    process = start(words, **more)
    stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
