"""The files of a model and of an adapter, looked over as they are loaded (lora.py): is each whole, do those of a folder
belong together, was the adapter trained on this model? What is wrong is one line, with the file and what to do.
"""
import hashlib
import json
import re
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import torch
import transformers
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ranks
from config import UserError, visible
from lora import find_folder, is_hub_name

Shapes = dict[str, tuple[int, ...]]                    # a tensor's name -> its shape
TOKENIZER_FILES = r"^tokenizer\.json$|vocab|\.model|spm|tekken|tiktoken"    # in one of these lie a tokenizer's words


@contextmanager
def reading(key: str, file: Path, fix: str = "copy or download it again") -> Iterator[None]:
    """The door of every file of a model, an adapter or a checkpoint: whatever its reader raises becomes one line."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        head = file.open("rb").read(24) if file.is_file() else b"-"
        if not head:
            found = "the file is empty"
        if head.startswith(b"version https://git-lfs"):
            found, fix = "this is a pointer of git LFS, not the file", "run `git lfs pull`"
        if isinstance(error, ImportError):
            fix = "install what it names"
        if unknown := re.search(r"has model type `(.*?)` but Transformers does not recognize", found):
            found = f"transformers {transformers.__version__} has no model type {unknown[1]}"
            fix = "pip install -U transformers if a newer one has it; code that lies beside a model is not run"
        raise UserError(f"{key}{file}: {' '.join(found.split())[:300]}; {fix}") from None


def read_json(key: str, file: Path, fix: str = "copy or download it again") -> dict:
    with reading(key, file, fix):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, found {found!r}")
        return found


# ------------------------------------------------------------------------------------------------------- a model
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def variant_of(folder: Path) -> str | None:
    """fp16, where a folder has only model.fp16.safetensors, or its shards; None where the names are plain."""
    if any((folder / name).is_file() for name in WEIGHTS):
        return None
    for stem, end in (name.rsplit(".", 1) for name in WEIGHTS):
        for file in [file for file in sorted(folder.glob(f"{stem}.*.{end}")) if "-of-" not in file.name]:
            return file.name.removeprefix(f"{stem}.").removesuffix(f".{end}")
    return None


def checkpoint_files(folder: Path) -> list[Path]:
    """The files with a model's weights, in the order in which transformers looks for them."""
    variant = variant_of(folder)
    for stem, end in (name.rsplit(".", 1) for name in WEIGHTS):
        file = folder / ".".join(filter(None, [stem, variant, end]))
        if file.is_file() and end != "json":
            return [file]
        if file.is_file():
            with reading("model: ", file):
                return sorted({folder / part for part in read_json("model: ", file)["weight_map"].values()})
    raise UserError(f"model: {folder} has no model.safetensors; copy or download it again")


def shapes_of(folder: Path) -> Shapes:
    """What a checkpoint holds, without reading it. A file that is not whole shows here."""
    found: Shapes = {}
    for file in checkpoint_files(folder):
        with reading("model: ", file):
            if file.suffix == ".bin":
                pickled = torch.load(file, weights_only=True, map_location="meta")
                found |= {key: tuple(value.shape) for key, value in pickled.items()}
                continue
            with safe_open(file, framework="pt") as tensors:
                found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    return found


def check_folder(folder: Path) -> None:
    """Before transformers reads it, for it would say less of what is wrong."""
    settings = folder / "tokenizer_config.json"
    for name in ("config.json", "generation_config.json", "tokenizer.json", settings.name):
        if (folder / name).exists():
            read_json("model: ", folder / name)
    template = folder / "chat_template.jinja"
    if template.exists():
        with reading("model: ", template):
            if template.read_text(encoding="utf-8").startswith("version https://git-lfs"):
                raise ValueError("no template")
    kind = read_json("model: ", settings).get("tokenizer_class") if settings.exists() else "TokenizersBackend"
    words = [file.name for file in folder.iterdir() if re.search(TOKENIZER_FILES, file.name)]
    if not words and re.search("Fast$|^TokenizersBackend$", str(kind)):
        raise UserError(f"model: {folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy it there")
    config = read_json("model: ", folder / "config.json")
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise UserError(f"model: {folder / 'config.json'}: quantization_config is {config['quantization_config']!r}, "
                        f"but must be an object; copy or download it again")
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > len(shapes_of(folder)):             # to make as many would take for ever
        raise UserError(f"model: {folder}: its config.json says {layers} layers, more than its checkpoint has tensors")


def check_tensors(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple]) -> None:
    """Config and checkpoint must be of one model. `mismatched`: (tensor, its shape, what the config says)."""
    odd = [*(f"has {key} as {tuple(found)}, not {tuple(expected)}" for key, found, expected in sorted(mismatched)),
           *(f"lacks {key}" for key in sorted(missing)), *(f"has {key}" for key in sorted(unexpected))]
    if odd:
        more = f" (and {len(odd) - 1} more)" * (len(odd) > 1)
        raise ValueError(f"its checkpoint {odd[0]}{more}, unlike its config.json")


def check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Every token of text has its row; added ones may lack theirs (Gemma 3 has one for pictures)."""
    added = tokenizer.get_added_vocab()
    last = max((i for token, i in tokenizer.get_vocab().items() if token not in added), default=-1)
    if not 0 <= last < rows or not tokenizer.encode("a"):
        raise ValueError(f"its tokenizer has tokens up to {last}, its weights have {rows} rows for them")


# --------------------------------------------------------------------------------------------- what a base is
def sample_of(value: torch.Tensor) -> bytes:
    """64 of its numbers, alike in float32, bfloat16 and 4 bits: those of all tensors tell one model from another."""
    flat = value.detach().flatten()
    return flat[::max(1, len(flat) // 64)][:64].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def base_digest(model: Any) -> str:
    """What base.json keeps beside an adapter. "": the model was not loaded from a checkpoint, or is in float16."""
    samples = getattr(model, "base_weights", ())
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest()[:16] if samples else ""


def check_base(model: Any, said: str, base: str, digest: str) -> None:
    """An adapter's base must be this model. In what we save, its weights say so. Of another's the name is all there
    is: a folder that lies here is compared, two hub names must be of one release, else another name is but a note."""
    here, folder, same = model.name_or_path, find_folder(base) if base else None, True
    known = bool(model.base_weights)                     # else float16
    hubs = is_hub_name(base) and is_hub_name(here)
    if digest and known:
        same = digest == base_digest(model)
    elif known and folder and folder.resolve() != Path(here).resolve():
        samples = set()
        for file in checkpoint_files(folder):
            with reading("model: ", file):
                if file.suffix == ".bin":
                    tensors = torch.load(file, weights_only=True, mmap=zipfile.is_zipfile(file))     # older ones are none
                    samples |= set(map(sample_of, tensors.values()))
                    continue
                with safe_open(file, framework="pt") as opened:
                    samples |= {sample_of(opened.get_tensor(key)) for key in opened.keys()}
        stacks = sum(key.endswith(".original") or value.dim() == 3 for key, value in model.named_parameters())
        same = len(model.base_weights - samples) <= stacks          # experts, which may lie there one by one
    elif hubs and release(base) != release(here):
        raise UserError(f"{said} was trained on {base}, which is not {here}; give model={base}, or an adapter of this model")
    elif base and base != here and (hubs or Path(base).name != Path(here).name) and ranks.rank() == 0:
        print(visible(f"note: {said} was trained on {base}, by its own account, and is used on {here}"), file=sys.stderr)
    if not same:
        raise UserError(f"{said} was trained on {base}, whose weights are not those of {here}; give model={base}, "
                        f"or an adapter of this model")


def release(name: str) -> str:
    """A hub name without its owner, and without what those add who upload a copy, or rename theirs."""
    return re.sub("^meta-|(-unsloth)?-bnb-4bit$", "", name.rpartition("/")[2].lower())


# --------------------------------------------------------------------------------- a run's checkpoint of its training
def check_checkpoint(saved: dict, parameters: Sequence[torch.Tensor], state: Iterable[str]) -> None:
    """It holds whole numbers under `state`, and for each of the adapter's tensors one of its shape and two moments."""
    if not all(type(saved["state"][name]) is int for name in state):
        raise ValueError(f"its state is {saved['state']}")
    moments = saved["optimizer"]["state"]
    pairs = [*zip(parameters, saved["parameters"], strict=True),
             *((parameters[i], moments[i][name]) for i in moments for name in ("exp_avg", "exp_avg_sq"))]
    for parameter, value in pairs:
        if value.shape != parameter.shape or not value.isfinite().all():
            raise ValueError(f"a tensor of shape {tuple(value.shape)} is not finite, or of another adapter")


# ------------------------------------------------------------------------------------------- rotary positions (RoPE)
def most_tokens(config: Any, context: int) -> int:
    """How long a conversation its positions allow; dynamic NTK stretches what the model was trained on, as does YaRN."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = str(rope.get("rope_type")), rope.get("factor") or 1.0
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")   # MPT has the second, Whisper the third
    most = next((getattr(config, name) for name in names if getattr(config, name, None)), context)
    if "dynamic" in kind:
        most = int(most * factor)
    if kind == "yarn":
        most = max(most, int((rope.get("original_max_position_embeddings") or most) * factor))
    most = most if most > 0 else context                                         # -1: no limit
    # beyond this window Doge drops the weakest keys: which of equal ones, as those of equal words are, is left open
    return min(most, getattr(config, "keep_window_size", context))


def fix_rope(model: Any, context: int) -> None:
    """LongRoPE and dynamic NTK choose their table by the longest conversation of a batch: what a token gets would depend
    on its neighbours, and cached keys on what came later. So the table is that for `context` tokens, once and for all,
    as in vLLM with --max-model-len; for dynamic NTK vLLM takes the most that the model allows."""
    for rotary in [module for module in model.modules() if hasattr(module, "rope_type")]:
        kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
        for layers, kind in kinds.items():               # a kind for each type of layers, or one for all
            if not (kind == "longrope" or "dynamic" in kind):
                continue
            own = rotary.config.rope_parameters
            trained = rotary.original_max_seq_len if kind != "longrope" else (
                own[layers] if layers else own)["original_max_position_embeddings"]
            table = getattr(rotary, f"{layers}_inv_freq" if layers else "inv_freq")
            if context > trained:
                table.copy_(ROPE_INIT_FUNCTIONS[kind](rotary.config, table.device, context, layers)[0])
            for scale in {"short_mscale"} & own.keys():  # PhiMoE chooses this by length, too
                own[scale] = own["long_mscale" if context > own["original_max_position_embeddings"] else scale]
                own["long_mscale"] = own[scale]
            kinds[layers] = "fixed"                      # transformers looks for the two names at each forward
        rotary.rope_type = kinds if isinstance(rotary.rope_type, dict) else kinds[None]
