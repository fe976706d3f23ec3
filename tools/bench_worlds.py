"""The benchmark's own worlds: Talk, whose conversations have a known shape, and Busy, whose steps take a known time.

    python envs.py tools/bench_worlds.py:Busy data=50
"""
import random
import time

from config import UserError
from envs import ROOMS, Env, Outcome


class Talk(Env):
    """Conversations of a known shape, 8 to 16 turns: rules and a task that all samples share, then observations
    that differ from sample to sample, whatever the action was. A task is "task/sample"."""
    max_turns = 16

    def __init__(self, turns: int = 16):
        self.rules, self.longest = words("rules", 120), turns

    def reset(self, task: str) -> str:
        self.task, self.t = task, 0
        self.turns = random.Random(task).randint(self.longest // 2, self.longest)
        return words(task.partition("/")[0], 40)

    def step(self, action: str) -> Outcome:
        self.t += 1
        return Outcome(words(f"{self.task}/{self.t}", 12), 0.0, self.t == self.turns)


def words(seed: str, count: int) -> str:
    return " ".join(random.Random(seed).choices(ROOMS, k=count))


class Busy(Env):
    """It computes at every step, in another process than the model. `data`: milliseconds of a processor's time."""
    rules, max_turns, apart, shares = "go.", 8, True, True

    def __init__(self, data: str = "50"):
        if not data.isdigit():
            raise UserError(f"data: {data!r} must be milliseconds a step, a whole number")
        self.ms = int(data)

    def tasks(self, split: str) -> list[str]:
        return [f"{split}-{n}" for n in range(1000)]

    def reset(self, task: str) -> str:
        self.left = self.max_turns
        return "you see a room."

    def step(self, action: str) -> Outcome:
        until = time.process_time() + self.ms / 1000
        while time.process_time() < until:
            pass
        self.left -= 1
        return Outcome("you see a room.", 0.0, self.left == 0)

    def actions(self) -> list[str]:
        return ["go"]
