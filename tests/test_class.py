"""The README's class: its commands, one after the other, in a copy of the project with a preset of seconds."""
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

SMALL = """  class:
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
    section = (ROOT / "README.md").read_text().split("## A class in 45 minutes")[1].split("\n## ")[0]
    copy = tmp_path / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".pytest_cache", "tests"))
    settings = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"(?m)^  class:.*\n(?:    .*\n)+", SMALL, settings))
    assert SMALL in (copy / "config.yaml").read_text()
    (copy / "bells.py").write_text(re.search(r"bells.py, to be.*?:\n\n```python\n(.*?)```", section, re.S)[1])
    commands = re.findall(r"(?m)^    (python .*)$", section)
    assert len(commands) > 10
    for command in commands:
        done = subprocess.run([sys.executable, *command.split()[1:]], cwd=copy, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
    assert re.search(r"Pass@1 .*[+-]\d", done.stdout)                  # the last one compares
