"""Text of worlds, models and files reaches a terminal through config.visible alone: it neither steers it nor hides."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import config
import eval
import programs
from config import UserError, visible
from conftest import ROOT
from tools import compare, measure, play, report, show

HOSTILE = "\x1b]0;pwned\x07 \x1b[2J \x9b31m \r \u202e \ud83d \u2066 \x08 \x00 \x7f \u200b \ufeff \u2028"
STEERS = re.compile(r"[^\n\t\x20-\x7e\xa0-\u200a\u2010-\u2027\u2030-\u205f\u2070-\ud7ff\U0001f000-\U0001ffff]")
SHOWN = r"\x1b]0;pwned\x07 \x1b[2J \x9b31m \r \u202e \ud83d"

WORLD = f'''
from envs import Env, Outcome
H = {HOSTILE!r}
class Hostile(Env):
    rules, max_turns = "go" + H, 2
    def tasks(self, split): return [f"{{split}}-{{n}}" + H.replace(chr(0xd83d), "") for n in range(64)]
    def reset(self, task):
        self.left = 2
        return "you see" + H
    def step(self, action):
        self.left -= 1
        return Outcome("done" + H, 0.0, self.left == 0, False, False)
    def actions(self): return ["go" + H]
    def difficulty(self, task): return "hard" + H
class Raises(Hostile):
    def step(self, action): raise ValueError(H)
class Named(Hostile):
    def reset(self, task): return H, {{}}
class Differs(Hostile):
    n = 0
    def reset(self, task):
        self.n += 1
        return super().reset(task) + H * self.n
class Broken(Hostile):
    def tasks(self, split): return super().tasks(split) * 2
'''


@pytest.fixture
def world(tmp_path):
    (tmp_path / "own.py").write_text(WORLD)
    return lambda kind: f"{tmp_path}/own.py:{kind}"


def tame(text: str, halves: bool = True) -> None:
    """It holds what is hostile, shown, and nothing that steers."""
    assert not (found := STEERS.search(text)), (found, text)
    assert r"\x1b]0;pwned\x07" in text and r"\u202e" in text and (r"\ud83d" in text or not halves), text


def test_what_steers_or_hides_is_shown_and_what_is_read_stays():
    tame(visible(HOSTILE))
    assert visible(HOSTILE).startswith(SHOWN)
    read = "a\tb\nZoë, 日本語 \u3000\xa0 👑 ½ — “x” עברית हिन्दी"
    assert visible(read) == read and visible("a\tb\nc", "") == r"a\tb\nc" and visible(3) == "3"
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {c for c in visible(every) if not c.isprintable()} - set("\n\t")
    assert all(c.isspace() and len(visible(c)) == 1 for c in left) and "\u2028" not in left and "\x85" not in left


def sample_folder(folder: Path, name: str, policy: str = "base") -> str:
    """A run's folder, as eval.py leaves it."""
    folder.mkdir(parents=True)
    cfg = vars(config.load_config([str(ROOT / "config.yaml"), "preset=smoke", f"env={name}"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    tasks = [f"test-{n}{HOSTILE}".replace("\ud83d", "") for n in range(8)]
    records = [dict(policy=policy, weights="x", task=task, sample=i, difficulty="hard" + HOSTILE, success=not i,
                    score=0.0, turns=2, refused=1, tokens=3, end="failure") for task in tasks for i in range(8)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "passk.json").write_text("{}")
    return str(folder)


def test_the_tables_of_eval_are_tame(world, tmp_path, capsys):
    a = sample_folder(tmp_path / "a\x1b]0;pwned\x07\u202e\r", world("Hostile"), "base" + HOSTILE)
    b = sample_folder(tmp_path / "b", world("Hostile"))
    for args in (["table", a], ["compare", a, b]):
        eval.main(args)
        said = capsys.readouterr().out
        tame(said)
        assert "\n  hard" + r"\x1b]0;pwned\x07" in said             # a name stays on its line


def test_a_name_cannot_forge_a_line_of_a_table():
    record = dict(task="t", success=True, refused=0, turns=1, tokens=1, difficulty="x\nPass@1     99.0")
    said = report.table([eval.Samples([record], "base\nPass@1   98.0")], [1], 10)
    assert [line for line in said.splitlines() if line.startswith("Pass@1")] == [said.splitlines()[1]]


def test_the_tables_of_a_comparison_are_tame(world, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "c\x1b]0;pwned\x07\u202e"
    sample_folder(folder / "leafe-0", world("Hostile"))
    monkeypatch.setattr(compare, "comparison", lambda folder: "grpo" + HOSTILE)
    monkeypatch.setattr(compare, "page", lambda folder: "")
    eval.main(["compare", str(folder)])
    tame(capsys.readouterr().out)


def test_what_stage_1_says_is_tame(monkeypatch, capsys):
    words = report.reflections_in_words({"asked": 2, "told": 0, "flaw a\nb" + HOSTILE: 1})
    tame(words)
    assert "\n" not in words


def test_playing_and_the_list_of_worlds_are_tame(world, capsys, monkeypatch):
    typed = iter(["hint", "go" + HOSTILE, "undo", "go", "go"])
    monkeypatch.setattr("builtins.input", lambda asked: next(typed))
    play.main([world("Hostile")])
    said = capsys.readouterr().out
    tame(said)
    assert said.count("you see" + r"\x1b]") == 2 and "(refused) done" + r"\x1b]" in said and "failure after" in said
    assert "go" + r"\x1b]" in said.split("hint`")[0] and r"task train-0\x1b]" in said
    monkeypatch.setattr("builtins.input", lambda asked: "quit")
    play.main([world("Differs")])
    tame(capsys.readouterr().out)
    monkeypatch.setattr(play, "make_env", lambda *args: (_ for _ in ()).throw(UserError("data: " + HOSTILE)))
    play.main([])
    tame(capsys.readouterr().out)


def test_what_is_measured_and_what_is_watched_is_tame(world, capsys):
    for kind in ("Hostile", "Differs"):
        measure.main([world(kind)])
    assert not STEERS.search(said := capsys.readouterr().out) and "pwned" in said
    show.say("looks back: " + HOSTILE)
    tame(capsys.readouterr().out)


SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import config
def main(args):
    raise {{}}
config.guarded(main)
"""


@pytest.mark.parametrize("error, code", [
    (f"config.UserError({HOSTILE!r})", 1), (f"PermissionError(13, 'no', {HOSTILE!r}.replace(chr(0), ''))", 1),
    (f"RuntimeError({HOSTILE!r})", 1), (f"SystemExit(config.visible({HOSTILE!r}))", 1)])
def test_errors_are_tame_even_those_that_are_ours(error, code):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(error)], capture_output=True)
    assert done.returncode == code and done.stdout == b""
    tame(done.stderr.decode())


@pytest.mark.parametrize("kind, told", [("Raises", "ValueError"), ("Named", "Gymnasium's pair"),
                                        ("Broken", "2 times; it must hold each task once")])
def test_what_a_world_raises_or_gets_wrong_is_told_tamely(world, kind, told):
    done = programs.run(["train.py", "config.yaml", "preset=smoke", f"env={world(kind)}", f"out={world('')}.run"],
                        text=False)
    assert done.returncode == 1 and told in done.stderr.decode()
    tame(done.stderr.decode(), halves=kind != "Broken")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_does_not_know_all_letters_is_no_error(world, encoding):
    done = subprocess.run([sys.executable, "envs.py", world("Hostile"), "train-0\u4e2d"], cwd=ROOT, input=b"quit\n",
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    said = done.stdout.decode("utf-8" if encoding == "utf-8" else "ascii")
    assert (r"\u4e2d" if encoding != "utf-8" else "\u4e2d") in said


@pytest.mark.slow
def test_a_whole_run_in_a_hostile_world_is_tame_on_both_streams_and_makes_its_page(world, tmp_path):
    done = programs.run(["train.py", "config.yaml", "preset=smoke", f"env={world('Hostile')}", "method=grpo",
                         "env_steps=40", "action_tokens=40", f"out={tmp_path}/run"], text=False)
    assert done.returncode == 0, done.stderr.decode()
    tame(done.stdout.decode())
    for part in re.split(r"\r|\n|\x1b\[A", done.stderr.decode()):                   # of the progress bars
        assert not STEERS.search(re.sub("[▏▎▍▌▋▊▉█]", "", part)), part
    assert "pwned" in (tmp_path / "run" / "report.html").read_text()


# what is printed without it and cannot be hostile: numbers, words shown by repr, what was made visible above
PLAIN = {
    "engine.py": ["out of memory: going on with slots={self.slots}"],
    "methods/warm_start.py": ["warm start: SFT on {len(fitting)} solved training episodes"],
    "models/template.py": ["note: the model's vocabulary lacks words that are said here, like {text[start:end].strip(' ')!r}"],
    "scale/serving.py": ["engine: {self.retold} of {self.told} messages", "engine: {self.smuggled} times a world's text"],
    "train.py": ["out of memory: going on with gradient_checkpointing=true",
                 "out of memory: going on with training rows in halves, of {len(row.ids)} tokens and more"],
    "tools/play.py": ["envs.__doc__"],
    "tools/show.py": ["text if plain else"],
    "worlds/crossing.py": ["message.get('printed', '')"],                     # inside the sandbox, to its pipes
    "worlds/launcher.py": ["sandbox: {folder} stays: {error}"],
    "worlds/sandbox.py": ["sandbox: namespaces are forbidden here ({said['weak']})"]}
WRITERS = ("print", "sys.exit", "tqdm.write", "sys.stderr.write", "sys.stdout.write")


def said_by(tree: ast.AST) -> list[ast.expr]:
    """What is printed: the first argument of each print and the like, and the words of each progress bar."""
    found: list[ast.expr] = []
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        into = [ast.unparse(word.value) for word in call.keywords if word.arg == "file"]
        if ast.unparse(call.func) in WRITERS and into in ([], ["sys.stderr"], ["sys.stdout"]):
            found += call.args[:1]
        found += [word.value for word in call.keywords if word.arg == "desc"]
    return found


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for folder in (".", "methods", "models", "scale", "tools", "worlds")
                                  for path in sorted((ROOT / folder).glob("*.py"))])
def test_nothing_is_printed_but_through_it(path):
    odd = []
    for text in said_by(ast.parse((ROOT / path).read_text())):
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        literal = all(isinstance(part, ast.Constant) or "round_}" in ast.unparse(part) for part in parts)
        through = isinstance(text, ast.Call) and ast.unparse(text.func) == "visible"
        if not literal and not through and not any(one in ast.unparse(text) for one in PLAIN.get(path, [])):
            odd.append(ast.unparse(text))
    assert odd == []
