"""What tools/bench.py memory measures: conversations of growing number and shape, many stored turns, the cache."""
import random
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable

import torch

from cache import SlotCache
from config import Config
from engine import Chat, Job
from leafe import Attempt, Branch, Turn, episode, read_trees, targets
from packing import pack, rows_of
from run import Jsonl, Policy, Run, read_jsonl
from tools.bench_worlds import Talk, words
from tools.machine import peak, seconds
from tools.report import stage1_figures
from train import loss_weights


def conversations(model, chat: Chat, cfg: Config, tasks: int, samples: int, turns: int, depth: int) -> dict:
    """Plain rollouts, and a chain of `depth` branches on each task's first one, each at the middle of the last."""
    run = Run(cfg, Policy(model, chat, cfg), folder=None)
    engine, pasts, kept, ended, peaks = run.policy.engine(), {}, [0], [0], []

    def job(task: str, name: str, past: list[Turn]) -> Job:
        pasts[task] = past
        attempt = Attempt(task, name, past, words(name, 8) if past else "")
        return Job(episode(run, Talk(turns), attempt, reflect=False), random.Random(0), task.partition("/")[0],
                   snapshot=depth > 0 and task.endswith("/0"))
    queue = deque(job(f"{n}/{i}", "0", []) for n in range(tasks) for i in range(samples))

    def work() -> None:
        for done in engine.run(queue):
            branch, path = done.result, pasts[done.result.task][:-1] + done.result.turns
            ended[0] += len(branch.turns)
            kept[0] = max(kept[0], sum(one.nbytes for family in engine.kept.values() for one in family))
            if branch.name.count(".") < depth and branch.task.endswith("/0"):
                queue.append(job(branch.task, branch.name + ".0", path[:len(path) // 2 + 1]))
            elif branch.task.endswith("/0"):
                engine.drop(done.family)
    took = seconds(lambda: peaks.append(peak(work)))
    return dict(turns=ended[0], seconds=took, milliseconds_a_turn=1000 * took / ended[0], peak_mb=peaks[0],
                snapshots_mb=kept[0] / 2**20)


def stored(cfg: Config, chat: Chat, turns: int) -> dict:
    """Write, read and pack `turns` made-up turns: 10 branches of 10 turns a tree, each at turn 5 of the first."""
    with tempfile.TemporaryDirectory() as folder:
        store, ids = Jsonl(Path(folder, "trees.jsonl")), chat.ids(words("some", 20))
        for n in range(turns // 100):
            for b in range(10):
                made = [Turn(words(f"{t}", 20), ids, f"go {t}", [*ids[:4], chat.end], None, "it is", 1.0, True)
                        for t in range(10)]
                branch = Branch(f"task-{n:05}", f"0.{b - 1}" if b else "0", 5 if b else 1, "it is" if b else "", made,
                                "", [], "success", 10, 4 if b else 0, 50, b, 0 if b else None)
                store.append(branch.record(1))
                store.records.clear()
        store.close()
        found: dict[str, float] = {}

        def step(name: str, work: Callable[[], Any]) -> Any:
            kept: list[Any] = []
            began = time.perf_counter()
            found[f"{name}_mb"] = peak(lambda: kept.append(work()))
            found[f"{name}_s"] = time.perf_counter() - began
            return kept[0]
        tasks = [f"task-{n:05}" for n in range(turns // 100)]
        trees = step("load", lambda: read_trees(read_jsonl(store.path), 1, tasks))
        pairs = step("targets", lambda: targets(trees, cfg, chat.stop))
        weights = loss_weights(trees, pairs, cfg.beta)
        step("pack", lambda: [pack(group) for group in rows_of(trees, weights, cfg.row_tokens)])
        step("report", lambda: stage1_figures(trees, pairs))
    return dict(turns=turns, pairs=len(pairs.D_cf) + len(pairs.D_reh), **found)


def growing(shape: Any, context: int, rows: int = 64) -> dict:
    """The engine's cache on a model's shape as it doubles its rows: MB in the end, and at most meanwhile."""
    cache, size = SlotCache(rows, context), shape.hidden_size // shape.num_attention_heads
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    zero = torch.zeros(1, 1, dtype=torch.long, device=device)

    def work() -> None:
        cache.hold(1, context)
        cache.aim(zero, zero, 1)
        for layer in range(shape.num_hidden_layers):
            one = torch.zeros(1, shape.num_key_value_heads, 1, size, device=device)
            cache.update(one, one, layer)
        while cache.held < rows:
            cache.hold(2 * cache.held, context)
    most = peak(work)
    sizes = [k.nbytes + v.nbytes for k, v in cache.layers]
    return dict(rows=rows, held_mb=sum(sizes) / 2**20, peak_mb=most, layer_mb=max(sizes) / 2**20)
