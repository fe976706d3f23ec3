"""Speed, side by side with what one would otherwise pick: every figure is measured here, in turns.

    python -m tools.bench                          rollout and train, on models/tiny and on the shape of a 135M model
    python -m tools.bench rollout model=135m       the same episodes by four ways of sampling
    python -m tools.bench train                    the same D_cf and D_reh by three ways of laying them out
    python -m tools.bench memory                   time and memory against tasks, samples, turns; 100,000 stored turns;
                                                   the cache as it grows
    python -m tools.bench gpu                      for a GPU: equality in fp32 and nf4, then the shape of a 7B model
    python -m tools.bench run preset=smoke         whole runs as one process and as two: time, memory, results
    python -m tools.bench neighbours tasks=48      exploration beside busy programs, which take the cores from it
    python -m tools.bench waiting world_ms=50      model and worlds in processes of their own, that wait for each other
    python -m tools.bench engines preset=smoke engine=http://localhost:8000/v1   a server's trees and samples beside ours

Its own keys are episodes=, repetitions= and contenders= (abcd); of run and neighbours processes= (1,2: the first is
the base; null is one a core); of neighbours tasks= and loops= (2,4: so many busy programs); of waiting world_ms=. Any
other is config.yaml's: model=, load_in_4bit=, slots=. model= may be a shape with random weights, 135m or 7b, but for
whole programs. Before a contender of rollout or train is timed, its (greedy) outputs are compared with a's. Medians of
the repetitions; a table on the screen, the same as JSON in out=.
"""
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from functools import lru_cache, partial
from logging import getLogger
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig,
                          LlamaConfig, Qwen2Config)

from config import ROOT, SHIPPED, Config, UserError, guarded, load_config, nearest, owners_of, shipped, visible
from engine import Chat, Job
from leafe import Attempt, Branch, Tree, episode, explore, read_trees, targets
from lora import add_lora, checks, load_model, loading, lora_layers, lora_parameters
from packing import Segment, length, pack, packed_nll, rows_of, segments
from run import Policy, Run, RunFolder, pick_tasks, read_jsonl, write_aside
from tools import bench_engines, bench_runs
from tools.bench_memory import conversations, growing, stored
from tools.bench_worlds import Talk, words
from tools.machine import machine, peak, seconds
from train import loss_weights, recomputing

OWN = dict(episodes=0, repetitions=3, contenders="",             # 0, "": what suits the model
           processes="1,2", tasks=48, loops="2,4", world_ms=50)
SHAPES = {                             # random weights: speed does not depend on what they are
    "135m": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                        tie_word_embeddings=True, initializer_range=0.05),
    "7b": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                      num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
                      tie_word_embeddings=False, initializer_range=0.05)}

# --------------------------------------------------------------------------------------------------- the policy


@lru_cache(maxsize=1)
def policy(name: str, load_in_4bit: bool | None, context: int) -> tuple[Any, Chat]:
    """A model, or one of SHAPES: written to disk as a checkpoint first, so that it is loaded as any."""
    if name not in SHAPES:
        model, tokenizer = load_model(name, load_in_4bit, context)
        return model, Chat(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config, parts, index = SHAPES[name], {}, {}
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "models" / "tiny").save_pretrained(folder)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        for key, tensor in empty.named_parameters():
            parts.setdefault(".".join(key.split(".")[:3]), {})[key] = tensor              # a file a layer
        noise = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
        for n, part in enumerate(parts.values()):
            file = f"model-{n:05}.safetensors"
            save_file({key: torch.ones(t.shape) if "norm" in key else noise.repeat(-(-t.numel() // len(noise)))[
                :t.numel()].view(t.shape).clone() for key, t in part.items()}, Path(folder, file),
                metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
        model, tokenizer = load_model(folder, load_in_4bit, context)
    return model, Chat(tokenizer)


def checked(cfg: Config) -> tuple[Any, Chat]:
    """As `policy`; of a user's own model, only where the fast way is its way."""
    model, chat = policy(cfg.model, cfg.load_in_4bit, cfg.context)
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
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=count * -(-cfg.context // 32), max_batch_tokens=1024)
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
    """Contenders a to d on cfg.model."""
    model, chat = checked(cfg)
    model = model.float() if own.get("wide") else model
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
        if name == "d" and rows[-1]["equal"] < 1 and next(model.parameters()).dtype == torch.float32:
            raise UserError("the engine's greedy replies are not generate's: nothing is timed")
    for _ in range(own["repetitions"]):
        for row in tqdm(rows, unit="contender", leave=False):
            todo = part if row["name"] == "a" else attempts
            work = partial(ways[row["name"]][1], play, todo)
            row["seconds"].append(seconds(lambda: row.update(peak_mb=peak(work))) * len(attempts) / len(todo))
    model.destroy_cached_continuous_batching_manager()
    found = dict(episodes=count, contenders=rows)
    if counted and rows[-1]["name"] == "d":
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


# ------------------------------------------------------------------------------------------------------- training

def line(tree: Tree, weights: dict[int, tuple]) -> tuple[list[int], list[tuple]]:
    """Turns of one path, with their history, as a trainer takes them: ids, and what each weighs in the losses."""
    chain = segments(tree, weights)
    return [i for part in chain for i in part.ids], [w for part in chain for w in part.weights]


def padded(lines: list) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Right-padded batches of eight: ids (B, T), mask (B, T), weights (B, T, C)."""
    random.Random(0).shuffle(lines)
    batches = []
    for group in (lines[at:at + 8] for at in range(0, len(lines), 8)):
        longest, columns = max(len(ids) for ids, _ in group), len(group[0][1][0])
        batches.append((torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in group]),
                        torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in group]),
                        torch.tensor([w + [(0.0,) * columns] * (longest - len(w)) for _, w in group])))
    return batches


def padded_nll(model, batch: tuple) -> torch.Tensor:
    """(C,): the losses as an SFT trainer computes them, with the logits of all tokens."""
    ids, mask, weights = (part.to(model.device) for part in batch)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return nll @ weights[:, 1:].flatten(0, 1)


def training(cfg: Config, own: dict) -> dict:
    """The gradient of L_cf + beta L_reh on a Quest exploration's own D_cf and D_reh (trees=, or explored here), the
    data laid out in three ways."""
    model, chat = checked(cfg)
    tasks = pick_tasks(cfg, "train")
    if cfg.trees:
        trees = read_trees(read_jsonl(Path(cfg.trees) / "trees.jsonl"), 1, tasks)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(cfg, Policy(model, chat, cfg), RunFolder(cfg.but(out=folder)))
            trees = explore(run, tasks)
            run.folder.close()
    add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    parameters = lora_parameters(model)
    for p in parameters:                                 # B is 0 at first, and A has no gradient then
        torch.nn.init.normal_(p, std=0.02)
    weights = loss_weights(trees, targets(trees, cfg, chat.stop), cfg.beta)
    pairs = [line(tree, {i: w}) for tree, mine in zip(trees, weights) for i, w in mine.items()]
    paths = []
    for tree, mine in zip(trees, weights):
        left = dict(mine)
        for n in sorted(range(len(tree.branches)), key=lambda n: -len(tree.branch_path(n))):
            if found := {i: left.pop(i) for i in tree.branch_path(n) if i in left}:
                paths.append(line(tree, found))
    rows = [pack(group) for group in rows_of(trees, weights, cfg.row_tokens)]
    ways: dict[str, tuple[str, Callable, list]] = dict(
        a=("one (history, action) pair a row, padded", padded_nll, padded(pairs)),
        b=("one trajectory a row, padded", padded_nll, padded(paths)),
        c=("whole trees, packed", lambda model, row: packed_nll(model, [row]), rows))
    computed = dict(c=sum(len(row.ids) for row in rows),
                    **{way: sum(ids.numel() for ids, _, _ in ways[way][2]) for way in "ab"})

    def gradient(way: str) -> torch.Tensor:
        model.zero_grad()
        losses = torch.zeros(2)
        for batch in ways[way][2]:
            found = ways[way][1](model, batch)
            found.sum().backward()
            losses += found.detach().cpu()
        return torch.cat([losses, *(p.grad.flatten().float().cpu() for p in parameters)])
    expected, table = gradient("a"), []
    for way in [name for name in own["contenders"] or "abc" if name in ways]:
        off = float((gradient(way) - expected).norm() / expected.norm())
        table.append(dict(name=way, what=ways[way][0], tokens=computed[way], equal=off, seconds=[],
                          peak_mb=peak(lambda: gradient(way))))
        if off > 1e-3:
            raise UserError(f"the gradient of {way} is not a's (off by {off:.1e}): nothing is timed")
    for _ in range(own["repetitions"]):
        for row in tqdm(table, unit="layout", leave=False):
            row["seconds"].append(seconds(lambda: gradient(row["name"])))
    bound = sum(length(segments(tree, mine)) for tree, mine in zip(trees, weights) if mine)
    return dict(pairs=len(pairs), tokens_at_least=bound, contenders=table)


# --------------------------------------------------------------------------------------------------------- memory

def memory(cfg: Config, own: dict) -> dict:
    """d against the number of tasks, samples, turns and rollbacks on rollbacks; 100,000 stored turns; the cache."""
    model, chat = checked(cfg)
    table = []
    sizes = [(what, times * first) for what, first in (("tasks", 32), ("samples", 4), ("turns", 4), ("depth", 2))
             for times in (1, 2, 4)]
    for what, size in tqdm(sizes, unit="size", leave=False):
        shape = dict(tasks=32, samples=4, turns=8, depth=0) | {what: size}
        table.append(dict(of=what, size=size, **conversations(model, chat, cfg, **shape)))
    return dict(table=table, stored=stored(cfg, chat, 100_000), cache=growing(SHAPES["135m"], cfg.context))


# ------------------------------------------------------------------------------------------------------------ GPU

def gpu(cfg: Config, own: dict, slots: tuple = (1, 32, 128), rows: tuple = (4096, 2048)) -> dict:
    """Equality in fp32 and nf4 first; then on the shape of cfg.model, in nf4 and bf16: the contenders, decoding at
    several numbers of slots, and SFT steps on rows of 4,096 and of 2,048 tokens with gradient checkpointing."""
    found: dict[str, Any] = {}
    for bits in (False, True):                           # fp32: the model is widened; nf4: against its own a
        small = cfg.but(model="135m", load_in_4bit=bits)
        found[f"equal_{'nf4' if bits else 'fp32'}"] = rollout(small, own | dict(
            contenders="d", episodes=own["episodes"] or 16, repetitions=0, wide=not bits))["contenders"][0]["equal"]
    for bits in (True, False):
        name, large = "nf4" if bits else "bf16", cfg.but(load_in_4bit=bits)
        found[name] = rollout(large, own | dict(repetitions=1))
        for n in slots:
            one = rollout(large.but(slots=n), own | dict(contenders="d", episodes=2 * n, repetitions=1))
            found[f"{name}_{n}_slots"] = {key: one[key] for key in ("sampled", "cached", "limit_s", "contenders")}
    for tokens in rows:
        found[f"step_{tokens}"] = step(cfg.but(load_in_4bit=True), tokens)
    return found


def step(cfg: Config, tokens: int) -> dict:
    """One SFT step, gradient checkpointing on: a row of `tokens` tokens, a fifth of which bear loss."""
    model, _ = checked(cfg)
    if not lora_layers(model):
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    ids = random.Random(0).choices(range(400), k=tokens)
    row = pack([[Segment(ids, [(float(i % 5 == 0), 0.0) for i in range(tokens)], None)]])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-4)

    def work() -> None:
        with recomputing(model, True):
            packed_nll(model, [row]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    work()
    return dict(seconds=seconds(work), peak_mb=peak(work), allocated_before_mb=torch.cuda.memory_allocated() / 2**20)


# --------------------------------------------------------------------------------------------------------- tables

def show(what: str, found: dict) -> str:
    """Contenders: medians, and how many times as fast the last one is. Memory, GPU: every figure as it is."""
    if what in WHOLE:
        return WHOLE[what][1](found)
    if what == "memory":
        keys = list(found["table"][0])
        lines = ["".join(f"{key:>20}" for key in keys)]
        lines += ["".join(f"{v:20.1f}" if isinstance(v, float) else f"{v:>20}" for v in row.values())
                  for row in found["table"]]
        return "\n".join([*lines, f"stored turns: {json.dumps(found['stored'])}",
                          "a cache of {rows} rows: {held_mb:.0f} MB, at most {peak_mb:.0f} MB while it grew, one layer "
                          "{layer_mb:.0f} MB".format(**found["cache"])])
    if what == "gpu":
        return json.dumps(found, indent=1)
    rows = found["contenders"]
    medians = [statistics.median(row["seconds"]) for row in rows]
    lines = [f"{'':44}{'seconds':>9}{'least':>9}{'most':>9}{'last is':>10}{'peak MB':>9}"]
    for row, median in zip(rows, medians):
        ends = f"{min(row['seconds']):9.2f}{max(row['seconds']):9.2f}"
        lines.append(f"{row['name']}  {row['what']:41}{median:9.2f}{ends}{median / medians[-1]:8.1f} x"
                     f"{row['peak_mb']:9.0f}")
    last = medians[-1]
    if "limit_s" in found:
        lines.append("episodes equal to a's: " + ", ".join(f"{row['name']} {row['equal']:.1%}" for row in rows)
                     + f"\nd: {found['cached']:.1%} of prompt tokens from the cache, {found['sampled'] / last:.0f} "
                     f"sampled tokens/s\na forward reads {found['mb_a_forward']:.1f} MB of weights, a sampled token "
                     f"needs {found['mflop_a_token']:.1f} MFLOP; the hardware's limit is {found['limit_s']:.2f} s, "
                     f"{found['limit_s'] / last:.0%} of it reached; {found['products_s'] / last:.0%} of the time in "
                     f"matrix products and attention")
    if "tokens_at_least" in found:
        lines.append(f"{found['pairs']} pairs; tokens computed: "
                     + ", ".join(f"{row['name']} {row['tokens']}" for row in rows)
                     + f"; distinct tokens of the trees: {found['tokens_at_least']}")
    return "\n".join(lines)


WHOLE = dict(run=(bench_runs.whole_runs, bench_runs.show_runs), waiting=(bench_runs.waiting, bench_runs.show_waiting),
             neighbours=(bench_runs.neighbours, bench_runs.show_neighbours),
             engines=(bench_engines.engines, bench_engines.show_engines))
JOBS = dict(rollout=rollout, train=training, memory=memory, gpu=gpu, **{name: job for name, (job, _) in WHOLE.items()})
DEFAULTS = dict(rollout=["temperature=0"], train=["train_tasks=64"], memory=["slots=128"],
                gpu=["model=7b", "temperature=0", "slots=32", "lora_rank=16", "snapshot_mb=8192"],
                run=["repetitions=2"], neighbours=["repetitions=1", "processes=null,1"], waiting=[], engines=[])


def parted(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Its own keys, and what is config.yaml's."""
    own: dict[str, Any] = dict(OWN)
    rest = []
    for arg in args:
        key, _, value = arg.partition("=")
        if key not in OWN:
            rest.append(arg)
            if key != "preset" and key not in shipped() and not owners_of(key):
                raise UserError(f"the command line: there is no key {key!r}{nearest(key, [*OWN, *shipped()])}")
        elif isinstance(OWN[key], int) and not value.isdigit():
            raise UserError(f"the command line: {key} is {value!r}, but must be a whole number")
        else:
            own[key] = int(value) if isinstance(OWN[key], int) else value
    return own, rest


def main(args: list[str]) -> None:
    what = [arg for arg in args if "=" not in arg]
    if len(what) > 1 or set(what) - set(JOBS):
        raise UserError(f"usage: python -m tools.bench [{'|'.join(JOBS)}] [key=value ...], also its own keys "
                        f"{', '.join(OWN)}{nearest(what[-1], JOBS)}")
    given = [arg for arg in args if "=" in arg]
    own, _ = parted(given)
    if not own["repetitions"]:
        raise UserError("repetitions: must be 1 or more")
    if what == ["gpu"] and not torch.cuda.is_available():
        raise UserError("tools.bench gpu: there is no GPU here")
    if set(own["contenders"]) - set("abcd"):
        raise UserError(f"contenders: {own['contenders']} must be some of abcd")
    here = machine()
    print(visible(", ".join(f"{key} {value}" for key, value in here.items() if value)))
    for name, more in [(what[0], [])] if what else [("rollout", []), ("rollout", ["model=135m"]), ("train", [])]:
        own, rest = parted([*DEFAULTS[name], *more, *given])
        cfg = load_config([str(SHIPPED), "out=out/bench", *rest])
        print(visible(f"\n{name}, model={cfg.model}"))
        found = JOBS[name](cfg, own)
        print(visible(show(name, found)))
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        path = Path(cfg.out) / f"{name}-{Path(cfg.model).name}.json"
        write_aside(path, json.dumps(dict(machine=here, model=cfg.model, **found), indent=1) + "\n")
        print(visible(f"results: {path}"))


if __name__ == "__main__":
    guarded(main, __doc__ if set(sys.argv[1:]) & {"-h", "--help"} else "")
