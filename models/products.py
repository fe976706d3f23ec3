"""Products on an AMD processor, in fp32, while nothing is learned: by oneDNN, as torch.compile does them. Torch's own
choice, MKL, uses half the width of its registers; the engine is up to twice as fast this way (docs/speed.md). On Intel's
MKL is the faster one at most sizes, and others were not measured: they keep torch's own.

    quicken    a model's linear layers, if the processor is AMD's and its oneDNN agrees with torch
    plain      inside, they are torch's own again: what others' code is timed with
"""
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator

import torch
from torch import nn

from ranks import processor

WORTH = 2**20                            # multiplications, fewer of which MKL begins sooner
STEP, FEW = 64, 8                        # rows: oneDNN makes, and keeps, code for each number of rows that it meets


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:           # (..., in) -> (..., out)
    # a layer that has since been cast, or moved, is torch's again: without AVX-512, oneDNN here has no bf16
    if torch.is_grad_enabled() or x.numel() * layer.out_features < WORTH or not ours(layer):
        return nn.functional.linear(x, layer.weight, layer.bias)
    rows = x.reshape(-1, layer.in_features)                              # (M, in)
    padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % (STEP if len(rows) > STEP else FEW)))
    y = torch.ops.mkldnn._linear_pointwise(padded, layer.weight, layer.bias, "none", [], "")
    return y[:len(rows)].view(*x.shape[:-1], layer.out_features)


def ours(layer: nn.Linear) -> bool:
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def quicken(model: Any) -> None:
    if processor() != "AuthenticAMD":
        return
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and ours(layer)]
    if layers and agrees(layers[0]):
        for layer in layers:
            layer.forward = partial(linear, layer)                       # type: ignore[method-assign]


@torch.no_grad()
def agrees(layer: nn.Linear) -> bool:
    x = torch.linspace(-1, 1, 64 * layer.in_features).view(1, 64, -1)
    x = x.expand(-(-WORTH // (x.numel() * layer.out_features)), -1, -1)
    try:
        return torch.allclose(linear(layer, x), nn.functional.linear(x, layer.weight, layer.bias), 1e-4, 1e-4)
    except (AttributeError, RuntimeError):                               # a build of torch without it
        return False


@contextmanager
def plain(model: Any) -> Iterator[None]:
    quick = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" in vars(layer)]
    for layer in quick:
        del layer.forward
    try:
        yield
    finally:
        for layer in quick:
            layer.forward = partial(linear, layer)                       # type: ignore[method-assign]
