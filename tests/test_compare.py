"""Several runs side by side: train.py method=compare, eval.py compare."""
import json
import os
import re
import shutil
import signal
import time
from html import escape
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file

import programs
from config import kept_config
from conftest import ROOT
from envs import Quest
from methods import warm_start
from methods.compare import COMPARED
from run import RunFolder, read_jsonl
from test_train import figures, train
from tools.compare import comparison, page, whole_cost
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


def test_what_all_started_from_stands_in_place_of_the_base_and_what_it_took_counts_once(settings, tmp_path):
    start, grpo = tmp_path / "warm_start-0/warm_start", tmp_path / "grpo-0/adapter"
    for seed in (0, 1):
        for name, wins, init in [("leafe", dict(warm_start=[0, 1, 1], leafe=[4, 4, 0]), start),
                                 ("grpo", dict(grpo=[0, 2, 0]), start), ("grpo+leafe", dict(leafe=[4, 4, 4]), grpo)]:
            ended_run(settings, tmp_path / f"{name}-{seed}", name.rpartition("+")[2], wins, seed=seed, init=init,
                      evaluate_base=name == "leafe")
    for folder, record, minutes in [(start.parent, dict(round=0, step=9, tokens=700), 2),
                                    (grpo.parent, dict(round=1, step=2, tokens=50), 5)]:
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "seconds.json").write_text(str(60 * minutes))
    shown = comparison(tmp_path)
    lines = {}
    for line in shown.splitlines():
        lines.setdefault(line.split()[0], []).append(line.split())
    assert "base" not in shown and "Pass@4 minus warm_start" in shown and list(lines)[1] == "warm_start"
    assert shown.endswith("tasks solved that warm_start never solves, and back; what warm_start took is shared, and "
                          "counts in its row alone")
    assert [lines[name][0][1] for name in ("warm_start", "leafe", "grpo+leafe")] == ["16.7", "66.7", "100.0"]
    assert [lines[name][1][-2:] for name in ("warm_start", "grpo+leafe")] == [["0.0", "0.0"], ["1.0", "0.0"]]
    assert [lines[name][2][3:] for name in ("warm_start", "grpo", "grpo+leafe", "leafe")] == [
        ["700", "2.0"], ["25", "2.5"], ["50", "5.0"], ["0", "-"]]    # trained tokens, minutes; grpo-1 took none
    for name in ("leafe-0", "leafe-1"):                        # where they lie says where the start lies, not where we are
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace(f"{tmp_path}/", ""))
    assert comparison(tmp_path) == shown
    html = page(tmp_path)
    assert "warm_start" in html and "base" not in re.findall(r"<text[^>]*>([^<]*)</text>", html)


def test_what_a_start_took_counts_wherever_the_runs_lie(tmp_path, monkeypatch):
    """A run names its start as seen from where it ran."""
    runs = tmp_path / "there/out/compare"
    for name, init, seconds in [("grpo-0", "", 5.0), ("grpo+leafe-0", "out/compare/grpo-0/adapter", 7.0)]:
        (runs / name).mkdir(parents=True)
        (runs / name / "config.yaml").write_text(f"out: out/compare/{name}\ninit: '{init}'\n")
        (runs / name / "seconds.json").write_text(str(seconds))
    (tmp_path / "here").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    assert [whole_cost(folder / "grpo+leafe-0")["seconds"] for folder in (runs, tmp_path / "here")] == [12.0, 12.0]
    monkeypatch.chdir(tmp_path / "there")
    assert whole_cost(runs.relative_to(tmp_path / "there") / "grpo+leafe-0")["seconds"] == 12.0


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


WARM = ["method=compare", "warm_start=8", "warm_steps=6", "lr=0.001", "train_tasks=4", "attempts=4", "horizon=8", "steps=2",
        "test_tasks=4", "samples=2", "ks=[1,2]"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A comparison from a warm start, of two seeds: (folder, stdout)."""
    out = tmp_path_factory.mktemp("warm") / "run"
    process = train(out, *WARM, "seeds=[0,1]")
    shown, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out, shown


@pytest.mark.slow
def test_every_method_on_every_seed_goes_on_from_the_one_warm_start(warm):
    out, shown = warm
    start, names = out / "warm_start-0", {f"{name}-{seed}" for name in COMPARED for seed in (0, 1)}
    assert {path.name for path in out.iterdir()} == names | {"warm_start-0", "report.html"}
    assert shown.count("warm start: SFT on") == 1
    begun = load_file(start / "warm_start/adapter_model.safetensors")
    trained = {}
    for name in sorted(names):
        own = kept_config(out / name)
        from_grpo = name.startswith("grpo+")
        assert own.init == str(out / f"grpo-{own.seed}/adapter" if from_grpo else start / "warm_start") and not own.warm_start
        trained[name] = load_file(out / name / "adapter_1/adapter_model.safetensors")
        apart = max(float((trained[name][key] - value).abs().max()) for key, value in begun.items())
        took = [r["gradient_norm"] for r in read_jsonl(out / name / "metrics.jsonl") if "step" in r]
        groups: dict = {}
        for r in read_jsonl(out / name / "trees.jsonl"):
            groups.setdefault((r["round"], r["task"]), set()).add(r["end"] == "success")
        alike = name.startswith("grpo-") and all(len(ends) == 1 for ends in groups.values())      # no advantage
        if alike and took:                             # but for a KL of 0, which some processors round: AdamW makes steps of it
            assert max(took) < 1e-5, name
        else:
            assert (apart > 0) == bool(took), name     # ACE alone, and who found nothing, stay there
        assert apart < 0.5, name
    assert trained["leafe-0"].keys() == begun.keys()
    drawn = [r for seed in (0, 1) for r in read_jsonl(out / f"leafe-{seed}/samples.jsonl") if r["policy"] == "warm_start"]
    assert len(drawn) == 2 * 4 * 2 and len({r["weights"] for r in drawn}) == 1
    explored = {r["task"] for name in names for r in read_jsonl(out / name / "trees.jsonl")}
    shown_to_it = set(warm_start.tasks(kept_config(start)))
    assert len(shown_to_it) == 8 and explored == set(Quest().tasks("train")[:4])
    assert not shown_to_it & (explored | {r["task"] for r in drawn})
    head, *lines = shown[shown.rindex("%  "):].splitlines()
    assert [line.split()[0] for line in lines[:len(COMPARED) + 1]] == ["warm_start", *sorted(COMPARED)]
    assert "Pass@2 minus warm_start" in shown and "never solves, and back; what warm_start took is shared" in lines[-2]


@pytest.mark.slow
def test_a_warm_start_made_alone_is_the_one_that_a_comparison_makes(warm, tmp_path):
    done = programs.run(["-m", "methods.warm_start", "config.yaml", "preset=smoke", *WARM[1:], f"out={tmp_path}/start"])
    assert done.returncode == 0 and f"results: {tmp_path}/start/warm_start\n" in done.stdout, done.stderr
    (a, b), made = (folder / "warm_start" for folder in (tmp_path / "start", warm[0] / "warm_start-0")), "adapter_model.safetensors"
    assert (a / made).read_bytes() == (b / made).read_bytes()
    asked = programs.run(["-m", "methods.warm_start", "config.yaml", f"out={tmp_path}/none"])
    assert asked.returncode == 1 and asked.stderr == "error: warm_start: say of how many episodes, like warm_start=96\n"


@pytest.mark.slow
def test_a_comparison_killed_in_its_warm_start_ends_as_if_it_had_not_been(warm, tmp_path):
    """And a seed that is run by itself shares it."""
    out, rows = tmp_path / "run", lambda path: sorted(path.read_text().splitlines())                 # noqa: E731
    process = train(out, *WARM, "seeds=[1]")
    while not (out / "warm_start-0/checkpoint.pt").exists():
        assert process.returncode is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "warm_start-0/warm_start").exists() and not (out / "leafe-1").exists()
    process = train(out, *WARM, "seeds=[1]")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    for name in ["warm_start-0/warm_start", *(f"{name}-1/adapter_1" for name in COMPARED)]:
        (a, b), made = (folder / name for folder in (out, warm[0])), "adapter_model.safetensors"
        assert (a / made).read_bytes() == (b / made).read_bytes(), name
    for name in [f"{name}-1" for name in COMPARED]:
        for made in ("trees.jsonl", "samples.jsonl"):
            assert rows(out / name / made) == rows(warm[0] / name / made), (name, made)
    assert figures(out / "warm_start-0") == figures(warm[0] / "warm_start-0")


@pytest.mark.parametrize("args, message", [
    (["warm_start=8", "init=a"], "warm_start is 8, but goes with neither init= nor react=true"),
    (["warm_start=8", "react=true"], "warm_start is 8, but goes with neither init= nor react=true"),
    (["warm_start=5000"], "warm_start: quest has 1272 training tasks beside the train_tasks, not 5000"),
    (["warm_start=8", f"env={ROOT}/tests/test_smollm2.py:Mute"], "does not say how its tasks are solved")])
def test_a_warm_start_that_cannot_be_is_one_line_before_anything_is_written(args, message, tmp_path):
    process = train(tmp_path / "run", "method=compare", *args)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert message in errors and not (tmp_path / "run").exists()
