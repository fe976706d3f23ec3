"""One GPU, simulated (fake_cuda.py): no tensor on the wrong device, few copies and waits a step, memory that runs out anywhere."""
import random
from collections import deque

import pytest
import torch
from torch import nn

import eval as eval_py
import packing
import train
from config import load_config
from conftest import ROOT, family, run_of, shake
from engine import Ask, Chat, Engine, Job
from fake_cuda import FakeCuda
from leafe import targets
from lora import add_lora, load_model, lora_layers
from packing import packed_nll, training_rows
from run import read_jsonl
from tools.families import tiny_model

LENGTHS = (7, 30, 5, 270, 12, 41)           # 256 columns are too few for one of them


def model_of(dtype="bfloat16", adapter=True):
    model, tokenizer = load_model("tiny", False, 768, dtype)
    if adapter:
        add_lora(model, 4, 8, seed=0)
        shake(model, size=0.05)
    return model, Chat(tokenizer)


def talk(seed):
    """Two or three replies of some tokens, with a few words in between."""
    rng = random.Random(seed)
    ids = [rng.randrange(6, 400) for _ in range(LENGTHS[seed % len(LENGTHS)])]
    for _ in range(rng.randrange(2, 4)):
        reply = yield Ask(ids, rng.randrange(2, 6), 0.0 if seed % 3 == 0 else None)
        ids = ids + reply + [rng.randrange(6, 400) for _ in range(rng.randrange(1, 9))]
    return ids


def play(engine, count=9):
    jobs = [Job(talk(n % 6), random.Random(n), str(n % 6), snapshot=True) for n in range(count)]
    ended = list(engine.run(deque(jobs)))
    assert len(ended) == count == len({id(job) for job in ended}) and not engine.live and not engine.parked
    return [(job.result, job.rng.random()) for job in jobs]


@pytest.mark.parametrize("dtype, vocabulary", [("bfloat16", 8192), ("float32", 8192), ("float32", 10)])
def test_replies_are_those_of_a_cpu_token_for_token(dtype, vocabulary, settings):
    """With an adapter; with few tokens, and, as for a large vocabulary, by a race of all of them."""
    def replies(cuda):
        model, chat = model_of(dtype)
        assert next(model.parameters()).device.type == ("cuda" if cuda else "cpu")
        engine = Engine(model, chat.stop, settings("slots=5", "snapshot_mb=64"))
        engine.padded, engine.many_tokens = True, vocabulary
        return play(engine)
    with FakeCuda():
        found = replies(True)
    assert found == replies(False)


FAULTS = {
    "ids left on the host": lambda model: model(input_ids=torch.tensor([[5, 6]])),
    "positions left on the host": lambda model: model(input_ids=torch.tensor([[5, 6]], device="cuda"),
                                                      position_ids=torch.arange(2)[None]),
    "a mask on the host": lambda model: nn.functional.scaled_dot_product_attention(
        *[torch.ones(1, 1, 2, 4, device="cuda")] * 3, attn_mask=torch.ones(2, 2, dtype=torch.bool)),
    "a generator of the host": lambda model: torch.rand(3, device="cuda", generator=torch.Generator()),
    "the device's index into the host's tensor": lambda model: torch.ones(4)[torch.tensor([1], device="cuda")],
    "the host's index to gather": lambda model: torch.ones(1, 4, device="cuda").gather(1, torch.tensor([[1]])),
    "weights of the loss left on the host": lambda model: torch.ones(4, device="cuda") @ torch.ones(4, 2),
    "a sum on the host": lambda model: torch.zeros(2).add_(torch.ones(2, device="cuda")),
    "numpy of the device's": lambda model: torch.ones(2, device="cuda").numpy(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_on_the_wrong_device_is_caught(fault):
    with FakeCuda():
        model = model_of()[0]
        with pytest.raises((RuntimeError, TypeError), match="same device|device type"):
            FAULTS[fault](model)


def test_a_decode_step_copies_once_and_waits_once_however_many_rows_and_layers(settings):
    with FakeCuda() as gpu:
        model, chat = model_of()
        for slots in (2, 6):
            # not captured; what a captured step is: test_captured.py
            engine = Engine(model, set(), settings(f"slots={slots}", "context=256", "captured=false"))
            ended = engine.run(deque(Job(one_reply(n), random.Random(n), str(n)) for n in range(slots)))
            steps, forwards = [], engine._forward

            def counted(rows, upto=None):
                gpu.clear()
                forwards(rows, upto)
                if rows and all(len(job.ids) - job.reply_at > 1 for job in engine.live):
                    steps.append((gpu.total("to device"), gpu.total("waits"), gpu.total("to host"), sum(gpu.calls.values())))
            engine._forward = counted
            list(ended)
            assert len(steps) > 5 and {step[:3] for step in steps} == {(1, 1, 0)}, gpu.counts
            assert max(step[3] for step in steps) <= 61 * model.config.num_hidden_layers      # 78 a layer before


def one_reply(n):
    yield Ask([5 + n] * (3 + n), 9)


def test_a_training_row_brings_no_mask_and_an_optimiser_step_waits_once(grown, settings):
    cfg, trees = settings("corrections=all", "rehearsal_share=1", "row_tokens=1500", "batch_tokens=3000", "steps=3",
                          "lr=0.001", "checkpoint_every=1000"), grown[1][:6]
    with FakeCuda() as gpu:
        model, chat = model_of(adapter=False)
        run = run_of(cfg, (model, chat), folder=True)
        rows = training_rows(trees, train.loss_weights(trees, targets(trees, cfg, chat.stop), 1.0), cfg.row_tokens)
        waits, per_row = [], []
        real_gradients, real_tried = train.gradients, train.tried

        def gradients(*args):
            gpu.clear()
            found = real_gradients(*args)
            waits.append(gpu.total("waits"))
            return found

        def tried(run, objective, row, *rest):
            before = gpu.total("to device"), gpu.total("waits")
            found = real_tried(run, objective, row, *rest)
            per_row.append((gpu.total("to device") - before[0], gpu.total("waits") - before[1]))
            assert gpu.large < len(row.ids) ** 2 / 8
            return found
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "gradients", gradients)
            patch.setattr(train, "tried", tried)
            train.fit(run, 1, ("L_cf", "beta_L_reh"), rows)
    assert waits == [1, 1] + waits[2:] and set(per_row) == {per_row[0]} and per_row[0][0] <= 8 and per_row[0][1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method, keys", [
    ("leafe", ["load_in_4bit=true", "gradient_checkpointing=true"]), ("grpo", ["load_in_4bit=false", "env_steps=120"])])
def test_a_whole_run_stays_on_its_device_resumes_and_is_evaluated(method, keys, tmp_path, capsys):
    words = [str(ROOT / "config.yaml"), "preset=smoke", f"method={method}", "train_tasks=2", "test_tasks=2", "samples=2", "ks=[1,2]",
             "attempts=3", "steps=2", f"out={tmp_path}/run", *keys]
    with FakeCuda() as gpu:
        train.whole_run(load_config(words))
        assert gpu.total("to device") > 50
        made = (tmp_path / "run" / "passk.json").read_bytes()
        (tmp_path / "run" / "passk.json").unlink()
        train.whole_run(load_config(words))
        assert (tmp_path / "run" / "passk.json").read_bytes() == made
        eval_py.main([str(ROOT / "config.yaml"), "preset=smoke", "test_tasks=2", "samples=2", "ks=[1,2]",
                      f"adapter={tmp_path}/run/adapter", f"out={tmp_path}/eval", *[key for key in keys if "4bit" in key]])
    assert len(list(read_jsonl(tmp_path / "eval" / "samples.jsonl"))) == 4
    capsys.readouterr()


def test_memory_may_run_out_at_any_place_of_sampling_and_the_samples_are_the_same(settings, capsys):
    cfg = settings("slots=4", "snapshot_mb=64")
    with FakeCuda(track=True) as gpu:
        model, chat = family("llama", num_hidden_layers=2).to("cuda"), model_of("float32")[1]
        gpu.clear()
        plain, places = play(Engine(model, chat.stop, cfg), 5), gpu.places
        wanted = [(place, n) for place, count in places.items() for n in sorted({1, count})]
        assert len(wanted) > 20 and {"cache.py:hold", "engine.py:_hidden", "forward.py:side_by_side"} < set(places)
        for place, n in wanted:
            gpu.clear()
            gpu.fail = place, n
            assert play(Engine(model, chat.stop, cfg), 5) == plain, (place, n)
    assert capsys.readouterr().err.count("going on with slots=2\n") > 10


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
                                   RuntimeError("CUDA error: out of memory")])
def test_a_snapshot_that_finds_no_memory_is_left_out_and_takes_others_with_it(error, tiny, settings, capsys):
    for fails_at in range(1, 10):
        engine, calls = Engine(tiny[0], tiny[1].stop, settings("slots=4", "snapshot_mb=64")), 0
        copy = engine._kept

        def short(x):
            nonlocal calls
            calls += 1
            if calls == fails_at * 8:
                raise error
            return copy(x)
        engine._kept = short
        plain = Engine(tiny[0], tiny[1].stop, settings("slots=4", "snapshot_mb=64"))
        assert play(engine) == play(plain) and engine.slots == 4
    assert not capsys.readouterr().err


def test_what_a_world_says_of_memory_is_its_own_error(tiny, settings):
    def one():
        yield Ask(tiny[1].first("rules", "step 1: you are in the hall."), 4)
        raise RuntimeError("the dragon is out of memory")
    with pytest.raises(RuntimeError, match="dragon"):
        list(Engine(tiny[0], tiny[1].stop, settings("slots=4")).run(deque([Job(one(), random.Random(0), "a")])))


def test_snapshots_go_before_rows_where_they_share_a_memory(tiny, settings, capsys):
    engine = Engine(tiny[0], tiny[1].stop, settings("slots=4", "snapshot_mb=64"))
    real, failed = engine._hidden, []

    def short(*args):
        if engine.kept and not failed:
            failed.append(sum(one.nbytes for family in engine.kept.values() for one in family))
            raise torch.OutOfMemoryError
        return real(*args)
    engine._hidden = short
    plain = play(Engine(tiny[0], tiny[1].stop, settings("slots=4", "snapshot_mb=64")))
    assert play(engine) == plain and engine.slots == 4 and engine.budget == failed[0] // 2


def test_a_card_without_bfloat16_computes_in_float16_and_another_may_be_asked_for():
    def dtype(gpu, *more):
        with gpu:
            return next(load_model("tiny", False, 768, *more)[0].parameters()).dtype
    assert [dtype(FakeCuda()), dtype(FakeCuda(bfloat16=False))] == [torch.bfloat16, torch.float16]
    assert dtype(FakeCuda(), "float32") == torch.float32
    assert next(load_model("tiny", False, 768)[0].parameters()).dtype == torch.float32


def test_float16_learns_what_float32_does_with_gradients_that_would_vanish(grown, settings, monkeypatch):
    """The losses are weighed so low that without their scale a half of the gradients would be zero; the scale is found where
    the first ones overflow."""
    cfg, trees = settings("corrections=all", "rehearsal_share=1", "row_tokens=1500", "steps=1", "clip=1e9"), grown[1][:2]
    found = {}
    for dtype in ("float32", "float16"):
        model, chat = model_of(dtype, adapter=False)
        run = run_of(cfg, (model, chat))
        weights = train.loss_weights(trees, targets(trees, cfg, chat.stop), 1.0)
        batch = train.Batch(training_rows(trees, weights, cfg.row_tokens)[:1], 1e-5, 1.0, None)
        room = train.Room(False, cfg.row_tokens, 2.0**16 if train.half(model) else 1.0)
        objective = train.Objective(("L_cf", "beta_L_reh"), lambda model, row: packed_nll(model, [row]), 1)
        figures = train.gradients(run, objective, batch, room)
        found[dtype] = figures, torch.cat([p.grad.flatten() for p in run.policy.parameters()])
    (whole, exact), (rounded, near) = found["float32"], found["float16"]
    assert torch.allclose(torch.tensor(rounded), torch.tensor(whole), rtol=0.02)
    assert (near - exact).norm() < 0.05 * exact.norm()
    room.loss_scale = 2.0**60
    assert train.gradients(run, objective, batch, room)[:2] == rounded[:2] and 1 < room.loss_scale < 2.0**50


def test_a_large_vocabulary_costs_a_chunk_of_logits_and_its_gradient_is_the_same(monkeypatch):
    model = tiny_model("llama")
    add_lora(model, 4, 8, seed=0)
    shake(model)
    ids = torch.randint(5, 400, (60,))
    row = packing.pack([[packing.Segment(ids.tolist(), [1.0] * 60, None)]])
    parameters = [p for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)]

    def gradient():
        widest.clear()
        loss = packed_nll(model, [row])
        return loss, torch.autograd.grad(loss.sum(), parameters)
    widest, plain = [], packing.logits
    monkeypatch.setattr(packing, "logits", lambda model, states: widest.append(len(states)) or plain(model, states))
    expected, whole = gradient()
    assert widest == [59]
    monkeypatch.setattr(packing, "LOGITS_BYTES", 4 * 16 * model.get_output_embeddings().weight.shape[0])
    loss, chunked = gradient()
    assert max(widest[:4]) == 16 and len(widest) == 8                      # each chunk twice
    assert torch.allclose(loss, expected) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(chunked, whole))


def test_a_row_s_halves_have_its_losses_and_gradients(grown, own_tiny, settings):
    cfg, trees = settings("corrections=all", "rehearsal_share=1"), grown[1][:6]
    model = own_tiny[0]
    add_lora(model, 4, 8, seed=0)
    shake(model, size=0.05)
    weights = train.loss_weights(trees, targets(trees, cfg, own_tiny[1].stop), 1.0)
    row = max(training_rows(trees, weights, 1500), key=lambda row: len(row.targets))
    parts, whole = [row], packed_nll(model, [row])
    for _ in range(4):
        parts = [half for part in parts for half in (packing.halves(part) if len(part.targets) > 1 else [part])]
    assert len(parts) > 10 and sum(len(part.targets) for part in parts) == len(row.targets)
    assert max(len(part.ids) for part in parts) < 0.5 * len(row.ids)
    assert torch.allclose(sum(packed_nll(model, [part]) for part in parts), whole, rtol=1e-5)
