"""The README's table "change this, touch that": each of its lines, done in a copy of the project."""
import json
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A copy of the project in which preset=smoke has been run."""
    copy = tmp_path_factory.mktemp("original") / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".pytest_cache"))
    run(copy, "train.py", "corrections=all")
    return copy


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "leafe")
    shutil.rmtree(tmp_path / "leafe" / "out")
    return tmp_path / "leafe"


def run(copy, script, *args, found=True):
    done = subprocess.run([sys.executable, script, "config.yaml", "preset=smoke", *args], cwd=copy,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 or not found and "found nothing to train on" in done.stderr, done.stderr
    return done.stdout


def change(path, before, after):
    text = path.read_text()
    assert text.count(before) == 1, before
    path.write_text(text.replace(before, after))


def records(copy, name):
    return [json.loads(line) for line in (copy / "out/smoke" / name).read_text().splitlines()]


CORRIDOR = '''
from envs import Env, Outcome

class Corridor(Env):
    rules, max_turns = "you are in a corridor. answer: go library, or: go attic", 4

    def tasks(self, split):
        return [f"{split}-{n}" for n in range(40)]

    def difficulty(self, task):
        return "all"

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
    change(copy / "leafe.py", '"\\nlook back: what should have been known, and from which step on? answer:\\n"',
           '"\\nwhat was missing? answer:\\n"')
    run(copy, "train.py", "corrections=all", found=False)           # the embedded model was taught the old one
    ours, theirs = (sorted(str(r["reflections"]) for r in records(c, "trees.jsonl") if r["name"] == "0")
                    for c in (copy, original))
    assert ours != theirs


def test_another_branching_rule(copy, original):
    """Only the last reflection of an attempt may branch."""
    change(copy / "leafe.py", "if not reflection.tau or depth > cfg.max_depth or not left:",
           "if not reflection.tau or n + 1 < len(ended[name].reflections) or not left:")
    run(copy, "train.py", "corrections=all", "reflect_every=3")

    def children(copy):
        names = [(r["task"], r["name"].rpartition(".")[0]) for r in records(copy, "trees.jsonl") if "." in r["name"]]
        return max(names.count(name) for name in names)
    assert children(copy) == 1


def test_another_loss(copy, original):
    """Corrections count twice, on the trees of the first run."""
    change(copy / "train.py", "weights[k][i] = (1 / len(pairs.D_cf), 0.0)",
           "weights[k][i] = (2 / len(pairs.D_cf), 0.0)")
    run(copy, "train.py", "corrections=all", f"trees={original}/out/smoke")
    ours, theirs = records(copy, "metrics.jsonl")[0], records(original, "metrics.jsonl")[0]
    assert ours["L_cf"] == pytest.approx(2 * theirs["L_cf"], rel=1e-4) and theirs["L_cf"] > 0


def test_other_targets(copy, original):
    """No rehearsal: D_reh stays empty."""
    change(copy / "leafe.py", "    return Targets(D_cf, D_reh)", "    return Targets(D_cf, [])")
    shown = run(copy, "train.py", "corrections=all", f"trees={original}/out/smoke")
    assert "|D_reh| = 0" in shown and all(r["beta_L_reh"] == 0 for r in records(copy, "metrics.jsonl"))


def test_another_model(copy):
    """A folder that transformers has written, of another architecture."""
    family("qwen2").save_pretrained(copy / "mine")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (ROOT / "tiny" / name).exists():
            shutil.copy(ROOT / "tiny" / name, copy / "mine")
    shown = run(copy, "eval.py", "model=mine", "samples=2", "ks=[1,2]", "context=512")
    assert "base: 8 tasks x 2 samples" in shown
