"""The world of the benchmark: conversations of a known shape."""
import random

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
