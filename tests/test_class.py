"""docs/class.md: its commands, one after the other, in a copy of the project with a preset of seconds."""
import re
import shutil

import pytest

import programs
from conftest import ROOT

SMALL = """
out: out/class
train_tasks: 6
test_tasks: 4
attempts: 4
steps: 2
samples: 2
ks: [1, 2]
corrections: all
"""


@pytest.mark.slow
def test_every_command_of_the_class_runs(tmp_path):
    page = (ROOT / "docs" / "class.md").read_text()
    copy = tmp_path / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".pytest_cache", "tests"))
    assert (copy / "configs/class.yaml").is_file()
    (copy / "configs/class.yaml").write_text(SMALL)
    (copy / "bells.py").write_text(re.search(r"bells.py, to be.*?:\n\n```python\n(.*?)```", page, re.S)[1])
    commands = re.findall(r"(?m)^    (python .*)$", page)
    assert len(commands) > 10
    for command in commands:
        done = programs.run(command.split()[1:], cwd=copy, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
    assert re.search(r"Pass@1 .*[+-]\d", done.stdout)                  # the last one compares
