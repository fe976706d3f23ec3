"""tools/bench.py: what it compares is equal, what it prints is what it measured. No time is asserted."""
import json

import pytest
import torch
from transformers import LlamaConfig

import programs
from config import UserError, load_config
from conftest import ROOT, SHAPE
from tools import bench
from tools.families import tiny_model

SMALL = LlamaConfig(**SHAPE | dict(initializer_range=0.05, num_hidden_layers=1))


def own(**more):
    return bench.OWN | dict(repetitions=2, episodes=8) | more


def test_conversations_have_the_shape_that_is_promised():
    talk, lengths = bench.Talk(), set()
    for n in range(40):
        first, turns, done = talk.reset(f"{n}/1"), 0, False
        assert first == bench.Talk().reset(f"{n}/2") != talk.reset(f"{n + 1}/1")       # samples share their task
        talk.reset(f"{n}/1")
        while not done:
            done, turns = talk.step("go").done, turns + 1
        lengths.add(turns)
    assert lengths == set(range(8, 17))
    assert [talk.reset("1/0"), talk.step("x").obs] == [talk.reset("1/0"), talk.step("y").obs]     # it replays


@pytest.mark.slow
def test_all_ways_of_sampling_reply_alike_and_each_is_timed(settings, tmp_path):
    done = programs.run(["-m", "tools.bench", "rollout", "episodes=4", "repetitions=1", "horizon=4",
                         "action_tokens=4", f"out={tmp_path}"], timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rollout-tiny.json").read_text())
    assert [row["name"] for row in found["contenders"]] == list("abcd")
    assert all(row["equal"] == 1 and len(row["seconds"]) == 1 for row in found["contenders"])
    assert found["machine"]["gb_a_second"] > 0 and 0 < found["limit_s"] and 0 < found["products_s"]
    assert 0.5 < found["cached"] < 1 and found["sampled"] >= 4 * 4
    assert "last is" in done.stdout and "of prompt tokens from the cache" in done.stdout


def test_an_engine_that_replies_otherwise_is_not_timed(settings, monkeypatch):
    right = bench.forking

    def wrong(*args):
        ended = right(*args)
        ended[0].turns[0].action_ids[0] += 1
        return ended
    cfg = settings("temperature=0")
    bench.policy.cache_clear()
    monkeypatch.setattr(bench, "forking", wrong)
    with pytest.raises(UserError, match="greedy replies are not generate's: nothing is timed"):
        bench.rollout(cfg, own(contenders="d", repetitions=0))


def test_all_layouts_of_the_training_data_give_the_same_gradient(settings):
    bench.policy.cache_clear()
    found = bench.training(settings("train_tasks=3", "corrections=all"), own(contenders="abc"))
    a, b, c = found["contenders"]
    assert found["pairs"] > 5 and max(row["equal"] for row in (a, b, c)) < 1e-4
    assert a["tokens"] > b["tokens"] > c["tokens"] >= found["tokens_at_least"]
    assert all(len(row["seconds"]) == 2 and row["peak_mb"] >= 0 for row in (a, b, c))
    assert "distinct tokens of the trees" in bench.show("train", found)


def test_a_layout_with_another_gradient_is_not_timed(settings, monkeypatch):
    bench.policy.cache_clear()
    monkeypatch.setattr(bench, "packed_nll", lambda model, rows: 1.01 * bench.padded_nll(
        model, (rows[0].ids[None], torch.ones_like(rows[0].ids)[None], torch.ones(1, len(rows[0].ids), 2))))
    with pytest.raises(UserError, match="the gradient of c is not a's"):
        bench.training(settings("train_tasks=2", "corrections=all"), own(contenders="ac"))


def test_stored_turns_are_counted_and_measured(settings, tiny):
    found = bench.stored(settings(), tiny[1], 2000)
    assert found["turns"] == 2000 and found["pairs"] > 200
    assert all(found[f"{step}_{unit}"] >= 0 for step in ("load", "targets", "pack", "report") for unit in ("s", "mb"))


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_from_end_to_end_on_small_shapes(settings, monkeypatch):
    """On the CPU: what it would measure is not measured here, but each of its parts is gone through, nf4 too."""
    monkeypatch.setattr(bench, "SHAPES", {"135m": SMALL, "7b": SMALL})
    bench.policy.cache_clear()
    found = bench.gpu(settings("model=7b", "temperature=0", "lora_rank=4", "action_tokens=2"),
                      own(contenders="ad", episodes=2), slots=(1, 2), rows=(64,))
    assert found["equal_fp32"] == found["equal_nf4"] == 1.0
    assert set(found) == {"equal_fp32", "equal_nf4", "nf4", "bf16", "nf4_1_slots", "nf4_2_slots", "bf16_1_slots",
                          "bf16_2_slots", "step_64"}
    assert found["step_64"]["seconds"] > 0 and found["nf4_2_slots"]["sampled"] > 0


def test_a_growing_cache_is_measured_against_what_it_holds():
    shape = LlamaConfig(**SHAPE | dict(num_hidden_layers=8))
    found = bench.growing(shape, 768, rows=16)
    assert found["rows"] == 16 and found["held_mb"] == pytest.approx(8 * found["layer_mb"])
    assert found["layer_mb"] == pytest.approx(2 * 16 * 2 * 769 * 12 * 4 / 2**20)             # k, v; heads, capacity, D
    assert 0 <= found["peak_mb"]


@pytest.mark.parametrize("args, said", [
    (["rolout"], "did you mean 'rollout'"), (["gpu"], "there is no GPU here"), (["contenders=x"], "some of abcd"),
    (["episodes=many"], "episodes is 'many', but must be a whole number"), (["slot=3"], "there is no key 'slot'"),
    (["repetition=3"], "did you mean 'repetitions'"), (["repetitions=0"], "must be 1 or more")])
def test_bad_input_is_one_line(args, said):
    if args == ["gpu"] and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=said):
        bench.main(args)


def test_its_own_defaults_are_known_keys():
    for what, more in bench.DEFAULTS.items():
        own_keys, rest = bench.parted(more)
        assert set(own_keys) == set(bench.OWN) and load_config([str(ROOT / "config.yaml"), *rest]), what


def test_a_model_of_the_general_way_is_one_line(monkeypatch, settings, tiny):
    model = tiny_model("lfm2")
    monkeypatch.setattr(bench, "policy", lambda *_: (model, tiny[1]))
    with pytest.raises(UserError, match="goes the general way, which is not measured here"):
        bench.training(settings(), {})
