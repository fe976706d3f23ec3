import copy
import random
from collections import deque

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import packing
from conftest import family, shake
from envs import Quest, UserError
from leafe import TURN, episode, targets
from model import Ask, Chat, Engine, Job, StaleSnapshot
from packing import Segment, pack, packed_nll
from weights import add_lora, adapter_off, lora_parameters


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


def play_trees(engine, chat, cfg, tasks, log, seed=0):
    """Plain rollouts, then branches at random tau with a hint, from ended rollouts: all in one engine."""
    rng, branches = random.Random(seed), []
    queue = deque(Job(spy(episode(Quest(), chat, cfg, task, [], "", "0", True), log), random.Random(task),
                      task, snapshot=True) for task in tasks)
    for job in engine.run(queue):
        branch = job.result
        branches.append(branch)
        if branch.name == "0":
            for n in range(2):
                past = branch.turns[:rng.randint(1, len(branch.turns))]
                queue.append(Job(spy(episode(
                    Quest(), chat, cfg, branch.task, past, "the attic needs the rope from the cellar.",
                    f"0.{n}", True), log), random.Random(branch.task), branch.task, snapshot=True))
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
    cfg = settings(f"keep_experience={str(keep).lower()}", "temperature=0", "reflect_temperature=0", "reflect_every=3",
                   "action_tokens=6", "reflect_tokens=9")
    engine, log = Engine(model, chat.stop, slots, cfg.context, 0, snapshot_mb=64), []
    count = 12 if name in ("tiny", "adapter") else 4              # tasks; three episodes each
    branches = play_trees(engine, chat, cfg, Quest().tasks("valid")[:count], log)
    assert len(branches) == 3 * count and len(log) > 15 * count
    assert engine.fed < 0.5 * engine.seen                         # it did fork and did keep what it had
    for ask, reply in log:
        context = torch.tensor([ask.context])
        out = model.generate(context, attention_mask=torch.ones_like(context), do_sample=False,
                             max_new_tokens=ask.max_new, eos_token_id=list(chat.stop), pad_token_id=0)
        assert out[0, context.shape[1]:].tolist() == reply


def test_samples_do_not_depend_on_slots_memory_or_order(tiny, settings):
    model, chat = tiny
    cfg, found = settings(), []
    for slots, memory, reverse in ((64, 64, False), (3, 64, False), (20, 0, True)):
        tasks = Quest().tasks("valid")[:10]
        engine = Engine(model, chat.stop, slots, cfg.context, 1.0, memory)
        jobs = [Job(episode(Quest(), chat, cfg, task, [], "", str(i), True), random.Random(f"{task}/{i}"),
                    task, snapshot=True) for task in tasks for i in range(3)]
        queue = deque(reversed(jobs) if reverse else jobs)
        found.append(sorted(((b := job.result).task, b.name, [t.action_ids for t in b.turns])
                            for job in engine.run(queue)))
    assert found[0] == found[1] == found[2]


def test_sampling_is_the_inverse_of_the_distribution_with_a_fresh_uniform_for_every_token(tiny):
    model, chat = tiny
    prompt = chat.first("rules", "step 1: you are in the hall.")

    def one():
        reply = yield Ask(prompt, 12)
        return reply
    for seed, heat in ((0, 1.0), (1, 1.0), (2, 2.0)):
        job, = Engine(model, set(), 1, 64, heat, 8).run(deque([Job(one(), random.Random(seed), "a")]))
        rng, ids = random.Random(seed), list(prompt)
        for _ in range(12):
            p = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / heat).softmax(-1)
            ids.append(int((p.cumsum(0) < rng.random()).sum()))
        assert job.result == ids[len(prompt):] and len(set(job.result)) > 1


def test_the_draw_of_a_large_vocabulary_is_from_the_same_distribution_and_as_independent(tiny, settings):
    model, chat = tiny
    engine, rng = Engine(model, chat.stop, 1, 64, 1.0, 0), random.Random(0)
    logits, heat = torch.tensor([0.0, 1.0, 2.0, 2.0, -1.0, -30.0]), 1.5
    us = torch.tensor([[rng.random()] for _ in range(8000)], dtype=torch.float64)
    tokens, edge = engine._race(logits.repeat(8000, 1), us, torch.full_like(us, heat))
    shares, n = torch.bincount(tokens, minlength=6) / 8000, 8000
    p = (logits / heat).softmax(-1)
    assert ((shares - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all() and (edge >= 0).all()
    near = torch.tensor([0.0, 1.0, 2.0, 2.0001, -1.0, -30.0])
    token, edge = engine._race(near[None], us[:1], torch.zeros(1, 1, dtype=torch.float64))     # greedy
    assert token.tolist() == [3] and float(edge) == pytest.approx(1e-4, rel=0.01)
    cfg, found = settings(), []
    for slots, memory in ((64, 64), (3, 0)):
        engine = Engine(model, chat.stop, slots, cfg.context, 1.0, memory)
        engine.many_tokens = 100
        jobs = deque(Job(episode(Quest(), chat, cfg, task, [], "", str(i), True), random.Random(f"{task}/{i}"), task)
                     for task in Quest().tasks("valid")[:8] for i in range(3))
        found.append(sorted((b.task, b.name, [t.action_ids for t in b.turns])
                            for b in (job.result for job in engine.run(jobs))))
    assert found[0] == found[1] and len({str(ids) for _, _, ids in found[0]}) > 8


def test_a_reply_may_have_a_temperature_of_its_own(tiny):
    """Greedy replies beside sampled ones: the greedy ones equal generate, whatever their neighbours draw."""
    model, chat = tiny
    contexts = [chat.first(Quest.rules, TURN.format(t=1, obs=Quest().reset(task)))
                for task in Quest().tasks("valid")[:8]]

    def one(context, temperature):
        return (yield Ask(context, 12, temperature))
    engine = Engine(model, chat.stop, 5, 256, 1.0, snapshot_mb=8)
    jobs = [Job(one(context, 0.0 if i % 2 else None), random.Random(i), str(i)) for i, context in enumerate(contexts)]
    list(engine.run(deque(jobs)))
    for context, job in list(zip(contexts, jobs))[1::2]:
        out = model.generate(torch.tensor([context]), attention_mask=torch.ones(1, len(context)), do_sample=False,
                             max_new_tokens=12, eos_token_id=list(chat.stop), pad_token_id=0)
        assert out[0, len(context):].tolist() == job.result
        assert job.rng.random() == random.Random(jobs.index(job)).random()        # and nothing was drawn
    assert all(job.rng.random() != random.Random(i).random() for i, job in enumerate(jobs) if i % 2 == 0)


def fork(engine, snapshot):
    with torch.inference_mode():
        engine.fork(snapshot, 0, 3)


def test_a_stale_snapshot_is_refused_after_a_step_and_after_a_switch(own_tiny):
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)

    def one():
        yield Ask(chat.first("rules", "step 1: you are in the hall."), 4)
    for change in ("step", "switch"):
        engine = Engine(model, chat.stop, 2, 64, 0, 64)
        list(engine.run(deque([Job(one(), random.Random(0), "a", snapshot=True)])))
        snapshot = engine.kept["a"][0]
        fork(engine, snapshot)                               # fresh: taken
        if change == "step":
            optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-9)
            for parameter in lora_parameters(model):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            with pytest.raises(StaleSnapshot):
                fork(engine, snapshot)
        else:
            with adapter_off(model), pytest.raises(StaleSnapshot):
                fork(engine, snapshot)
            fork(engine, snapshot)                           # switched back: the same weights again


def test_snapshot_memory_stays_within_its_budget(tiny, settings):
    model, chat = tiny
    cfg = settings()
    engine = Engine(model, chat.stop, 8, cfg.context, 1.0, snapshot_mb=4)
    play_trees(engine, chat, cfg, Quest().tasks("valid")[:6], [])
    assert 0 < sum(s.nbytes for kept in engine.kept.values() for s in kept) <= 4 * 2**20


def test_an_episode_that_outgrows_the_context_ends_and_is_counted(tiny, settings):
    model, chat = tiny
    cfg = settings("context=150")
    engine = Engine(model, chat.stop, 4, cfg.context, 1.0, 8)
    branches = [job.result for job in engine.run(deque(
        Job(episode(Quest(), chat, cfg, task, [], "", "0", False), random.Random(0), task)
        for task in Quest().tasks("valid")[2:6]))]
    assert {b.end for b in branches} == {"context"} and all(b.turns for b in branches)


@pytest.mark.parametrize("where", ["_hidden", "_draw"])
def test_out_of_memory_goes_on_with_fewer_slots_and_the_same_samples(where, tiny, settings, capsys):
    model, chat = tiny
    cfg = settings()

    def play(engine):
        jobs = [Job(episode(Quest(), chat, cfg, task, [], "", str(n), True), random.Random(f"{task}/{n}"), task)
                for task in Quest().tasks("valid")[:10] for n in range(3)]
        return sorted((b.task, b.name, b.end, [t.action_ids for t in b.turns])
                      for b in (job.result for job in engine.run(deque(jobs))))
    plain = play(Engine(model, chat.stop, 16, cfg.context, 1.0, 64))
    engine, calls = Engine(model, chat.stop, 16, cfg.context, 1.0, 64), 0
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


def test_out_of_memory_with_a_single_slot_is_one_line_and_closes_the_episodes(tiny):
    model, chat = tiny
    engine, closed = Engine(model, chat.stop, 4, 64, 1.0, 64), []

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

def trees_for_packing(tiny, settings):
    from leafe import explore
    from run import Jsonl
    model, chat = tiny
    cfg = settings("corrections=all", "rehearsal_share=1", "attempts=8")
    cfg_path = __import__("pathlib").Path(cfg.out)
    cfg_path.mkdir(parents=True, exist_ok=True)
    store = Jsonl(cfg_path / "trees.jsonl")
    engine = Engine(model, chat.stop, 32, cfg.context, 1.0, 64)
    trees = explore(engine, chat, Quest, cfg, Quest().tasks("train")[:8], store)
    return cfg, trees, targets(trees, cfg, chat.stop)


def test_packed_equals_one_pair_at_a_time(tiny, own_tiny, settings):
    from leafe import rows_of
    from train import loss_weights
    cfg, trees, pairs = trees_for_packing(tiny, settings)
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
    plain, lengths = packing.sdpa_attention_forward, []
    monkeypatch.setattr(packing, "sdpa_attention_forward", lambda module, query, *args, **more: (
        lengths.append(query.shape[2]), plain(module, query, *args, **more))[1])
    trees = [[Segment([7] * n, [1.0] * n, None)] for n in (5, 9, 3)]
    whole = packed_nll(tiny[0], [pack(trees)])[0].item()
    assert lengths == [5, 9, 3] * tiny[0].config.num_hidden_layers
    assert whole == pytest.approx(sum(packed_nll(tiny[0], [pack([tree])])[0].item() for tree in trees), rel=1e-5)


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
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>", True),
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
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content + ' ' }}{% endif %}{{ m.content }}<|end|>{% endfor %}<|assistant|>", False),
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
