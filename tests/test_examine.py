"""A world is looked over before anything is sampled: what is missing or of the wrong shape is one line that names
file and class and says what it must be; what the world itself raises is two; what will be regretted is a note."""
import re
from pathlib import Path
from tempfile import mkdtemp

import pytest

import programs
from config import UserError
from conftest import run_of
from envs import make_env, wait_for, world_names
from leafe import explore
from run import open_run
from scale.apart import Remote

BASE = '''
import random
from concurrent.futures import Future
from dataclasses import dataclass
import envs
from envs import Env, Outcome

ROOMS = ["attic", "cellar", "garden"]

class Right(Env):
    rules = "find the crown. answer with one action, like: go cellar"
    max_turns = 3
    def tasks(self, split):
        return [f"{split}-{n}" for n in range(64)]
    def reset(self, task):
        self.room, self.left = random.Random(task).choice(ROOMS), self.max_turns
        return "find the crown."
    def step(self, action):
        self.left -= 1
        found, place = action == "go " + self.room, action[3:] in ROOMS
        said = "you see the crown." if found else "it is not here." if place else "you cannot do that."
        return Outcome(said, float(found), found or self.left == 0, found, place)
    def actions(self):
        return ["go " + room for room in ROOMS]

class Bare(Env):
    rules, max_turns = "say go", 2
    def tasks(self, split): return [f"{split}-{n}" for n in range(64)]
    def reset(self, task): return "hello"
    def step(self, action): return Outcome("no")

class Of:
    """An Outcome of a class of its own."""
    def __init__(self, *args): self.args = args
    def __repr__(self): return "Of(a,\\n   b)"

class Odd(BASE):
    APART
'''

# id: (the body of a class derived from Env, what the one line says)
LACKS = {
    "max_turns": ("rules = 'x'\ntasks, reset, step = Right.tasks, Right.reset, Right.step",
                  "max_turns must be the turns an episode may have, like max_turns = 20, not NoneType None"),
    "rules": ("max_turns = 2\ntasks, reset, step = Right.tasks, Right.reset, Right.step",
              "rules must be text, the system prompt, not NoneType None"),
    "tasks": ("rules, max_turns, reset, step = 'x', 2, Right.reset, Right.step",
              r"it must have a method tasks\(self, split: str\) -> list\[str\]$"),
    "reset": ("rules, max_turns, tasks, step = 'x', 2, Right.tasks, Right.step",
              r"it must have a method reset\(self, task: str\) -> str$"),
    "step": ("rules, max_turns, tasks, reset = 'x', 2, Right.tasks, Right.reset",
             r"it must have a method step\(self, action: str\) -> envs.Outcome$"),
}

# id: (the body of a class derived from Right above, what the one line says)
SHAPES = {
    "max_turns-zero": ("max_turns = 0", "max_turns must be .*, not int 0"),
    "max_turns-negative": ("max_turns = -1", "max_turns must be .*, not int -1"),
    "max_turns-True": ("max_turns = True", "max_turns must be .*, not bool True"),
    "max_turns-text": ("max_turns = '20'", "max_turns must be .*, not str '20'"),
    "max_turns-float": ("max_turns = 20.0", "max_turns must be .*, not float 20.0"),
    "max_turns-None": ("max_turns = None", "max_turns must be .*, not NoneType None"),
    "rules-None": ("rules = None", "rules must be text, the system prompt, not NoneType None"),
    "rules-a-list": ("rules = ['go', 'take', 'drop']", r"rules must be text, .*, not list \['go', 'take'"),
    "tasks-no-method": ("tasks = ['a', 'b']", r"it must have a method tasks\(self, split"),
    "tasks-a-generator": ("def tasks(self, split):\n for n in range(9): yield f'{split}-{n}'",
                          r"tasks\('train'\) must return a list of texts, not generator <generator object"),
    "tasks-a-set": ("def tasks(self, split): return {split + 'a'}",
                    r"tasks\('train'\) must return a list of texts, not set {'traina'}"),
    "tasks-a-dict": ("def tasks(self, split): return {split + 'a': 1}", "a list of texts, not dict {"),
    "tasks-a-range": ("def tasks(self, split): return range(9)", "a list of texts, not range range"),
    "tasks-one-text": ("def tasks(self, split): return split", "a list of texts, not str 'train'"),
    "tasks-None": ("def tasks(self, split): pass", "a list of texts, not NoneType None"),
    "tasks-numbers": ("def tasks(self, split): return [0, 1]", "a list of texts, not int 0"),
    "tasks-one-number": ("def tasks(self, split): return ['a', 1]", "a list of texts, not int 1"),
    "tasks-lists": ("def tasks(self, split): return [['a']]", r"a list of texts, not list \['a'\]"),
    "test-tasks-None": ("def tasks(self, split):\n if split == 'train': return ['a']",
                        r"tasks\('test'\) must return a list of texts, not NoneType None"),
    "reset-pair": ("def reset(self, task): return super().reset(task), {'info': 1}",
                   r"reset\(task\) must return the first observation, which is text, not tuple .*; "
                   r"Gymnasium's pair is \(obs, info\): return obs alone$"),
    "reset-bytes": ("def reset(self, task): return b'hello'", r"which is text, not bytes b'hello'$"),
    "reset-None": ("def reset(self, task): pass", r"which is text, not NoneType None$"),
    "reset-a-dict": ("def reset(self, task): return dict(obs='hello')", r"which is text, not dict {"),
    "reset-an-Outcome": ("def reset(self, task): return Outcome('hello')", "which is text, not Outcome Outc"),
    "tasks-one-twice": ("def tasks(self, split): return ['a', split, 'a', 'a']",
                        r"tasks\('train'\) holds 'a' 3 times; it must hold each task once$"),
    "tasks-half-a-letter": ("def tasks(self, split): return ['a', split, 'b\\ud83d']",
                            r"tasks\('train'\) holds 'b\\ud83d', which has half of a surrogate pair$"),
    "test-tasks-one-twice": ("def tasks(self, split): return [split] * (1 + (split == 'test'))",
                             r"tasks\('test'\) holds 'test' 2 times"),
    "rules-a-property": ("rules = property(lambda self: 'x')",
                         r"rules must be an attribute that can be set, not a prop"),
    "step-five": ("def step(self, action): return 'a', 0.5, False, False, {}",
                  r"step\(action\) must return an Outcome\(obs, score, done, success, valid\) of envs, not tuple .*; "
                  r"Gymnasium's five are \(obs, reward, terminated, truncated, info\): return Outcome\(obs, score="),
    "step-five-by-refusal": ("def step(self, action):\n"
                             " return super().step(action) if action != 'look' else ('a', 0, False, False, {})",
                             "an Outcome.*Gymnasium's five are"),
    "step-four": ("def step(self, action): return 'a', 0.5, False, {}",
                  r"an Outcome.*, not tuple .*; Gym's four are \(obs, reward, .*, info\): return Outcome\("),
    "step-four-as-a-list": ("def step(self, action): return ['a', 0.5, False, {}]", "Gym's four are"),
    "step-a-pair": ("def step(self, action): return 'a', True", r"an Outcome.*, not tuple \('a', True\)$"),
    "step-a-dict": ("def step(self, action): return dict(obs='a')", r"an Outcome.*, not dict {'obs': 'a'}$"),
    "step-None": ("def step(self, action): pass", r"an Outcome.*, not NoneType None$"),
    "step-text": ("def step(self, action): return 'a'", r"an Outcome.*, not str 'a'$"),
    "step-the-class": ("def step(self, action): return Outcome", r"an Outcome.*, not type <class"),
    "step-an-object": ("def step(self, action): return Of('a')", r"an Outcome.*, not Of Of\(a, b\)$"),
    "obs-None": ("def step(self, action): return Outcome(None)", r"the obs of an Outcome must be text, not N"),
    "obs-bytes": ("def step(self, action): return Outcome(b'a')", r"the obs of an Outcome must be .* b'a'$"),
    "score-tensor": ("def step(self, action):\n import torch\n return Outcome('a', torch.tensor(0.5))",
                     r"the score of an Outcome must be a number of 0..1, not Tensor tensor\(0.5\S+; write float\("),
    "score-numpy": ("def step(self, action):\n import numpy\n return Outcome('a', numpy.float32(0.5))",
                    r"the score of an Outcome must be a number of 0..1, not float32 .*; write float\("),
    "score-None": ("def step(self, action): return Outcome('a', None)", "score of an Outcome must be .*, not N"),
    "score-text": ("def step(self, action): return Outcome('a', '1')", "score of an Outcome must be .* '1'"),
    "score-ten": ("def step(self, action): return Outcome('a', 10)",
                  r"score of an Outcome must be a number of 0..1, not int 10; write float\(...\), scaled to 0..1$"),
    "score-below": ("def step(self, action): return Outcome('a', -0.1)", "a number of 0..1, not float -0.1;"),
    "score-above": ("def step(self, action): return Outcome('a', 1.0000001, True, True)", "not float 1.0000001;"),
    "score-nan": ("def step(self, action): return Outcome('a', float('nan'))", "a number of 0..1, not float nan;"),
    "score-inf": ("def step(self, action): return Outcome('a', float('inf'))", "a number of 0..1, not float inf;"),
    "score-huge": ("def step(self, action): return Outcome('a', 10**400)", "a number of 0..1, not int 1000000000"),
    "score-bool": ("def step(self, action): return Outcome('a', True, True, True)", "0..1, not bool True; write float"),
    "score-complex": ("def step(self, action): return Outcome('a', 1j)", "a number of 0..1, not complex 1j;"),
    "score-one-without-success": ("def step(self, action): return Outcome('a', 1.0, True)",
                                  "an Outcome has score 1 but success=False; write success=True, which ends the "
                                  "episode, or a score below 1$"),
    "score-one-without-an-end": ("def step(self, action): return Outcome('a', 1)", "score 1 but success=False; write"),
    "done-tensor": ("def step(self, action):\n import torch\n return Outcome('a', 0, torch.tensor(True))",
                    r"done of an Outcome must be True or False, not Tensor tensor\(True\); write bool\("),
    "done-numpy": ("def step(self, action):\n import numpy\n return Outcome('a', 0, numpy.bool_(True))",
                   "done of an Outcome must be True or False, not bool"),
    "done-None": ("def step(self, action): return Outcome('a', 0, None)", "done of an Outcome must be .* None"),
    "success-tensor": ("def step(self, action):\n import torch\n"
                       " return Outcome('a', 0, True, torch.tensor(True))", "success of an Outcome must be"),
    "success-None": ("def step(self, action): return Outcome('a', 0, True, None)", "success of an Outcome must"),
    "success-number": ("def step(self, action): return Outcome('a', 0, True, 1)", "success of .*, not int 1"),
    "valid-None": ("def step(self, action): return Outcome('a', valid=None)", "valid of an Outcome must be"),
    "difficulty-number": ("def difficulty(self, task): return int(task[-1])",
                          r"difficulty\(task\) must return the name of a group, which is text, not int 0"),
    "difficulty-None": ("def difficulty(self, task): pass", "difficulty.* which is text, not NoneType None"),
    "action-None": ("def action(self, reply): pass", r"action\(reply\) must return the action .*, not NoneTyp"),
    "actions-None": ("def actions(self): pass", r"actions\(\) must return a list of texts, not NoneType None"),
    "actions-a-generator": ("def actions(self): yield 'go attic'", r"actions\(\) must .*, not generator <gen"),
    "actions-a-set": ("def actions(self): return {'go attic'}", r"actions\(\) must .*, not set {'go attic'}"),
    "judge-None": ("def judge(self, task, actions, tau, e): pass", r"judge must return three of True or False .*, not None$"),
    "judge-True": ("def judge(self, task, actions, tau, e): return True", "judge must return three .*, not True$"),
    "judge-a-pair": ("def judge(self, task, actions, tau, e): return True, False", r"judge must .*, not \(True, False\)$"),
    "judge-words": ("def judge(self, task, actions, tau, e): return 'yes', 'no', 'no'", "judge must return three .*'no'"),
    "rules-of-a-task": ("def reset(self, task):\n self.rules = 'find ' + task\n return super().reset(task)",
                        "reset or step changes rules, which is read before it; what belongs to one task goes into its first"),
    "max_turns-of-a-task": ("def reset(self, task):\n self.max_turns = 4\n return super().reset(task)",
                            "reset or step changes max_turns, which is read before it"),
    "actions-numbers": ("def actions(self): return [0, 1]", r"actions\(\) must return a list of texts, not int 0"),
}

# id: (the body of a class derived from Right, what was asked, where in the world's own file, the error)
RAISES = {
    "init": ("def __init__(self, data=''): raise RuntimeError('no such game')", r"__init__\(''\)", "__init__",
             "RuntimeError: no such game"),
    "tasks": ("def tasks(self, split): return self.table[split]", r"tasks\('train'\)", "tasks",
              "AttributeError: 'Odd' object has no attribute 'table'"),
    "test-tasks": ("def tasks(self, split): return dict(train=['a'])[split]", r"tasks\('test'\)", "tasks",
                   "KeyError: 'test'"),
    "reset": ("def reset(self, task): return open('/nowhere/' + task).read()", r"reset\('train-0'\)", "reset",
              "FileNotFoundError: .*/nowhere/train-0"),
    "second-reset": ("n = 0\ndef reset(self, task):\n self.n += 1\n assert self.n < 2, 'once only'\n"
                     " return super().reset(task)", r"reset\('train-63'\)", "reset", "AssertionError: once only"),
    "step": ("def step(self, action):\n def inner(): raise ValueError('a\\nlong\\n\\nstory')\n inner()",
             r"step\('go attic'\)", "inner", "ValueError: a long story"),
    "step-by-refusal": ("def step(self, action):\n if not action.startswith('go'): raise KeyError(action)\n"
                        " return Outcome('no')", r"step\('look'\)", "step", "KeyError: 'look'"),
    "step-in-a-library": ("def step(self, action):\n import json\n json.loads('{')", r"step\('go attic'\)",
                          "step", "JSONDecodeError: Expecting property name"),
    "step-exits": ("def step(self, action): exit(3)", r"step\('go attic'\)", "step", "SystemExit: 3"),
    "actions": ("def actions(self): return [1 / 0]", r"actions\(\)", "actions", "ZeroDivisionError: division"),
    "difficulty": ("def difficulty(self, task): return task.split('/')[1]", r"difficulty\('train-0'\)",
                   "difficulty", "IndexError: list index out of range"),
    "action": ("def action(self, reply): return self.found.group(1)", r"action\('look'\)", "action",
               "AttributeError: 'Odd' object has no attribute 'found'"),
}


# id: (the body of a class derived from Right, what was asked, the error): called as it cannot be called
CALLS = {
    "tasks-without-split": ("def tasks(self): return ['a']", "tasks('train')",
                            "Odd.tasks() takes 1 positional argument but 2 were given"),
    "reset-by-keywords": ("def reset(self, *, seed=None, options=None): return 'a', {}", "reset('train-0')",
                          "Odd.reset() takes 1 positional argument but 2 were given"),
    "step-of-two": ("def step(self, state, action): pass", "step('go attic')",
                    "Odd.step() missing 1 required positional argument: 'action'"),
    "actions-of-a-state": ("def actions(self, state): return []", "actions()",
                           "Odd.actions() missing 1 required positional argument: 'state'"),
    "difficulty-no-method": ("difficulty = 'easy'", "difficulty('train-0')", "'str' object is not callable"),
}


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(monkeypatch):
    started, take = [], Remote._take
    monkeypatch.setattr(Remote, "_take", lambda env: (take(env), started.append(env.process)))
    yield
    for process in started:
        process.kill()


@pytest.fixture
def world(tmp_path):
    """A new file with a class Odd of this body; its name."""
    def make(base: str, body: str, apart: bool = False) -> str:
        file = Path(mkdtemp(dir=tmp_path), "world.py")
        text = BASE.replace("BASE", base).replace("APART", f"apart = {apart}\n")
        file.write_text(text + "".join(f"    {line}\n" for line in body.split("\n")))
        return f"{file}:Odd"
    return make


def file_of(name: str) -> str:
    return name.rpartition(":")[0]


def refusal(name: str, data: str = "") -> str:
    with pytest.raises(UserError) as caught:
        make_env(name, data).examine("train")
    return str(caught.value)


ONE_LINE = [pytest.param("Env", *LACKS[kind], id=f"lacks-{kind}") for kind in LACKS]
ONE_LINE += [pytest.param("Right", *SHAPES[kind], id=kind) for kind in SHAPES]


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("base, body, says", ONE_LINE)
def test_what_is_missing_or_of_the_wrong_shape_is_one_line(world, base, body, says, apart):
    name = world(base, body, apart)
    said = refusal(name)
    assert said.startswith(f"env: {file_of(name)}, class Odd: ") and "\n" not in said
    assert re.search(says, said), said


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("kind", RAISES)
def test_what_a_world_raises_is_told_in_two_lines_with_its_own_file_line_and_function(world, kind, apart):
    body, asked, function, error = RAISES[kind]
    name = world("Right", body, apart)
    first, second = refusal(name).split("\n")
    assert re.fullmatch(f"env: Odd failed in {asked}", first)
    lines = Path(file_of(name)).read_text().split("\n")
    found = re.fullmatch(rf"  {file_of(name)}, line (\d+), in {function}: {error}.*", second)
    assert found and lines.index("class Odd(Right):") < int(found[1]) <= len(lines), second


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_method_that_is_called_in_vain_is_told_in_two_lines_with_the_file(world, kind, apart):
    body, asked, error = CALLS[kind]
    name = world("Right", body, apart)
    assert refusal(name) == f"env: Odd failed in {asked}\n  {file_of(name)}: TypeError: {error}"


def test_what_cannot_even_be_looked_at_is_two_lines_too(world):
    name = world("Right", "turns = {}\n@property\ndef max_turns(self): return self.turns['most']")
    first, second = refusal(name).split("\n")
    assert first == "env: Odd failed when it was examined"
    assert re.fullmatch(rf"  {file_of(name)}, line \d+, in max_turns: KeyError: 'most'", second)
    late = "def reset(self, task):\n answer = Future()\n answer.set_exception(OSError('gone'))\n return answer"
    assert refusal(world("Right", late)).endswith("OSError: gone")


@pytest.mark.parametrize("text, where, error", [
    ("class A(Env:\n    pass\n", r"line 1", "SyntaxError: .*"),
    ("x = 1\nclass A(Env):\n    pass\n", r"line 2, in <module>", "NameError: name 'Env' is not defined"),
    ("import no_such_package\n", r"line 1, in <module>", "ModuleNotFoundError: No module named 'no_such_package'"),
    ("from envs import Environment\n", r"line 1, in <module>", "ImportError: cannot import name 'Environment' .*"),
    ("def load():\n    raise OSError('no game')\nload()\n", r"line 2, in load", "OSError: no game"),
    ("import sys\nsys.exit('usage')\n", r"line 2, in <module>", "SystemExit: usage")])
def test_a_file_that_cannot_be_imported_is_two_lines(tmp_path, text, where, error):
    (tmp_path / "world.py").write_text(text)
    first, second = refusal(f"{tmp_path}/world.py:A").split("\n")
    assert first == f"env: {tmp_path}/world.py cannot be imported"
    assert re.fullmatch(f"  {tmp_path}/world.py, {where}: {error}", second), second


def test_a_file_of_worlds_that_cannot_be_imported_is_two_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("envs.ROOT", tmp_path)
    package = tmp_path / "worlds"
    package.mkdir()
    (package / "half_written.py").write_text("def reset(: pass\n")
    monkeypatch.setattr("worlds.__path__", [str(package)])
    assert world_names() == ["quest", "half-written"]
    first, second = refusal("half-written").split("\n")
    assert first == f"env: {package}/half_written.py cannot be imported"
    assert second.startswith(f"  {package}/half_written.py, line 1: SyntaxError: ")


@pytest.mark.parametrize("body, data, error", [
    ("pass", "games/", "Odd() takes no arguments"),
    ("def __init__(self): pass", "games/", "Odd.__init__() takes 1 positional argument but 2 were given"),
    ("def __init__(self, data): pass", "", "Odd.__init__() missing 1 required positional argument: 'data'"),
    ("def __init__(self, data, level): pass", "x", "Odd.__init__() missing 1 required positional argument: 'level'")])
def test_a_world_that_cannot_be_made_with_the_data_given_is_two_lines(world, body, data, error):
    for apart in (False, True):
        name = world("Bare", body, apart)
        assert refusal(name, data) == f"env: Odd failed in __init__({data!r})\n  {file_of(name)}: TypeError: {error}"


def test_a_class_that_does_not_derive_from_env_is_one_line(world, tmp_path):
    file = file_of(world("object", "rules, max_turns = 'x', 2"))
    assert refusal(file + ":Odd") == f"env: {file} has no class Odd(Env); that one there must derive from envs.Env"
    assert refusal(file + ":Od") == f"env: {file} has no class Od(Env)"
    assert refusal(file) == (f"env: {file} has 2 classes derived from envs.Env (Right, Bare); name one: "
                             f"env={file}:Class")
    (tmp_path / "other.py").write_text("class Env: pass\nclass Mine(Env): pass\n")
    assert "has no class Mine(Env); that one there must derive from envs.Env" in refusal(f"{tmp_path}/other.py:Mine")
    assert "has 0 classes derived from envs.Env" in refusal(f"{tmp_path}/other.py")


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("body", ["import threading\nlock = threading.Lock()",
                                  "import socket\nlock = socket.socket()", "lock = lambda self: 1"])
def test_what_an_outcome_holds_beside_its_fields_does_no_harm(world, body, apart):
    step = body + ("\ndef step(self, action):\n outcome = super().step(action)\n if action.startswith('go'):"
                   " outcome.info = Odd.lock\n return outcome")
    assert make_env(world("Right", step, apart)).examine("train") == []


def test_tasks_that_cannot_be_sent_from_one_process_to_another_are_one_line(world):
    name = world("Right", "def tasks(self, split): yield split", apart=True)
    with pytest.raises(UserError) as caught:
        make_env(name).tasks("train")
    assert str(caught.value).startswith(f"env: {file_of(name)}, class Odd: what tasks returned must be text and "
                                        "numbers, to be sent to another process (apart = True): ")


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("body, says", [
    ("def reset(self, task):\n super().reset(task)\n return f'find it. {random.random()}'",
     r"give other observations, once 'find it. 0\.\d+' and once 'find it. 0\.\d+': branches will be dropped"),
    ("def step(self, action):\n outcome = super().step(action)\n outcome.obs = f'{\"a\" * 999} {random.random()}'\n"
     " return outcome", r"once 'a{9,29} 0\.\d+' and once 'a{9,29} 0\.\d+': branches"),
    ("n = 0\ndef reset(self, task):\n super().reset(task)\n Odd.n += 1\n return f'visit {Odd.n}'",
     "once 'visit 1' and once 'visit 3'"),
    ("def tasks(self, split): return ['valid'] if split == 'valid' else [f't-{n}' for n in range(64)]",
     "64 tasks of train, like t-0, are in test, too"),
    ("def tasks(self, split): return ['a', 'b'] if split == 'train' else ['b', 'c'] if split == 'test' else ['d']",
     "1 tasks of train, like b, are in test, too"),
    ("def tasks(self, split): return ['a', 'b'] if split == 'train' else ['b', 'c'] if split == 'valid' else ['d']",
     "1 tasks of train, like b, are in valid, too")])
def test_what_will_be_regretted_is_a_note(world, body, says, apart):
    name = world("Right", body, apart)
    note, = make_env(name).examine("train")
    assert note.startswith(f"env: {file_of(name)}, class Odd: ") and "\n" not in note
    assert re.search(says, note), note


def test_the_tasks_of_a_part_are_held_against_all_other_splits(world):
    name = world("Right", "def tasks(self, split): return ['a', split]")
    for part, others in (("valid-deep", ["test", "train"]), ("test-deep", ["train", "valid"]),
                         ("train", ["test", "valid"])):
        notes = make_env(name).examine(part)
        assert [note.rpartition(", are in ")[2] for note in notes] == [f"{other}, too" for other in others]


def test_tasks_that_are_the_same_under_other_names_are_a_note(world):
    by_number = "def reset(self, task): return super().reset(task.split('-')[1]) + ' room ' + task.split('-')[1]"
    note, = make_env(world("Right", by_number)).examine("train")
    assert note.endswith("class Odd: train-0 and test-0, and those behind them, begin with the same words; are they "
                         "the same tasks? the splits must share none")
    by_name = "def reset(self, task): return super().reset(task) + ' room ' + task"
    assert make_env(world("Right", by_name)).examine("train") == [] == make_env(world("Right", "pass")).examine("train")


@pytest.mark.parametrize("body", [
    "def tasks(self, split): return random.sample([f'{split}-{n}' for n in range(64)], 64)",
    "n = 0\ndef tasks(self, split):\n Odd.n += 1\n return [f'{split}-{Odd.n}']"])
def test_a_list_of_tasks_that_changes_is_one_line(world, body):
    assert re.search(r"class Odd: tasks\('train'\) returned another list when it was asked again; it must return "
                     "the same ids in the same order, always$", refusal(world("Right", body)))


@pytest.mark.parametrize("base, body", [
    ("Right", "pass"), ("Bare", "pass"), ("Right", "def tasks(self, split): return (split,)"),
    ("Right", "def tasks(self, split): return []"), ("Right", "score = 1\nmax_turns = 1"),
    ("Right", "def step(self, action): return Outcome('', 1, True, True)"),
    ("Right", "def step(self, action): return Outcome('', success=True)"),
    ("Right", "items = []\ndef reset(self, task):\n self.items = []\n return super().reset(task)"),
    ("Right", "def reset(self, task): return super().reset(task) + ' \\U0001F451 \\x00 \\ud83d é\\r\\n' * 5000"),
    ("Right", "def step(self, action):\n later = Future()\n later.set_result(super().step(action))\n return later")])
def test_a_world_that_is_right_is_not_talked_about(world, base, body):
    assert make_env(world(base, body)).examine("train") == []


@pytest.mark.parametrize("name", ["quest", "sokoban", "sokoban-words", "webshop"])
def test_the_worlds_that_come_with_the_project_are_right(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make_env(name).examine("train") == [] == make_env(name).examine("test")


def test_a_run_says_so_before_its_folder_is_made_and_its_model_loaded(world, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("run.load_model", lambda *args: pytest.fail("a model was loaded"))
    name = world("Right", "def reset(self, task): return 'a', {}")
    with pytest.raises(UserError, match="Gymnasium's pair"):
        open_run(settings(f"env={name}"), "", training=True)
    empty = world("Right", "def tasks(self, split): return [f'a{n}' for n in range(64)] if split == 'train' else []",
                  apart=True)
    with pytest.raises(UserError, match="has no tasks in its split test, not"):
        open_run(settings(f"env={empty}"), "", training=True)
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
def test_what_it_raises_later_in_an_episode_is_two_lines_too(world, settings, tiny, apart):
    name = world("Right", "def step(self, action):\n if self.left == 1: raise OSError('out of film')\n"
                 " return super().step(action)", apart)
    assert make_env(name).examine("train") == []
    with pytest.raises(UserError) as caught:
        explore(run_of(settings(f"env={name}", "workers=2"), tiny, folder=True), ["train-0", "train-1"])
    first, second = str(caught.value).split("\n")
    assert re.fullmatch(r"env: Odd failed in step\('.*'\)", first)
    assert re.fullmatch(rf"  {file_of(name)}, line \d+, in step: OSError: out of film", second)


LATE = {
    "five": ("return 'a', 0.5, False, False, {}", r"must return an Outcome.*Gymnasium's five are"),
    "None": ("return None", "must return an Outcome.*not NoneType None"),
    "obs": ("return Outcome(None)", "the obs of an Outcome must be text, not NoneType None"),
    "score": ("return Outcome('a', '1')", "the score of an Outcome must be a number of 0..1, not str '1'"),
    "score-ten": ("return Outcome('a', 10.0, True, True)", "must be a number of 0..1, not float 10.0"),
    "score-nan": ("return Outcome('a', float('nan'))", "must be a number of 0..1, not float nan"),
    "score-one": ("return Outcome('a', 1.0, True)", "an Outcome has score 1 but success=False; write success=True"),
    "done": ("return Outcome('a', 0, None)", "done of an Outcome must be True or False, not NoneType None"),
}


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("kind", LATE)
def test_a_shape_that_goes_wrong_late_in_an_episode_is_that_line_and_writes_nothing(world, settings, tiny, kind, apart):
    body, says = LATE[kind]
    name = world("Right", f"def step(self, action):\n if self.left == 1: {body}\n return super().step(action)", apart)
    assert make_env(name).examine("train") == []
    run = run_of(settings(f"env={name}", "workers=2"), tiny, folder=True)
    with pytest.raises(UserError, match=says) as caught:
        explore(run, ["train-0"])
    assert str(caught.value).startswith(f"env: {file_of(name)}, class Odd: ") and not run.store("trees.jsonl").records


def test_a_future_that_fails_or_brings_a_wrong_shape_is_told_like_any_answer(world, settings, tiny):
    later = ("def later(self, work, *args):\n future = Future()\n try: future.set_result(work(*args))\n"
             " except Exception as error: future.set_exception(error)\n return future\n")
    for body, says in (("raise KeyError('late')", r"env: Odd failed in step\('.*'\)\n  .*KeyError: 'late'"),
                       ("return 'a', 1.0, True, {}", "class Odd: step.action. must return an Outcome.*Gym's four are")):
        name = world("Right", later + "def step(self, action): return self.later(self.now, action)\n"
                     f"def now(self, action):\n if self.left == 1: {body}\n return Right.step(self, action)")
        with pytest.raises(UserError, match=says):
            explore(run_of(settings(f"env={name}", f"out={file_of(name)}.run"), tiny, folder=True), ["train-0"])


SHARING = {
    "left": ("n = 0\ndef reset(self, task):\n Odd.n = 9\n return super().reset(task)\n"
             "def step(self, action):\n Odd.n -= 1\n outcome = super().step(action)\n"
             " return Outcome(f'{Odd.n} left', outcome.score, outcome.done, outcome.success)",
             "'7 left' and once '6 left'"),
    "inventory": ("bag = []\ndef reset(self, task):\n self.bag.clear()\n return super().reset(task)\n"
                  "def step(self, action):\n self.bag.append(action)\n return Outcome(', '.join(self.bag))",
                  "'go attic, look' and once 'go attic, go attic, look'"),
    "task": ("def reset(self, task):\n envs.now = task\n return super().reset(task)\n"
             "def step(self, action): return Outcome(envs.now)", "'train-0' and once 'train-63'")}


@pytest.mark.parametrize("kind", SHARING)
def test_instances_that_share_what_changes_are_one_line_before_anything_is_sampled(world, settings, kind, tmp_path):
    body, says = SHARING[kind]
    name = world("Right", body)
    with pytest.raises(UserError, match="keep all that changes in self, not in the class or the file") as caught:
        open_run(settings(f"env={name}"), "", training=True)
    said = str(caught.value)
    assert said.startswith(f"env: {file_of(name)}, class Odd: with another episode beside it") and "\n" not in said
    assert says in said.replace("once ", "", 1), said
    assert make_env(world("Right", body, apart=True)).examine("train") == []         # alone in its process: no harm


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("body", [
    "return Outcome('yes', 1.0, done=False, success=True)", "return Outcome('yes', success=True)",
    "return Outcome('yes', 0.3, True, True)"], ids=["not-done", "no-score", "low-score"])
def test_a_success_ends_its_episode_and_counts_whatever_else_is_said(world, settings, tiny, body, apart):
    name = world("Right", f"def step(self, action):\n if self.left == 2: {body}\n return Right.step(self, 'wait')",
                 apart)
    cfg = settings(f"env={name}", "workers=2", "roots=1", "attempts=1")
    tree, = explore(run_of(cfg, tiny, folder=True), ["train-0"])
    branch, = tree.branches
    assert branch.end == "success" and branch.success and branch.steps == 2 and branch.last_obs == "yes"
    assert [(turn.score, turn.success) for turn in branch.turns] == [(0.0, False), (1.0, True)]


def test_tasks_that_are_trained_and_tested_on_are_one_line_unless_meant(world, settings, monkeypatch, tmp_path):
    monkeypatch.setattr("run.load_model", lambda *args: pytest.fail("a model was loaded"))
    some = world("Right", "def tasks(self, split): return [split + str(n) for n in range(63)] + ['both']")
    name = world("Right", "def tasks(self, split): return [f't-{n}' for n in range(64)]")
    with pytest.raises(UserError, match=r"split: 8 of the 8 tasks of .* to test on, like 't-0', are trained on, too; .*"
                                        r"or say split=train if that is meant"):
        open_run(settings(f"env={name}"), "", training=True)
    with pytest.raises(UserError, match="1 of the 64 tasks of .* to test on, like 'both', are trained on"):
        open_run(settings(f"env={some}", "train_tasks=64", "test_tasks=64"), "", training=True)
    with pytest.raises(UserError, match="1 of the 64 tasks of .* to test on, like 'both', are trained on"):
        open_run(settings(f"env={some}", "train_tasks=60", "warm_start=4", "test_tasks=64"), "", training=True)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("run.Policy.open", lambda *args: None)
    assert open_run(settings(f"env={some}"), "", training=True).test_tasks[0] == "test0"
    assert open_run(settings(f"env={name}", "split=train", f"out={tmp_path}/own"), "", training=True)
    assert open_run(settings(f"env={name}", f"out={tmp_path}/eval"), "", training=False)


def test_a_close_that_raises_is_two_lines_and_hides_nothing_that_was_raised_before(world, settings, tiny):
    close = "def close(self): raise OSError('lost the game')\n"
    name = world("Right", close)
    with pytest.raises(UserError, match=rf"env: Odd failed in close\(\)\n  {file_of(name)}, line \d+, in close: OSErr"):
        explore(run_of(settings(f"env={name}"), tiny, folder=True), ["train-0"])
    name = world("Right", close + "def step(self, action): raise KeyError('first')")
    with pytest.raises(UserError, match=r"failed in step\(.*\n.*in step: KeyError: 'first'"):
        explore(run_of(settings(f"env={name}", f"out={file_of(name)}.run"), tiny, folder=True), ["train-0"])


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_future_that_is_cancelled_is_one_line(world, settings, tiny, when):
    cancel = "later.cancel()" if when == "at once" else "threading.Timer(0.2, later.cancel).start()"
    name = world("Right", "import threading\ndef step(self, action):\n if self.left > 1: return super().step(action)\n"
                 f" later = Future()\n {cancel.replace('threading', 'self.threading')}\n return later")
    with pytest.raises(UserError, match=r"class Odd: the Future of step\('.*'\) was cancelled$"):
        explore(run_of(settings(f"env={name}"), tiny, folder=True), ["train-0"])
    with pytest.raises(UserError, match=r"class Odd: the Future of step\('look'\) was cancelled$"):
        env = make_env(name)
        env.reset("train-0")
        env.left = 1
        wait_for(env, "step", "look")


@pytest.mark.slow
@pytest.mark.parametrize("body, apart, says", [
    ("def step(self, action): return 'a', 0.5, False, False, {}", False,
     r"error: env: {file}, class Odd: step\(action\) must return an Outcome.*; Gymnasium's five are .*\n"),
    ("def step(self, action): raise KeyError(action)", False,
     r"error: env: Odd failed in step\('go attic'\)\n  {file}, line \d+, in step: KeyError: 'go attic'\n"),
    ("def __init__(self, data=''): raise OSError('no game')", True,
     r"error: env: Odd failed in __init__\(''\)\n  {file}, line \d+, in __init__: OSError: no game\n"),
    ("def reset(self, task) return 'a'", False,
     r"error: env: {file} cannot be imported\n  {file}, line \d+: SyntaxError: .*\n")],
    ids=["shape", "raises", "raises-apart", "syntax"])
def test_training_ends_with_that_line_and_leaves_nothing(world, tmp_path, body, apart, says):
    name = world("Right", body, apart)
    done = programs.run(["train.py", "config.yaml", "preset=smoke", f"env={name}", f"out={tmp_path}/run"])
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(says.replace("{file}", file_of(name)), done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_in_a_world_that_does_not_replay_says_so_and_goes_on(world, tmp_path):
    name = world("Right", "def reset(self, task):\n super().reset(task)\n return f'find it. {random.random()}'")
    done = programs.run(["train.py", "config.yaml", "preset=smoke", f"env={name}", f"out={tmp_path}/run"])
    assert re.match(rf"note: env: {file_of(name)}, class Odd: the same actions give other", done.stderr)
    assert "Traceback" not in done.stderr and "Pass@1" in done.stdout, done.stderr
