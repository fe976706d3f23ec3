"""The README and the pages of docs/: of one sitting, their examples run, their links lead somewhere."""
import re

import pytest

import programs
from conftest import ROOT
from envs import make_env

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_of_one_sitting():
    assert len(README.encode()) <= 12_000


def test_its_world_is_whole(tmp_path):
    (tmp_path / "doors.py").write_text(re.search(r"```python\n(import random.*?)```", README, re.S)[1])
    env = make_env(f"{tmp_path}/doors.py:Doors")
    assert env.examine("train") == []
    env.reset("train-1")
    assert [env.step("go " + room).success for room in ("attic", "cellar", "garden")].count(True) == 1


@pytest.mark.slow
def test_its_method_trains_and_brings_its_own_key(tmp_path):
    (tmp_path / "best.py").write_text(re.search(r"\(best\.py\):\n\n```python\n(.*?)```", README, re.S)[1])
    done = programs.run(["train.py", "config.yaml", "preset=smoke", f"method={tmp_path}/best.py", "rollouts=2",
                         "train_tasks=3", "test_tasks=2", "samples=2", "ks=[1,2]", "steps=2", f"out={tmp_path}/run"])
    assert done.returncode == 0, done.stderr
    assert '"L_best":' in (tmp_path / "run/metrics.jsonl").read_text()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, part = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if part:
            assert part in [anchor(line.lstrip("# ")) for line in file.read_text().splitlines() if line[:1] == "#"], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_it_names_are_there(page):
    """Of the project's own Python files; a file that the reader is to write is introduced as `NAME.py:`."""
    own = {"doors.py", "best.py", "bells.py", "my_gym_world.py", "gym_world.py", "mine.py", "file.py", "world.py"}
    for name in re.findall(r"[\w/]+\.py\b", page.read_text()):
        there = [file for file in ROOT.rglob(name.rpartition("/")[2]) if str(file).endswith("/" + name)]
        assert there or name.rpartition("/")[2] in own, name
