"""Several runs side by side: train.py method=compare, eval.py compare."""
import json
import os
import re
import shutil
from html import escape
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

import programs
from envs import Quest
from methods.compare import COMPARED
from run import RunFolder
from test_train import figures, train
from tools.compare import comparison
from tools.pictures import passk
from tools.report import spent


def ended_run(settings, folder, method, wins, split="test", **extra):
    """A run's folder with samples: `wins` by policy, how many of 4 samples succeed on each task."""
    cfg = settings(f"out={folder}", f"method={method}", f"split={split}", "test_tasks=3", "samples=4", "ks=[1,4]",
                   *(f"{key}={value}" for key, value in extra.items()))
    run = RunFolder(cfg)
    store = run.store("samples.jsonl")
    for policy, counts in wins.items():
        for task, count in zip(Quest().tasks(split), counts):
            for i in range(4):
                store.append(dict(policy=policy, weights="w", task=task, sample=i, success=i < count, score=0.0,
                                  turns=5, tokens=9, refused=1, end="", difficulty="x"))
    run.close()
    (folder / "passk.json").write_text("{}")
    (folder / "adapter").mkdir(exist_ok=True)


def test_a_comparison_shows_means_over_seeds_and_what_is_newly_solved_and_lost(settings, tmp_path):
    for seed, base in enumerate(([0, 1, 2], [0, 0, 4])):
        ended_run(settings, tmp_path / f"leafe-{seed}", "leafe", dict(base=base, leafe=[4, 4, 0]), seed=seed)
        ended_run(settings, tmp_path / f"rft-{seed}", "rft", dict(rft=[0, 2, 4]), seed=seed,
                  trees=tmp_path / "leafe-0", evaluate_base="false")
    lines = {}
    for line in comparison(tmp_path).splitlines():
        lines.setdefault(line.split()[0], []).append(line.split())
    assert [lines[name][0][1] for name in ("base", "leafe", "rft")] == ["29.2", "66.7", "50.0"]     # Pass@1
    lines_drawn = [e for e in ElementTree.fromstring(passk([str(tmp_path)])) if e.tag.endswith("polyline")]
    assert len(lines_drawn) == 3
    found = [lines[name][1][-2:] for name in ("base", "leafe", "rft")]
    assert found == [["0.0", "0.0"], ["1.5", "1.0"], ["0.5", "0.0"]]


def test_a_comparison_is_of_the_split_that_was_asked_for_last(settings, tmp_path):
    folder = tmp_path / "leafe-0"
    ended_run(settings, folder, "leafe", dict(base=[0, 0, 0], leafe=[4, 4, 4]))
    ended_run(settings, folder, "leafe", dict(base=[0, 0, 0], leafe=[4, 0, 0]), split="test-deep")
    line = next(line for line in comparison(tmp_path).splitlines() if line.startswith("leafe"))
    assert line.split()[1] == "33.3"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of all methods: (folder, stdout)."""
    out = tmp_path_factory.mktemp("compared") / "run"
    process = train(out, "method=compare")
    shown, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out, shown


@pytest.mark.slow
def test_a_comparison_runs_every_method_within_leafes_steps_and_shows_one_table(compared):
    out, shown = compared
    assert {path.name for path in out.iterdir()} == {f"{name}-0" for name in COMPARED} | {"report.html"}
    *lines, where = shown[shown.rindex("%  "):].splitlines()
    html = (out / "report.html").read_text()
    assert where == f"results: {out}/report.html" and html.count("<polyline") == len(COMPARED) + 1
    assert re.search(r"<b>leafe</b> wins .*: a difference of", html) and escape(lines[-1]) in html
    links = [unquote(link) for link in re.findall('href="([^"]*)"', html)]
    assert links == sorted(f"{name}-0/report.html" for name in COMPARED)
    assert all((out / one).exists() for one in links)
    assert [line.split()[0] for line in lines[1:len(COMPARED) + 2]] == ["base", *sorted(COMPARED)]
    allowed = spent(out / "leafe-0")["steps"]
    for name in COMPARED:
        took = spent(out / f"{name}-0")
        assert took["seconds"] > 0 and (took["steps"] <= allowed or name == "grpo+leafe") and took["steps"] > 0
        assert (took["trained"] == 0) == (name == "ace" or not (out / f"{name}-0/checkpoint.pt").exists())
    policies = {json.loads(line)["policy"] for line in (out / "leafe-0/samples.jsonl").read_text().splitlines()}
    assert policies == {"base", "leafe"} and (out / "ace-0/playbook.txt").exists()
    again = programs.run(["eval.py", "compare", out])
    assert again.stdout.splitlines() == [*lines, where]


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_killed(compared, tmp_path):
    """Late in GRPO and late in ACE; every method's part then ends as if it had not been."""
    out, rows = compared[0], lambda path: sorted(path.read_text().splitlines())                      # noqa: E731
    shutil.copytree(out, tmp_path / "whole")
    for name in ("grpo-0", "ace-0"):
        folder = out / name
        for made in ("adapter", "adapter_1", "playbook.txt", "samples.jsonl", "passk.json"):
            path = folder / made
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.truncate(folder / "trees.jsonl", (folder / "trees.jsonl").stat().st_size - 2000)
    (out / "grpo-0/checkpoint.pt").unlink()
    process = train(out, "method=compare")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    for name in ("grpo-0", "ace-0"):
        for made in ("trees.jsonl", "samples.jsonl"):
            assert rows(out / name / made) == rows(tmp_path / "whole" / name / made), (name, made)
        assert figures(out / name) == figures(tmp_path / "whole" / name)   # its waves and steps are told once


@pytest.mark.slow
def test_a_comparison_shows_which_methods_are_unfinished(compared, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(compared[0], out)
    (out / "leafe-0").rename(out / "leafe-1")
    shutil.copytree(out / "leafe-1", out / "leafe-2")
    shown = comparison(out)
    assert "grpo              0 of 2 seeds so far" in shown and "means over 2 seeds" in shown
