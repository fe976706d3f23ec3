"""The folder of an adapter, looked over as it is loaded (lora.py), and the config that is saved with one: which of the
fields of peft's LoraConfig are understood, which layer each tensor changes, by what scale. Anything else is one line.
"""
import math
import re
import sys
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import safe_open
from torch import nn

import ranks
from config import UserError, visible
from lora import LINEAR, LoRA, is_hub_name, layers_of, lora_layers, reads_weight, widths
from models.weights import read_json, reading

Tensors = dict[str, torch.Tensor]


Part = tuple[Tensors, float]                           # a layer's tensors by LoRA's names for them, and its scale
ANEW = "copy it again, or delete its folder and train it anew"
MERGE = ("have peft merge it into its base (merge_and_unload, save_pretrained) and give that folder as model=, or train "
         "a LoRA")
CONVERT = ("one that leaves the base as it is; save it as a change of that: peft's save_pretrained(..., "
           "path_initial_model_for_weight_conversion=...)")


def patterned(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or isinstance(v, dict) and all(map(holds, v.values()))


def is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e38


def is_names(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(name, str) for name in value)


# The allow-list. What a field of LoraConfig must be, where it says what the adapter computes:
MUST: dict[str, tuple[Callable[[Any], Any], str]] = {
    "peft_type": (lambda v: v == "LORA", f"LORA: plain LoRA is what is read here; {MERGE}"),
    "r": (is_rank, "a whole number of 1 or more"),
    "lora_alpha": (is_alpha, "a number above 0"),
    "rank_pattern": (patterned(is_rank), "a whole number of 1 or more for each pattern"),
    "alpha_pattern": (patterned(is_alpha), "a number above 0 for each pattern"),
    "use_rslora": (lambda v: v in (None, True, False), "true or false"),
    "use_dora": (lambda v: v in (None, True, False), "true or false"),
    "init_lora_weights": (lambda v: str(v).lower() in "none true false gaussian orthogonal eva mica".split(), CONVERT),
    "target_modules": (lambda v: v is None or is_names(v), "the names of the layers that it changes"),
    "target_parameters": (lambda v: not v or isinstance(v, list) and is_names(v), "the names of the weights that it changes"),
    "exclude_modules": (lambda v: v is None or is_names(v), "the names of layers"),
    "layers_to_transform": (lambda v: v is None or type(v) is int or isinstance(v, list) and
                            all(type(n) is int for n in v), "the numbers of layers"),
    "layers_pattern": (lambda v: v is None or is_names(v), "the names of lists of layers"),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "the name of its base")}
# which change no answer, whatever they say: how it began, how it was trained, which way round a base keeps its weights
IDLE = """task_type auto_mapping peft_version revision inference_mode lora_dropout fan_in_fan_out megatron_core
qalora_group_size runtime_config loftq_config eva_config corda_config lora_ga_config ensure_weight_tying
""".split()                                            # and any other must be empty


# ----------------------------------------------------------------------------------------------------- its files
def read_config(key: str, folder: Path) -> dict:
    """adapter_config.json; its weights lie beside it. Raises UserError for what is not there or not understood."""
    file, parts = folder / "adapter_config.json", weight_files(key, folder)
    if not file.is_file() or not parts:
        below = next((f"; {found.parent} has both" for found in sorted(folder.glob("*/adapter_config.json"))), "")
        hub = f"; `hf download {folder} --local-dir FOLDER` fetches it" if is_hub_name(str(folder)) else ""
        raise UserError(f"{key}{folder} has no adapter_config.json with adapter_model.safetensors (or .bin) beside it"
                        f"{below}{hub}")
    config = read_json(key, file, ANEW)
    for name, (holds, must) in MUST.items():
        if not holds(config.get(name)):
            raise UserError(f"{key}{file}: {name} is {config.get(name)!r:.80}, but must be {must}")
    if not config.get("target_modules") and not config.get("target_parameters"):
        raise UserError(f"{key}{file}: target_modules is {config.get('target_modules')!r}, but must be the names of the "
                        f"layers that it changes")
    for name in sorted(config.keys() - MUST.keys() - set(IDLE)):
        if config[name] and config[name] != "none":
            value = f"{config[name]!r:.80}"
            raise UserError(f"{key}{file}: uses {name}={value}; plain LoRA is what is read here; {MERGE}")
    return config


def read_adapter(key: str, folder: Path) -> tuple[dict, Tensors, str]:
    """(config, tensors, digest of its base or ""). Raises UserError for what is not whole or not understood."""
    config = read_config(key, folder)
    if config.get("lora_dropout") and key.startswith("init") and ranks.rank() == 0:
        print(visible(f"note: {key}{folder} was trained with lora_dropout={config['lora_dropout']}; here it is trained "
                      f"on without"), file=sys.stderr)
    tensors: Tensors = {}
    for part in weight_files(key, folder):
        with reading(key, part, ANEW):
            tensors |= read_tensors(part)
    base = folder / "base.json"
    return config, tensors, read_json(key, base, ANEW).get("weights", "") if base.is_file() else ""


def weight_files(key: str, folder: Path) -> list[Path]:
    """In the order in which peft looks for them; one, or the parts that an index names."""
    for file in (folder / "adapter_model.safetensors", folder / "adapter_model.bin"):
        index = file.with_name(f"{file.name}.index.json")
        if file.is_file():
            return [file]
        if index.is_file():
            with reading(key, index, ANEW):
                return sorted({folder / part for part in read_json(key, index, ANEW)["weight_map"].values()})
    return []


def read_tensors(file: Path) -> Tensors:
    if file.suffix == ".bin":
        found = torch.load(file, weights_only=True, map_location="cpu")
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise ValueError("it holds something else than tensors by name")
    else:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}
    for name, value in found.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise ValueError(f"{name} holds what is no finite number")
    return found


# ---------------------------------------------------------------------------------------- which layers it changes
# Who saved an adapter shows in front of its names, and so does whether its base was the whole of a model that sees, or
# its text part. vision_tower and the like are none of these: another layer's tensor is never taken for the text's.
FRONT = re.compile(r"^(?:(?:base_model|model|language_model|text_model|module)\.)*")
WRAPPED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OF_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.(?!bias$)[^.]+){0,2}")    # .default, .weight


def bare(name: str) -> str:
    """A module's or a tensor's name without what comes before its layers."""
    return FRONT.sub("", name)


def placed(model: Any, config: dict, tensors: Tensors) -> dict[str, Part]:
    """The adapter's part for each layer of the model that it changes, by the layer's name. A tensor without a layer,
    half a pair, one of another size, and a layer that the config promises but the file has not: all raise."""
    linear = {bare(name): name for name in linear_names(model)}
    sides = ["lora_A", "lora_B", *["lora_magnitude_vector"] * bool(config.get("use_dora"))]
    found: dict[str, dict[str, str]] = {}              # a layer's bare name -> side -> the tensor's name
    fronts = {}                                        # ours -> the adapter's
    towers, idle = left_out(model), set()
    for tensor, value in tensors.items():
        name = WRAPPED.sub("", tensor).removeprefix("base_model.model.")
        match = OF_LORA.fullmatch(name)
        if not match or match[2] not in sides:
            check_copy(model, tensor, value)
            continue
        layer, side = bare(match[1]), match[2]
        if layer.startswith(towers):
            idle.add(layer.split(".")[0])
            continue
        if layer not in linear:
            if layer in {bare(own) for own, module in model.named_modules() if type(module).__name__ in LINEAR}:
                raise ValueError(f"it has {tensor}, a layer whose weight the model multiplies by itself, past any adapter: "
                                 f"{MERGE}")
            experts = f"; experts in one stack are not adapted here: {MERGE}" if "experts" in layer.split(".") else ""
            raise ValueError(f"it has {tensor}, which this model has not as a linear layer{experts}")
        if side in found.setdefault(layer, {}):
            raise ValueError(f"it has both {found[layer][side]} and {tensor}: of two adapters?")
        found[layer][side] = tensor
        fronts[linear[layer].removesuffix(layer)] = match[1].removesuffix(layer)
        rank = rank_and_scale(config, match[1])[0]
        if side != "lora_magnitude_vector" and (value.dim() != 2 or value.shape[sides.index(side)] != rank):
            raise ValueError(f"{tensor} is {tuple(value.shape)}, but r is {rank} in adapter_config.json")
    if idle and ranks.rank() == 0:
        print(visible(f"note: the adapter changes {', '.join(sorted(idle))}, too, which is not loaded for text; it is used "
                      f"and saved without"), file=sys.stderr)
    parts, head = {}, model.get_output_embeddings()
    for layer, own in linear.items():
        module, front, names = model.get_submodule(own), own.removesuffix(layer), found.get(layer, {})
        theirs = fronts.get(front, front) + layer      # what peft would match its patterns against
        lacks = [side for side in sides if side not in names]
        if lacks and (names or targeted(config, theirs, module is head)):
            has = f", while it has {next(iter(names.values()))}" if names else ""
            raise ValueError(f"it lacks the {lacks[0]} of base_model.model.{theirs}{has}")
        if names and config.get("target_modules") and not (targeted(config, theirs, module is head) or by_weight(config, theirs)):
            raise ValueError(f"it has {next(iter(names.values()))}, a layer that its adapter_config.json does not name, so "
                             f"that peft leaves it out")
        if names:
            rank, scale = rank_and_scale(config, theirs)
            check_shapes(module, rank, {names[side]: tensors[names[side]] for side in sides})
            parts[own] = {side: tensors[names[side]] for side in sides}, scale
    return parts


def left_out(model: Any) -> tuple[str, ...]:
    """How the bare names in the parts begin that a model has beside its decoder, but that were not loaded: its towers."""
    decoder = set(layers_of(model).modules())
    return tuple(f"{bare(f'{path}.{name}'.lstrip('.'))}." for path, module in model.named_modules()
                 if module not in decoder for name, part in module._modules.items() if part is None)


def linear_names(model: Any) -> list[str]:
    """Of all layers that an adapter may change; a module that takes a layer's weight alone would pass it by."""
    found: list[str] = []
    for path, parent in model.named_modules():
        kind: Any = type(parent)
        if kind is not LoRA:
            found += [f"{path}.{name}".lstrip(".") for name, layer in parent.named_children()
                      if (type(layer) is LoRA or type(layer).__name__ in LINEAR) and not reads_weight(kind, name)]
    return found


def check_shapes(layer: Any, rank: int, values: Tensors) -> None:
    inside, outside = widths(layer.base if isinstance(layer, LoRA) else layer)
    for (tensor, value), shape in zip(values.items(), ((rank, inside), (outside, rank), (outside,))):
        if tuple(value.shape) != shape:
            raise ValueError(f"{tensor} is {tuple(value.shape)}, not {shape}")


def rank_and_scale(config: dict, name: str) -> tuple[int, float]:
    """A layer's r, and what its update is multiplied by. The first pattern that matches the end of its name counts."""
    if by_weight(config, name):
        name = f"{name}.weight"                        # peft takes it for that
    found = [next((value for pattern, value in (config.get(key) or {}).items()
                   if re.match(rf"(.*\.)?({pattern})$", name)), config[default])
             for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))]
    rank, alpha = found
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_weight(config: dict, name: str) -> bool:
    """Whether the config names the layer by its weight."""
    return f".{name}.weight".endswith(tuple(f".{weight}" for weight in config.get("target_parameters") or ()))


def targeted(config: dict, name: str, is_head: bool) -> bool:
    """Whether the config says that this layer is adapted: peft's rule."""
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else ends_with(name, excluded):
        return False
    if isinstance(targets, str):
        return not is_head if targets.lower() == "all-linear" else bool(re.fullmatch(targets, name))
    if name in targets:
        return True
    numbers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if not ends_with(name, targets) or numbers is None or numbers == []:
        return ends_with(name, targets)
    numbers = [numbers] if isinstance(numbers, int) else numbers
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name) for pattern in patterns]
    return next((int(match[1]) in numbers for match in found if match), False)


def ends_with(name: str, ends: list[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def check_copy(model: Any, tensor: str, value: torch.Tensor) -> None:
    """A tensor that is no LoRA's must be a copy of one of the base's, as peft keeps of embeddings."""
    own = {bare(name): own for name, own in model.state_dict().items()}.get(
        bare(WRAPPED.sub("", tensor)).replace(".base_layer", "").replace(".modules_to_save", ""))
    if own is None:
        raise ValueError(f"{tensor} is none of the tensors of plain LoRA; if it belongs there, {MERGE}")
    rough = min(own.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
    if own.shape != value.shape or not torch.equal(own.to("cpu", rough), value.to(rough)):
        raise ValueError(f"{tensor} is not the base's: it was trained along, which is not read here; {MERGE}")


# ------------------------------------------------------------------------------------------------ what is saved
def tensors_of(model: Any, alike: bool) -> Tensors:
    """By peft's names. `alike`: of the largest rank all (zeros add nothing), B times what the scale is more than the
    first layer's."""
    found: Tensors = {}
    layers = lora_layers(model)
    rank, scale = max(len(layer.lora_A) for layer in layers.values()), next(iter(layers.values())).scale
    for name, layer in layers.items():
        for part, parameter in layer.named_parameters(recurse=False):
            value, more = parameter.detach().cpu(), rank - len(layer.lora_A)
            if alike and part == "lora_A":
                value = nn.functional.pad(value, (0, 0, 0, more))
            if alike and part == "lora_B":
                value = nn.functional.pad(value * (layer.scale / scale), (0, more))
            found[f"base_model.model.{name}.{part}{'.weight' * (value.dim() == 2)}"] = value.contiguous()
    return found


def config_of(model: Any, base_name: str, alike: bool) -> dict:
    """adapter_config.json, for peft to find the layers of `model` and their scales, and no others."""
    layers = lora_layers(model)
    first = next(iter(layers))
    dora = layers[first].lora_magnitude_vector is not None
    weights = [] if dora else targets_as_weights(model, list(layers))          # by its weight peft makes no DoRA
    rank = {name: len(layer.lora_A) for name, layer in layers.items()}
    alpha = {name: layer.scale * rank[name] for name, layer in layers.items()}
    if alike:
        rank = dict.fromkeys(layers, max(rank.values()))
        alpha = dict.fromkeys(layers, layers[first].scale * rank[first])
    by_name = {name: f"{name}.weight" if name in weights else name for name in layers}
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base_name, r=rank[first],
                  lora_alpha=alpha[first], lora_dropout=0.0, bias="none", fan_in_fan_out=False,
                  inference_mode=True, target_modules=target_modules(model, [n for n in layers if n not in weights]))
    more = dict(use_dora=dora, target_parameters=[by_name[name] for name in weights],
                rank_pattern={by_name[name]: rank[name] for name in layers if rank[name] != rank[first]},
                alpha_pattern={by_name[name]: alpha[name] for name in layers
                               if not math.isclose(alpha[name], alpha[first])})
    return config | {key: value for key, value in more.items() if value}


def target_modules(model: Any, layers: list[str]) -> list[str]:
    """The last words of their names; the whole names where other modules end so, too, or might, in parts of the model
    that were not loaded."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    caught = {name for name, _ in model.named_modules() if ends_with(name, ends)}
    return ends if caught <= set(layers) and not left_out(model) else sorted(layers)


def targets_as_weights(model: Any, layers: list[str]) -> list[str]:
    """In a model whose experts are stacked, peft takes these words for the experts, wherever they stand, and in
    whatever form target_modules has. Such layers are found by their weights, in target_parameters."""
    stacked = any(re.search(r"experts\.(parametrizations\.)?(gate_up|down)_proj", name)
                  for name, _ in model.named_parameters())
    words = "gate gate_proj up_proj down_proj w1 w2 w3".split()
    return [name for name in layers if stacked and ends_with(name, words)]
