"""Pictures for the docs, made from runs' files."""
from xml.etree import ElementTree

import pytest

from config import UserError
from envs import Quest
from run import Jsonl, RunFolder
from test_eval import records
from tools.pictures import main, passk, reward


def test_curves_are_well_formed_and_escape_their_labels(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("<script>&", "b"):
        folder = RunFolder(settings(f"out={name}", "ks=[1,2,4,8]", "samples=8", "test_tasks=2"))
        store = folder.store("samples.jsonl")
        for record in records([0.1, 0.6], n=8):
            store.append(dict(record, policy="leafe", task=Quest().tasks("test")[int(record["task"][1:])]))
        folder.close()
    root = ElementTree.fromstring(passk(["<script>&", "b"]))
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert [len(e.get("points").split()) for e in lines] == [4, 4]
    texts = [e for e in root if e.tag.endswith("text")]
    assert {"<script>&", "b"} <= {e.text for e in texts}
    heights = [float(e.get("y")) for e in texts if e.text in ("<script>&", "b")]
    assert abs(heights[0] - heights[1]) >= 13                      # the two lines end at one place: no overlap


def test_the_reward_of_grpo_is_drawn_wave_by_wave(tmp_path):
    store = Jsonl(tmp_path / "metrics.jsonl")
    for wave, success in ((1, 0.0), (2, 0.1), (2, 0.1), (3, 0.2)):     # killed in the second: written again
        store.append(dict(wave=wave, success=success))
        store.append(dict(step=wave))
    store.close()
    root = ElementTree.fromstring(reward([str(tmp_path)]))
    line = next(e for e in root if e.tag.endswith("polyline")).get("points").split()
    heights = [float(point.split(",")[1]) for point in line]
    assert len(line) == 3 and heights[0] > heights[1] > heights[2]
    with pytest.raises(UserError, match="no wave of GRPO"):
        reward([str(tmp_path / "nothing")])


@pytest.mark.parametrize("args, said", [
    ([], "usage: python -m tools.pictures passk"), (["pie", "a.svg", "out"], "usage"),
    (["tree", "a.png", "out"], "usage"), (["passk", "nowhere/a.svg", "out"], "there is no folder nowhere")])
def test_bad_input_is_one_line(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        main(args)
