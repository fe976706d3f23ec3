"""Worlds that are slow, or cannot run beside another of their kind, in processes of their own: while one steps, the
model goes on with the others. A world asks for it by `apart = True`; then envs.make_env gives a Remote, which answers
reset, step, rollback and action with a Future, as any world may (envs.visit): the engine goes on with other episodes
until it is there.

Where a world says `shares = True`, the worlds of all conversations live in workers= processes, several in each, which
asks one after the other: so conversations are as many as memory has room for, and processes as cores. Else a world has
its process for itself, and no more conversations run side by side than there are workers (Policy.engine).

In the other process other people's code runs. So what comes back is JSON behind its length, and its shape is checked; a
call that takes longer than env_timeout is told in a line; and the world's parent, a keeper, ends the world and all that
it has started when this program is gone, however it went.
"""
import atexit
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import getfile
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, BinaryIO, Callable, Iterator, Sequence

import envs
from config import ROOT, UserError, blaming, visible
from envs import Env, Outcome, ReplayMismatch, ask, closing, env_class, open_env, wait_for

START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scale.apart import serve; serve(*sys.argv[1:])"
LONGEST = 1 << 31                      # bytes of a message
GRACE = 1.0                            # seconds for a world to end by itself, and then for what it has started


def packed(value: Any) -> bytes:
    """A message: JSON, its length before it. Half of a surrogate pair comes through."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "big") + text


# ---------------------------------------------------------------------------------------- a process, seen from here
class Process(subprocess.Popen):
    """A keeper, and behind it a process with worlds. What they are asked waits in a thread, which keeps no program from
    ending."""
    started: list["Process"] = []

    def __init__(self, key: tuple[str, str]):
        super().__init__([sys.executable, "-c", START, *key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                         stderr=None if sys.__stderr__ else subprocess.DEVNULL,
                         start_new_session=True)                           # Ctrl-C is not for it
        self.ends = self.stdin.fileno(), self.stdout.fileno()              # type: ignore[union-attr]
        for end in self.ends:
            os.set_blocking(end, False)
        self.key, self.busy = key, False
        self.lost: UserError | None = None             # how; it is not asked again
        self.held, self.spare = 0, []                  # how many worlds there are in use; the numbers of the others
        self.work: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._answering, daemon=True).start()
        Process.started.append(self)

    def _answering(self) -> None:
        while True:
            future, asked = self.work.get()
            try:
                future.set_result(asked())
            except BaseException as error:
                future.set_exception(error)
            self.busy = not self.work.empty()

    def take(self) -> int:
        """The number of a world there that nobody uses, for use; a new one is made when it is first asked something."""
        self.held += 1
        return self.spare.pop() if self.spare else self.held - 1

    def give(self, number: int) -> None:
        self.held -= 1
        self.spare.append(number)

    def later(self, asked: Callable[[], Any]) -> Future:
        future: Future = Future()
        self.busy = True
        self.work.put((future, asked))
        return future

    def send(self, message: bytes, limit: float) -> None:
        view, deadline = memoryview(message), time.monotonic() + limit
        while view:
            self._ready(self.ends[0], select.POLLOUT, deadline)
            view = view[os.write(self.ends[0], view[:1 << 16]):]

    def receive(self, limit: float) -> Any:
        """What the world says. Raises TimeoutError; EOFError and OSError where it has ended; ValueError."""
        deadline = time.monotonic() + limit
        size = int.from_bytes(self._bytes(8, deadline), "big")
        if size > LONGEST:
            raise ValueError("a message without end")
        return json.loads(self._bytes(size, deadline).decode("utf-8", "surrogatepass"))

    def _bytes(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            self._ready(self.ends[1], select.POLLIN, deadline)
            parts.append(os.read(self.ends[1], min(size, 1 << 20)))
            if not parts[-1]:
                raise EOFError
            size -= len(parts[-1])
        return b"".join(parts)

    def _ready(self, end: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(end, event)
        while not poll.poll(1000 * min(left := max(0.0, deadline - time.monotonic()), 3600)):
            if not left:                               # nothing is there even now; a program may have been suspended
                raise TimeoutError

    def how_it_ended(self) -> str:
        """In words; the keeper's own exit code says it as a shell does."""
        try:
            code = self.wait(5 * GRACE)
        except subprocess.TimeoutExpired:
            return "closed its output"
        number = -code if code < 0 else code - 128
        if number == signal.SIGKILL:
            return "was killed (SIGKILL; out of memory? then lower workers= or slots=)"
        return (f"was ended by {signal.Signals(number).name}" if number in list(signal.Signals) else
                f"ended by itself, with exit code {code},")


@atexit.register
def end_all() -> None:
    """All end with this program: those that are at work at once."""
    for process in Process.started:
        if process.busy:
            process.terminate()
        else:
            process.stdin.close()                      # type: ignore[union-attr]
    for process in Process.started:
        try:
            process.wait(3 * GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


# ---------------------------------------------------------------------------------------- its world, seen from here
class Remote(Env):
    """A world in another process. It takes one there that nobody uses when it is first asked something, and close()
    gives it back."""
    about: dict[tuple[str, str], list] = {}

    def __init__(self, name: str, data: str, timeout: float = 1800.0, workers: int = 1):
        self.key, self.timeout, self.task = (name, data), timeout, ""
        self.workers, self.shares = workers, env_class(name).shares
        self.own_action = env_class(name).action is not Env.action
        self.process: Process | None = None
        self.number = 0                                # of this world, among those there
        if self.key not in Remote.about:
            Remote.about[self.key] = self.submit("about").result()
            self.close()
        self.rules, self.max_turns = Remote.about[self.key]

    def _take(self) -> None:
        """In the process with the fewest worlds in use; or in a new one, if it may not be shared, or there may be more."""
        there = [process for process in Process.started if process.key == self.key and not process.lost]
        process = min(there, key=lambda process: process.held, default=None)
        if not process or process.held and (not self.shares or len(there) < self.workers):
            process = Process(self.key)
        self.process, self.number = process, process.take()

    def submit(self, what: str, *args, calls: int = 1) -> Future:
        """Ask the world something that takes it so many calls at the most."""
        if not self.process:
            self._take()
        assert self.process
        if what in ("reset", "rollback"):
            self.task = args[0]
        return self.process.later(partial(self._ask, self.process, [self.number, what, *args], calls * self.timeout))

    def _ask(self, process: Process, message: list, limit: float) -> Any:
        """In the process's thread: the answer, checked. Raises UserError."""
        if process.lost:                               # by what another world there was asked
            raise process.lost
        who, question = f"env: the process of {self.key[0]}", message[1:]
        doing = question
        try:
            process.send(packed(message), limit)
            said = process.receive(limit)
            while question[0] == "examine" and "doing" in said:
                self.task, what, *more = (of(str, text) for text in of(list, said["doing"]))
                doing = [what, *more]
                said = process.receive(limit)
            if not isinstance(said, dict) or len(said) != 1:
                raise ValueError
            kind, answer = next(iter(said.items()))
            if kind == "answer":
                return shaped(question[0], answer)
            if kind not in ("error", "mismatch") or not isinstance(answer, str):
                raise ValueError
        except TimeoutError:
            why = f"has not answered for {limit:g} seconds, in {{}}; does it hang? Else give it more: env_timeout="
        except (EOFError, OSError):
            why = f"{process.how_it_ended()} in {{}}"
        except (ValueError, TypeError, LookupError, RecursionError):
            why = "gave what is no answer, in {}; it must not write to files that it did not open itself"
        else:
            raise (ReplayMismatch if kind == "mismatch" else UserError)(answer)
        process.lost = UserError(f"{who} {why.format(self._in_words(doing))}")
        process.terminate()
        raise process.lost

    def _in_words(self, question: list) -> str:
        if question[0] == "about":                     # the first question
            return f"__init__({self.key[1]!r})"
        told = f"{question[0]}({', '.join(repr(part)[:80] for part in question[1:2])})"
        return f"{told} of task {repr(self.task)[:80]}" if question[0] == "step" else told

    # an episode goes on when these are there
    def reset(self, task: str) -> Any:
        return self.submit("reset", task)

    def step(self, action: str) -> Any:
        return self.submit("step", action)

    def rollback(self, task: str, turns: Sequence) -> Any:
        return self.submit("rollback", task, [[turn.obs, turn.action] for turn in turns], calls=max(1, len(turns)))

    def action(self, reply: str) -> Any:
        return self.submit("action", reply) if self.own_action else super().action(reply)

    # these are waited for
    def tasks(self, split: str) -> list[str]:
        return self.submit("tasks", split).result()

    def actions(self) -> list[str]:
        return self.submit("actions").result()

    def difficulty(self, task: str) -> str:
        return self.submit("difficulty", task).result()

    def examine(self, split: str, other: Env | None = None) -> list[str]:        # another is there, if it shares
        notes = self.submit("examine", split).result()
        for task in self.tasks(split)[:1]:                   # what it answers must come through to here, too
            wait_for(self, "reset", task)
            wait_for(self, "step", (self.actions() or ["look"])[0])
        return notes

    def close(self) -> None:
        if self.process:
            self.process.give(self.number)
        self.process = None


def of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise ValueError
    return value


def shaped(what: str, answer: Any) -> Any:
    """An answer, if it is of its question's shape. Raises ValueError or TypeError: the world itself is told of its
    mistakes by `ask`, on its own side."""
    if what == "step":
        obs, score, *flags = of(list, answer)
        done, success, valid = (of(bool, flag) for flag in flags)
        return Outcome(of(str, obs), of((int, float), score), done, success, valid)
    if what in ("tasks", "actions", "examine"):
        return [of(str, text) for text in of(list, answer)]
    if what == "about":
        rules, turns = of(list, answer)
        return [of(str, rules), of(int, turns)]
    return of(str, answer)


# ------------------------------------------------------------------------------------------------ the other process
def keep() -> None:
    """Fork, before anything else is here: the child returns and holds the worlds. This process stays its parent and
    that of all orphans that it leaves, waits for it, or for the questions' end to close, and ends them all."""
    libc, keeper, parent = ctypes.CDLL(None), os.getpid(), os.getppid()
    libc.prctl(36, 1, 0, 0, 0)                           # PR_SET_CHILD_SUBREAPER
    world = os.fork()
    if world == 0:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)           # PR_SET_PDEATHSIG
        if os.getppid() != keeper:
            os._exit(1)
        return
    os.dup2(2, 1)                                        # the answers' only writer is the world
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    codes: dict[int, int] = {}
    poll = select.poll()
    poll.register(0, 0)                                  # says when nobody can write to it any more
    while world not in reaped(codes) and not told and os.getppid() == parent and not poll.poll(50):
        pass
    deadline = time.monotonic() + GRACE * (not told)
    while world not in reaped(codes) and time.monotonic() < deadline:
        time.sleep(0.01)
    deadline = time.monotonic() + GRACE
    while left := children():
        late = time.monotonic() > deadline               # what the world left behind may clean up
        for pid in left if late else {world} & {*left}:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        reaped(codes)
    code = codes.get(world, -signal.SIGKILL)
    os._exit(code if code >= 0 else 128 - code)


def reaped(codes: dict[int, int]) -> dict[int, int]:
    """How the children ended that have: an exit code, or less a signal's number."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        pass
    return codes


def children() -> list[int]:
    """Of this process, until they are reaped."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
        except OSError:                                  # it ended meanwhile
            pass
    return found


def serve(name: str, data: str) -> None:
    """In the other process: answer until the questions' end closes."""
    keep()
    questions, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)         # who asks for input gets none
    os.dup2(2, 1)                                        # what the world prints is no answer
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")         # type: ignore[union-attr]
    worlds: dict[int, Env] = {}
    while asked := heard(questions):
        number, *question = asked
        try:
            if number not in worlds:
                worlds[number] = open_env(name, data)
            if question[0] == "examine":
                answer: Any = examined(worlds[number], answers, partial(open_env, name, data), *question[1:])
            else:
                answer = answer_to(worlds[number], *question)
            message = packed(dict(answer=answer))
        except ReplayMismatch as error:
            message = packed(dict(mismatch=str(error)))
        except UserError as error:                       # whatever a world raises, `ask` makes it one
            full = "; out of memory? then lower workers= or slots=" * isinstance(error.__context__, MemoryError)
            message = packed(dict(error=f"{error}{full}"))
        except BaseException as error:                   # but not all: a KeyboardInterrupt, say
            at = traceback.extract_tb(error.__traceback__)[-1]
            message = packed(dict(error=f"env: {name} failed in {question[0]}\n  {at.filename}, line {at.lineno}, "
                                        f"in {at.name}: {type(error).__name__}"))
        if not written(answers, message):
            break
    for env in worlds.values():
        try:
            ask(env, "close")
        except UserError as error:
            print(visible(f"note: {error}"), file=sys.stderr)


def heard(questions: BinaryIO) -> list | None:
    size = int.from_bytes(questions.read(8), "big")
    text = questions.read(size)
    return json.loads(text.decode("utf-8", "surrogatepass")) if size and len(text) == size else None


def written(file: int, message: bytes) -> bool:
    """Is it? If not, nobody reads it any more."""
    view = memoryview(message)
    try:
        while view:
            view = view[os.write(file, view):]
    except OSError:
        return False
    return True


@contextmanager
def telling(answers: int) -> Iterator[None]:
    """Tell of each call before it is made: who waits, while a world is examined, knows for what."""
    plain, tasks = envs.ask, {}

    def told(env: Env, what: str, *args: Any) -> Any:
        if what == "reset":
            tasks[id(env)] = args[0]
        written(answers, packed(dict(doing=[tasks.get(id(env), ""), what, *args[:1]])))
        return plain(env, what, *args)
    envs.ask = told
    try:
        yield
    finally:
        envs.ask = plain


def examined(env: Env, answers: int, another: Callable[[], Env], split: str) -> list[str]:
    """Beside another of its process, if it shares that."""
    with telling(answers), closing(another()) if env.shares else nullcontext() as other:
        return env.examine(split, other)


def answer_to(env: Env, what: str, *args) -> Any:
    """What JSON can say of an answer."""
    file, who = getfile(type(env)), type(env).__name__
    with blaming(file, f"env: {who} failed when it was looked at"):
        rules, turns = getattr(env, "rules", ""), getattr(env, "max_turns", 0)
    if what == "about":                                  # what is wrong with them is told when it is examined
        return [rules if isinstance(rules, str) else "", turns if type(turns) is int else 0]
    if what == "rollback":
        args = args[0], [SimpleNamespace(obs=obs, action=action) for obs, action in args[1]]
    answer = wait_for(env, what, *args)
    if what == "step":
        answer = [answer.obs, answer.score, answer.done, answer.success, answer.valid]
    try:
        packed(answer)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"env: {file}, class {who}: what {what} returned must be text and numbers, to be sent to "
                        f"another process (apart = True): {error}") from None
    return answer
