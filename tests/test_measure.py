"""tools/measure.py: what a world costs, and whether its episodes are the same wherever and whenever they run."""
import re

import pytest

import programs
from config import UserError
from tools.measure import measure

WORLD = '''
import random
from envs import Env, Outcome

ROOMS = ["attic", "cellar", "garden"]

class Right(Env):
    rules, max_turns = "find the crown. answer with one action, like: go cellar", 6
    def tasks(self, split): return [f"{split}-{n}" for n in range(64)]
    def reset(self, task):
        self.room, self.left = random.Random(task).choice(ROOMS), self.max_turns
        return "find the crown."
    def step(self, action):
        self.left -= 1
        found = action == "go " + self.room
        return Outcome("yes" if found else f"no, {self.left} left", float(found), found or not self.left, found)
    def actions(self): return ["go " + room for room in ROOMS]
class Shares(Right):
    "two instances share a count"
    left = 0
    def reset(self, task):
        obs = super().reset(task)
        Shares.count = 9
        return obs
    def step(self, action):
        Shares.count -= 1
        outcome = super().step(action)
        outcome.obs += f" {Shares.count}" * (self.left < 4)
        return outcome
class Keeps(Right):
    "what one has seen stays from one episode to the next"
    def __init__(self): self.seen = []
    def step(self, action):
        outcome = super().step(action)
        self.seen.append(action)
        outcome.obs += " again" * (self.left < 4 and self.seen.count(action) > 4)
        return outcome
class Scores(Right):
    "the same words, another score"
    made = 0
    def __init__(self):
        Scores.made += 1
        self.own = self.made
    def reset(self, task):
        self.own += 1
        return super().reset(task)
    def step(self, action):
        outcome = super().step(action)
        if not outcome.success: outcome.score = 1 / (1 + self.own)
        return outcome
class Back(Right):
    def rollback(self, task, turns): return super().rollback(task, turns) + "!"
class Alone(Shares):
    apart = True
class Gives(Right):
    def step(self, action): return super().step(action).obs, 0.0, False, False, {}
class Nothing(Right):
    def tasks(self, split): return []
'''


@pytest.fixture
def world(tmp_path):
    (tmp_path / "own.py").write_text(WORLD)
    return lambda kind: f"{tmp_path}/own.py:{kind}"


@pytest.mark.parametrize("kind", ["Right", "Alone"])
def test_a_world_that_replays_is_said_to(world, kind):
    said = measure(world(kind), "")
    sizes = "train 64, valid 64, test 64 tasks"
    assert re.search(rf"own.py:\w+: {sizes}; 20 of 20 random episodes replay byte for byte", said)
    assert "\n" not in said


@pytest.mark.parametrize("kind, what", [
    ("Shares", r"train-\d+, action \d, '[a-z ]+': obs once 'no, \d left \d', then 'no, \d left \d'"),
    ("Keeps", r"train-\d+, action \d, '[a-z ]+': obs once 'no, \d left.*', then 'no, \d left.*'"),
    ("Scores", r"train-\d+, action 1, '[a-z ]+': score once 0\.\d+, then 0\.\d+"),
    ("Back", r"train-\d+: rollback returned '.*!', not '.*'")])
def test_state_that_is_shared_or_kept_is_told_with_task_and_action(world, kind, what):
    first, *lines = measure(world(kind), "").split("\n")
    replayed = int(re.search(r"(\d+) of 20 random episodes replay", first)[1])
    assert replayed < 20 and len(lines) == 20 - replayed
    assert all(line.startswith("  differs: ") for line in lines)
    assert any(re.fullmatch(f"  differs: {what}", line) for line in lines), lines


def test_what_is_no_world_is_one_line(world):
    for kind, says in (("Gives", "must return an Outcome"), ("Nothing", "has no tasks in train, valid or test")):
        with pytest.raises(UserError, match=says):
            measure(world(kind), "")
    done = programs.run(["-m", "tools.measure", "quest"])
    assert "20 of 20" in done.stdout and "1280" in done.stdout, done.stderr
