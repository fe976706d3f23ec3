"""What `python lora.py check MODEL` says of a model beside the check's figures: what adapters and 4 bits reach, how it talks, and
how many conversations fit on a card, by the plan.
"""
from typing import Any

import torch

from lora import lora_layers
from models.loading import reached
from models.plan import CARDS, KEPT_FREE, Place, fitting, measured
from models.template import describe

ESTIMATE = f"an estimate: weights, an adapter, the largest prefill; {KEPT_FREE:.0%} stay free"


def conversations_on(card: int, policy: Any, four: bool, token: float) -> str:
    """How many of context= tokens fit side by side. `token`: numbers that one has in the cache."""
    cfg = policy.cfg.but(load_in_4bit=four)
    most = fitting(measured(policy.model, cfg, token), cfg, Place(cuda=True), card * 1e9 * (1 - KEPT_FREE), 10**6)
    return f"{most:,}" if most else "-"


def lines_of(policy: Any, found: dict[str, torch.Tensor], token: float) -> list[str]:
    """`found`: the check's figures."""
    model, cfg = policy.model, policy.cfg
    first = next(model.parameters())
    said = ", ".join(f"{float(values.mean()):.1e} in {name}" for name, values in found.items())
    way = "the forking engine" if model.forks else "the general way (transformers' generate)"
    rows = "packed rows" if model.packs else "the general way (one path a row)"
    covered = f"LoRA: the adapter's {len(lora_layers(model))} layers" if lora_layers(model) else reached(model)
    short = f"{first.dtype}".removeprefix("torch.")
    lines = [f"{cfg.model}: {type(model).__name__}, {short} on {first.device.type}", f"sampled by {way}, trained in {rows}",
             f"differs from the model's own forward by {said}, in the mean", covered, *describe(policy.chat.template),
             f"cache: {2 * token:,.0f} bytes a token in 16 bits", f"conversations of context={cfg.context} side by side on a card "
             f"({ESTIMATE}):", f"{'GB':>12}" + "".join(f"{card:>10}" for card in CARDS)]
    for name, four in (("4 bits", True), ("16 bits", False)):
        lines.append(f"{name:>12}" + "".join(f"{conversations_on(card, policy, four, token):>10}" for card in CARDS))
    return lines
