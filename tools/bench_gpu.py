"""One script for the day a GPU is there: what tools/bench.py gpu measures, the cheapest and most telling stages first.

    python -m tools.bench gpu                            all stages, in under eight minutes; minutes=, model=, out=
    python -m tools.bench_gpu out/gpu/gpu-7b.json        the table of a run again, also of one that was stopped

The large model is a shape with random weights, made on the device (tools/bench_rollouts.py): nothing is downloaded or
written but the JSON, which is there, whole, after every stage. A stage that fails is an `error` in it, and the next goes on.
"""
import gc
import json
import random
import shutil
import statistics
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

from config import ROOT, Config, UserError, guarded, visible
from engine import Ask, Engine, Episode, Job
from lora import adapter_off, checks, lora_layers
from packing import Segment, pack, packed_nll
from run import Policy, plans, write_aside
from tools import smollm2
from tools.bench_rollouts import checked, paged, policy, rollout
from tools.bench_runs import watch
from tools.machine import seconds
from train import recomputing

PRECISIONS = {"fp32": (False, "float32"), "16 bits": (False, ""), "nf4": (True, "")}       # "": the card's own half
FIGURES = dict(log_probability="log-probability", packed="packed log-probability", gradient="gradient")
SHORT = dict(temperature=0.0, slots=8, horizon=6, action_tokens=8)                         # exactness: `generate` is slow
TRAIN = [str(ROOT / "train.py"), str(ROOT / "config.yaml")]
SMOLLM2 = ["preset=smollm2", "warm_start=48", "warm_steps=60", "train_tasks=16", "attempts=6", "corrections=all", "steps=20",
           "test_tasks=16", "samples=4", "ks=[1,4]"]


@dataclass
class Sizes:
    """How much is measured; tests take less."""
    episodes: int = 8                                  # compared with generate's
    rows: tuple = (64, 1, 16, 128)                     # that decode side by side
    prompt: int = 256                                  # tokens before they do
    new: int = 40                                      # decode steps, the first of which are not counted
    prefill: tuple = (16, 1024)                        # conversations, and tokens of each
    fork: int = 1000                                   # tokens of a snapshot
    training: tuple = ((4096, True), (2048, False))    # tokens of a row, and whether it is recomputed


@dataclass
class Bench:
    cfg: Config
    own: dict[str, Any]                                # minutes, machine
    sizes: Sizes = field(default_factory=Sizes)
    began: float = field(default_factory=time.perf_counter)
    found: dict[str, dict] = field(default_factory=dict)

    @property
    def left(self) -> float:                           # seconds
        return 60 * self.own["minutes"] - (time.perf_counter() - self.began)


# --------------------------------------------------------------------------------------------------------- the loop
def gpu(cfg: Config, own: dict, sizes: Sizes | None = None) -> dict:
    """Every stage in turn; after each the JSON is written anew, and a line is printed."""
    bench = Bench(cfg, own, sizes or Sizes())
    for name, stage in stages(bench.sizes):
        began = time.perf_counter()
        bench.found[name] = tried(stage, bench) if bench.left > 0 else dict(left_out=f"minutes={own['minutes']} are over")
        took = time.perf_counter() - began
        write(cfg, own["machine"], bench.found)
        print(visible(f"{name}: {in_line(bench.found[name])} ({took:.1f} s)"), flush=True)
    policy.cache_clear()
    return bench.found


def stages(sizes: Sizes) -> Iterator[tuple[str, Callable[[Bench], dict]]]:
    for model in ("tiny", "135m"):
        for name, (four, dtype) in PRECISIONS.items():
            yield f"exact: {model}, {name}", partial(exact, model=model, four=four, dtype=dtype)
    yield "preset=smoke", smoke
    yield "load", load
    for rows in sizes.rows:
        yield f"decode: {rows} row{'s' * (rows > 1)}", partial(decode, rows=rows)
    yield "prefill", prefill
    yield "fork", fork
    for tokens, again in sizes.training:
        yield f"training row: {tokens} tokens{', recomputed' if again else ''}", partial(step, tokens=tokens, again=again)
    yield "plan", plan
    yield "attention", attention
    yield "continuous batching", batching
    yield "smollm2", on_smollm2


def tried(stage: Callable[[Bench], dict], bench: Bench) -> dict:
    """What a stage found, or why it did not."""
    try:
        gc.collect()
        torch.cuda.empty_cache()
        return stage(bench)
    except Exception as error:                         # whatever a device does that was never seen
        said = " ".join(str(error).split())[:300]
        return dict(error=said if isinstance(error, UserError) else f"{type(error).__name__}: {said}")


def write(cfg: Config, machine: dict, found: dict) -> Path:
    """The results so far."""
    path = Path(cfg.out) / f"gpu-{Path(cfg.model).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(dict(machine=machine, model=cfg.model, **found), indent=1) + "\n")
    return path


def in_line(found: dict) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {figure(value)}" for key, value in found.items())


def figure(value: Any) -> str:
    if isinstance(value, dict):
        return f"({in_line(value)})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


# ------------------------------------------------------------------------------------------------------ is it right?
def exact(bench: Bench, model: str, four: bool, dtype: str) -> dict:
    """How far the engine and packed rows are from the model's own forward, whether models/check.py lets that pass (if not,
    a run would take another way, but here all is told), and the share of greedy episodes that are generate's."""
    cfg = bench.cfg.but(model=model, load_in_4bit=four, dtype=dtype, **SHORT)
    one = Policy(*policy(model, four, cfg.context, dtype), cfg)
    checks().check_4bit(one.model)
    vars(one.model).update(checks().SAMPLING[0] | checks().TRAINING[0])                    # the fast ways
    judge = checks().judge_of(one)
    off = checks().sampling(judge) | checks().training(judge)
    told = {key: checks().mean(off[name]) for key, name in FIGURES.items()}
    told |= {f"{key}_limit": max(checks().FLOOR, judge.limits[name]) for key, name in FIGURES.items()}
    own = dict(contenders="d", episodes=bench.sizes.episodes, repetitions=0)
    return dict(agrees=judge.agrees(off), **told, equal=rollout(cfg, own)["contenders"][0]["equal"])


def smoke(bench: Bench) -> dict:
    return program(bench, "smoke", ["preset=smoke"])


def on_smollm2(bench: Bench) -> dict:
    """The real language model, if its file is here: a small run of all stages."""
    smollm2.unpacked()
    policy.cache_clear()                               # the card is its own
    torch.cuda.empty_cache()
    return program(bench, "smollm2", SMOLLM2)


def program(bench: Bench, name: str, words: list[str]) -> dict:
    """train.py from outside: its minutes, the seconds of its stages, and Pass@1 before and after."""
    folder = Path(bench.cfg.out) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    took, spent, _ = watch([*TRAIN, *words, f"out={folder}"], folder, bench.left)
    passk = json.loads((folder / "passk.json").read_text())
    solved = {f"Pass@1 of {who}": figures["Pass@1"]["estimate"] for who, figures in passk.items()}
    return dict(minutes=took / 60, **spent, **solved)


# --------------------------------------------------------------------------------------------------- a large model
def large(bench: Bench) -> Policy:
    """The policy, its adapter one that counts: while B is zero an adapter costs nothing."""
    model, chat = checked(bench.cfg)
    one = Policy(model, chat, bench.cfg)
    rng = torch.Generator(model.device).manual_seed(0)
    for value in one.parameters():
        if not value.any():
            with torch.no_grad():
                value.normal_(std=0.02, generator=rng)
    return one


def peak_gb(work: Callable[[], Any]) -> float:
    """Of all that is allocated, weights among it."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


def load(bench: Bench) -> dict:
    policy.cache_clear()
    took: list[float] = []
    most = peak_gb(lambda: took.append(seconds(lambda: checked(bench.cfg))))
    there = torch.cuda.memory_allocated() / 1e9
    return dict(seconds=took[0], gb=there, peak_gb=most, read_gb=bytes_read(large(bench).model) / 1e9)


def bytes_read(model: Any) -> float:
    """Of weights in a decode step: those of the layers and the head, 4 bits with their scales, the adapter as it is folded."""
    head = model.get_output_embeddings().weight
    adapter = {id(value) for layer in lora_layers(model).values() for value in layer.parameters(recurse=False)}
    total = head.nbytes
    for value in model.get_decoder().layers.parameters():
        total += value.numel() * head.itemsize if id(value) in adapter else value.nbytes
        state = getattr(value, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def keys_read(model: Any) -> int:
    """Bytes of keys and values, a token."""
    shape = model.config.get_text_config()
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * size * model.get_output_embeddings().weight.itemsize


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(6, 400), k=tokens)


def reply(context: list[int], new: int, temperature: float | None = None) -> Episode:
    return (yield Ask(context, new, temperature))


def forwards(engine: Any, jobs: list[Job]) -> list[tuple[int, float]]:
    """(tokens fed, seconds) of every forward that samples: it ends with reading the tokens back, so it has waited."""
    found, plain = [], engine._forward

    def timed(rows: list[int], upto: int | None = None) -> None:
        fed, began = engine.fed, time.perf_counter()
        plain(rows, upto)
        if upto is None:
            found.append((engine.fed - fed, time.perf_counter() - began))
    engine._forward = timed
    for _ in engine.run(deque(jobs)):
        pass
    return found


def engine_of(one: Policy, rows: int, context: int, snapshot_mb: int) -> Engine:
    cfg = one.cfg.but(slots=rows, context=context, snapshot_mb=snapshot_mb, temperature=1.0)
    return Engine(one.model, set(), cfg)               # no token ends a reply: all rows go on to the end


def decode(bench: Bench, rows: int) -> dict:
    """Without an adapter and with one, beside the least that reading the weights and keys takes; and with its steps not
    captured (scale/captured.py)."""
    one, sizes = large(bench), bench.sizes
    with adapter_off(one.model):
        plain = decoding(one, rows, sizes)
    told = dict(decoding(one, rows, sizes), without_adapter=plain)
    told["captured"] = getattr(one.model, "captured", True)        # False where a capture failed: stderr says why
    told["not_captured"] = decoding(replace(one, cfg=one.cfg.but(captured=False)), rows, sizes)
    read = bytes_read(one.model) + rows * (sizes.prompt + sizes.new / 2) * keys_read(one.model)
    least = read / bench.own["machine"]["gb_a_second"] / 1e9
    return told | dict(limit_tokens_a_second=rows / least, of_limit=least / told["step_s"])


def decoding(one: Policy, rows: int, sizes: Sizes) -> dict:
    """They share a prompt, which is fed once and forked: each row has its own copy, which is what a step reads."""
    engine = engine_of(one, rows, sizes.prompt + sizes.new, 512)
    jobs = [Job(reply(prompt(sizes.prompt), sizes.new), random.Random(n), "one") for n in range(rows)]
    found: list[tuple[int, float]] = []
    most = peak_gb(lambda: found.extend(forwards(engine, jobs)))
    steps = [took for fed, took in found if fed == rows]
    if len(steps) < sizes.new:
        raise UserError(f"slots: there is no memory for {rows} rows")
    step = statistics.median(steps[sizes.new // 4:])
    return dict(tokens_a_second=rows / step, step_s=step, mean_step_s=statistics.mean(steps), peak_gb=most)


def prefill(bench: Bench) -> dict:
    """Conversations that share nothing, fed at once; the second time counts."""
    one, (rows, tokens) = large(bench), bench.sizes.prefill
    took: list[float] = []

    def work() -> None:
        engine = engine_of(one, rows, tokens + 1, 0)
        # what keeps a snapshot in the end is not fed for others first
        jobs = [Job(reply(prompt(tokens, n), 1), random.Random(n), str(n), snapshot=True) for n in range(rows)]
        fed, spent = map(sum, zip(*forwards(engine, jobs)))
        if fed != rows * tokens:
            raise UserError(f"slots: there is no memory for {rows} rows of {tokens} tokens")
        took.append(spent)
    work()
    most = peak_gb(work)
    return dict(rows=rows, tokens=tokens, tokens_a_second=rows * tokens / took[1], seconds=took[1], first_s=took[0], peak_gb=most)


def fork(bench: Bench) -> dict:
    """A snapshot, in the host's memory, back into a row."""
    one, tokens = large(bench), bench.sizes.fork
    engine = engine_of(one, 2, tokens + 1, 8192)
    forwards(engine, [Job(reply(prompt(tokens), 1), random.Random(0), "one", snapshot=True)])
    snapshot = engine.kept["one"][0]
    with torch.inference_mode():
        took = [seconds(lambda: engine.fork(snapshot, 1, len(snapshot.ids))) for _ in range(6)]
    least = statistics.median(took[1:])
    return dict(tokens=len(snapshot.ids), seconds=least, gb_a_second=snapshot.nbytes / least / 1e9)


def step(bench: Bench, tokens: int, again: bool) -> dict:
    """An optimiser step on one row, a fifth of whose tokens bear loss; the second one counts. `again`: recomputed."""
    one = large(bench)
    weights = [(float(n % 5 == 0), 0.0) for n in range(tokens)]
    row = pack([[Segment(prompt(tokens), weights, None)]])
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-5)

    def work() -> None:
        with recomputing(one.model, again):
            packed_nll(one.model, [row]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    took = [seconds(work)]
    most = peak_gb(lambda: took.append(seconds(work)))
    return dict(seconds=took[1], first_s=took[0], tokens_a_second=tokens / took[1], peak_gb=most)


def plan(bench: Bench) -> dict:
    """What models/plan.py says of the prefill and the training rows that were measured, beside it."""
    of, one, (rows, tokens) = plans(), large(bench), bench.sizes.prefill
    cfg = bench.cfg.but(context=tokens + 1, slots=rows, snapshot_mb=0)
    planned = of.plan_of(of.measured(one.model, cfg), cfg, of.here(cfg), rows)
    told = dict(sampling=beside(planned.sampling, bench.found.get("prefill", {})))
    for tokens, again in bench.sizes.training:
        cfg = bench.cfg.but(row_tokens=tokens, context=min(tokens, bench.cfg.context), gradient_checkpointing=again)
        planned = of.plan_of(of.measured(one.model, cfg), cfg, of.here(cfg), 1)
        name = f"training row: {tokens} tokens{', recomputed' if again else ''}"
        told[name] = beside(planned.training, bench.found.get(name, {}))
    return told


def beside(planned: float, measured: dict) -> dict:
    return dict(planned_gb=planned / 1e9, peak_gb=measured.get("peak_gb"))


def attention(bench: Bench) -> dict:
    """cuDNN's attention among those that torch may choose, and not (as lora.load_model has it)."""
    told: dict[str, dict] = {}
    rows, (tokens, again) = bench.sizes.rows[0], bench.sizes.training[0]
    try:
        for name, on in (("without_cudnn", False), ("with_cudnn", True)):
            torch.backends.cuda.enable_cudnn_sdp(on)
            sampled, learned = decoding(large(bench), rows, bench.sizes), step(bench, tokens, again)
            told[name] = dict(step_s=sampled["step_s"], mean_step_s=sampled["mean_step_s"], row_s=learned["seconds"],
                              first_row_s=learned["first_s"])
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
    return told


def batching(bench: Bench) -> dict:
    """The same greedy replies by transformers' continuous batching, prompts that share nothing, prefill counted in. The
    adapter is not folded there: it computes in a thread of its own, outside inference mode."""
    one, sizes, rows = large(bench), bench.sizes, bench.sizes.rows[0]
    cfg = one.cfg.but(context=sizes.prompt + sizes.new)
    asks = [Ask(prompt(sizes.prompt, n), sizes.new) for n in range(rows)]
    said: dict[str, list] = {}

    def ours() -> None:
        engine = engine_of(one, rows, cfg.context, 0)
        jobs = [Job(reply(ask.context, sizes.new, 0.0), random.Random(n), str(n), snapshot=True) for n, ask in enumerate(asks)]
        forwards(engine, jobs)
        said["ours"] = [job.result for job in jobs]

    def theirs() -> None:
        with torch.inference_mode():
            said["theirs"] = paged(one.model, one.chat, cfg, rows, asks)
    told = {}
    try:
        for name, work in (("ours", ours), ("theirs", theirs)):
            work()
            told[f"{name}_tokens_a_second"] = sum(map(len, said[name])) / seconds(work)
    finally:
        one.model.destroy_cached_continuous_batching_manager()
    return told | dict(equal=sum(a == b for a, b in zip(said["ours"], said["theirs"])) / rows)


# --------------------------------------------------------------------------------------------------------- the table
def table(found: dict) -> str:
    """The results in the form of docs/speed.md."""
    here = found["machine"]
    lines = [f"The machine: {here['gpu'] or here['processor']}, {here['gb_a_second']:,.0f} GB/s and "
             f"{here['gflop_a_second']:,.0f} GFLOP/s, torch {here['torch']}."]
    named = {name: value for name, value in found.items() if isinstance(value, dict) and name != "machine"}
    fine = {name: value for name, value in named.items() if not {"error", "left_out"} & value.keys()}
    lines += exactness({name: value for name, value in fine.items() if name.startswith("exact: ")})
    lines += decoded(found["model"], {name: value for name, value in fine.items() if name.startswith("decode: ")})
    rest = [row for name, one in fine.items() if not name.startswith(("exact: ", "decode: ")) for row in parts(name, one)]
    lines += ["", "| stage | |", "|---|---|", *(f"| {name} | {in_line(one)} |" for name, one in rest)] if rest else []
    missing = [f"- {name}: {in_line(value)}" for name, value in named.items() if name not in fine]
    return "\n".join([*lines, *(["", "Not measured:", *missing] if missing else [])])


def parts(name: str, found: dict) -> list[tuple[str, dict]]:
    """A stage that compares some things has a line for each."""
    several = all(isinstance(one, dict) for one in found.values())
    return [(f"{name}: {key.replace('_', ' ')}", one) for key, one in found.items()] if several else [(name, found)]


def exactness(found: dict[str, dict]) -> list[str]:
    if not found:
        return []
    lines = ["", "How far from the model's own forward, in the mean, and in brackets how far they may be:", "",
             "| | " + " | ".join(FIGURES.values()) + " | agrees | greedy episodes equal to generate's |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        cells = [f"{one[key]:.1e} ({one[f'{key}_limit']:.1e})" for key in FIGURES]
        lines.append(f"| {name.removeprefix('exact: ')} | " + " | ".join(cells) + f" | {one['agrees']} | {one['equal']:.0%} |")
    return lines


def decoded(model: str, found: dict[str, dict]) -> list[str]:
    if not found:
        return []
    ordered = sorted(found.items(), key=lambda item: int(item[0].split()[1]))
    lines = ["", "| decode, " + model + " | tokens/s, no adapter | with one | ms a step | not captured | the bandwidth's limit, tokens/s "
             "| of it | peak GB |", "|---|---|---|---|---|---|---|---|"]
    for name, one in ordered:
        lines.append(f"| {name.removeprefix('decode: ')} | {one['without_adapter']['tokens_a_second']:,.0f} | "
                     f"{one['tokens_a_second']:,.0f} | {1000 * one['step_s']:.1f}{'' if one['captured'] else ' (not captured)'} | "
                     f"{1000 * one['not_captured']['step_s']:.1f} | {one['limit_tokens_a_second']:,.0f} | "
                     f"{one['of_limit']:.0%} | {one['peak_gb']:.1f} |")
    return lines


def main(args: list[str]) -> None:
    if len(args) != 1 or not Path(args[0]).is_file():
        raise UserError("usage: python -m tools.bench_gpu out/gpu/gpu-7b.json")
    print(visible(table(json.loads(Path(args[0]).read_text()))))


if __name__ == "__main__":
    guarded(main, __doc__)
