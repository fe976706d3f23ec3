"""The general way (scale/general.py), as the slow twin of the forking engine and of packed rows, and on models that they
do not take."""
import random
from collections import deque

import pytest
import torch

from conftest import run_of, shake
from engine import Ask, Engine, Job
from envs import Quest
from lora import add_lora, lora_parameters
from packing import Segment, pack, token_logp
from scale.general import General
from test_engine import play_trees


@pytest.mark.parametrize("pads", [True, False])
def test_trees_of_the_general_engine_equal_the_forking_one_s_token_for_token(pads, own_tiny, settings, monkeypatch):
    model, chat = own_tiny
    model.pads, found = pads, []
    cfg = settings("slots=5", "reflect_every=3", "action_tokens=6", "reflect_tokens=12", "horizon=6")
    for forks in (True, False):
        model.forks = forks
        run = run_of(cfg, (model, chat))
        engine = run.policy.engine()
        assert isinstance(engine, General) != forks
        found.append(sorted((b.task, b.name, b.end, [t.action_ids for t in b.turns])
                            for b in play_trees(engine, run, Quest().tasks("valid")[:3], [])))
    assert found[0] == found[1] and len(found[0]) == 9


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
        return first, (yield Ask(chat.first("rules", "go" * 900), 900)), (yield Ask(chat.first("rules", "then"), 5, 0.0))

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
