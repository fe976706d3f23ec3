"""Worlds that are slow, or cannot run beside another of their kind, each in a process of its own: while one steps,
the model goes on with the others. A world asks for it by `apart = True`; then envs.make_env gives a Remote, which
answers reset, step and rollback with a Future, as any world may (envs.visit): the engine goes on with other episodes
until it is there.
"""
import atexit
import os
import pickle
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from inspect import getfile
from types import SimpleNamespace
from typing import Any, Sequence

from config import ROOT, UserError
from envs import Env, ask, open_env

START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scale.apart import serve; serve(*sys.argv[1:])"


class Remote(Env):
    """A world in another process. It takes an idle process, or starts one, when it is first asked something, and
    close() gives it back. All end with this program, also if it is killed: their input closes."""
    idle: dict[tuple[str, str], list] = defaultdict(list)
    about: dict[tuple[str, str], tuple[str, int]] = {}

    def __init__(self, name: str, data: str):
        self.key = name, data
        self.process: subprocess.Popen | None = None
        self.thread: ThreadPoolExecutor | None = None
        if self.key not in Remote.about:
            Remote.about[self.key] = self.submit("about").result()
            self.close()
        self.rules, self.max_turns = Remote.about[self.key]

    def _take(self) -> None:
        if Remote.idle[self.key]:
            self.process, self.thread = Remote.idle[self.key].pop()
            return
        self.process = subprocess.Popen([sys.executable, "-c", START, *self.key], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, start_new_session=True)     # Ctrl-C is not for it
        self.thread = ThreadPoolExecutor(1)
        atexit.register(self.process.kill)

    def submit(self, what: str, *args) -> Future:
        if not self.process:
            self._take()
        return self.thread.submit(self._ask, self.process, what, args)

    def _ask(self, process: subprocess.Popen, what: str, args: tuple) -> Any:
        try:
            pickle.dump((what, args), process.stdin)
            process.stdin.flush()
            good, answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(f"env: a process of {self.key[0]} ended by itself (out of memory?); run the same command "
                            f"again, with fewer workers=") from None
        if not good:
            raise answer
        return answer

    # an episode goes on when these are there
    def reset(self, task: str) -> Any:
        return self.submit("reset", task)

    def step(self, action: str) -> Any:
        return self.submit("step", action)

    def rollback(self, task: str, turns: Sequence) -> Any:
        return self.submit("rollback", task, [(turn.obs, turn.action) for turn in turns])

    # these are waited for
    def tasks(self, split: str) -> list[str]:
        return self.submit("tasks", split).result()

    def action(self, reply: str) -> str:
        return self.submit("action", reply).result()

    def actions(self) -> list[str]:
        return self.submit("actions").result()

    def difficulty(self, task: str) -> str:
        return self.submit("difficulty", task).result()

    def examine(self, split: str, other: Env | None = None) -> list[str]:    # nothing is shared with another
        notes = self.submit("examine", split).result()
        for task in self.tasks(split)[:1]:                   # what it answers must come through to here, too
            self.reset(task).result()
            self.step((self.actions() or ["look"])[0]).result()
        return notes

    def close(self) -> None:
        if self.process:
            Remote.idle[self.key].append((self.process, self.thread))
            self.process = None


def serve(name: str, data: str) -> None:
    """In the other process: answer until the input closes."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                        # what the world prints is no answer
    env = None
    while True:
        try:
            what, args = pickle.load(questions)
        except EOFError:
            break
        try:
            env = env or open_env(name, data)
            good, answer = True, answer_to(env, what, args)
        except UserError as error:                       # whatever a world raises, `ask` makes it one
            good, answer = False, error
        try:
            said = pickle.dumps((good, answer))
        except Exception as error:
            said = pickle.dumps((False, UserError(
                f"env: {getfile(type(env))}, class {type(env).__name__}: what {what} returned must be text and "
                f"numbers, to be sent to another process (apart = True): {error}")))
        answers.write(said)
        answers.flush()
    if env:
        env.close()


def answer_to(env: Env, what: str, args: tuple) -> Any:
    if what == "about":
        return getattr(env, "rules", ""), getattr(env, "max_turns", 0)
    if what == "rollback":
        task, turns = args
        args = task, [SimpleNamespace(obs=obs, action=action) for obs, action in turns]
    return ask(env, what, *args)
