"""Runs a program that nobody has read. What a model writes is hostile; Linux alone, the standard library alone.

    run("print(input())", "hello")    ->    Result(out="hello\\n", err="", code=0, end="exit")

A launcher (launcher.py, a process of its own, so that nothing of the caller is forked) starts Python in a folder that
is removed afterwards, watches it, and kills its whole tree. The program is held by
    Landlock     reads Python's library, writes its own folder, executes Python: nothing else of the file system
    seccomp      the system calls of launcher.CALLS: no sockets, no signals, no links, no namespaces, no tracing
    rlimits      memory, processor time, processes, size of a file, open files
    user         where the caller is root: a user of the program's own
    namespaces   user, network, processes, IPC; where the system forbids them, that is said once
and sees an empty environment. Landlock is what a weaker system must not lack: without it nothing is run.
"""
import glob
import marshal
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from worlds.launcher import ARCHES, SandboxError, remove


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0      # wall clock
    memory_mb: int = 512      # of the whole tree; the address space of each process
    processes: int = 16       # threads count, too
    disk_mb: int = 16         # of its folder
    output_kb: int = 64       # of stdout


ERRORS = 1 << 16              # bytes kept of what a program prints to stderr: the last
ENDS = ("exit", "time", "memory", "disk", "output", "stopped")


@dataclass
class Result:
    out: str
    err: str
    code: int                 # as subprocess has it: negative, the signal that ended it
    end: str                  # exit, or the limit it ran into: time, memory, disk, output; or stopped


@dataclass
class Program:
    """A started program: `process` is its launcher."""
    process: subprocess.Popen
    report: int               # a pipe's end
    folder: str
    deadline: float


@lru_cache
def python() -> str:
    """The Python that programs run on: this one, without its virtual environment; or, for root, whose program is
    another user, the first that is open to others."""
    here = [os.path.realpath(sys.executable), *glob.glob("/usr/local/bin/python3"), *glob.glob("/usr/bin/python3")]
    for path in map(os.path.realpath, here):
        if os.geteuid() != 0 or all(parent.stat().st_mode & 0o1 for parent in [Path(path), *Path(path).parents]):
            return path
    raise SandboxError(f"as root, a program runs as another user, to whom {here[0]} is closed; "
                       f"install python3 in /usr/bin, or run as an ordinary user")


@lru_cache
def files() -> dict[str, list[str]]:
    """What a program may read, and what it may execute: Python and its loader."""
    library = os.path.join(os.path.dirname(os.path.dirname(python())), "lib*")
    found = {what: sorted({os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern)})
             for what, patterns in dict(read=[library, "/lib*", "/usr/lib*", "/etc/ld.so.cache", "/usr/share/zoneinfo"],
                                        execute=["/lib*/ld-*", "/usr/lib*/ld-*", "/lib/*/ld-*", python()]).items()}
    if not all(found.values()):
        raise SandboxError("Python's library, or its loader, is not where it is on other systems")
    return found


def readable(path: Path) -> str:
    """The folder through which a program may read this file, or ""."""
    here = Path(os.path.realpath(path))
    return next((folder for folder in files()["read"] if here.is_relative_to(folder)), "")


numbers = count()


def start(source: str, limits: Limits, stdin, stdout, stderr) -> Program:
    """Run `source` on these files. Raises SandboxError."""
    if sys.platform != "linux" or os.uname().machine not in ARCHES:
        raise SandboxError(f"programs are run on Linux on {' or '.join(ARCHES)} alone, "
                           f"not on {sys.platform} on {os.uname().machine}")
    folder, ends, uid = tempfile.mkdtemp(prefix="leafe-"), [], 0
    try:
        Path(folder, "main.py").write_text(source, encoding="utf-8", errors="surrogatepass")
        if os.geteuid() == 0:                            # no two programs share a user
            uid = 10**8 + (os.getpid() << 8 | next(numbers) & 255)
            try:
                os.chown(folder, uid, uid)
                os.chown(os.path.join(folder, "main.py"), uid, uid)
            except OSError as error:                     # root of a container that has few users
                raise SandboxError(f"as root each program runs as a user of its own, and this system gives it none "
                                   f"({error.strerror}); run as an ordinary user") from None
        ends += os.pipe()
        job = dict(asdict(limits), folder=folder, uid=uid, python=python(), files=files(), report=ends[1],
                   parent=os.getpid())
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launcher.py")), marshal.dumps(job).hex()]
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=ends[1:], env={},
                                   start_new_session=True)
    except BaseException:
        remove(folder)
        for end in ends:
            os.close(end)
        raise
    os.close(ends[1])
    return Program(process, ends[0], folder, time.monotonic() + limits.seconds + 10)


warned: list[str] = []


def finish(program: Program) -> tuple[int, str]:
    """Wait for a program: (code, end), or what kept it from being started: (0, message)."""
    late = False
    try:
        program.process.wait(max(0.0, program.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:                    # the launcher keeps time itself; this is the second line
        program.process.kill()
        program.process.wait()
        late = True
    remove(program.folder)
    with open(program.report, "rb") as file:
        text = file.read()
    if late:
        return -signal.SIGKILL, "time"
    if not text and program.process.returncode == -signal.SIGTERM:       # stopped before it listened
        return -signal.SIGKILL, "stopped"
    said: dict[str, Any] = marshal.loads(text) if text else dict(error="the launcher was killed")
    if "error" in said:
        return 0, said["error"]
    if said["weak"] and not warned:
        warned.append(said["weak"])
        print(f"sandbox: namespaces are forbidden here ({said['weak']}); programs are held by Landlock, seccomp and "
              f"limits alone", file=sys.stderr)
    return said["code"], said["end"]


def collect(programs: list[Program], limits: Limits) -> list[Result]:
    """What programs print to the pipes that they were given, until they end; when the last of them has closed its
    own, the others are stopped."""
    pipes = [[pipe for pipe in (program.process.stdout, program.process.stderr) if pipe] for program in programs]
    got: dict[Any, bytearray] = {pipe: bytearray() for own in pipes for pipe in own}
    over, last = set(), programs[-1]
    try:
        with selectors.DefaultSelector() as waiting:
            for n, own in enumerate(pipes):
                for pipe in own:
                    waiting.register(pipe, selectors.EVENT_READ, n)
            while waiting.get_map() and (ready := waiting.select(max(0.0, last.deadline - time.monotonic()))):
                for key, _ in ready:
                    more = os.read(key.fd, 1 << 16)
                    if not more:
                        waiting.unregister(key.fileobj)
                    got[key.fileobj] += more
                    if key.fileobj is programs[key.data].process.stderr:  # drained; its end is what one wants to read
                        del got[key.fileobj][:-ERRORS]
                    elif len(got[key.fileobj]) > limits.output_kb << 10 and key.data not in over:
                        over.add(key.data)
                        programs[key.data].process.terminate()
                if not any(pipe in waiting.get_map() for pipe in pipes[-1]):
                    for program in programs[:-1]:
                        program.process.terminate()
    except BaseException:                                # Ctrl-C
        for program in programs:
            program.process.terminate()
        raise
    finally:
        ends = [finish(program) for program in programs]
        for pipe in got:
            pipe.close()
    if failed := [end for _, end in ends if end not in ENDS]:
        raise SandboxError(failed[0])
    results = []
    for n, program in enumerate(programs):
        text = (got.get(pipe, bytearray())[:limits.output_kb << 10].decode("utf-8", "replace")
                for pipe in (program.process.stdout, program.process.stderr))
        out, err = (part.replace(program.folder + "/", "").replace(program.folder, ".")   # its name is random, and
                    for part in text)                                                     # a replay reads the same
        results.append(Result(out, err, ends[n][0], "output" if n in over else ends[n][1]))
    return results


def run(source: str, stdin: str = "", limits: Limits = Limits()) -> Result:
    """Run a Python program on an input to its end. Raises SandboxError if this system cannot hold it."""
    with tempfile.TemporaryFile() as given:
        given.write(stdin.encode("utf-8", "surrogatepass"))
        given.flush()
        os.fchmod(given.fileno(), 0o444)                 # as /dev/stdin, it is opened again
        with open(f"/proc/self/fd/{given.fileno()}", "rb") as readable:       # the program cannot write to it
            program = start(source, limits, readable, subprocess.PIPE, subprocess.PIPE)
    return collect([program], limits)[0]


def pair(one: str, other: str, limits: Limits = Limits(), patience: float = 3.0) -> list[Result]:
    """Run two programs that talk: what one prints the other reads, both ways. Their Results hold what they print to
    stderr. `other` has `patience` seconds more; when it has ended, `one` is stopped."""
    ends, programs = [*os.pipe(), *os.pipe()], []
    try:
        programs.append(start(one, limits, ends[0], ends[3], subprocess.PIPE))
        longer = replace(limits, seconds=limits.seconds + patience)
        programs.append(start(other, longer, ends[2], ends[1], subprocess.PIPE))
    except BaseException:
        for program in programs:
            program.process.kill()
            finish(program)
        raise
    finally:
        for end in ends:
            os.close(end)
    return collect(programs, limits)
