"""What `python lora.py check MODEL` says of a model beside the check's figures: what adapters and 4 bits reach, how it talks, and
how many conversations fit on a card.
"""
from dataclasses import dataclass
from typing import Any

import torch

from lora import LINEAR, layers_of, linear_layers, lora_layers, lora_parameters, widths
from models.loading import reached
from models.template import describe

CARDS = (8, 16, 24, 48, 80)             # GB
KEPT_FREE = 0.08                        # of a card: the context of CUDA, and what fragments
PREFILL = 16384                         # tokens that the engine feeds at once, at most
FOUR = 0.52                             # bytes a weight in nf4, its scales among them
ESTIMATE = (f"an estimate: weights, an adapter with gradients and Adam, snapshot_mb=, a prefill of {PREFILL:,} tokens; "
            f"{100 * KEPT_FREE:.0f} % stay free")


@dataclass
class Sizes:
    """Bytes, on a card."""
    four: float                         # weights where 4 bits reach, the rest in 16
    sixteen: float                      # all of them in 16 bits
    adapter: float                      # its weights, their gradients and Adam's two moments, fp32
    prefill: float                      # states and logits of the most tokens that are fed at once
    token: float                        # keys and values of a token


def sizes_of(policy: Any, token: float) -> Sizes:
    model, cfg = policy.model, policy.cfg
    text = model.config.get_text_config()
    linear = [layer for layer in layers_of(model).modules() if type(layer).__name__ in LINEAR]
    four = sum(widths(layer)[0] * widths(layer)[1] for layer in linear if layer is not model.get_output_embeddings())
    every = sum(value.quant_state.shape.numel() if type(value).__name__ == "Params4bit" else value.numel()
                for value in model.parameters())
    four += sum(value.numel() for value in layers_of(model).parameters() if value.dim() == 3)            # experts
    numbers = sum(value.numel() for value in lora_parameters(model)) or cfg.lora_rank * sum(
        sum(widths(layer)) for _, _, layer in linear_layers(model))
    adapter = 16 * numbers
    states = 2 * (8 * text.hidden_size + 3 * (getattr(text, "intermediate_size", 0) or 4 * text.hidden_size))
    most = PREFILL * states + 8 * cfg.slots * text.vocab_size
    return Sizes(FOUR * four + 2 * (every - four), 2 * every, adapter, most, token)


def conversations_on(card: int, weights: float, sizes: Sizes, policy: Any) -> str:
    """How many of context= tokens fit side by side."""
    cfg = policy.cfg
    left = card * 1e9 * (1 - KEPT_FREE) - weights - sizes.adapter - sizes.prefill - cfg.snapshot_mb * 2**20
    slots = int(left // max(1, sizes.token * (cfg.context + 1)))
    return f"{slots:,}" if slots > 0 else "-"


def lines_of(policy: Any, found: dict[str, torch.Tensor], token: float) -> list[str]:
    """`found`: the check's figures; `token`: bytes that a token has in the cache, in 16 bits."""
    model, cfg, sizes = policy.model, policy.cfg, sizes_of(policy, token)
    first = next(model.parameters())
    said = ", ".join(f"{float(values.mean()):.1e} in {name}" for name, values in found.items())
    way = "the forking engine" if model.forks else "the general way (transformers' generate)"
    rows = "packed rows" if model.packs else "the general way (one path a row)"
    covered = f"LoRA: the adapter's {len(lora_layers(model))} layers" if lora_layers(model) else reached(model)
    short = f"{first.dtype}".removeprefix("torch.")
    lines = [f"{cfg.model}: {type(model).__name__}, {short} on {first.device.type}", f"sampled by {way}, trained in {rows}",
             f"differs from the model's own forward by {said}, in the mean", covered, *describe(policy.chat.template),
             f"cache: {token:,.0f} bytes a token in 16 bits", f"conversations of context={cfg.context} side by side on a card "
             f"({ESTIMATE}):", f"{'GB':>12}" + "".join(f"{card:>10}" for card in CARDS)]
    for name, weights in (("4 bits", sizes.four), ("16 bits", sizes.sixteen)):
        lines.append(f"{name:>12}" + "".join(f"{conversations_on(card, weights, sizes, policy):>10}" for card in CARDS))
    return lines
