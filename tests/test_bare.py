"""The core alone: a copy without methods/, worlds/, scale/ and all of tools/ but the report runs LEAFE whole, and each
door that leads nowhere there says so in one line."""
import json
import shutil

import pytest

import programs
from conftest import ROOT

pytestmark = pytest.mark.slow
LEFT_OUT = ("out", ".git", "__pycache__", ".pytest_cache", "tests", "docs", "methods", "worlds", "scale", "tiny-sokoban")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    copy = tmp_path_factory.mktemp("bare") / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for tool in (copy / "tools").iterdir():
        if tool.name not in ("__init__.py", "report.py", "page.py", "page.html", "provenance.py"):
            tool.unlink()
    return copy


def run(copy, *words):
    return programs.run(words, cwd=copy, timeout=300)


def test_the_core_alone_runs_to_its_table_its_adapter_and_its_page(bare):
    done = run(bare, "train.py", "config.yaml", "preset=smoke")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("Pass@")] == [
        "Pass@1", "Pass@2", "Pass@4", "Pass@8"]
    out = bare / "out/smoke"
    assert (out / "adapter/adapter_model.safetensors").stat().st_size > 0
    assert set(json.loads((out / "passk.json").read_text())) == {"base", "leafe"}
    assert "<h2>Rollback trees</h2>" in (out / "report.html").read_text()
    again = run(bare, "eval.py", "table", "out/smoke")
    assert again.returncode == 0 and again.stdout.strip() in done.stdout, again.stderr
    sampled = run(bare, "eval.py", "config.yaml", "preset=smoke", "adapter=out/smoke/adapter", "out=out/again")
    assert sampled.returncode == 0 and "leafe: 8 tasks x 8 samples" in sampled.stdout, sampled.stderr


TRAIN = ["train.py", "config.yaml", "preset=smoke", "out=out/other"]


@pytest.mark.parametrize("words, said", [
    ([*TRAIN, "env=sokoban"], "env: there is no 'sokoban'; there are quest, and path/to/file.py:Class"),
    ([*TRAIN, "method=rft"], "method: there is no 'rft'; there are leafe, and path/to/file.py"),
    ([*TRAIN, "model=tiny-sokoban", "out=out/lost"], "model: tiny-sokoban is no folder with a config.json"),
    ([*TRAIN, "engine=http://localhost:1/v1"], "this copy of the project has no scale/"),
    ([*TRAIN, "warm_start=2"], "this copy of the project has no methods/"),
    (["eval.py", "compare", "out/smoke"], "this copy of the project has no tools/compare.py"),
    (["envs.py"], "this copy of the project has no tools/play.py"),
    (["envs.py", "quest"], "this copy of the project has no tools/play.py"),
    (["leafe.py", "config.yaml"], "this copy of the project has no tools/show.py")])
def test_a_door_that_leads_nowhere_says_so_in_one_line(bare, words, said):
    done = run(bare, *words)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith("error: " + said) and done.stderr.endswith(told[0] + "\n")
