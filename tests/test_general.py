"""The general way (scale/general.py), as the slow twin of the forking engine and of packed rows, and on models that
they do not take."""
import random
from collections import deque
from concurrent.futures import Future

import pytest
import torch

from conftest import run_of, shake
from engine import Ask, Engine, Job
from envs import Quest
from lora import add_lora, lora_parameters
from packing import Segment, pack, token_logp
from scale.general import General
from test_engine import play_trees
from tools.families import tiny_model
from train import fit


@pytest.mark.parametrize("pads", [True, False])
def test_trees_of_the_general_engine_equal_the_forking_one_s_token_for_token(pads, own_tiny, settings, monkeypatch):
    model, chat = own_tiny
    model.pads, found = pads, []
    cfg = settings("slots=5", "reflect_every=3", "action_tokens=6", "reflect_tokens=12", "horizon=4")
    for forks in (True, False):
        model.forks = forks
        run = run_of(cfg, (model, chat))
        engine = run.policy.engine()
        assert isinstance(engine, General) != forks
        found.append(sorted((b.task, b.name, b.end, [t.action_ids for t in b.turns])
                            for b in play_trees(engine, run, Quest().tasks("valid")[:1 + pads], [])))
    assert found[0] == found[1] and len(found[0]) == 3 * (1 + pads)


def test_rows_one_path_at_a_time_have_the_packed_rows_loss_and_gradient(own_tiny):
    model = own_tiny[0]
    add_lora(model, 4, 8, seed=0)
    shake(model, size=0.05)
    torch.manual_seed(0)

    def some(n, first=0.0):
        return torch.randint(6, 400, (n,)).tolist(), [first] + [0.0] * (n - 4) + [1.0] * 3
    # targets on a trunk, on both its branches, and none on a middle segment; then a tree of one segment
    tree = [Segment(*some(30, 1.0), None), Segment([7, 8], [0.0, 0.0], 0), Segment(*some(9), 1),
            Segment(*some(7), 1), Segment(*some(8), 2)]
    rows, found = [pack([tree, [Segment(*some(12), None)]]), pack([[Segment(*some(5), None)]])], []
    for packs in (True, False):
        model.packs = packs
        logp = token_logp(model, rows)
        (logp * torch.linspace(1, 2, len(logp))).sum().backward()
        found.append((logp.detach(), [p.grad.clone() for p in lora_parameters(model)]))
        for p in lora_parameters(model):
            p.grad = None
    (packed, packed_grads), (general, general_grads) = found
    assert packed.shape == (18,) and torch.allclose(packed, general, atol=2e-5)
    for one, other in zip(packed_grads, general_grads):
        assert (one - other).norm() <= 1e-4 * one.norm() > 0


def test_the_general_engine_goes_on_after_memory_ran_out_in_a_reply(own_tiny, settings, capsys):
    model, chat = own_tiny

    def one(n):
        first = yield Ask(chat.first("rules", "step 1: you are in the hall." * n), 12)
        second = yield Ask(chat.first("rules", "go" * 900), 900)
        return first, second, (yield Ask(chat.first("rules", "then"), 5, 0.0))

    def play(engine):
        jobs = [Job(one(n), random.Random(n), "a") for n in range(1, 9)]
        ended = list(engine.run(deque(jobs)))
        assert len(ended) == 8
        return [job.result for job in jobs], [job.rng.random() for job in jobs]
    cfg, calls = settings("slots=8", "context=768"), 0
    plain, engine = play(Engine(model, chat.stop, cfg)), General(model, chat.stop, cfg)
    assert all(second is None for _, second, _ in plain[0])                   # no room
    real = engine._draw

    def short(logits, *rest):
        nonlocal calls
        calls += 1
        if len(logits) > 3 and calls > 4:
            raise torch.OutOfMemoryError
        return real(logits, *rest)
    engine._draw = short
    assert play(engine) == plain and engine.slots <= 3
    assert f"going on with slots={engine.slots}\n" in capsys.readouterr().err


class Watched(General):
    """Notes how far the log-probabilities that a token is drawn by are from the model's own of that conversation."""
    apart = 0.0

    def _sample(self, logits, jobs, draws):
        alone = torch.cat([self._alone(job.ids) for job in jobs])
        self.apart = max(self.apart, float((logits.log_softmax(-1) - alone.log_softmax(-1)).abs().max()))
        return super()._sample(logits, jobs, draws)


@pytest.mark.parametrize("name, pads, caches", [                 # as models/check.py finds them
    ("mamba2", True, True), ("lfm2", True, True), ("qwen3_next", True, True), ("jamba", True, True),
    ("recurrent_gemma", False, True), ("llama4_text", False, True), ("zamba2", False, False)])
def test_what_no_fork_takes_is_sampled_and_trained_as_each_conversation_alone(name, pads, caches, settings):
    model = tiny_model(name).float().eval().requires_grad_(False)
    model.pads, model.caches, model.packs, rng = pads, caches, False, random.Random(0)
    model.generation_config.update(repetition_penalty=3.0, suppress_tokens=[7, 8, 9], eos_token_id=10)      # not pi's

    def one(ids):
        reply = yield Ask(ids, rng.randint(1, 6))
        return ids + reply + (yield Ask([*ids, *reply, 7, 8], 3))
    engine = Watched(model, set(), settings("slots=4", "context=64"))
    prompts = [[rng.randint(5, 400) for _ in range(n)] for n in (5, 19, 12, 12, 5, 9)]
    jobs = [Job(one(ids), random.Random(n), "a") for n, ids in enumerate(prompts)]
    assert len(list(engine.run(deque(jobs)))) == 6 and engine.apart < 5e-5
    root, left, right = prompts[1], jobs[0].result[5:], jobs[1].result[19:]
    row = pack([[Segment(root, [0.0] * 19, None), Segment(left, [1.0] * len(left), 0),
                 Segment(right, [1.0] * len(right), 0)]])
    alone = []
    for reply in (left, right):
        logp = model(input_ids=torch.tensor([root + reply])).logits[0, 18:-1].log_softmax(-1)
        alone.append(logp.gather(1, torch.tensor(reply)[:, None])[:, 0])
    assert torch.allclose(token_logp(model, [row]), torch.cat(alone), atol=5e-5)


def test_a_model_with_convolutions_learns_what_its_rows_say(tiny, settings):
    model = tiny_model("lfm2").float().eval().requires_grad_(False)
    model.packs = False
    cfg = settings("steps=8", "warmup=1", "lr=0.03", "gradient_checkpointing=true")
    run = run_of(cfg, (model, tiny[1]), folder=True)
    none, cf, reh = (0.0, 0.0), (0.5, 0.0), (0.0, 0.5)
    tree = [Segment([9, 8, 7, 6], [none] * 4, None), Segment([20, 21], [cf] * 2, 0), Segment([30, 31], [reh] * 2, 0)]
    fit(run, 1, ("L_cf", "beta_L_reh"), [pack([tree])])
    first, *_, last = run.metrics.records
    run.folder.close()
    assert last["step"] == 8 and last["L_cf"] < first["L_cf"] / 2 and last["beta_L_reh"] < first["beta_L_reh"] / 2
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_episode_that_waits_for_its_world_holds_up_no_other_and_all_are_closed(tiny, settings):
    model, chat = tiny
    answer, closed, prompt = Future(), [], chat.first("rules", "step 1: you are in the hall.")

    def waits():
        told = yield answer
        return told, (yield Ask(prompt, 3))

    def goes():
        reply = yield Ask(prompt, 3)
        answer.set_result("the attic is dark.")
        return reply

    def stays():
        try:
            yield Ask(prompt, 3)
        finally:
            closed.append(1)
    engine = General(model, chat.stop, settings("slots=2", "context=64", "temperature=0"))
    first, second = engine.run(deque([Job(waits(), random.Random(0), "a"), Job(goes(), random.Random(1), "b")]))
    assert second.result == ("the attic is dark.", first.result) and 0 < len(first.result) <= 3
    engine._draw, own = lambda *_: 1 / 0, model.generation_config
    with pytest.raises(ZeroDivisionError):
        list(engine.run(deque(Job(stays(), random.Random(n), "a") for n in range(2))))
    assert closed == [1, 1] and model.generation_config is own
