import copy
import random
import warnings
import weakref
from collections import deque
from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AttentionInterface

import forward
from cache import SlotCache
from config import UserError
from conftest import family, run_of, shake
from engine import Ask, Chat, Engine, Job
from envs import Quest
from leafe import TURN, Attempt, episode, targets
from lora import add_lora, adapter_off, lora_parameters
from packing import Segment, pack, packed_nll, rows_of
from train import loss_weights


def spy(attempt, log):
    """Run an episode and note every context that it asked with, and the reply it got."""
    reply = None
    while True:
        try:
            ask = attempt.send(reply)
        except StopIteration as end:
            return end.value
        reply = yield ask
        log.append((ask, reply))


def job_of(run, task, name="0", reflect=True, seed=None):
    """A plain rollout."""
    return Job(episode(run, Quest(), Attempt(task, name), reflect),
               random.Random(f"{task}/{name}" if seed is None else seed), task)


def play_trees(engine, run, tasks, log, seed=0):
    """Plain rollouts, then branches at random tau with a hint, from ended rollouts: all in one engine."""
    rng, branches = random.Random(seed), []

    def job(attempt):
        return Job(spy(episode(run, Quest(), attempt, True), log), random.Random(attempt.task), attempt.task,
                   snapshot=True)
    queue = deque(job(Attempt(task, "0")) for task in tasks)
    for ended in engine.run(queue):
        branch = ended.result
        branches.append(branch)
        if branch.name == "0":
            for n in range(2):
                past = branch.turns[:rng.randint(1, len(branch.turns))]
                queue.append(job(Attempt(branch.task, f"0.{n}", past, "the attic needs the rope from the cellar.")))
    return branches


@pytest.mark.parametrize("name, keep, slots", [
    ("tiny", True, 7), ("tiny", False, 64), ("llama", True, 5), ("qwen2", False, 9), ("qwen3", True, 9),
    ("mistral", False, 5), ("adapter", True, 6)])
def test_forked_generation_equals_generate_token_for_token(name, keep, slots, tiny, own_tiny, settings):
    chat = tiny[1]
    model = own_tiny[0] if name == "adapter" else tiny[0] if name == "tiny" else family(name)
    if name == "adapter":
        add_lora(model, 4, 8, seed=0)
        shake(model)
    cfg = settings(f"keep_experience={str(keep).lower()}", "temperature=0", "reflect_temperature=0",
                   "reflect_every=3", "action_tokens=6", "reflect_tokens=9", f"slots={slots}", "snapshot_mb=64")
    engine, log = Engine(model, chat.stop, cfg), []
    count = 12 if name in ("tiny", "adapter") else 4              # tasks; three episodes each
    branches = play_trees(engine, run_of(cfg, (model, chat)), Quest().tasks("valid")[:count], log)
    assert len(branches) == 3 * count and len(log) > 15 * count
    assert engine.fed < 0.5 * engine.seen                         # it did fork and did keep what it had
    for ask, reply in log:
        context = torch.tensor([ask.context])
        out = model.generate(context, attention_mask=torch.ones_like(context), do_sample=False,
                             max_new_tokens=ask.max_new, eos_token_id=list(chat.stop), pad_token_id=0)
        assert out[0, context.shape[1]:].tolist() == reply


@pytest.mark.parametrize("keep", ["true", "false"])
def test_what_was_sampled_is_fed_again_id_by_id_and_not_as_its_text_would_be(keep, tiny, settings):
    chat, run = tiny[1], run_of(settings("reflect_every=3", f"keep_experience={keep}"), tiny)
    odd = [chat.tokenizer.pad_token_id, *chat.ids("take hat"), chat.end]          # its text is `take hat` alone
    assert chat.ids("", chat.text(odd)) != odd[:-1]
    branch, contexts = drive(episode(run, Quest(), Attempt("train-1-0000", "0"), True), odd)
    paths = [sum((turn.ids for turn in branch.turns[:n]), []) for n in range(9)]
    for n, turn in enumerate(branch.turns):
        assert paths[n] + turn.obs_ids in contexts and turn.action_ids == odd
    for reflection in branch.reflections:
        assert any(context[:len(paths[reflection.t])] == paths[reflection.t] for context in contexts)
    assert len(contexts) == len(branch.turns) + len(branch.reflections) == 8 + 3


def test_a_draw_at_the_edge_between_two_tokens_is_settled_by_that_conversation_alone(tiny, settings):
    engine = Engine(tiny[0], tiny[1].stop, settings("slots=2", "context=64", "snapshot_mb=0"))
    job = Job(iter(()), random.Random(0), "a")
    job.ids = tiny[1].first("rules", "step 1: you are in the hall.")
    with torch.inference_mode():
        own = engine._alone(job.ids)
        token = int(own.argmax())
        u = float(own.softmax(-1).cumsum(-1, dtype=torch.float64)[0, token]) - 1e-7
        rounded = own.clone()
        rounded[0, token + 1:] += 1e-4                                   # as another shape of batch may round
        draws = torch.tensor([u, 1.0], dtype=torch.float64)
        assert int(engine._draw(rounded, draws[:1, None], draws[1:, None], [False])[0]) != token
        assert engine._sample(rounded, [job], draws) == [token]


def test_samples_do_not_depend_on_slots_memory_or_order(tiny, settings):
    found = []
    for slots, memory, reverse in ((64, 64, False), (3, 64, False), (20, 0, True)):
        run = run_of(settings(f"slots={slots}", f"snapshot_mb={memory}"), tiny)
        jobs = [job_of(run, task, str(i)) for task in Quest().tasks("valid")[:10] for i in range(3)]
        for job in jobs:
            job.snapshot = True
        queue = deque(reversed(jobs) if reverse else jobs)
        found.append(sorted(((b := job.result).task, b.name, [t.action_ids for t in b.turns])
                            for job in run.policy.engine().run(queue)))
    assert found[0] == found[1] == found[2]


def test_sampling_is_the_inverse_of_the_distribution_with_a_fresh_uniform_for_every_token(tiny, settings):
    model, chat = tiny
    prompt = chat.first("rules", "step 1: you are in the hall.")

    def one():
        reply = yield Ask(prompt, 12)
        return reply
    for seed, heat in ((0, 1.0), (1, 1.0), (2, 2.0)):
        cfg = settings("slots=1", "context=64", f"temperature={heat}", "snapshot_mb=8")
        job, = Engine(model, set(), cfg).run(deque([Job(one(), random.Random(seed), "a")]))
        rng, ids = random.Random(seed), list(prompt)
        for _ in range(12):
            p = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / heat).softmax(-1)
            ids.append(int((p.cumsum(0) < rng.random()).sum()))
        assert job.result == ids[len(prompt):] and len(set(job.result)) > 1


def test_the_draw_of_a_large_vocabulary_is_from_the_same_distribution_and_as_independent(tiny, settings):
    engine, rng = Engine(tiny[0], tiny[1].stop, settings("slots=1", "context=64", "snapshot_mb=0")), random.Random(0)
    logits, heat = torch.tensor([0.0, 1.0, 2.0, 2.0, -1.0, -30.0]), 1.5
    us = torch.tensor([[rng.random()] for _ in range(8000)], dtype=torch.float64)
    tokens, edge = engine._race(logits.repeat(8000, 1), us, torch.full_like(us, heat), [False] * 8000)
    shares, n = torch.bincount(tokens, minlength=6) / 8000, 8000
    p = (logits / heat).softmax(-1)
    assert ((shares - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all() and (edge >= 0).all()
    near = torch.tensor([0.0, 1.0, 2.0, 2.0001, -1.0, -30.0])
    token, edge = engine._race(near[None], us[:1], torch.zeros(1, 1, dtype=torch.float64), [True])
    assert token.tolist() == [3] and float(edge) == pytest.approx(1e-4, rel=0.01)
    found = []
    for slots, memory in ((64, 64), (3, 0)):
        run = run_of(settings(f"slots={slots}", f"snapshot_mb={memory}"), tiny)
        engine = run.policy.engine()
        engine.many_tokens = 100
        jobs = deque(job_of(run, task, str(i)) for task in Quest().tasks("valid")[:8] for i in range(3))
        found.append(sorted((b.task, b.name, [t.action_ids for t in b.turns])
                            for b in (job.result for job in engine.run(jobs))))
    assert found[0] == found[1] and len({str(ids) for _, _, ids in found[0]}) > 8


def test_a_reply_may_have_a_temperature_of_its_own(tiny, settings):
    """Greedy replies beside sampled ones: the greedy ones equal generate, whatever their neighbours draw."""
    model, chat = tiny
    contexts = [chat.first(Quest.rules, TURN.format(t=1, obs=Quest().reset(task)))
                for task in Quest().tasks("valid")[:8]]

    def one(context, temperature):
        return (yield Ask(context, 12, temperature))
    engine = Engine(model, chat.stop, settings("slots=5", "context=256", "snapshot_mb=8"))
    jobs = [Job(one(context, 0.0 if i % 2 else None), random.Random(i), str(i)) for i, context in enumerate(contexts)]
    list(engine.run(deque(jobs)))
    for context, job in list(zip(contexts, jobs))[1::2]:
        out = model.generate(torch.tensor([context]), attention_mask=torch.ones(1, len(context)), do_sample=False,
                             max_new_tokens=12, eos_token_id=list(chat.stop), pad_token_id=0)
        assert out[0, len(context):].tolist() == job.result
        assert job.rng.random() == random.Random(jobs.index(job)).random()        # and nothing was drawn
    assert all(job.rng.random() != random.Random(i).random() for i, job in enumerate(jobs) if i % 2 == 0)


def test_sampling_and_training_hand_transformers_nothing_that_it_warns_of(tiny, settings):
    model, chat = tiny

    def one():
        return (yield Ask(chat.first("rules", "step 1: you are in the hall."), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        list(Engine(model, chat.stop, settings("slots=1", "context=64")).run(deque([Job(one(), random.Random(0), "a")])))
        packed_nll(model, [pack([[Segment([5, 6, 7], [0.0, 1.0, 1.0], None)]])])


def fork(engine, snapshot):
    with torch.inference_mode():
        engine.fork(snapshot, 0, 3)


def test_a_stale_snapshot_is_refused_after_a_step_and_after_a_switch(own_tiny, settings):
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)

    def one():
        yield Ask(chat.first("rules", "step 1: you are in the hall."), 4)
    for change in ("step", "switch"):
        engine = Engine(model, chat.stop, settings("slots=2", "context=64", "temperature=0", "snapshot_mb=64"))
        list(engine.run(deque([Job(one(), random.Random(0), "a", snapshot=True)])))
        snapshot = engine.kept["a"][0]
        fork(engine, snapshot)                               # fresh: taken
        if change == "step":
            optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-9)
            for parameter in lora_parameters(model):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            with pytest.raises(AssertionError, match="the weights have changed"):
                fork(engine, snapshot)
        else:
            with adapter_off(model), pytest.raises(AssertionError, match="the weights have changed"):
                fork(engine, snapshot)
            fork(engine, snapshot)                           # switched back: the same weights again


def test_snapshot_memory_stays_within_its_budget(tiny, settings):
    run = run_of(settings("slots=8", "snapshot_mb=4"), tiny)
    engine = run.policy.engine()
    play_trees(engine, run, Quest().tasks("valid")[:6], [])
    assert 0 < sum(s.nbytes for kept in engine.kept.values() for s in kept) <= 4 * 2**20


def test_out_of_memory_at_the_first_snapshot_leaves_room_for_later_ones(tiny, settings, monkeypatch):
    run = run_of(settings("slots=8", "snapshot_mb=64"), tiny)
    engine = run.policy.engine()
    kept, failing = engine._kept, [True]

    def fails_once(x):
        if failing and failing.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kept(x)
    monkeypatch.setattr(engine, "_kept", fails_once)
    play_trees(engine, run, Quest().tasks("valid")[:3], [])
    assert not failing and engine.budget == 32 * 2**20 and any(engine.kept.values())


def test_a_cache_that_grows_holds_one_tensor_more_than_it_needs_at_most(monkeypatch):
    cache, zero, made, most = SlotCache(8, 30), torch.zeros(1, 1, dtype=torch.long), [], [0]
    new_zeros = torch.Tensor.new_zeros

    def told(self, *shape):
        made.append(weakref.ref(new := new_zeros(self, *shape)))
        most[0] = max(most[0], sum(one().nbytes for one in made if one() is not None))
        return new
    monkeypatch.setattr(torch.Tensor, "new_zeros", told)
    cache.hold(1, 30)
    cache.aim(zero, zero, 1)
    for layer in range(5):
        cache.update(torch.full((1, 2, 1, 4), 1.0), torch.full((1, 2, 1, 4), 2.0), layer)
    cache.hold(8, 30)
    sizes = [x.nbytes for layer in cache.layers for x in layer]
    assert sizes == [8 * 2 * 30 * 4 * 4] * 10 and most[0] == sum(sizes) + sizes[0] // 8
    assert all(k[0, :, 0].eq(1).all() and v[0, :, 0].eq(2).all() and not k[1:].any() for k, v in cache.layers)


def test_an_episode_that_outgrows_the_context_ends_and_is_counted(tiny, settings):
    run = run_of(settings("context=150", "slots=4", "snapshot_mb=8"), tiny)
    branches = [job.result for job in run.policy.engine().run(deque(
        job_of(run, task, reflect=False, seed=0) for task in Quest().tasks("valid")[2:6]))]
    assert {b.end for b in branches} == {"context"} and all(b.turns for b in branches)


@pytest.mark.parametrize("where", ["_hidden", "_draw"])
def test_out_of_memory_goes_on_with_fewer_slots_and_the_same_samples(where, tiny, settings, capsys):
    run = run_of(settings("slots=16", "snapshot_mb=64"), tiny)

    def play(engine):
        jobs = [job_of(run, task, str(n)) for task in Quest().tasks("valid")[:10] for n in range(3)]
        return sorted((b.task, b.name, b.end, [t.action_ids for t in b.turns])
                      for b in (job.result for job in engine.run(deque(jobs))))
    plain = play(run.policy.engine())
    engine, calls = run.policy.engine(), 0
    real = getattr(engine, where)

    def short(batch, *rest):
        nonlocal calls
        calls += 1
        if len(batch) > 3 and calls > 12:
            raise torch.OutOfMemoryError
        return real(batch, *rest)
    setattr(engine, where, short)
    assert play(engine) == plain
    assert engine.slots <= 3 and f"going on with slots={engine.slots}\n" in capsys.readouterr().err
    assert not engine.live and not engine.parked


def test_out_of_memory_with_a_single_slot_is_one_line_and_closes_the_episodes(tiny, settings):
    model, chat = tiny
    engine, closed = Engine(model, chat.stop, settings("slots=4", "context=64", "snapshot_mb=64")), []

    def fails(*_):
        raise torch.OutOfMemoryError

    def one():
        try:
            yield Ask(chat.first("rules", "step 1: you are in the hall."), 4)
        finally:
            closed.append(1)
    engine._hidden = fails
    with pytest.raises(UserError, match="out of memory with a single conversation"):
        list(engine.run(deque(Job(one(), random.Random(i), "a") for i in range(4))))
    assert len(closed) == 4


# training rows

def test_packed_equals_one_pair_at_a_time(grown, tiny, own_tiny, settings):
    cfg, trees = settings("corrections=all", "rehearsal_share=1"), grown[1][:8]
    pairs = targets(trees, cfg, tiny[1].stop)
    assert len(pairs.D_cf) >= 8
    model, _ = own_tiny
    model.double()                                                # fp32 rounding would hide a small mistake
    add_lora(model, 4, 8, seed=0)
    model.double()
    shake(model, size=0.05)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    total = torch.zeros(2, dtype=torch.double)
    for group in rows_of(trees, loss_weights(trees, pairs, cfg.beta), cfg.row_tokens):
        assert sum(len(s.ids) for tree in group for s in tree) <= cfg.row_tokens
        losses = packed_nll(model, [pack(group)])
        losses.sum().backward()
        total += losses.detach()
    packed = [p.grad.clone() for p in lora_parameters(model)]
    for p in lora_parameters(model):
        p.grad = None
    plain = torch.zeros(2, dtype=torch.double)
    for column, (part, weight) in enumerate(((pairs.D_cf, 1.0), (pairs.D_reh, cfg.beta))):
        for k, i in part:                                         # slow twin: one (history, action) a forward
            path = trees[k].path(i)
            context = [token for turn in path[:-1] for token in turn.ids] + path[-1].obs_ids
            ids = torch.tensor([context + path[-1].action_ids])
            logits = model(input_ids=ids).logits[0, len(context) - 1:-1]
            nll = torch.nn.functional.cross_entropy(
                logits, ids[0, len(context):], reduction="sum") * weight / len(part)
            nll.backward()
            plain[column] += nll.detach()
    assert torch.allclose(total, plain, rtol=1e-5)
    for p, old in zip(lora_parameters(model), packed):
        assert (p.grad - old).norm() <= 1e-5 * old.norm() and old.norm() > 0


def test_packed_rows_in_fp32_are_within_1e_5_of_one_at_a_time(tiny):
    model = tiny[0]
    torch.manual_seed(0)
    words = lambda n: torch.randint(6, 400, (n,)).tolist()       # noqa: E731
    tree = [Segment(words(40), [0.0] * 40, None)] + [
        Segment(words(9), [0.0] * 6 + [1.0] * 3, parent) for parent in (0, 0, 1, 1, 2)]
    one, two = pack([tree]), pack([tree, [Segment(words(12), [0.0, 1.0] * 6, None)]])
    alone = 0.0
    for i in range(1, 6):
        chain, at = [], i
        while at is not None:
            chain, at = tree[at].ids + chain, tree[at].parent
        ids = torch.tensor([chain])
        alone += torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, -4:-1], ids[0, -3:], reduction="sum").item()
    assert packed_nll(model, [one])[0].item() == pytest.approx(alone, rel=1e-5)
    both = packed_nll(model, [one, two])[0].item()               # padded side by side
    assert both == pytest.approx(
        packed_nll(model, [one])[0].item() + packed_nll(model, [two])[0].item(), rel=1e-5)


def test_the_trees_of_a_packed_row_attend_each_by_itself(tiny, monkeypatch):
    """What it costs, and not only what comes out, is the trees' own."""
    plain, lengths = forward.sdpa_attention_forward, []
    told = partial(forward._attend, lambda module, query, *args, **more: (
        lengths.append(query.shape[2]), plain(module, query, *args, **more))[1])
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", told)
    trees = [[Segment([7] * n, [1.0] * n, None)] for n in (5, 9, 3)]
    whole = packed_nll(tiny[0], [pack(trees)])[0].item()
    assert lengths == [5, 9, 3] * tiny[0].config.num_hidden_layers
    assert whole == pytest.approx(sum(packed_nll(tiny[0], [pack([tree])])[0].item() for tree in trees), rel=1e-5)


def test_the_gradient_of_a_row_has_the_same_bits_with_one_thread_and_with_two(own_tiny):
    model, threads, found = own_tiny[0], torch.get_num_threads(), []
    add_lora(model, 4, 8, seed=0)
    shake(model, size=0.05)
    rng = random.Random(0)
    tree = [Segment([7] * 60, [0.0] * 60, None)]
    tree += [Segment([rng.randrange(6, 400) for _ in range(3)], [1.0] * 3, rng.randrange(n // 20 + 1)) for n in range(200)]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for _ in range(3):
                packed_nll(model, [pack([tree])]).sum().backward()
                found.append(torch.cat([p.grad.flatten() for p in lora_parameters(model)]))
                model.zero_grad()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], one) for one in found)


# chat tokens

def test_chat_pieces_rebuild_what_the_template_renders(tiny):
    chat, tokenizer = tiny[1], tiny[1].tokenizer
    messages = [dict(role="system", content="you are in a house"),
                dict(role="user", content="step 1: find the crown."),
                dict(role="assistant", content="go attic"),
                dict(role="user", content="step 2: the attic is dark.")]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    pieces = (chat.first("you are in a house", "step 1: find the crown.") + chat.ids("go attic<|end|>")
              + chat.next("step 2: the attic is dark."))
    assert pieces == rendered
    assert chat.next("step 2", cut=True) == [tokenizer.eos_token_id] + chat.next("step 2")


TEMPLATES = {                                           # each known trouble, in few words: (template, system role?)
    "begins with BOS": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
        "<|assistant|>", True),
    "refuses a system role": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>", False),
    "drops a system role": (
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}<|assistant|>", False),
    "wants strict alternation": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>", False),
    "moves the system message to the last": (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}<|assistant|>", False),
    "drops earlier thoughts": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] if m.role == 'assistant' "
        "else m.content }}<|end|>{% endfor %}<|assistant|>", True),
    "opens a thought": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>so:", True),
    "ends lines between messages": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ '<|assistant|>\n' }}", True)}


@pytest.mark.parametrize("trouble", TEMPLATES)
def test_chat_pieces_rebuild_what_a_template_with_this_trouble_renders(trouble, tiny):
    tokenizer = copy.deepcopy(tiny[1].tokenizer)
    tokenizer.chat_template, system = TEMPLATES[trouble]
    tokenizer.bos_token = "<|pad|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.bos_token_id)])     # and encode adds it again
    chat = Chat(tokenizer)
    rules, one, two = "you are in a house", "step 1: find the crown.", "step 2: the attic is dark."
    head = [dict(role="system", content=rules), dict(role="user", content=one)] if system else [
        dict(role="user", content=f"{rules}\n\n{one}")]
    rendered = tokenizer.apply_chat_template(
        [*head, dict(role="assistant", content="go attic"), dict(role="user", content=two)], tokenize=False,
        add_generation_prompt=True)
    prompt = chat.first(rules, one)
    if trouble == "opens a thought":                    # the prompt opened it, and what was said stays as it was said
        rendered = rendered.replace("<|assistant|>go", "<|assistant|>so:go")
    assert prompt + chat.ids("go attic<|end|>") + chat.next(two) == chat.ids(rendered)
    assert chat.system_role is system and chat.end == tokenizer.eos_token_id
    assert prompt.count(tokenizer.bos_token_id) == (trouble == "begins with BOS")
    assert chat.next(two, cut=True) == [chat.end] + chat.next(two)


@pytest.mark.parametrize("template", [None, "{{ messages[-1].content }}",
                                      "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_model_without_a_usable_chat_template_is_refused(template, tiny):
    tokenizer = copy.deepcopy(tiny[1].tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template"):
        Chat(tokenizer)


def test_words_that_the_vocabulary_lacks_are_told_of_once_with_an_example(tiny, capsys):
    chat = Chat(tiny[1].tokenizer)
    chat.ids("you are in the hall.")
    assert capsys.readouterr().err == ""
    unknown = chat.tokenizer.unk_token_id
    assert unknown in chat.ids("the Troubadour sings in the hall.")
    chat.ids("the Troubadour sings"), chat.ids("a Zither")
    said = capsys.readouterr().err
    assert said.startswith("note: the model's vocabulary lacks words") and said.count("\n") == 1
    assert "'Troubadour'" in said
    again = Chat(tiny[1].tokenizer)                        # another run, its own note; the token itself is no word
    again.ids(f"the {again.tokenizer.unk_token} is in the hall.")
    assert capsys.readouterr().err == ""
    again.ids("a Zither")
    assert "'Zither'" in capsys.readouterr().err


# long observations

@pytest.mark.parametrize("limit", [8, 9, 64])
def test_of_a_long_observation_the_head_and_the_tail_are_seen(limit, tiny):
    chat, obs = tiny[1], "you are in the hall. " + "go attic. take lamp. " * 40 + "the attic is dark."
    short = chat.text(chat.ids(obs)[:limit])
    assert chat.glimpse(short, limit) == short and chat.glimpse("", limit) == ""
    seen = chat.glimpse(obs, limit)
    head, tail = seen.split("\n...\n")
    assert obs.startswith(head) and obs.endswith(tail) and head and tail
    assert (head, tail) == (chat.text(chat.ids(obs)[:limit // 2]), chat.text(chat.ids(obs)[-(limit // 2):]))
    assert len(chat.ids(head)) == len(chat.ids(tail)) == limit // 2


class Talkative(Quest):
    """What follows an action is longer than any context; the middle, which no policy sees, tells the actions."""
    middle = "{}"

    def step(self, action):
        outcome = super().step(action)
        self.said = getattr(self, "said", "") + f" {action}."
        told = "the hall. " * 500 + self.middle.format(self.said) + " the attic." * 500
        return replace(outcome, obs=f"{outcome.obs} {told} {outcome.obs}")


def drive(attempt, reply):
    """The branch of an episode that always gets this reply, and the contexts it asked with."""
    asks = [next(attempt)]
    try:
        while True:
            asks.append(attempt.send(list(reply)))
    except StopIteration as end:
        return end.value, [ask.context for ask in asks]


def test_an_endless_observation_is_seen_in_part_and_counted_and_the_episode_goes_on(tiny, settings):
    chat, run = tiny[1], run_of(settings("observation_tokens=40", "reflect_every=3"), tiny)
    reply = [*chat.ids("take hat"), chat.end]
    branch, contexts = drive(episode(run, Talkative(), Attempt("train-1-0000", "0"), True), reply)
    assert (branch.end, len(branch.turns), branch.clipped) == ("failure", 8, 8)     # all but the first
    assert max(map(len, contexts)) < run.cfg.context and [r.t for r in branch.reflections] == [3, 6, 8]
    for turn in branch.turns[1:]:
        assert len(turn.obs) > 9000 and len(turn.obs_ids) < 60
        assert chat.glimpse(turn.obs, 40) in chat.tokenizer.decode(turn.obs_ids)
    whole = run_of(settings("observation_tokens=100000"), tiny)
    ended = list(whole.policy.engine().run(deque([Job(
        episode(whole, Talkative(), Attempt("train-1-0000", "0"), True), random.Random(0), "a")])))[0].result
    assert ended.end == "context" and ended.clipped == 0


def test_an_endless_observation_is_replayed_and_compared_whole(tiny, settings):
    """What the policy sees of it is the same; a middle that differs is a replay that differs."""
    chat, run = tiny[1], run_of(settings("observation_tokens=40"), tiny)
    reply, root = [*chat.ids("take hat"), chat.end], Attempt("train-1-0000", "0")
    branch, _ = drive(episode(run, Talkative(), root, False), reply)

    class Other(Talkative):
        middle = "otherwise{}"
    past = Attempt("train-1-0000", "0.0", branch.turns[:3], "the cat.")
    again, _ = drive(episode(run, Talkative(), past, False), reply)
    assert (again.end, again.replayed, again.clipped) == ("failure", 2, 6)
    assert again.turns[0].obs == branch.turns[2].obs and again.turns[0].obs_ids == branch.turns[2].obs_ids
    assert drive(episode(run, Other(), root, False), reply)[0].turns[2].obs_ids == branch.turns[2].obs_ids
    with pytest.raises(StopIteration) as ended:
        next(episode(run, Other(), past, False))
    assert ended.value.value.end == "mismatch"
