"""The plan: what a run takes of a card or of this machine, and how much it does at most, from the settings and the model's config
alone. No weight is loaded: the model is made on the meta device, where tensors have shapes and no memory.

    python train.py config.yaml preset=qwen7b plan=true

How much is done, and how many hours that takes, is hours.py's.

The formulas count what is alive at once where the code's memory peaks; tests/test_plan.py holds them against a measured 135M, and
against this code at 7B shapes, run on the meta device, too. Bytes throughout; GB are 10^9 of them.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import transformers

import forward
import packing
import ranks
from config import Config, UserError, visible
from envs import env_class
from lora import (LINEAR, files, find_model, hub_fix, layers_of, linear_layers, lora_layers, lora_parameters, read_config,
                  widths)
from models import adapters, hours
from models.loading import is_whole, leave_out_towers, model_class, stacked

CARDS = (8, 16, 24, 48, 80)             # GB
KEPT_FREE = 0.08                        # of a card: the context of CUDA, and what fragments
KEPT_BY_GLIBC = 0.25                    # of the memory that is free: pieces below 32 MB do not all go back at once
FOUR = 0.52                             # bytes a weight in nf4, its scales among them
USUAL, MOST = 192, 512                  # slots where null is said: on a CPU; on a GPU, beyond which a step gains little
FEW = 8                                 # slots, below which other settings are to make room first


# ----------------------------------------------------------------------------------------------------- what is counted
@dataclass
class Shape:
    """What a plan needs to know of a model. Numbers, not bytes."""
    kind: str
    every: int                          # weights
    four: int                           # of them, those that 4 bits reach on a GPU
    four_on_cpu: int
    packed: bool                        # whether its checkpoint is in 4 bits already
    largest: int                        # of a layer that is unpacked while it computes
    adapter: int                        # weights of an adapter
    layers: int
    hidden: int
    wide: int                           # of the middle of an MLP
    queries: int                        # of all heads, a token
    groups: int                         # heads that share keys
    inputs: float                       # of the linear layers of one layer, a token, each for itself
    ranks: float                        # of the adapter in one layer, a token
    normed: int                         # of queries and keys that are normed, a token
    vocab: int
    limits: Callable[[int], tuple[int, int]]     # bytes of a number -> most tokens, most rows of one forward
    token: float                        # keys and values of a token, all layers


@dataclass
class Place:
    """Where a run computes, and how precisely."""
    cuda: bool
    number: int = 2                     # bytes of one: 2 in bfloat16 or float16, 4 in float32
    processes: int = 1                  # that share it; on GPUs each has its own


@dataclass
class Plan:
    """Bytes of one process, each part at its largest."""
    weights: float
    adapter: float                      # while sampling: its weights, fp32, and in the model's own precision again
    learned: float                      # while training: gradients and Adam's two moments besides
    slot: float
    slots: int
    snapshots: float                    # beside the cache: a CPU's
    host: float                         # those of a GPU, in the host's memory
    prefill: float                      # a forward of the most tokens that are fed at once
    draw: float                         # logits of all slots, and what a token is drawn by
    graphs: float                       # what a captured step takes, which is a memory of its own
    plain: float                        # a training row, everything kept for the gradient
    recomputed: float                   # the same with gradient_checkpointing
    row: float                          # the one that is set

    @property
    def sampling(self) -> float:
        return self.weights + self.adapter + self.slots * self.slot + self.snapshots + max(self.prefill, self.draw) + self.graphs

    @property
    def training(self) -> float:
        return self.weights + self.learned + self.row


def shape_of(cfg: Config) -> Shape:
    """Of the model that cfg names, by its config.json alone."""
    path = find_model(cfg.model)
    transformers.logging.set_verbosity_error()
    with files().reading("model: ", Path(path), hub_fix(path)):
        config = read_config(cfg.model, path, cfg.context)
        with torch.device("meta"):
            model = model_class(config)._from_config(config)
        leave_out_towers(model)
        return measured(model, cfg, numbers_a_token(model, torch.zeros(1, 8, dtype=torch.long, device="meta"), cfg.context))


def measured(model: Any, cfg: Config, token: float | None = None) -> Shape:
    """Of a model that is there, or on the meta device. `token`: numbers that one has in the cache."""
    text, head, decoder = model.config.get_text_config(), model.get_output_embeddings(), layers_of(model)
    layers, heads = text.num_hidden_layers, of_all(text, "num_attention_heads") or 1
    linear = [widths(layer) for layer in decoder.modules() if type(layer).__name__ in LINEAR and layer is not head]
    stacks = sum(size for module in decoder.modules() for size in stacked(module))                       # experts
    every, own = stacks, {id(value) for value in lora_parameters(model)}
    for value in [value for value in model.parameters() if id(value) not in own]:
        state = getattr(value, "quant_state", None)
        every += state.shape.numel() if state else value.numel() if value.dim() < 3 and value.is_floating_point() else 0
    rank = rank_of(cfg)
    adapted = [widths(layer.base) for layer in lora_layers(model).values()] or [
        widths(layer) for _, _, layer in linear_layers(model)]
    size = of_all(text, "head_dim") or text.hidden_size // heads
    shared = of_all(text, "num_key_value_heads") or heads
    normed = any(name.endswith("q_norm") for name, _ in decoder.named_modules())
    return Shape(
        kind=type(model).__name__, every=every, four=stacks + sum(i * o for i, o in linear),
        four_on_cpu=stacks + sum(i * o for i, o in linear if is_whole(i, "cpu")), packed=is_packed(model.config),
        largest=max(i * o for i, o in linear),
        adapter=sum(value.numel() for value in lora_parameters(model)) or rank * sum(map(sum, adapted)),
        layers=layers, hidden=text.hidden_size, wide=forward.middle(text),
        queries=heads * size, groups=heads // shared, inputs=sum(i for i, _ in adapted) / layers,
        ranks=rank * len(adapted) / layers, normed=(heads + shared) * size if normed else 0,
        vocab=text.vocab_size, limits=lambda bytes_: forward.limits(text, text.vocab_size, bytes_),
        token=token or 2 * layers * shared * size)


def rank_of(cfg: Config) -> int:
    """Of the adapter; one that a run begins with keeps its own, the largest where layers differ."""
    if not (adapter := cfg.init or cfg.adapter):
        return cfg.lora_rank
    told = adapters.read_config("", Path(adapter))
    return max(told["r"], *(told.get("rank_pattern") or {}).values(), 1)


def is_packed(config: Any) -> bool:
    told = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    return bool(told.get("load_in_4bit") if isinstance(told, dict) else getattr(told, "load_in_4bit", False))


def of_all(text: Any, name: str) -> Any:
    """What a config says of all layers; None where it has not this, or says it of each."""
    try:
        return getattr(text, name, None)
    except RuntimeError:
        return None


def numbers_a_token(model: Any, ids: torch.Tensor, context: int) -> float:
    """In the cache, none forgotten behind a window: so the engine holds them. States that do not grow are shared among
    context= tokens. 0 where the meta device does not get that far: routers look at what tokens are."""
    try:
        with torch.no_grad():
            kept = model(input_ids=ids, use_cache=True)
    except (NotImplementedError, RuntimeError):
        if ids.device.type != "meta":
            raise
        return 0.0
    total = 0.0
    for layer in getattr(kept.get("past_key_values", kept.get("cache")), "layers", []):
        for name, parts in vars(layer).items():
            for value in parts.values() if isinstance(parts, dict) else [parts]:             # states come in dicts
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    total += value.numel() / (value.shape[-2] if name in ("keys", "values") else context)
    return total


# ------------------------------------------------------------------------------------------------------- the plan
def in_four(shape: Shape, cfg: Config, place: Place) -> bool:
    return shape.packed or (place.cuda if cfg.load_in_4bit is None else cfg.load_in_4bit)


def plan_of(shape: Shape, cfg: Config, place: Place, slots: int) -> Plan:
    """`slots`: of all processes on a CPU, which share snapshot_mb=, too."""
    b, four = place.number, 0
    if in_four(shape, cfg, place):
        four = shape.four if place.cuda or shape.packed else shape.four_on_cpu
    unpacked = b * shape.largest if four else 0
    slots = 0 if cfg.engine else -(-slots // place.processes)          # a server has a memory of its own
    plain, recomputed = (row_of(shape, cfg, b, again) + unpacked for again in (False, True))
    kept = min(1, slots) * cfg.snapshot_mb * 2**20
    rows = min(slots, shape.limits(b)[1])
    draw = rows * shape.vocab * (20 if b == 4 else 18)                  # engine._race and _draw, fp64 sums among them
    step = max(draw, forward_of(shape, cfg, place, rows) + min(1, slots) * unpacked)
    # gradients of a row and, where a step has more than one, the sum of those before
    gradients = 4 if cfg.batch_tokens < 2 * cfg.row_tokens else 8
    return Plan(
        weights=FOUR * four + b * (shape.every - four), adapter=(4 + b) * shape.adapter,
        learned=(4 + b + 8 + gradients) * shape.adapter,
        slot=b * shape.token * -(-cfg.context // 64) * 64, slots=slots,
        # pinned, each piece of them takes a power of two
        snapshots=0 if place.cuda else kept / place.processes, host=2 * kept if place.cuda else 0,
        prefill=prefill_of(shape, cfg, place, slots) + unpacked,
        draw=draw, graphs=step + b * rows * shape.vocab if place.cuda and cfg.captured else 0,          # the logits stay
        plain=plain, recomputed=recomputed, row=recomputed if cfg.gradient_checkpointing else plain)


def prefill_of(shape: Shape, cfg: Config, place: Place, slots: int) -> float:
    # a conversation that is longer than the limit is fed alone
    tokens = min(max(shape.limits(place.number)[0], cfg.context), slots * cfg.context)
    # on a CPU heads that share keys are asked one conversation after the other
    masks = shape.groups * cfg.context if shape.groups > 1 and not place.cuda else 0
    return forward_of(shape, cfg, place, tokens) + min(1, slots) * place.number * cfg.context * masks


def forward_of(shape: Shape, cfg: Config, place: Place, tokens: float) -> float:
    """A layer of a forward without gradient: the larger of its MLP and its attention."""
    b = place.number
    # one of the MLP's halves is done; of the other there is W x, and that with B A x
    mlp = 3 * b * shape.wide
    attention = 4 * b * shape.queries
    stream = 4 * b * shape.hidden + (b + 1) * cfg.context              # states, the mask
    if place.cuda:                      # side by side: masks of all, padded before
        # heads that share keys are asked as one, each with its mask
        attention += b * shape.groups * cfg.context if shape.groups > 1 else 0
        stream += b * cfg.context
    return tokens * (stream + max(mlp, attention))


def row_of(shape: Shape, cfg: Config, b: int, again: bool) -> float:
    """A training row, all of whose tokens bear loss. `again`: a layer is computed again for its gradient."""
    tokens = cfg.row_tokens
    # kept of a token in a layer: what adapters are fed (in 16 bits each has its fp32 copy), norms, attention, MLP, mask
    fed = 4 * shape.inputs if b < 4 else 4 * (2 * shape.hidden + shape.queries + shape.wide)
    kept = (fed + 4 * shape.ranks + 8 * shape.hidden + 4 * shape.normed + 4 * b * shape.queries + 3 * b * shape.wide
            + b * tokens)
    # at the head, a chunk of targets: the log-softmax of their logits, its gradient, and theirs, fp32
    head = 12 * shape.vocab * min(tokens, max(1, packing.LOGITS_BYTES // (4 * shape.vocab)))
    ends = 8 * shape.hidden * tokens + tokens**2                       # states behind the last layer, the mask
    if not again:
        return shape.layers * tokens * kept + head + ends
    # the MLP's second half, its adapter's part in fp32, while its third keeps nothing yet; in fp32, gradients on their way back
    back = (4 if b < 4 else 16) * shape.wide
    return shape.layers * tokens * b * shape.hidden + max(head, tokens * (kept + back)) + ends


# ------------------------------------------------------------------------------------------------------ what fits
def fitting(shape: Shape, cfg: Config, place: Place, room: float, most: int | None = None) -> int:
    """The most slots with which sampling takes no more than `room` bytes in each process; 0: not one."""
    low, high = 0, most or (MOST if place.cuda else USUAL)
    while low < high:
        middle = (low + high + 1) // 2
        if plan_of(shape, cfg, place, middle).sampling <= room:
            low = middle
        else:
            high = middle - 1
    return low


def here(cfg: Config) -> Place:
    cuda = torch.cuda.is_available()
    return Place(cuda, number_of(cfg, cuda), 1 if cuda else ranks.world())


def number_of(cfg: Config, cuda: bool) -> int:
    """Bytes of one. A GPU that lacks bfloat16 takes float16."""
    return getattr(torch, cfg.dtype).itemsize if cfg.dtype else 2 if cuda else 4


def room_here(place: Place) -> float:
    """Bytes that each process may take, what it has already among them."""
    if place.cuda:
        free, total = torch.cuda.mem_get_info()
        return min((1 - KEPT_FREE) * total, free + torch.cuda.memory_reserved())
    told = dict(line.split(":") for file in ("/proc/meminfo", "/proc/self/status") for line in open(file) if " kB" in line)
    own, free = (1024 * int(told[name].split()[0]) for name in ("VmRSS", "MemAvailable"))
    return own + (1 - KEPT_BY_GLIBC) * free / place.processes


def slots_of(model: Any, cfg: Config) -> int:
    """What `slots: null` means, for a model that is there."""
    place = here(cfg)
    if cfg.engine:                      # requests at a time, and no cache
        return USUAL
    ids = torch.zeros(1, 8, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    most = fitting(measured(model, cfg, numbers_a_token(model, ids, cfg.context)), cfg, place, room_here(place))
    if not most:
        keys = "context=" if place.cuda else "context= or snapshot_mb="
        raise UserError(f"slots: by the plan not one conversation fits beside the model (plan=true says what does); lower "
                        f"{keys}, or say how many with slots=")
    return most


def changes(shape: Shape, cfg: Config, place: Place, room: float) -> dict[str, Any] | None:
    """The settings with which both stages fit, those first that cost least; None: none do."""
    found: dict[str, Any] = {}

    def short(stage: str) -> bool:
        now = cfg.but(**found)
        samples = min(FEW, now.slots or FEW) <= fitting(shape, now, place, room)
        return not {"sampling": samples, "training": plan_of(shape, now, place, 1).training <= room}[stage]
    for stage, key, value in cheaper(shape, cfg, place):
        if short(stage):
            found |= {key: value} | ({"row_tokens": value} if key == "context" else {})
    most = fitting(shape, cfg.but(**found), place, room)
    if not most or short("training"):
        return None
    if cfg.slots and cfg.slots > most:
        found["slots"] = most
    return {key: value for key, value in found.items() if getattr(cfg, key) != value}


def cheaper(shape: Shape, cfg: Config, place: Place) -> Iterator[tuple[str, str, Any]]:
    """(stage, key, value), from what costs a little time to what costs room for thought."""
    yield "training", "gradient_checkpointing", True
    yield "training", "row_tokens", cfg.context
    for mb in (2048, 512):
        if cfg.snapshot_mb > mb and not place.cuda:
            yield "sampling", "snapshot_mb", mb
    for stage in ("sampling", "training"):
        if place.cuda and not in_four(shape, cfg, place):
            yield stage, "load_in_4bit", True
    most = cfg.context
    while most > 1024:
        most //= 2
        yield "sampling", "context", most
        yield "training", "context", most


def side_by_side(cfg: Config, slots: int) -> int:
    """Conversations at a time: a world that shares no process takes a worker each (run.Policy.engine)."""
    return min(slots, workers(cfg)) if env_class(cfg.env).apart and not env_class(cfg.env).shares else slots


def workers(cfg: Config) -> int:
    return cfg.workers or ranks.cores()


# ------------------------------------------------------------------------------------------------------------- in words
def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 10e9 else f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def said(found: dict[str, Any] | None) -> str:
    """What changes() found."""
    if found is None:
        return "no setting makes it fit; take a smaller model"
    if not found:
        return "fits"
    alone = " (training finds that itself)" if "gradient_checkpointing" in found else ""
    return "to fit: " + " ".join(f"{key}={str(value).lower()}" for key, value in found.items()) + alone


def lines_of(cfg: Config) -> list[str]:
    """The plan as `plan=true` prints it: for this machine's GPU, or for any and this machine's processors."""
    shape, gpu = shape_of(cfg), torch.cuda.is_available()
    cpu = Place(False, number_of(cfg, False), cfg.processes or ranks.cores())
    other = "a GPU" if cfg.slots else "a GPU of 24 GB"
    places = {"this GPU": here(cfg)} if gpu else {other: Place(True, number_of(cfg, True)), "here": cpu}
    rooms = {name: 24e9 * (1 - KEPT_FREE) if place.cuda and not gpu else room_here(place) for name, place in places.items()}
    plans = [plan_of(shape, cfg, place, side_by_side(cfg, cfg.slots or fitting(shape, cfg, place, rooms[name])))
             for name, place in places.items()]
    heads = [name if place.cuda else f"{name}, {place.processes} processes, each" if place.processes > 1 else name
             for name, place in places.items()]
    lines = [f"{cfg.model}: {shape.kind}, {shape.every / 1e9:.3g} billion weights in {shape.layers} layers", "",
             f"{'GB':40}" + "".join(f"{head:>26}" for head in heads)]
    for text, value in PARTS:
        lines.append(f"{text.format(cfg=cfg):40}" + "".join(f"{value(plan):>26}" for plan in plans))
    lines.append("")
    if gpu:
        lines.append(f"this GPU: {gb(rooms['this GPU'])} GB may be taken; {said(changes(shape, cfg, here(cfg), rooms['this GPU']))}")
    else:
        lines += [*on_cards(shape, cfg), f"here, no GPU: {gb(cpu.processes * rooms['here'])} GB may be taken; "
                  f"{said(changes(shape, cfg, cpu, rooms['here']))}"]
    return [*lines, *worlds_lines(cfg), "", *work_lines(cfg)]


PARTS: list[tuple[str, Callable[[Plan], str]]] = [
    ("weights", lambda plan: gb(plan.weights)),
    ("adapter, gradients, Adam", lambda plan: gb(plan.learned)),
    ("cache, a slot of {cfg.context:,} tokens", lambda plan: gb(plan.slot)),
    ("cache, all slots", lambda plan: f"{plan.slots:,} slots: {gb(plan.slots * plan.slot)}"),
    ("snapshots, at most", lambda plan: f"in the host's memory: {gb(plan.host)}" if plan.host else gb(plan.snapshots)),
    ("largest prefill", lambda plan: gb(plan.prefill)),
    ("captured decode steps", lambda plan: gb(plan.graphs)),
    ("training row of {cfg.row_tokens:,} tokens", lambda plan: gb(plan.plain)),
    ("the same, recomputed", lambda plan: gb(plan.recomputed)),
    ("peak of sampling", lambda plan: gb(plan.sampling)),
    ("peak of training", lambda plan: gb(plan.training))]


def on_cards(shape: Shape, cfg: Config) -> list[str]:
    """What cards of the usual sizes take, for a machine that has none."""
    room, place = {card: card * 1e9 * (1 - KEPT_FREE) for card in CARDS}, Place(True, number_of(cfg, True))
    slots = [f"{fitting(shape, cfg, place, size) or '-'}" for size in room.values()]
    found = {card: said(changes(shape, cfg, place, size)) for card, size in room.items()}
    trains = [plan_of(shape, cfg, place, 1).training <= size for size in room.values()]
    rows = [("on a card of", [f"{card} GB" for card in CARDS]), ("slots that fit", slots),
            ("the training row fits", ["yes" if fits else "no" for fits in trains])]
    lines = [f"{name:40}" + "".join(f"{value:>9}" for value in values) for name, values in rows]
    return lines + [f"{f'{card} GB, {KEPT_FREE:.0%} kept free':40}{text}" for card, text in found.items()]


def worlds_lines(cfg: Config) -> list[str]:
    """Of a world that runs apart: what its processes hold."""
    world, count = env_class(cfg.env), workers(cfg)
    if not world.apart:
        return []
    held = (f"the worlds of all conversations in {count} processes" if world.shares else
            f"a process for each conversation, at most {count} side by side")
    return [f"{cfg.env}: {held} (workers=)"]


def work_lines(cfg: Config) -> list[str]:
    heads = ("at most", "environment steps", "tokens", "optimiser steps")
    lines = [f"{heads[0]:22}" + "".join(f"{head:>20}" for head in heads[1:])]
    for name, *counts in hours.work_of(cfg):
        shown = [f"{count:,}" if isinstance(count, int) else count for count in counts]
        lines.append(f"{name:22}" + "".join(f"{count:>20}" for count in shown))
    return [*lines, hours.line_of(cfg, hours.paces(Path(cfg.out)))]


def say(cfg: Config) -> None:
    """The plan in short, before a run loads its model onto a GPU."""
    if not torch.cuda.is_available() or ranks.rank():
        return
    try:
        shape, place = shape_of(cfg), here(cfg)
    except UserError as error:          # who loads the model says it, if it is to end the run
        print(visible(f"plan: none; {error}"), file=sys.stderr)
        return
    room = room_here(place)
    plan = plan_of(shape, cfg, place, side_by_side(cfg, cfg.slots or fitting(shape, cfg, place, room)))
    print(visible(f"plan: at most {gb(plan.sampling)} GB in sampling (weights {gb(plan.weights)}, {plan.slots} slots "
                  f"{gb(plan.slots * plan.slot)}, prefill {gb(plan.prefill)}), {gb(plan.training)} in training "
                  f"(a row {gb(plan.row)}), of {gb(room)}; snapshots in the host's memory {gb(plan.host)}\n"
                  f"plan: {said(changes(shape, cfg, place, room))}"), file=sys.stderr)
