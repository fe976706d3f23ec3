"""How long a run will take: from a pace.json that is given, and by a clock that the tests set."""
import json
from types import SimpleNamespace

import pytest
import torch

import ranks
import train
from config import SHIPPED, UserError
from conftest import run_of
from envs import Quest
from eval import sample
from leafe import explore
from models import hours
from models.hours import Pace, line_of, paces

SAMPLING, TRAINING = dict(tokens=36_000, seconds=36.0), dict(tokens=7200, seconds=72.0)        # 1000 and 100 a second
ARGS = ("train_tasks=10 attempts=9 reflect_every=17 action_tokens=360 reflect_tokens=340 steps=36 batch_tokens=10000 "
        "row_tokens=10000 test_tasks=2 samples=10 ks=[1]").split()
SAID = "hours, at most: explore 0.17; distil 1.0; evaluate, 2 policies 0.068; together 1.2\nan estimate, by the pace in {}" \
       "/pace.json: sampling 1,000 tokens/s over 36 s, training 100 tokens/s over 72 s"


def kept(folder, **found):
    folder.mkdir(exist_ok=True)
    (folder / "pace.json").write_text(json.dumps(found))


def test_the_plan_of_a_folder_whose_run_had_a_pace_says_hours_by_it(tmp_path, capsys):
    words = [str(SHIPPED), "preset=smoke", f"out={tmp_path}/run", *ARGS, "plan=true"]
    train.main(words)
    assert "hours: not before a pace is measured, which a run keeps in its folder (pace.json)" in capsys.readouterr().out
    kept(tmp_path / "run", sampling=SAMPLING, training=TRAINING)
    train.main(words)
    assert capsys.readouterr().out.rstrip().endswith(SAID.format(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["pace.json"]


def test_of_several_runs_there_is_no_plan(tmp_path):
    with pytest.raises(UserError, match="plan: method=compare makes several runs; ask for one of them"):
        train.main([str(SHIPPED), "preset=smoke", "method=compare", f"out={tmp_path}/run", "plan=true"])


@pytest.mark.parametrize("args, found, says", [
    ([], dict(sampling=dict(tokens=360, seconds=36.0)),
     "hours, at most: explore 17; evaluate, 2 policies 6.8; together 24, without distil (no pace is known)\n"),
    (["trees=out/other"], dict(sampling=SAMPLING, training=TRAINING),
     "hours, at most: explore 0; distil 1.0; evaluate, 2 policies 0.068; together 1.1\n"),
    (["method=grpo", "trees=out/other"], dict(sampling=SAMPLING, training=TRAINING),
     "hours, at most: evaluate, 2 policies 0.068; together 0.068, without grpo (no pace is known)\n"),
    (["method=rft", "trees=out/other"], dict(training=TRAINING), "hours: not before a pace is measured")])
def test_what_has_no_pace_is_left_out_and_said(args, found, says, settings):
    said = line_of(settings(*ARGS, *args), found)
    assert said.startswith(says) and ("training" in said.partition("\n")[2]) == ("distil 1.0" in said)


@pytest.mark.parametrize("text", ["{", "[]", '{"sampling": {"tokens": 3}}', '{"training": {"tokens": -1, "seconds": 2.0}}'])
def test_a_damaged_pace_is_one_line_that_says_to_delete_it(text, tmp_path):
    (tmp_path / "pace.json").write_text(text)
    with pytest.raises(UserError, match="pace.json: .*; restore it, or delete it: no result depends on it") as caught:
        paces(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_a_stage_keeps_its_pace_every_twenty_seconds_and_says_hours_once_on_a_gpu(cuda, world, settings, tmp_path, capsys,
                                                                                monkeypatch):
    now, cfg, folder = [1000.0], settings(*ARGS), tmp_path / "run"
    monkeypatch.setattr(hours, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(ranks, "world", lambda: world)
    run = SimpleNamespace(cfg=cfg, folder=SimpleNamespace(path=folder))
    kept(folder, training=TRAINING)
    stage = Pace(run, "sampling")
    for seconds, tokens, found in ((19.9, 1, None), (36.0, 36_000 // world, 36_000), (55.0, 7, 36_000), (57.0, 100, 100 * world)):
        now[0] = 1000.0 + seconds
        stage.tell(tokens)
        assert paces(folder) == dict(training=TRAINING) | (
            dict(sampling=dict(tokens=found, seconds=36.0 if found == 36_000 else 57.0)) if found else {})
    said = capsys.readouterr()
    assert said.out == "" and said.err == ("plan: " + SAID.format(folder).replace("\n", "; ") + "\n") * cuda
    stage = Pace(run, "training")                          # ranks train on the same tokens
    now[0] += 72
    stage.tell(7200)
    assert paces(folder)["training"] == TRAINING


def test_exploring_training_and_sampling_keep_their_pace(own_tiny, settings, monkeypatch):
    monkeypatch.setattr(hours, "PACED", 0.0)
    cfg = settings("steps=2", "samples=2", "ks=[1]", "train_tasks=2", "corrections=all")
    run = run_of(cfg, own_tiny, folder=True, train_tasks=Quest().tasks("train")[:2], test_tasks=Quest().tasks("test")[:2])
    trees = explore(run, run.train_tasks)
    drawn = sum(branch.tokens for tree in trees for branch in tree.branches)
    assert paces(run.folder.path)["sampling"]["tokens"] == drawn and "training" not in paces(run.folder.path)
    sample(run, "base")
    assert paces(run.folder.path)["sampling"]["tokens"] == sum(record["tokens"] for record in run.store("samples.jsonl").records)
    train.learn(run, 1, trees)
    assert paces(run.folder.path)["training"]["tokens"] == run.metrics.records[-1]["tokens"] > 0
