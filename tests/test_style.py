"""The source is clean under ruff and mypy; every script explains itself, and ends well when nobody reads on."""
import importlib.util
import os
import re
import subprocess
import sys

import pytest

import programs
from conftest import ROOT

FILES = sorted(str(path.relative_to(ROOT)) for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)
               if path.parent.name != "tests")
WORKERS = ["worlds/launcher.py"]                        # started by the project, not by people
SCRIPTS = [file for file in FILES if "__main__" in (ROOT / file).read_text() and file not in WORKERS]


def command(script):
    """How it is run: from the top by its name, in a wing as a module."""
    wing, _, name = script.removesuffix(".py").rpartition("/")
    return f"-m {wing}.{name}" if wing else script


@pytest.mark.slow
@pytest.mark.parametrize("tool, args", [("ruff", ["check", "."]), ("mypy", ["--cache-dir", os.devnull])])
def test_the_source_is_clean(tool, args):
    if not importlib.util.find_spec(tool):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {tool} here")
    done = subprocess.run([sys.executable, "-m", tool, *args, *(FILES if tool == "mypy" else [])], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script):
    done = programs.run([*command(script).split(), "-h"])
    assert done.returncode == 0 and done.stderr == "" and f"python {command(script)}" in done.stdout


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} eval.py -h | true"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 141 and done.stderr == ""


def test_the_log_of_kinds_names_tests_that_are_there():
    log = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    file, missing = "", []
    for name, function in re.findall(r"(test_\w+\.py)?::(test_\w+)", log):
        file = name or file
        if f"def {function}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8"):
            missing.append(f"{file}::{function}")
    assert log.count("::test_") > 90 and not missing
