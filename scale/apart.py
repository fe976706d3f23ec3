"""Worlds that are slow, or cannot run beside another of their kind, each in a process of its own: while one steps,
the model goes on with the others. A world asks for it by `apart = True`; then make_env gives a Remote.

An episode acts through `act` and `back`. They are generators: of a Remote they yield the Future of what it was asked
(the engine goes on with other episodes until it is there), of any other world nothing.
"""
import atexit
import os
import pickle
import random
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generator, Sequence

from envs import Env, Outcome, ReplayMismatch, UserError, open_env, rollback


class Remote(Env):
    """A world in another process; the methods wait for its answer, `submit` does not. It takes an idle process, or
    starts one, when it is first asked something, and close() gives it back. All end with this program, also if it is
    killed: their input closes."""
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
        self.process = subprocess.Popen([sys.executable, str(Path(__file__)), *self.key], stdin=subprocess.PIPE,
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

    def tasks(self, split: str) -> list[str]:
        return self.submit("tasks", split).result()

    def reset(self, task: str) -> str:
        return self.submit("reset", task).result()

    def step(self, action: str) -> Outcome:
        return self.submit("step", action).result()

    def action(self, reply: str) -> str:
        return self.submit("action", reply).result()

    def actions(self) -> list[str]:
        return self.submit("actions").result()

    def difficulty(self, task: str) -> str:
        return self.submit("difficulty", task).result()

    def close(self) -> None:
        if self.process:
            Remote.idle[self.key].append((self.process, self.thread))
            self.process = None


def act(env: Env, action: str) -> Generator[Future, Any, Outcome]:
    return (yield env.submit("step", action)) if isinstance(env, Remote) else env.step(action)


def back(env: Env, task: str, past: Sequence) -> Generator[Future, Any, str]:
    """envs.rollback; with no past, a reset."""
    if isinstance(env, Remote):
        return (yield env.submit("rollback", task, [(turn.obs, turn.action) for turn in past]))
    return rollback(env, task, past)


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
            answer: Any
            if what == "about":
                answer = env.rules, env.max_turns
            elif what == "rollback":
                answer = rollback(env, args[0], [SimpleNamespace(obs=obs, action=action) for obs, action in args[1]])
            else:
                answer = getattr(env, what)(*args)
            good = True
        except Exception as error:                       # UserError, ReplayMismatch, or the world's own
            good, answer = False, error
        pickle.dump((good, answer), answers)
        answers.flush()
    if env:
        env.close()


def measure(name: str, data: str) -> str:
    """Splits, whether random walks replay on another instance, speed and memory of a world."""
    from launcher import below, processes

    def memory() -> int:
        found = processes()
        return sum(found[pid][2] for pid in [os.getpid(), *below(os.getpid(), found)])
    before = memory()
    env, other, rng = open_env(name, data), open_env(name, data), random.Random(0)
    splits = {split: env.tasks(split) for split in ("train", "valid", "test")}
    tasks = next(found for found in splits.values() if found)
    same = steps = 0
    seconds = 0.0
    for task in rng.sample(tasks, min(20, len(tasks))):
        turns = [SimpleNamespace(obs=env.reset(task), action="")]
        for _ in range(min(25, env.max_turns)):
            turns[-1].action = rng.choice(env.actions() or ["nothing"]) if rng.random() < 0.9 else "nothing"
            began = time.perf_counter()
            outcome = env.step(turns[-1].action)
            seconds, steps = seconds + time.perf_counter() - began, steps + 1
            turns.append(SimpleNamespace(obs=outcome.obs, action=""))
            if outcome.done:
                break
        try:
            same += rollback(other, task, turns) == turns[-1].obs
        except ReplayMismatch:
            pass
    sizes = ", ".join(f"{split} {len(found)}" for split, found in splits.items())
    text = (f"{name}: {sizes} tasks; {same} of {min(20, len(tasks))} random episodes replay byte for byte on another "
            f"instance; {steps / seconds:.0f} steps a second; {(memory() - before) / 2**21:.0f} MB an instance")
    env.close()
    other.close()
    return text


if __name__ == "__main__":
    serve(*sys.argv[1:])
