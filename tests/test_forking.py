"""The README's fork table ("to do this, change here") and that of docs/class.md: each of their lines, done in a copy
of the project. The README tells how many lines each of its own takes: those that are added or changed here."""
import difflib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

import programs
from conftest import ROOT, family

pytestmark = pytest.mark.slow
SMALL = ["train_tasks=4", "test_tasks=2", "samples=2", "ks=[1,2]", "steps=3", "evaluate_base=false"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A copy of the project in which preset=smoke has been run."""
    copy = tmp_path_factory.mktemp("original") / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".pytest_cache", "tests"))
    run(copy, "train.py")
    return copy


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "leafe")
    shutil.rmtree(tmp_path / "leafe" / "out")
    return tmp_path / "leafe"


def run(copy, script, *args, found=True, **env):
    words = [script, "config.yaml", "preset=smoke", *SMALL, *args]
    if env:                                                            # of which an interpreter reads at its start
        done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True, timeout=400,
                              env={**os.environ, **env})
    else:
        done = programs.run(words, cwd=copy, timeout=400)
    assert done.returncode == 0 or not found and "found nothing to train on" in done.stderr, done.stderr
    return done.stdout


def change(path, *pairs):
    text = path.read_text()
    for before, after in pairs:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)


def records(copy, name):
    return [json.loads(line) for line in (copy / "out/smoke" / name).read_text().splitlines()]


def steps(copy):
    return [record for record in records(copy, "metrics.jsonl") if "step" in record]


def lines(copy, name):
    """Lines of a file that are not as the project has them."""
    before = (ROOT / name).read_text().splitlines() if (ROOT / name).exists() else []
    return sum(line.startswith("+ ") for line in difflib.ndiff(before, (copy / name).read_text().splitlines()))


def told(what):
    """The lines that a row of the README's fork table promises."""
    rows = [row.split("|") for row in (ROOT / "README.md").read_text().splitlines() if row.startswith("| ")]
    found, = [cells[-2].strip() for cells in rows if what in cells[1]]
    return found


# ------------------------------------------------------------------------------------------- the README's fork table

SCRIPTED = r'''
import json
from config import load_config
from leafe import Tree, episode, grow, read_reflection
from run import Policy, Run

class Chat:                                     # bytes in place of tokens, 0 ends a reply
    def first(self, system, user): return list((system + user).encode())
    def next(self, user, cut): return list(user.encode())
    def cut(self, reply): return reply[-1] != 0
    def glimpse(self, obs, limit): return obs
    def text(self, ids): return bytes(ids[:-1]).decode()

cfg = load_config(["config.yaml", "reflect_every=3"])
run, tree, asked = Run(cfg, Policy(None, Chat(), cfg), None), Tree("train-1-0000"), []
level = next(growing := grow(tree, cfg, {}))
attempt, reply = episode(run, run.world(), level[0], reflect=True), None
try:
    while True:
        ask = attempt.send(reply)
        said = "take hat"
        if ask.temperature is not None:
            asked.append(bytes(ask.context).decode()[-120:])
            said = '{"experience": 1}'
            said = 'so: {"experience": "no hat\\nis \\"here\\"", "step": 2}' if len(asked) > 1 else said
        reply = list(said.encode()) + [0]
except StopIteration as end:
    following = growing.send([end.value])
flaws = [read_reflection(text, 5).flaw for text in (
    "", "experience: x\nstep: 2", "[1]", "3", '{"step": 2}', '{"experience": "x", "step": 9}',
    '{"experience": "x", "step": "two"}', '{"experience": " ", "step": 2}', '{"experience": "", "step": null}')]
print(json.dumps([asked, [(one.tau, one.e) for one in following], flaws, tree.branches[0].reflections[0].flaw]))
'''


def test_reflections_as_json(copy):
    change(copy / "leafe.py", ('''           "experience: ...\\nstep: N")            # behind''',
                               '''           '{"experience": ..., "step": N}')       # behind'''),
           ('''REFLECTION = "experience: {e}\\nstep: {tau}"       # what''',
            '''REFLECTION = '{{"experience": "{e}", "step": {tau}}}'   # what'''),
           ('''    parts = re.split(r"(?mi)^[^\\S\\n]*((?a:experience|step))[^\\S\\n]*:", text)     # what is before, a key, its value, a key, ...
    for n in range(1, len(parts), 2):
        lines = [line.strip() for line in parts[n + 1].split("\\n")]
        goes_on = parts[n].lower() == "experience" and n + 2 < len(parts)
        found[parts[n].lower()].append(" ".join(filter(None, lines if goes_on else lines[:1])))
''', '''    try:                                               # whatever stands before it
        said = json.loads(text[text.index("{"):])
        found = {key: [str(said[key]).strip()] for key in found}
    except (ValueError, KeyError):                     # not JSON, or not all of it: a flaw
        pass
'''), ("import random\n", "import json\nimport random\n"),
           ('''    """(tau, e) from the answer: lines `experience: ...` (it goes on to a step behind it) and `step: N`, N in 1..t or none,
    in any order. Strict''', '''    """(tau, e) from the answer: {"experience": ..., "step": N} with N in 1..t (or null). Strict'''))
    done = subprocess.run([sys.executable, "-c", SCRIPTED], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked, following, flaws, first = json.loads(done.stdout)
    assert all(text.endswith('{"experience": ..., "step": N}') for text in asked) and len(asked) > 1
    assert following == [[2, 'no hat\nis "here"']] and first == "not one step and one experience"
    assert flaws == ["empty", *["not one step and one experience"] * 4, "step out of range", "step is no number",
                     "experience is empty", ""]
    run(copy, "train.py", found=False)                              # the embedded model was taught the old form
    asked = [reflection for record in records(copy, "trees.jsonl") for reflection in record["reflections"]]
    assert asked and all(reflection["flaw"] for reflection in asked)
    assert told("JSON") == str(lines(copy, "leafe.py"))


def test_best_first_order(copy):
    change(copy / "leafe.py", ('''        level, waiting = waiting, []
''', '''        waiting.sort(key=got, reverse=True)
        level, waiting = waiting[:1], waiting[1:]
'''), ("# breadth first: all that wait are next; another order takes some of them, and leaves the others waiting",
       "# best first: next is the one whose parent got furthest"), ('''    asked = set()
    while waiting:
''', '''    asked = set()

    def got(one: Attempt) -> float:
        return max(turn.score for turn in tree.branches[one.parent].turns) if one.past else 1.0
    while waiting:
'''))
    run(copy, "train.py", "attempts=10", "reflect_every=4")
    depths = []
    for task in {record["task"] for record in records(copy, "trees.jsonl")}:
        own = {r["number"]: r for r in records(copy, "trees.jsonl") if r["task"] == task}
        got = [max(turn["score"] for turn in own[n]["turns"]) for n in range(len(own))]
        depths.append([own[n]["name"].count(".") for n in range(len(own))])
        for n in range(1, len(own)):
            waited = [own[m]["parent"] for m in range(n + 1, len(own)) if own[m]["parent"] < n]
            assert all(got[own[n]["parent"]] >= got[parent] for parent in waited)
    assert any(found != sorted(found) for found in depths)          # not what breadth first does
    read = ("from leafe import read_trees; from run import read_jsonl; "
            "trees = read_trees(read_jsonl('out/smoke/trees.jsonl'), 1, ['train-1-0000', 'train-2-0001']); "
            "print(all(tree.turns[i].obs == turn.obs for tree in trees for branch in tree.branches "
            "for i, turn in zip(tree.branch_path(branch.number)[branch.tau - 1:], branch.turns, strict=True)))")
    done = subprocess.run([sys.executable, "-c", read], cwd=copy, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert told("best first") == str(lines(copy, "leafe.py"))


DPO = '''
"""DPO: each improved action a'_tau against the action that it replaced, at the same history, e out of view.

    python train.py config.yaml method=dpo.py trees=out/quest out=out/dpo

    L = - mean log sigmoid(dpo_beta * (gain(a'_tau) - gain(a_tau))), gain(a) = log pi'(a | h_tau) - log pi(a | h_tau)

where pi, the reference, is the policy with its adapter off.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from leafe import corrections, explore, read_trees
from packing import pack, rows_of, token_logp
from run import read_jsonl
from train import Objective, optimise, sft_batches

KEYS = """
dpo_beta: 0.1                 # the smaller, the further the policy may go from the base
"""


def train(run, round_):
    cfg = run.cfg
    trees = (read_trees(read_jsonl(Path(cfg.trees) / "trees.jsonl"), round_, run.train_tasks) if cfg.trees
             else explore(run, run.train_tasks, round_))
    # a pair is a small tree of its own: a history with two actions behind it. Weights: the action's sign, the pair
    pairs, weights = [], []
    for tree in trees:
        for better, *_ in corrections(tree, cfg):
            worse = tree.at_tau(tree.branches[tree.starts.index(better)])
            weights.append({better: (1.0, len(pairs)), worse: (-1.0, len(pairs))})
            pairs.append(tree)
    rows = [pack(group) for group in rows_of(pairs, weights, cfg.row_tokens)]
    with torch.no_grad(), run.policy.off():
        reference = [token_logp(run.policy.model, [row]).cpu() for row in rows]
    rows = [replace(row, weights=torch.column_stack([row.weights, logp])) for row, logp in zip(rows, reference)]
    loss = partial(dpo_loss, cfg.dpo_beta, len(pairs))
    optimise(run, round_, Objective(("L_dpo",), loss, cfg.steps), partial(sft_batches, [], rows, cfg))


def dpo_loss(beta, count, model, row):
    gained = token_logp(model, [row])
    sign, pair, reference = row.weights.to(gained.device).T                     # (N,) each, a token
    pairs, which = pair.unique(return_inverse=True)
    margin = gained.new_zeros(len(pairs)).index_add(0, which, sign * (gained - reference))
    return -logsigmoid(beta * margin).sum()[None] / count
'''


def test_a_dpo_loss(copy, original):
    (copy / "dpo.py").write_text(DPO.lstrip())
    shown = run(copy, "train.py", "method=dpo.py", f"trees={original}/out/smoke", "steps=6", "dpo_beta=0.5",
                "warmup=1", "lr=0.003")
    found = [record["L_dpo"] for record in steps(copy)]
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)         # the policy is its own reference yet
    assert found[-1] < 0.8 * found[0] and len(found) == 6
    assert "dpo: 2 tasks x 2 samples" in shown and (copy / "out/smoke/adapter/adapter_model.safetensors").is_file()
    assert not (copy / "out/smoke/trees.jsonl").exists()
    count = lines(copy, "dpo.py")
    assert count <= 50 and told("DPO") == str(count)


DESK = '''
"""A desk with tools: what does an order cost? Prices stand in a catalogue, sums are a calculator's."""
import json
import random

from envs import Env, Outcome


class Desk(Env):
    rules = ("find out what the order costs. answer with one call of a tool, like: "
             '{"tool": "price", "args": {"thing": "lamp"}}. tools: price (thing), add (a, b), answer (total)')
    max_turns = 6

    def tasks(self, split):
        return [f"{split}-{n}" for n in range(64)]

    def reset(self, task):
        rng = random.Random(task)
        self.catalogue = {thing: rng.randint(2, 9) for thing in ("lamp", "rug", "chair", "clock")}
        self.order = rng.sample(list(self.catalogue), 2)
        return f"the order: a {self.order[0]} and a {self.order[1]}."

    def action(self, reply):
        """The last call in a reply, its thoughts left out."""
        return "{" + reply.rpartition('{"tool"')[1][1:] + reply.rpartition('{"tool"')[2]

    def step(self, action):
        try:
            call, _ = json.JSONDecoder().raw_decode(action)
            return getattr(self, f"tool_{call['tool']}")(**call["args"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Outcome(f"that is no call of a tool: {error}", valid=False)

    def tool_price(self, thing):
        return Outcome(f"{self.catalogue[thing]}")

    def tool_add(self, a, b):
        return Outcome(f"{a + b}")

    def tool_answer(self, total):
        right = total == sum(self.catalogue[thing] for thing in self.order)
        return Outcome("right." if right else "wrong.", float(right), done=True, success=right)
'''


def test_a_world_with_tools(copy):
    (copy / "desk.py").write_text(DESK.lstrip())
    calls = ["a rug, then", '{"tool": "price", "args": {"what": "rug"}}', '{"tool": "prize", "args": {}}',
             'look: {"tool": "price", "args": {"thing": "%s"}}', '{"tool": "price", "args": {"thing": "%s"}} please',
             '{"tool": "add", "args": {"a": %s, "b": %s}}', '{"tool": "answer", "args": {"total": %s}}']

    def play(typed):
        done = programs.run(["envs.py", "desk.py:Desk", "train-3"], cwd=copy, typed="\n".join(typed) + "\n")
        assert done.returncode == 0, done.stderr
        return done.stdout
    things = re.search("the order: a (.*) and a (.*)[.]", play([])).groups()
    typed = [*calls[:3], "undo", "undo", "undo", calls[3] % things[0], calls[4] % things[1]]
    prices = [line for line in play(typed).splitlines() if line.isdigit()]
    total = str(sum(map(int, prices)))
    shown = play([*typed, calls[5] % tuple(prices), calls[6] % total])
    assert shown.count("(refused) that is no call of a tool") == 3 and f"\n{total}\n" in shown
    assert "right.\nsuccess after 4 turns" in shown
    assert "wrong.\nfailure after 1 turns" in play([calls[6] % 99])
    assert "base: 2 tasks x 2 samples" in run(copy, "eval.py", "env=desk.py:Desk")
    run(copy, "train.py", "env=desk.py:Desk", "out=out/smoke/train", found=False)
    assert all("{" in turn["action"] for record in records(copy, "train/trees.jsonl") for turn in record["turns"])
    assert told("world with tools") == str(lines(copy, "desk.py"))


BOARD = '''
import json
import sys
import types

class SummaryWriter:
    def __init__(self, folder):
        self.file = open(f"{folder}.jsonl", "a")

    def add_scalar(self, tag, value, step):
        self.file.write(json.dumps([tag, value, step]) + "\\n")

    def close(self):
        self.file.flush()

sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
'''


def test_tensorboard(copy):
    """Without the package: a writer that has its name and its methods is put in its place."""
    change(copy / "run.py", ("from torch import nn\n",
                             "from torch import nn\nfrom torch.utils.tensorboard import SummaryWriter\n"),
           ('''        self.silent = alone and ranks.rank() > 0
''', '''        self.silent = alone and ranks.rank() > 0
        figures = path.name == "metrics.jsonl" and not self.silent
        self.board = SummaryWriter(path.with_name("board")) if figures else None
'''), ('''            self.file.flush()

    def gather''', '''            self.file.flush()
        for name, value in record.items() if self.board else ():
            if isinstance(value, (int, float)):
                part = record.get("policy", f"round {record.get('round', 1)}")
                at = record.get("step", record.get("wave", record.get("round")))
                self.board.add_scalar(f"{part}/{name}", value, at)

    def gather'''), ('''            self.file.close()
            self.file = None
''', '''            self.file.close()
            self.file = None
            if self.board:
                self.board.close()
'''))
    (copy / "stub").mkdir()
    (copy / "stub" / "sitecustomize.py").write_text(BOARD)
    run(copy, "train.py", "evaluate_base=true", "rounds=2", "evaluate_rounds=true", PYTHONPATH=str(copy / "stub"))
    arrived, expected = records(copy, "board.jsonl"), []
    for record in records(copy, "metrics.jsonl"):
        part = record.pop("policy", f"round {record['round']}")
        expected += [[f"{part}/{name}", value, record.get("step", record["round"])] for name, value in record.items()]
    assert arrived == expected
    assert {tag for tag, _, _ in arrived} >= {
        "base/Pass@1", "round 1/stage_1/solved", "round 1/reflections/asked", "round 1/L_cf", "round 2/beta_L_reh",
        "round 2/gradient_norm", "leafe-1/Pass@1", "leafe/Pass@2", "leafe/recovery"}
    count = lines(copy, "run.py")
    assert count <= 10 and told("TensorBoard") == str(count)


# --------------------------------------------------------------------------------------------- the class's table

CORRIDOR = '''
from envs import Env, Outcome

class Corridor(Env):
    rules, max_turns = "you are in a corridor. answer: go library, or: go attic", 4

    def tasks(self, split):
        return [f"{split}-{n}" for n in range(40)]

    def reset(self, task):
        self.left = 4
        return f"find the crown. it is in the {'attic' if int(task[-1]) % 2 else 'library'}."

    def step(self, action):
        self.left -= 1
        good = action in ("go library", "go attic")
        return Outcome("you are there." if good else "it is locked.", float(good), good or not self.left, good, good)
'''


def test_a_world_of_your_own(copy):
    (copy / "corridor.py").write_text(CORRIDOR)
    shown = run(copy, "train.py", "env=corridor.py:Corridor")
    assert "stage 1: " in shown and (copy / "out/smoke/adapter/adapter_model.safetensors").is_file()


def test_another_reflection_prompt(copy, original):
    change(copy / "leafe.py", ('"\\nlook back: what should have been known, and from which step on? answer:\\n"',
                               '"\\nwhat was missing? answer:\\n"'))
    run(copy, "train.py", found=False)                              # the embedded model was taught the old one
    ours, theirs = (sorted(str(r["reflections"]) for r in records(c, "trees.jsonl") if r["name"] == "0")
                    for c in (copy, original))
    assert ours != theirs


def test_another_branching_rule(copy, original):
    """Only the last reflection of an attempt may branch."""
    change(copy / "leafe.py", ("        if reflection.tau:\n",
                               "        if reflection.tau and n + 1 == len(branch.reflections):\n"))
    run(copy, "train.py", "reflect_every=3")

    def children(copy):
        names = [(r["task"], r["name"].rpartition(".")[0]) for r in records(copy, "trees.jsonl") if "." in r["name"]]
        return max(names.count(name) for name in names)
    assert children(copy) == 1 < children(original)


def test_another_loss(copy, original):
    """Corrections count twice, on the trees of the first run."""
    change(copy / "train.py", ("weights[k][i] = (1 / len(pairs.D_cf), 0.0)",
                               "weights[k][i] = (2 / len(pairs.D_cf), 0.0)"))
    run(copy, "train.py", f"trees={original}/out/smoke")
    ours, theirs = steps(copy)[0], steps(original)[0]
    assert ours["L_cf"] == pytest.approx(2 * theirs["L_cf"], rel=1e-4) and theirs["L_cf"] > 0


def test_other_targets(copy, original):
    """No rehearsal: D_reh stays empty."""
    change(copy / "leafe.py", ("    return Targets(D_cf, D_reh)", "    return Targets(D_cf, [])"))
    shown = run(copy, "train.py", f"trees={original}/out/smoke")
    assert "|D_reh| = 0" in shown and all(record["beta_L_reh"] == 0 for record in steps(copy))


def test_another_model(copy):
    """A folder that transformers has written, of another architecture."""
    family("qwen2").save_pretrained(copy / "mine")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (ROOT / "models" / "tiny" / name).exists():
            shutil.copy(ROOT / "models" / "tiny" / name, copy / "mine")
    assert "base: 2 tasks x 2 samples" in run(copy, "eval.py", "model=mine", "context=512")
