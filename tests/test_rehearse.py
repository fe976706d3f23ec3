"""Reflections as targets of their own (methods/rehearse.py): which, in what context, and what they weigh."""
import json

import pytest
import torch

import leafe
from config import load_config
from conftest import ROOT, run_of
from envs import Quest
from leafe import Reflection, explore, targets
from methods.rehearse import fruitful, with_reflections
from packing import pack, packed_nll, rows_of, training_rows
from test_leafe import tree_by_hand
from tools.report import chat_pairs
from train import loss_weights


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    """(run, trees, [context and answer of every reflection that the policy gave]) of an exploration."""
    cfg = load_config([str(ROOT / "config.yaml"), "preset=smoke", "attempts=12", "reflect_tokens=109", "observation_tokens=40",
                       "rehearse_reflections=1", f"out={tmp_path_factory.mktemp('asked')}/run"])
    run, given = run_of(cfg, tiny, folder=True), []
    original = leafe.episode

    def noted(*args):
        attempt = original(*args)
        reply = None
        try:
            while True:
                ask = attempt.send(reply)
                reply = yield ask
                if ask.max_new == 109:
                    given.append(ask.context + reply)
        except StopIteration as ended:
            return ended.value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leafe, "episode", noted)
        trees = explore(run, Quest().tasks("train")[:12])
    run.folder.close()
    return run, trees, given


def test_a_reflection_is_learned_at_the_very_ids_that_it_answered(asked):
    run, trees, given = asked
    pairs = targets(trees, run.cfg, run.policy.chat.stop)
    grown = with_reflections(run, trees, pairs)
    assert len(pairs.D_ref) > 5 and len({k for k, _ in pairs.D_ref}) > 1
    for k, i in pairs.D_ref:
        assert [token for turn in grown[k].path(i) for token in turn.ids] in given
        assert i >= len(trees[k].turns) and grown[k].turns[:len(trees[k].turns)] == trees[k].turns
        assert grown[k].turns[i].action_ids[-1] in run.policy.chat.stop


def test_only_reflections_that_led_to_a_success_count():
    tree = tree_by_hand()
    led, too, not_ = Reflection(3, "led", 2, "e1"), Reflection(3, "too", 3, "e3"), Reflection(3, "not", 3, "e2")
    tree.branches[0].reflections = [not_, led]                 # to 0.1, which failed, and to 0.0, of which 0.0.0 grew
    tree.branches[1].reflections = [Reflection(3, "nothing"), too]
    assert fruitful(tree) == [(0, led), (1, too)]
    tree.branches[3].experience = "another task's"             # as the control gives it
    assert fruitful(tree) == [(0, led)]


def test_a_share_of_them_is_taken_and_never_one_that_was_cut_off(asked):
    run, trees, _ = asked
    def learned(share, stop=run.policy.chat.stop):
        pairs = targets(trees, run.cfg, stop)
        with_reflections(run.but(rehearse_reflections=share), trees, pairs)
        return len(pairs.D_ref)
    every = learned(1.0)
    assert learned(0.5) == round(every / 2) and learned(0.01) == 1
    cut = next(reflection for tree in trees for _, reflection in fruitful(tree))
    cut.ids, whole = cut.ids[:-1], cut.ids
    try:
        assert learned(1.0) == every - 1
    finally:
        cut.ids = whole


def test_they_have_a_column_of_the_loss_and_leave_the_others_as_they_are(asked):
    run, trees, _ = asked
    pairs, model = targets(trees, run.cfg, run.policy.chat.stop), run.policy.model
    plain = training_rows(trees, loss_weights(trees, pairs, 0.5, 0.25), 2048)
    grown = with_reflections(run, trees, pairs)
    rows = training_rows(grown, loss_weights(grown, pairs, 0.5, 0.25), 2048)
    with torch.no_grad():
        before, found = (sum(packed_nll(model, [row]).double() for row in some) for some in (plain, rows))
        alone = []
        for k, i in pairs.D_ref:                               # each by itself, its history before it
            (group,) = rows_of([grown[k]], [{i: (1.0,)}], 2048)
            alone.append(packed_nll(model, [pack(group)]).item())
    assert len(found) == 3 and found[:2].tolist() == pytest.approx(before.tolist(), rel=1e-5)
    assert found[2].item() == pytest.approx(0.25 * sum(alone) / len(alone), rel=1e-5)


def test_they_are_exported_with_the_other_targets(asked):
    run, trees, _ = asked
    pairs = targets(trees, run.cfg, run.policy.chat.stop)
    told = [json.loads(line) for line in chat_pairs(run, with_reflections(run, trees, pairs), pairs)]
    last = [one for one in told if one["part"] == "D_ref"]
    assert len(last) == len(pairs.D_ref)
    for one in last:
        assert one["prompt"][-1]["content"].endswith(leafe.REFLECT) and "step:" in one["completion"][0]["content"]
