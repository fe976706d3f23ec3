"""The forking engine and packed rows on families whose heads, windows, caches or positions are not Llama's: each token's
log-probability is what the model itself says of that conversation alone."""
import random
from collections import deque

import pytest
import torch
import transformers

import forward
from engine import Ask, Engine, Job
from models.check import check_layers
from packing import Segment, pack, packed_nll
from tools.families import tiny_model

# windows hold eight tokens, conversations up to 56; transformers 5.4 lacks some, or cannot make their configs
NEW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
WIDENED = ["afmoe", "deepseek_v3", "gemma2", "gemma3_text", "gpt_oss", "granite", "ministral", "mistral"] + NEW * [
    "cohere2", "gemma4_text, shared keys", "granitemoehybrid, attention", "minicpm3", "olmo3"]
HEADS = ["biogpt", "cohere", "gemma2", "gemma3", "gpt2", "granite", "nanochat"] + NEW * ["falcon_h1", "hyperclovax"]
OWN = {"afmoe", "deepseek_v3", "gemma4_text, shared keys", "minicpm3"}        # attention that takes batches alone
MIXED = {"bamba": "layers", "bart": "counts positions itself", "gpt_neo": "keeps masks of its own",
         "llama4_text": "has chunked_attention layers", "mamba": "layers", "zamba2": "layers"}


def some(n, rng):
    return [rng.randrange(5, 470) for _ in range(n)]


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_model_whatever_its_head_does(name):
    model, ids = tiny_model(name), torch.arange(3, 15).view(2, 6)
    right = model(input_ids=ids).logits
    found = forward.logits(model, model.get_decoder()(input_ids=ids).last_hidden_state.flatten(0, 1))
    assert torch.equal(found, right.flatten(0, 1))


def talk(seed):
    """Conversations of an even seed share their beginning, and so do those of an odd one."""
    rng = random.Random(seed)
    ids = some(11, random.Random(seed % 2)) + some(3, rng)
    while True:
        reply = yield Ask(ids, rng.randrange(1, 7))
        if reply is None:
            return
        ids = ids + reply + some(rng.randrange(1, 9), rng)


@pytest.mark.parametrize("name, way", [
    (name, way) for name in WIDENED for way in ("one by one", "side by side", "batches") if way == "batches" or name not in OWN])
def test_sampled_tokens_have_the_probabilities_of_the_conversation_alone(name, way, settings):
    model, drawn_from = tiny_model(name), []
    model.ragged = way != "batches"
    engine = Engine(model, {3}, settings("slots=3", "context=56", "snapshot_mb=16"))
    engine.padded = way == "side by side"              # as on a GPU
    draw = engine._sample

    def spy(logits, jobs, draws):
        drawn_from.extend((list(job.ids), of.clone()) for of, job in zip(logits, jobs))
        return draw(logits, jobs, draws)
    engine._sample = spy
    list(engine.run(deque(Job(talk(i), random.Random(i), str(i % 2), snapshot=True) for i in range(4))))
    assert max(len(ids) for ids, _ in drawn_from) > 45 and engine.fed < 0.5 * engine.seen
    for ids, logits in drawn_from[::3]:
        alone = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(logits.log_softmax(-1), alone.log_softmax(-1), atol=1e-4), len(ids)


@pytest.mark.parametrize("rows, heads", [((0, 1, 3), 4), ((1, 4), 4), ((2, 0), 2)], ids=["most rows", "few", "shared keys"])
def test_parts_side_by_side_are_what_they_are_one_by_one(rows, heads):
    kept, parts = [torch.randn(6, heads, 20, 8) for _ in range(2)], []
    for row, (size, end) in zip(rows, ((1, 9), (5, 20), (1, 1))):
        begun = parts[-1].tokens.stop if parts else 0
        parts.append(forward.Part(slice(begun, begun + size), row, slice(0, end)))
    last = torch.cat([torch.arange(part.keys.stop)[part.tokens.start - part.tokens.stop:] for part in parts])
    mask = torch.zeros(1, 1, len(last), 20).masked_fill_(torch.arange(20) > last[:, None], -torch.inf)
    places = forward.places(parts)
    mask.parts, mask.whole, mask.places = parts, True, places.on(list(map(torch.tensor, places.numbers)))
    query = torch.randn(1, 4, len(last), 8)
    found = forward.side_by_side(query, kept, mask, None)
    assert torch.allclose(found, forward.one_by_one(query, kept, mask, None), atol=1e-6)
    assert isinstance(mask.places.rows, slice) == (len(rows) == 3)


def tree(seed):
    """A trunk of 30 tokens and four branches; the second half of each segment bears loss."""
    rng, found = random.Random(seed), []
    for size, parent in ((30, None), (9, 0), (7, 0), (8, 1), (6, 1)):
        found.append(Segment(some(size, rng), [0.0] * (size // 2) + [1.0] * (size - size // 2), parent))
    return found


def alone(model, tree):
    """The summed loss, each segment behind its ancestors as the only conversation."""
    total = 0.0
    for segment in tree:
        ids, above = segment.ids, segment
        while above.parent is not None:
            above = tree[above.parent]
            ids = above.ids + ids
        logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        said = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        total -= said[-(len(segment.ids) - len(segment.ids) // 2):].sum()
    return total


@pytest.mark.parametrize("name", WIDENED)
def test_packed_loss_and_gradient_are_those_of_each_conversation_alone(name):
    model = tiny_model(name)
    weights = [p.requires_grad_() for layer in model.get_decoder().layers for p in layer.parameters()]
    alike = alone(model, tree(0)) + alone(model, tree(1))
    right = torch.autograd.grad(alike, weights, allow_unused=True)
    # two trees in a row, and two rows side by side
    for rows in ([pack([tree(0), tree(1)])], [pack([tree(0)]), pack([tree(1)])]):
        loss = packed_nll(model, rows).sum()
        assert torch.allclose(loss, alike, rtol=1e-5)
        for found, one in zip(torch.autograd.grad(loss, weights, allow_unused=True), right):
            assert (found is None and one is None) or torch.allclose(found, one, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_tokens_otherwise_is_told_before_anything_is_computed(name):
    model = tiny_model(name)
    with pytest.raises(NotImplementedError, match=f"{type(model).__name__} .*{MIXED[name]}"):
        check_layers(model)
