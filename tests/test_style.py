"""The source is clean under ruff and mypy; every script explains itself, and ends well when nobody reads on."""
import importlib.util
import os
import subprocess
import sys

import pytest

from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("tool, args", [("ruff", ["check", "."]), ("mypy", ["--cache-dir", os.devnull])])
def test_the_source_is_clean(tool, args):
    if not importlib.util.find_spec(tool):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {tool} here")
    files = [path.name for path in ROOT.glob("*.py")] if tool == "mypy" else []
    done = subprocess.run([sys.executable, "-m", tool, *args, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in ("launcher.py", "workers.py")])
def test_every_script_explains_itself(script):
    done = subprocess.run([sys.executable, script, "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and script in done.stdout


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} eval.py -h | true"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 141 and done.stderr == ""
