"""Speed, side by side with what one would otherwise pick: every figure is measured here, in turns.

    python -m tools.bench                          rollout and train, on models/tiny and on the shape of a 135M model
    python -m tools.bench rollout model=135m       the same episodes by four ways of sampling
    python -m tools.bench train                    the same D_cf and D_reh by three ways of laying them out
    python -m tools.bench memory                   time and memory against tasks, samples, turns; 100,000 stored turns;
                                                   the cache as it grows
    python -m tools.bench gpu minutes=8            for a GPU: exactness, then a 7B shape in nf4, stage by stage (bench_gpu.py)
    python -m tools.bench run preset=smoke         whole runs as one process and as two: time, memory, results
    python -m tools.bench neighbours tasks=48      exploration beside busy programs, which take the cores from it
    python -m tools.bench waiting world_ms=50      model and worlds in processes of their own, that wait for each other
    python -m tools.bench engines preset=smoke engine=http://localhost:8000/v1   a server's trees and samples beside ours

Its own keys are episodes=, repetitions= and contenders= (abcd); of run and neighbours processes= (1,2: the first is
the base; null is one a core); of neighbours tasks= and loops= (2,4: so many busy programs); of waiting world_ms=; of gpu
minutes=. Any other is config.yaml's: model=, load_in_4bit=, slots=. model= may be a shape with random weights, 135m or
7b, but for whole programs. Before a contender of rollout or train is timed, its (greedy) outputs are compared with a's.
Medians of the repetitions; a table on the screen, the same as JSON in out=.
"""
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

import torch
from tqdm import tqdm

from config import SHIPPED, Config, UserError, guarded, load_config, nearest, owners_of, shipped, visible
from leafe import Tree, explore, read_trees, targets
from lora import add_lora, lora_parameters
from packing import length, pack, packed_nll, rows_of, segments
from run import Policy, Run, RunFolder, pick_tasks, read_jsonl, write_aside
from tools import bench_engines, bench_gpu, bench_runs
from tools.bench_memory import conversations, growing, stored
from tools.bench_rollouts import SHAPES, checked, rollout
from tools.machine import machine, peak, seconds
from train import loss_weights

OWN = dict(episodes=0, repetitions=3, contenders="",             # 0, "": what suits the model
           processes="1,2", tasks=48, loops="2,4", world_ms=50, minutes=8)


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


# --------------------------------------------------------------------------------------------------------- tables

def show(what: str, found: dict) -> str:
    """Contenders: medians, and how many times as fast the last one is. Memory: every figure as it is."""
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
             neighbours=(bench_runs.neighbours, bench_runs.show_neighbours), gpu=(bench_gpu.gpu, bench_gpu.table),
             engines=(bench_engines.engines, bench_engines.show_engines))
JOBS = dict(rollout=rollout, train=training, memory=memory, **{name: job for name, (job, _) in WHOLE.items()})
DEFAULTS = dict(rollout=["temperature=0"], train=["train_tasks=64"], memory=["slots=128"], gpu=["model=7b", "out=out/gpu"],
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
        found = dict(machine=here, model=cfg.model) | JOBS[name](cfg, own | dict(machine=here))
        print(visible(show(name, found)))
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        path = Path(cfg.out) / f"{name}-{Path(cfg.model).name}.json"
        write_aside(path, json.dumps(found, indent=1) + "\n")
        print(visible(f"results: {path}"))


if __name__ == "__main__":
    guarded(main, __doc__ if set(sys.argv[1:]) & {"-h", "--help"} else "")
