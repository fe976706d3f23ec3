"""Four ways of sampling the same episodes, and the models that they are measured on: what tools/bench.py rollout times. A
shape of SHAPES is a model with random weights, made where it computes: nothing is downloaded or written.
"""
import copy
import random
import time
from collections import Counter, deque
from functools import lru_cache, partial
from logging import getLogger
from typing import Any, Callable

import torch
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig,
                          LlamaConfig, Qwen2Config)

from config import ROOT, Config, UserError
from engine import Chat, Job
from leafe import Attempt, Branch, episode
from lora import checks, linear_layers, load_model, loading, precision
from run import Policy, Run
from tools.bench_worlds import Talk, words
from tools.machine import machine, peak, seconds

SHAPES = {                             # random weights: speed does not depend on what they are
    "135m": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                        tie_word_embeddings=True, initializer_range=0.05),
    "7b": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                      num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
                      tie_word_embeddings=False, initializer_range=0.05)}


# --------------------------------------------------------------------------------------------------- the policy

@lru_cache(maxsize=1)
def policy(name: str, load_in_4bit: bool | None, context: int, dtype: str = "") -> tuple[Any, Chat]:
    """A model, or one of SHAPES, with the embedded model's tokenizer."""
    if name not in SHAPES:
        model, tokenizer = load_model(name, load_in_4bit, context, dtype)
        return model, Chat(tokenizer)
    # from its own folder: beside another model's config it would be read as another class, with other tokens
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    four = load_in_4bit if load_in_4bit is not None else device == "cuda"
    return made(SHAPES[name], four, precision(dtype, device), device), Chat(tokenizer)


@torch.no_grad()
def made(shape: Any, four: bool, dtype: torch.dtype, device: str) -> Any:
    """A model of this shape with random weights, as load_model would leave it. It is filled a layer at a time on its
    device, each in 4 bits before the next is made: a 7B takes no more than it will."""
    torch.backends.cuda.enable_cudnn_sdp(False)                        # as load_model does
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=dtype)
    rng = torch.Generator(device).manual_seed(0)

    def noise(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=rng, dtype=dtype, device=device).mul_(shape.initializer_range)
    for parent, name, layer in linear_layers(model) if four else []:
        if loading().is_whole(layer.in_features, device):
            packed = loading().linear_4bit(layer)
            packed.weight = loading().params_4bit(noise(layer.weight), device)
            setattr(parent, name, packed)
    for path, module in list(model.named_modules()):
        for name, value in module.named_parameters(recurse=False):
            if value.is_meta:
                filled = torch.ones(value.shape, dtype=dtype, device=device) if "norm" in path else noise(value)
                setattr(module, name, torch.nn.Parameter(filled))
        if any(value.is_meta for value in module.buffers(recurse=False)):                # the table of its positions
            model.set_submodule(path, type(module)(model.config).to(device))
    model.tie_weights()
    loading().quicken(model)
    return model.eval().requires_grad_(False)


def checked(cfg: Config) -> tuple[Any, Chat]:
    """As `policy`; of a user's own model, only where the fast way is its way."""
    model, chat = policy(cfg.model, cfg.load_in_4bit, cfg.context, cfg.dtype)
    if cfg.model not in SHAPES and "forks" not in vars(model):
        checks().check(Policy(model, chat, cfg))
    if not (getattr(model, "forks", True) and getattr(model, "packs", True)):
        raise UserError(f"model: {cfg.model} goes the general way, which is not measured here; choose another model")
    return model, chat


# ------------------------------------------------------------------------------------------------------- rollouts

def lockstep(answer: Callable, play: Callable, attempts: list[Attempt]) -> list[Branch]:
    """Every episode asks, all are answered, and so on: how one samples without an engine that knows of episodes."""
    ended, asks = [], {}
    live = [(play(attempt), None) for attempt in attempts]
    while live:
        asks = {}
        for one, reply in live:
            try:
                asks[one] = one.send(reply)
            except StopIteration as end:
                ended.append(end.value)
        live = list(zip(asks, answer(list(asks.values())))) if asks else []
    return ended


def as_published(model, answer: Callable, asks: list) -> list[list[int]]:
    """What one would otherwise pick has torch's own products (models/products.py)."""
    with loading().plain(model):
        return answer(asks)


def whole(model, chat: Chat, asks: list) -> list[list[int]]:
    """a: generate for one conversation, its whole history fed again."""
    return [left_padded(model, chat, [ask])[0] for ask in asks]


def left_padded(model, chat: Chat, asks: list) -> list[list[int]]:
    """b: generate for a left-padded batch, whole histories fed again: what small RL repositories do."""
    longest = max(len(ask.context) for ask in asks)
    ids = torch.tensor([[0] * (longest - len(ask.context)) + ask.context for ask in asks])
    mask = torch.tensor([[0] * (longest - len(ask.context)) + [1] * len(ask.context) for ask in asks])
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, pad_token_id=0,
                         max_new_tokens=asks[0].max_new, eos_token_id=sorted(chat.stop))[:, longest:].tolist()
    return [row[:next((i + 1 for i, token in enumerate(row) if token in chat.stop), len(row))] for row in out]


def paged(model, chat: Chat, cfg: Config, count: int, asks: list) -> list[list[int]]:
    """c: transformers' continuous batching, its blocks shared among prompts, and kept from turn to turn."""
    getLogger("ContinuousBatchingLogger").setLevel("ERROR")
    most = 1024 if model.device.type == "cpu" else 4096
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=count * -(-cfg.context // 32), max_batch_tokens=most)
    found = model.generate_batch([ask.context for ask in asks], GenerationConfig(
        do_sample=False, max_new_tokens=asks[0].max_new, eos_token_id=sorted(chat.stop), pad_token_id=0),
        pages, progress_bar=False, persistent_manager=True)           # in the order of the asks
    return [answer.generated_tokens for answer in found.values()]


def forking(run: Run, counted: list, play: Callable, attempts: list[Attempt]) -> list[Branch]:
    """d: the engine of engine.py; a branch waits for the end of the rollout that it starts from (leafe.explore)."""
    later: dict[tuple[str, str], list[Attempt]] = {}
    for attempt in attempts:
        if attempt.past:
            later.setdefault((attempt.task, attempt.name.rpartition(".")[0]), []).append(attempt)

    left = Counter(attempt.task.partition("/")[0] for attempt in attempts)

    def job(attempt: Attempt) -> Job:
        return Job(play(attempt), random.Random(0), attempt.task.partition("/")[0], snapshot=True)
    engine, ended = run.policy.engine(), []
    queue = deque(job(attempt) for attempt in attempts if not attempt.past)
    for done in engine.run(queue):
        ended.append(done.result)
        queue.extend(job(branch) for branch in later.get((done.result.task, done.result.name), []))
        left[done.family] -= 1
        if not left[done.family]:
            engine.drop(done.family)
    counted[:] = [engine.fed, engine.seen, engine.sampled]
    return ended


def rollout(cfg: Config, own: dict) -> dict:
    """Contenders a to d on cfg.model. With repetitions=0 none is timed: the share of episodes that are a's is all."""
    model, chat = checked(cfg)
    count = own["episodes"] or (512 if cfg.model == "tiny" else 32)

    run = Run(cfg, Policy(model, chat, cfg), folder=None)

    def play(attempt: Attempt):
        return episode(run, Talk(), attempt, reflect=False)
    roots = [Attempt(f"{n // 4}/{n % 4}", "0") for n in range(-(-count * 3 // 4))]        # four samples a task
    counted: list[int] = []
    engine = partial(forking, run, counted)
    rng, attempts = random.Random(0), list(roots)
    for root in rng.sample(engine(play, roots), count - len(roots)):          # branches at a random tau
        past = root.turns[:rng.randint(2, len(root.turns))]
        attempts.append(Attempt(root.task, "0.0", past, words(root.task, 8)))
    others = dict(a=("generate, one episode at a time", partial(whole, model, chat)),
                  b=("generate, left-padded batches", partial(left_padded, model, chat)),
                  c=("generate_batch (continuous batching)", partial(paged, model, chat, cfg, count)))
    ways = {name: (what, partial(lockstep, partial(as_published, model, answer)))
            for name, (what, answer) in others.items()} | dict(d=("the forking engine", engine))
    part = attempts[::8] if count >= 16 else attempts        # of a, which has no batches: the rest takes as long
    keys = {(attempt.task, attempt.name) for attempt in part}

    def said(ended: list[Branch]) -> dict:
        return {(b.task, b.name): [turn.action_ids for turn in b.turns] for b in ended if (b.task, b.name) in keys}
    expected, rows = said(ways["a"][1](play, part)), []
    for name in own["contenders"] or ("abcd" if count <= 64 else "abd"):     # c: 512 would take hours on a CPU
        found = said(ways[name][1](play, attempts if name == "d" else part)) if name != "a" else expected
        rows.append(dict(name=name, what=ways[name][0], seconds=[], peak_mb=0.0,
                         equal=sum(found[key] == expected[key] for key in keys) / len(keys)))
        wrong = name == "d" and rows[-1]["equal"] < 1 and next(model.parameters()).dtype == torch.float32
        if wrong and own["repetitions"]:
            raise UserError("the engine's greedy replies are not generate's: nothing is timed")
    for _ in range(own["repetitions"]):
        for row in tqdm(rows, unit="contender", leave=False):
            todo = part if row["name"] == "a" else attempts
            work = partial(ways[row["name"]][1], play, todo)
            row["seconds"].append(seconds(lambda: row.update(peak_mb=peak(work))) * len(attempts) / len(todo))
    model.destroy_cached_continuous_batching_manager()
    found = dict(episodes=count, contenders=rows)
    if counted and rows[-1]["name"] == "d" and own["repetitions"]:
        found |= dict(cached=1 - counted[0] / counted[1],
                      sampled=counted[2], fed=counted[0], **limit(model, lambda: ways["d"][1](play, attempts)))
    return found


def limit(model, work: Callable[[], Any]) -> dict[str, float]:
    """`limit_s`: what the hardware needs at least for the forwards of `work`, if each reads all weights once at the
    measured bandwidth or multiplies at the measured rate, whichever takes longer (keys, values and attention are not
    counted). `products_s`: the seconds that `work` spends in matrix products and attention (on a CPU; a GPU works on
    while Python goes ahead)."""
    shapes: list[torch.Size] = []
    spent, began, attention = [], [], torch.nn.functional.scaled_dot_product_attention

    def timed(*args, **kwargs) -> torch.Tensor:
        start = time.perf_counter()
        out = attention(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return out
    hooks = [model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))]
    for module in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        hooks += [module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
                  module.register_forward_hook(lambda *_: spent.append(time.perf_counter() - began.pop()))]
    torch.nn.functional.scaled_dot_product_attention = timed
    try:
        work()
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()
    here, least = machine(), 0.0
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.in_features * m.out_features for m in model.get_decoder().layers.modules()
               if isinstance(m, torch.nn.Linear))
    size = sum(p.nbytes for p in [*model.get_decoder().layers.parameters(), model.get_output_embeddings().weight])
    for rows, tokens in shapes:
        least += max(size / here["gb_a_second"], 2 * rows * (body * tokens + head) / here["gflop_a_second"]) / 1e9
    return dict(limit_s=least, products_s=sum(spent), forwards=len(shapes), mb_a_forward=size / 1e6,
                mflop_a_token=2 * (body + head) / 1e6)
