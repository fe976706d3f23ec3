"""The weights: loading a causal LM of transformers, in 4 bits where a GPU is, and LoRA adapters in PEFT's layout.

    load_model                   (model, tokenizer), from a local folder or a hub name
    add_lora, adapter_off        an adapter on every linear layer; switched off, the model is the base exactly
    save_adapter, load_adapter   adapter_model.safetensors and adapter_config.json; peft and vLLM load them as are

    python lora.py check MODEL [key=value ...]       what lies between a model and a run, and what fits on a card
"""
import functools
import inspect
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

import ranks
from config import ROOT, UserError, guarded

LINEAR = ("Linear", "Linear4bit", "Conv1D", "FalconLinear")          # what computes W x + b, and nothing else


@contextmanager
def aside(file: Path) -> Iterator[Path]:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    new = file.with_name(file.name + ".new")
    try:
        yield new
    except (SafetensorError, RuntimeError) as error:     # so their writers say that a disk is full
        raise UserError(f"{new} cannot be written; is the disk full? ({' '.join(str(error).split())[:200]}); nothing "
                        f"is lost: free the way and run the same command again") from None
    new.replace(file)


def find_folder(name: str) -> Path | None:
    return next((folder for folder in (Path(name), ROOT / "models" / name) if (folder / "config.json").is_file()), None)


def is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def find_model(name: str) -> str:
    """The door of the models: a local folder (as given, or one of models/, as tiny is), smollm2, or a hub name."""
    if (Path(name) / "adapter_config.json").is_file():   # of both, peft would load both
        raise UserError(f"model: {name} holds an adapter; give that as init= (train.py) or adapter= (eval.py)")
    if folder := find_folder(name):
        return str(folder)
    if name == "smollm2":
        from tools.smollm2 import unpacked
        return str(unpacked())
    if not is_hub_name(name):
        raise UserError(f"model: {name} is no folder with a config.json, and no hub name of the form owner/name")
    return name


def hub_fix(path: str) -> str:
    """What to do where a model cannot be read."""
    return (f"a local folder works offline; `hf download {path}` fetches it" if is_hub_name(path) else
            "copy or download all of it again")


def read_config(name: str, path: str, context: int) -> Any:
    """What config.json says of a model."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)           # nor ask whether to
    text = config.get_text_config()
    if (most := files().most_tokens(text, context)) < context:
        raise UserError(f"context: {context} is more than the {most} tokens of {name}; lower context=")
    if getattr(text, "attn_logit_softcapping", None):                    # which sdpa leaves out
        config._attn_implementation = "eager"
    return config


def load_model(name: str, load_in_4bit: bool | None, context: int, dtype: str = ""):
    """(model, tokenizer). load_in_4bit None: on a GPU yes, on a CPU no (fp32 is faster, more exact there)."""
    path = find_model(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # on Hopper torch would prefer cuDNN, which builds a plan, for tenths of a second, for each new length
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.set_verbosity_error()           # what they would warn of ends the run here
    huggingface_hub.logging.set_verbosity_error()
    with files().reading("model: ", Path(path), hub_fix(path)):
        if Path(path).is_dir():
            files().check_folder(Path(path))
        config = read_config(name, path, context)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        four = load_in_4bit if load_in_4bit is not None else device == "cuda"
        model = loading().load(path, config, four, precision(dtype, device), device)
        files().fix_rope(model, context)
        files().check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
        loading().quicken(model)
    return model.eval().requires_grad_(False), tokenizer


def precision(dtype: str, device: str) -> torch.dtype:
    """A T4, and all before Ampere, has no bfloat16 but by emulation."""
    if dtype:
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def files() -> ModuleType:
    """The door of models/weights.py, which looks the files of a model and of an adapter over."""
    from models import weights
    return weights


def general() -> ModuleType:
    """The door of scale/general.py, the way of models that the forking engine or packed rows cannot take."""
    from scale import general as module
    return module


def checks() -> ModuleType:
    """The door of models/check.py: does what is computed here agree with the model's own forward?"""
    from models import check
    return check


def adapters() -> ModuleType:
    """The door of models/adapters.py, which knows what peft writes beside the tensors of an adapter."""
    from models import adapters
    return adapters


def loading() -> ModuleType:
    """The door of models/loading.py, where a checkpoint becomes a model, in 4 bits or in full."""
    from models import loading as module
    return module


def template_file() -> ModuleType:
    """The door of models/template.py: what a chat template says around messages, and where a reply ends."""
    from models import template
    return template


@torch.no_grad()
def finite(model: Any) -> bool:
    """Whether the adapter, and what the model answers with it, are numbers."""
    table = model.get_input_embeddings().weight
    logits = model(input_ids=torch.tensor([[0, 1]], device=table.device)).logits
    return bool(torch.stack([value.isfinite().all() for value in [logits, table, *lora_parameters(model)]]).all())


def layers_of(model: Any) -> nn.Module:
    """The decoder; of ModernBERT's, where the head has that name, all but it."""
    decoder = model.get_decoder()
    return model.base_model if decoder is model.get_output_embeddings() else decoder


def linear_layers(model: Any) -> list[tuple[nn.Module, str, Any]]:
    """(parent, attribute, layer) of every linear layer of the decoder, as in QLoRA and peft's "all-linear", but for
    routers. The head is not among them, nor what a picture goes through."""
    found, head = [], model.get_output_embeddings()
    for path, parent in layers_of(model).named_modules():
        kind: Any = type(parent)
        if kind is not LoRA and "embed" not in path:
            found += [(parent, name, layer) for name, layer in parent.named_children()
                      if type(layer).__name__ in LINEAR and layer is not head
                      and not is_router(f"{path}.{name}", layer) and not reads_weight(kind, name)]
    if not found:
        raise UserError(f"model: {type(model).__name__} has no linear layers that an adapter could change")
    return found


def is_router(path: str, layer: nn.Module) -> bool:
    """What sends a token to its experts, or says how much of one is taken."""
    parts = path.split(".")
    return "gate" in parts or "router" in parts or (parts[-1].endswith("_gate") and widths(layer)[1] == 1)


@functools.cache
def reads_weight(owner: Any, name: str) -> bool:
    """A module that takes its layer's weight for a product of its own (Mamba) would pass by an adapter and 4 bits."""
    return re.search(rf"self\.{name}\.weight(?!\.device)", inspect.getsource(owner)) is not None


def widths(layer: Any) -> tuple[int, int]:               # (in, out)
    return (layer.nx, layer.nf) if hasattr(layer, "nx") else (layer.in_features, layer.out_features)


class LoRA(nn.Module):
    """y = W x + (alpha / r) B A x, for each of LINEAR. A (r, in), B (out, r), B = 0 at start. Where an adapter that is
    read has magnitudes, DoRA: the rows of W + (alpha / r) B A brought to these lengths."""
    def __init__(self, base: Any, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale, self.on, self.loads = base, alpha / rank, True, 0
        width, out = widths(base)
        bound = 1 / math.sqrt(width)
        first = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        device = base.weight.device
        self.lora_A = nn.Parameter(first.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))
        self.lora_magnitude_vector: nn.Parameter | None = None         # (out,), DoRA's alone
        self.looked: tuple = ()
        self.product: tuple[torch.Tensor, torch.Tensor] | None = None          # what sampling multiplies by; None: B = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:      # (..., in) -> (..., out)
        y = self.base(x)
        if not self.on:
            return y
        if torch.is_inference_mode_enabled() and self.lora_magnitude_vector is None:         # sampling
            product = self.folded(y.dtype)
            if product is None:
                return y
            down, up = product                               # (in, r), (r, out)
            return torch.addmm(y.flatten(0, -2), x.flatten(0, -2).to(y.dtype) @ down, up).view(y.shape)
        change = ((x.to(self.lora_A.dtype) @ self.lora_A.T) @ self.lora_B.T * self.scale).to(y.dtype)
        if self.lora_magnitude_vector is None:
            return y + change
        bias = y.new_zeros(1) if self.base.bias is None else self.base.bias
        longer = (self.lora_magnitude_vector / self.lengths()).to(y.dtype)
        return y + (longer - 1) * (y - bias) + longer * change

    def folded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and (alpha / r) B in the model's own precision, made once for each change of them; None while B is zero: a
        step of sampling is short, and on a GPU each operation costs the time to begin it."""
        now = dtype, self.loads, self.scale, self.lora_A._version, self.lora_B._version
        if self.looked != now:
            up = (self.scale * self.lora_B.detach()).T.to(dtype).contiguous()
            down = self.lora_A.detach().T.to(dtype).contiguous()
            self.looked, self.product = now, (down, up) if self.lora_B.any() else None
        return self.product

    @torch.no_grad()
    def lengths(self) -> torch.Tensor:                       # (out,)
        """Of the rows of W + (alpha / r) B A. DoRA lets no gradient through them."""
        weight, state = self.base.weight, getattr(self.base.weight, "quant_state", None)
        if state is not None:
            weight = loading().bitsandbytes().functional.dequantize_4bit(weight.data, state)
        weight = weight.T if hasattr(self.base, "nx") else weight                       # Conv1D keeps it (in, out)
        return (weight + self.scale * self.lora_B @ self.lora_A).norm(dim=1)


def add_lora(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parent, name, linear in linear_layers(model):
        setattr(parent, name, LoRA(linear, rank, alpha, generator))


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)]


@contextmanager
def adapter_off(model: nn.Module, off: bool = True) -> Iterator[None]:
    """Inside, the model is the base (when `off`): the reference policy, at no memory."""
    layers = lora_layers(model).values()
    before = [layer.on for layer in layers]
    for layer in layers:
        layer.on = layer.on and not off
    try:
        yield
    finally:
        for layer, on in zip(layers, before):
            layer.on = on


def save_adapter(model: nn.Module, folder: Path, base_name: str, alike: bool = False) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does; peft and vLLM load them as is. base.json
    beside them names the base by its weights. `alike`: with one r and one alpha for all layers, for those who know no
    patterns of them."""
    if ranks.rank():
        ranks.wait_for_all()
        return
    tensors = adapters().tensors_of(model, alike)
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"{folder}: the adapter is not finite, so it is not saved; lower lr= or lora_alpha=")
    folder.mkdir(parents=True, exist_ok=True)
    with aside(folder / "adapter_model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with aside(folder / "base.json") as file:
        file.write_text(json.dumps(dict(name=base_name, weights=files().base_digest(model))))
    with aside(folder / "adapter_config.json") as file:
        file.write_text(json.dumps(adapters().config_of(model, base_name, alike), indent=1))
    ranks.wait_for_all()


def load_adapter(model: Any, folder: Path, key: str = "") -> None:
    """Read an adapter in PEFT's layout into the model: the layers that it changes become LoRA, each of its own rank.
    Other layers that are LoRA already stay so, unchanged (B = 0). `key`: who asks."""
    config, tensors, digest = adapters().read_adapter(key, folder)
    if hasattr(model, "base_weights"):
        files().check_base(model, f"{key}{folder}", config.get("base_model_name_or_path") or "", digest)
    with files().reading(key, folder, f"was it made for another model than {model.name_or_path}?"):
        parts = adapters().placed(model, config, tensors)
        for name in parts.keys() - lora_layers(model).keys():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LoRA(model.get_submodule(name), 1, 1, torch.Generator()))
        for name, layer in lora_layers(model).items():
            idle = dict(lora_A=layer.lora_A, lora_B=torch.zeros_like(layer.lora_B)), layer.scale
            values, layer.scale = parts.get(name, idle)
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                setattr(layer, part, nn.Parameter(values[part].to(layer.lora_A)) if part in values else None)
            layer.loads += 1
        if not finite(model):
            raise ValueError(f"what the model answers with it is not finite (lora_alpha={config['lora_alpha']})")


def weights_version(model: nn.Module) -> tuple:
    """Changes with each load, switch and in-place change of an adapter weight (torch counts those itself)."""
    return tuple((layer.on, layer.loads, *(p._version for p in layer.parameters(recurse=False)))
                 for layer in lora_layers(model).values())


if __name__ == "__main__":
    import lora                                        # not this second copy of it
    guarded(lora.checks().main, __doc__)
