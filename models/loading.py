"""A checkpoint becomes a model. Names, prefixes, shards, conversions and tied heads are the business of transformers'
own loader, which hands each tensor to a quantizer. The one here needs no accelerate and takes into 4 bits what lora.py
adapts and the stacked experts of a mixture, tensor by tensor. A checkpoint that is in bitsandbytes' 4 bits stays as it
is. Of a model that sees or hears the text part is loaded, under the names that it has in the whole.
"""
import logging
import math
import re
import sys
import traceback
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig
from transformers.core_model_loading import ConversionOps
from transformers.models.auto.auto_factory import _get_model_class
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import Mxfp4Config

import ranks
from config import UserError, installed, visible
from lora import LINEAR, layers_of, linear_layers, widths
from models.products import plain, quicken              # noqa: F401  (this is their door, lora.loading)
from models.weights import check_tensors, checkpoint_files, sample_of, variant_of

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)    # it advises to install what only speeds a CPU up
METHOD = "bitsandbytes without accelerate"             # transformers finds Plan and FourBit by it
EVERY = "LoRA: 100 % of the linear layers"
BUFFERS = re.compile(r"(masked_bias|rotary\w*\.inv_freq|embed_positions\.weights|\.attn(\.attention)?\.bias)$")
# masks and tables, which older versions of transformers saved with the weights
SMALL = 16                                             # a stack of matrices with a side below this is no experts'


def load(name: str, config: Any, four: bool, dtype: torch.dtype, device: str) -> Any:
    """The model of a folder or hub name, in `dtype` but for its 4-bit layers; base_weights tells it from others."""
    with naming_what_did_not_fit():
        model, told = read(name, config, four, dtype, device)
    met = getattr(model.__dict__.get("hf_quantizer"), "met", Met())
    heads = tuple(key for key in told["unexpected_keys"] if key.startswith("v_head."))
    unexpected = {key for key in told["unexpected_keys"] if not (key.startswith((*met.left_out, *heads)) or BUFFERS.search(key))}
    check_tensors(told["missing_keys"], unexpected, {*told["mismatched_keys"], *met.mismatched})
    nn.Module.to(model, device)
    model.base_weights = met.samples or {sample_of(value) for value in model.parameters()}
    if dtype == torch.float16:                           # it rounds small weights to others; names alone tell then
        model.base_weights = set()
    if heads and ranks.rank() == 0:
        print(visible(f"note: {name}: its value head (v_head) is left out"), file=sys.stderr)
    if ranks.rank() == 0 and (what := reached(model)) != EVERY:
        print(visible(f"note: {name}: {what}"), file=sys.stderr)
    return model


def read(name: str, config: Any, four: bool, dtype: torch.dtype, device: str) -> tuple[Any, dict]:
    """(model, what was missing or too much). On the way to 4 bits files are read tensor by tensor."""
    plan = planned(name, config, four, dtype, device)
    asked: dict = dict(config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
                       quantization_config=plan)
    if not (plan and four):
        return model_class(config).from_pretrained(name, variant=variant_of(Path(name)), **asked)
    folder = folder_of(name)
    model, told = model_class(config).from_pretrained(None, state_dict=on_demand(folder), **asked)
    model.config.name_or_path = model.name_or_path = name
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, told


@contextmanager
def naming_what_did_not_fit() -> Iterator[None]:
    """Where tensors cannot be put together as the model has them, transformers tells the names in a report alone."""
    try:
        yield
    except RuntimeError as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            report = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
            if report:
                raise ValueError(f"its checkpoint has not what {min(report)} is made of, unlike its "
                                 f"config.json") from None
        raise


def folder_of(name: str) -> Path:
    folder = Path(name)
    for kind in ("model*.safetensors", "pytorch_model*.bin"):
        if folder.is_dir():
            break
        found = Path(huggingface_hub.snapshot_download(
            name, allow_patterns=[kind, f"{kind}.index*.json", "generation_config.json"]))
        if any(found.glob(kind)):
            return found
    return folder


class OnDemand:
    """A tensor of a file, as transformers' loader takes one, but the file is open only while it is read: mapped as a
    whole, it would stay in memory."""
    def __init__(self, file: Path, key: str):
        self.file, self.key = file, key

    def get_shape(self) -> list[int]:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_slice(self.key).get_shape()

    def get_dtype(self) -> str:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_slice(self.key).get_dtype()

    def __getitem__(self, _: Any) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.key)


def on_demand(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds, by name, without reading it."""
    found: dict[str, Any] = {}
    for file in checkpoint_files(folder):
        if file.suffix == ".bin":
            found |= torch.load(file, weights_only=True, mmap=zipfile.is_zipfile(file), map_location="cpu")
            continue
        with safe_open(file, framework="pt") as tensors:
            found |= {key: OnDemand(file, key) for key in tensors.keys()}
    return found


def is_part(config: Any) -> bool:
    """Is text only a part of what the model takes?"""
    return config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping


def model_class(config: Any) -> Any:
    """Of a model of more than text the whole, for its names are those that peft and vLLM expect."""
    known = (AutoModelForImageTextToText if is_part(config) else AutoModelForCausalLM)._model_mapping
    if type(config) not in known:
        raise ValueError(f"{config.model_type} is no causal language model that transformers "
                         f"{transformers.__version__} knows")
    return _get_model_class(config, known)


def planned(name: str, config: Any, four: bool, dtype: torch.dtype, device: str) -> Any:
    """What from_pretrained is to do besides reading, or None. A checkpoint in 4 bits says so in its config."""
    told = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None) or {}
    method = "bitsandbytes" if told.get("load_in_4bit") else told.get("quant_method", "")
    kind = getattr(method, "value", method)
    ours = dict(device=device, bnb_4bit_compute_dtype=str(dtype).removeprefix("torch."))
    if kind == "bitsandbytes" and told.get("load_in_4bit"):
        told = {key: value for key, value in told.items() if "load_in" not in key}
        config.quantization_config = told | ours | dict(quant_method=METHOD)
        return None
    if kind == "mxfp4" and not four:
        return Mxfp4Config(dequantize=True)
    if told:
        also = ", or set load_in_4bit=false, which undoes it" if kind == "mxfp4" else ""
        kind = "bitsandbytes in 8 bits" if told.get("load_in_8bit") else kind
        raise UserError(f"model: {name} is quantised as {kind or told}, which is not read here; take its original in "
                        f"16 bits (load_in_4bit=true makes 4 bits of it), or one in bitsandbytes' 4 bits "
                        f"(-bnb-4bit){also}")
    return Plan(four=four, **ours) if four or is_part(config) else None


@dataclass
class Met:
    """What was met on the way."""
    left_out: tuple[str, ...] = ()                                     # towers, by the beginning of their names
    samples: set[bytes] = field(default_factory=set)                   # sample_of each tensor, before 4 bits
    mismatched: list[tuple] = field(default_factory=list)              # (tensor, its shape, what the config says)
    states: dict[str, Any] = field(default_factory=dict)               # of stacked experts: how to undo their 4 bits


@register_quantization_config(METHOD)
class Plan(BitsAndBytesConfig):
    """nf4, double quantised, unless a checkpoint says otherwise; `four`: whether to take layers into it at all."""
    def __init__(self, four: bool = True, device: str = "cpu", **told: Any):
        kept = {key: value for key, value in told.items() if key != "quant_method"}
        super().__init__(**dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) | kept, load_in_4bit=True)
        self.quant_method: Any = METHOD
        self.four, self.device = four, device


@register_quantizer(METHOD)
class FourBit(Bnb4BitHfQuantizer):
    """transformers' quantizer of bitsandbytes, but for accelerate, which layers it takes, and that it takes experts."""
    def __init__(self, plan: Plan, **told: Any):
        super().__init__(plan, **told)
        self.plan, self.met = plan, Met()

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if self.pre_quantized or self.plan.four:
            bitsandbytes()

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **told: Any) -> None:
        """The model is on the meta device, without memory."""
        self.met.left_out = leave_out_towers(model)
        self.expected = {key: value for key, value in model.named_parameters()}
        self.transposed, self.taken = set(), set()
        if self.pre_quantized:
            super()._process_model_before_weight_loading(model, device_map, **told)
        elif self.plan.four:
            names = {id(module): name for name, module in model.named_modules()}
            for parent, own, layer in linear_layers(model):
                if not is_whole(widths(layer)[0], self.plan.device):
                    continue
                key = f"{names[id(layer)]}.weight"
                self.taken.add(key)
                if type(layer).__name__ == "Conv1D":
                    self.transposed.add(key)
                setattr(parent, own, linear_4bit(layer))
            for module in layers_of(model).modules():
                self.taken |= {f"{names[id(module)]}.{own}" for own in stacks_of(module)
                               if is_whole(getattr(module, own).shape[-1], self.plan.device)}

    def param_needs_quantization(self, model: Any, param_name: str, **told: Any) -> bool:
        """Or has been: then it may have another shape than the model says."""
        return param_name in self.taken or (self.pre_quantized and (
            getattr(self.expected.get(param_name), "ndim", 0) == 3 or super().param_needs_quantization(model, param_name)))

    def get_quantize_ops(self) -> ConversionOps:
        return Quantise(self)

    def quantised(self, key: str, value: torch.Tensor) -> Any:
        if key not in self.taken:
            return value
        expected = self.expected[key]
        if value.shape != expected.shape:
            self.met.mismatched.append((key, tuple(value.shape), tuple(expected.shape)))
        value = value.to(expected.dtype)
        self.met.samples.add(sample_of(value))
        if value.dim() == 3:
            packed, self.met.states[key] = bitsandbytes().functional.quantize_4bit(
                value.to(self.plan.device).contiguous(), quant_type="nf4", compress_statistics=True)
            return nn.Parameter(packed, requires_grad=False)
        return params_4bit(value.T if key in self.transposed else value, self.plan.device)

    def _process_model_after_weight_loading(self, model: Any, **told: Any) -> Any:
        for key, value in model.named_parameters():
            if key in self.taken:
                continue
            expected = self.expected[key]
            state = getattr(value, "quant_state", None)
            shape = state.shape if state else value.shape
            if self.pre_quantized and expected.dim() == 3 and value.dtype == torch.uint8:
                raise ValueError(f"{key} is in 4 bits, which is not read here of experts; take the model's original in "
                                 f"16 bits (load_in_4bit=true makes 4 bits of it)")
            if shape != expected.shape:
                self.met.mismatched.append((key, tuple(shape), tuple(expected.shape)))
            if state and not is_whole(state.shape[-1], self.plan.device):
                raise ValueError(f"{key} is in 4 bits in rows of {state.shape[-1]}, which bitsandbytes unpacks wrongly on a "
                                 f"CPU where it is no multiple of 64; take the model's original in 16 bits")
            if not state and value.is_floating_point() and value.dtype != torch.float32:
                value.data = value.data.to(expected.dtype)         # a renamed one beside 4-bit ones keeps its own
            self.met.samples.add(sample_of(value))
        for parent in list(model.modules()):
            for own, layer in list(parent.named_children()):
                if type(layer).__name__ == "Linear4bit":
                    setattr(parent, own, settled(layer, self.plan))
        for key, state in self.met.states.items():
            place, _, own = key.rpartition(".")
            unpacked_when_used(model.get_submodule(place), own, state)
        return model


class Quantise(ConversionOps):
    """What transformers calls for each tensor that is to be quantised, when it is as the model has it."""
    def __init__(self, quantizer: FourBit):
        self.quantizer = quantizer

    def convert(self, input_dict: dict, *_: Any, full_layer_name: str = "", **__: Any) -> dict:
        found = {}
        for key, value in input_dict.items():
            name = key if key in self.quantizer.expected else full_layer_name
            found[name] = self.quantizer.quantised(name, value[0] if isinstance(value, list) else value)
        return found


def leave_out_towers(model: Any) -> tuple[str, ...]:
    """Take away what lies beside the text model, and say how its names begin."""
    decoder, head, left_out = model.get_decoder(), model.get_output_embeddings(), []
    if not is_part(model.config):
        return ()
    path = next(name for name, module in model.named_modules() if module is decoder)
    place, way = model, ""
    for step in path.split("."):
        for name, beside in list(place.named_children()):
            if name != step and beside is not head:
                left_out.append(f"{way}{name}.")
                setattr(place, name, None)
        place, way = getattr(place, step), f"{way}{step}."
    return tuple(left_out)


# ------------------------------------------------------------------------------------------------------------- 4 bits
def bitsandbytes(part: str = "") -> Any:
    return installed(f"bitsandbytes{part}", "bitsandbytes", "load_in_4bit: 4 bits")


def is_whole(width: int, device: str) -> bool:
    """Whether bitsandbytes takes a row of so many weights back from 4 bits as they were: packed in blocks of 64 that go on
    from row to row, they are unpacked on a CPU as if each row began a block."""
    return width % 64 == 0 or device != "cpu"


def params_4bit(weight: torch.Tensor, device: str) -> Any:
    """nf4, double quantised."""
    whole = bitsandbytes().nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return whole.to(device)                              # this packs it


def linear_4bit(layer: Any) -> nn.Module:
    """bitsandbytes' 4-bit product in a layer's place, with its bias. Its weight is still to come."""
    dtype = layer.weight.dtype
    with torch.device("meta"):
        four = bitsandbytes().nn.Linear4bit(*widths(layer), bias=False, compute_dtype=dtype, quant_type="nf4")
    four.weight.data = four.weight.data.to(dtype)
    four.support_avx512bf16_for_cpu = False              # else a CPU that can repacks them at each switch, rounding
    four.bias = layer.bias
    return four


def settled(layer: Any, plan: Plan) -> Any:
    """A 4-bit layer as it was read; one that its checkpoint has in 16 bits after all is a plain one."""
    dtype = layer.compute_dtype = plan.bnb_4bit_compute_dtype
    layer.support_avx512bf16_for_cpu = False             # else a CPU that can repacks them at each switch, rounding
    if type(layer.weight).__name__ == "Params4bit":
        layer.weight = layer.weight.to(plan.device)
        layer.weight.quant_state.dtype = dtype           # forward works in its input's precision, backward in this
        return layer
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def stacks_of(module: nn.Module) -> list[str]:
    """The module's parameters (E, out, in) that hold a matrix for each expert."""
    return [own for own, value in module.named_parameters(recurse=False)
            if value.dim() == 3 and min(value.shape[1:]) >= SMALL and not isinstance(module, nn.Conv1d)]


def unpacked_when_used(module: Any, own: str, state: Any) -> None:
    """Experts in 4 bits, a layer's at a time in full: kept no longer than its forward pass, and made again for its
    backward pass, since autograd would keep those of all layers."""
    undo = bitsandbytes(".nn.parametrize").Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, own, undo, unsafe=True)
    if "forward" in vars(module):                        # its other stack came first
        return
    inner = module.forward

    def once(*args: Any, **told: Any) -> Any:
        with parametrize.cached():                       # however often the layer asks for a stack
            return inner(*args, **told)

    def forward(*args: Any, **told: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(once, *args, use_reentrant=False, **told)
        return once(*args, **told)
    module.forward = forward


# ---------------------------------------------------------------------------------------------------- what was reached
def reached(model: Any) -> str:
    """What part of the weights is in 4 bits, and what part of the decoder's linear layers an adapter goes on."""
    head = model.get_output_embeddings()
    stacks = [size for module in layers_of(model).modules() for size in stacked(module)]
    four = sum(stacks) if any(map(parametrize.is_parametrized, model.modules())) else 0
    whole = sum(stacks)
    for value in model.parameters():
        if type(value).__name__ == "Params4bit":
            four += value.quant_state.shape.numel()
            whole += value.quant_state.shape.numel()
        elif value.dim() < 3 and value.is_floating_point():
            whole += value.numel()
    linear = [layer for layer in layers_of(model).modules() if type(layer).__name__ in LINEAR and layer is not head]
    sizes = {id(layer): math.prod(widths(layer)) for layer in linear}
    adapted = sum(sizes[id(layer)] for _, _, layer in linear_layers(model))
    share = f"LoRA: {100 * adapted / (sum(sizes.values()) + sum(stacks)):.0f} % of the linear layers"
    return f"4 bits: {100 * four / whole:.0f} % of the weights; {share}" if four else share


def stacked(module: Any) -> list[int]:
    """How many numbers each stack of this module's experts has."""
    if parametrize.is_parametrized(module):
        return [undo[0].quant_state.shape.numel() for undo in module.parametrizations.values()]
    return [getattr(module, own).numel() for own in stacks_of(module)]
