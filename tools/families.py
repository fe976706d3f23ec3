"""Every family of causal LMs that transformers lists, as a small random model: which way is it sampled and trained, and how
far is that from the model's own forward?

    python -m tools.families               # all of them, and the table of docs/models.md again; five minutes
    python -m tools.families gemma3 lfm2   # these, to the terminal

Each is saved, loaded as a user's checkpoint is, checked as at every load, given an adapter with weights that matter, and
compared once more, beyond its windows. A family's default config is shrunk by the names of its keys: a few layers that cover
every kind of layer it mixes, widths of some tens, windows and chunks of eight tokens, so that a short conversation goes beyond
them, and whatever scales or caps (logits, embeddings, residuals) is set so that leaving it out shows.
"""
import contextlib
import io
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lora
from config import ROOT, Config, UserError, guarded, load_config, visible
from run import Policy

# what a family has besides its default and is met in practice: keys over the shrunk config
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, decoder": ("bert", dict(is_decoder=True)),
    "falcon, new decoder": ("falcon", dict(new_decoder_architecture=True, multi_query=False)),
    "falcon, ALiBi": ("falcon", dict(alibi=True)),
    "gemma4_text, shared keys": ("gemma4_text", dict(
        layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4, num_kv_shared_layers=2,
        per_layer_config={"1": dict(head_dim=16), "3": dict(head_dim=16)})),
    "gemma4_text, experts": ("gemma4_text", dict(enable_moe_block=True, num_experts=4, top_k_experts=2,
                                                 moe_intermediate_size=16)),
    "granitemoehybrid, attention": ("granitemoehybrid", dict(layer_types=["full_attention"] * 2)),
    "llama, dynamic RoPE": ("llama", dict(max_position_embeddings=32, rope_parameters=dict(
        rope_type="dynamic", rope_theta=100.0, factor=4.0))),
    "llama, YaRN": ("llama", dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16))),
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "phi3, LongRoPE": ("phi3", dict(original_max_position_embeddings=24, sliding_window=None, rope_parameters=dict(
        rope_type="longrope", rope_theta=100.0, short_factor=[1.0] * 4, long_factor=[1.5, 2.0, 3.0, 4.0],
        factor=4.0, original_max_position_embeddings=24))),
    "qwen2, sliding window": ("qwen2", dict(
        use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"])),
}
LISTED = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES             # of the installed transformers
FAMILIES = sorted([*LISTED, *(name for name, (family, _) in VARIANTS.items() if family in LISTED)])
WORDS = 480                                            # of the vocabulary: models/tiny's tokenizer fits

# what names cannot tell: families whose default config is incomplete, shows one of several kinds of layer, or has sizes that
# are tied to each other
INDEXER = dict(indexer_n_heads=16, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2)
DOTS = dict(head_dim=20, per_layer_config={
    "2": dict(num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=16, qk_nope_head_dim=16)})
OWN: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"], rope_parameters={
        kind: dict(rope_type="default", rope_theta=100.0) for kind in ("sliding_attention", "full_attention")}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=100.0, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dory": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], num_hidden_layers=3,
                 n_input_layers=1, n_recurrent_layers=1, n_output_layers=1),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "dots3_note_text": DOTS,
    "dots3_note": dict(text_config=DOTS, audio_config=dict(adapter_input_size=32, adapter_out_dim=32),
                        vision_config=dict(adapter_in_dim=32, adapter_out_dim=32)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hrm_text": dict(num_layers_per_stack=1, num_hidden_layers=8),
    "lfm2": dict(layer_types=["conv", "full_attention"], num_hidden_layers=2, full_attn_idxs=None),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp": dict(text_config=INDEXER),
    "qwen4_exp_text": INDEXER,
    "reformer": dict(is_decoder=True, axial_pos_shape=[16, 32], axial_pos_embds_dim=[8, 24]),
    "xmod": dict(default_language="en_XX"),
    "xlstm": dict(hidden_size=128, embedding_dim=128, num_heads=4),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4,
                  attention_hidden_size=64, attention_head_dim=16),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4,
                   hybrid_layer_ids=[1, 3], attention_hidden_size=64, attention_head_dim=16),
    "zaya": dict(num_experts_per_tok=1),
}
INCOMPLETE: dict[str, dict[str, Any]] = {              # what a family's config cannot be made without
    "gemma4_assistant": dict(text_config=dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)),
}
TWINS = [("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim"),
         ("num_kv_shared_layers", "num_hidden_layers")]
NOT_OURS = {"id2label", "label2id", "transformers_version", "architectures", "torch_dtype", "dtype", "return_dict"}

# by the name of a key, the first that matches it: what an integer (above zero) becomes
SIZES: list[tuple[str, int]] = [
    (r"vocab_size|ngram_vocab_size_base|byte_group_vocab", WORDS),
    (r"original_max_position|floor_scale|log_scaling_n_floor|mem_len", 8),
    (r"compressed_attention", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_\w+_positions|context_length|model_max_length", 512),
    (r"keep_window_size", 512),
    (r"sliding_window$|sliding_window_size|window_size|window_len|attention_chunk_size|local_attention$", 8),
    (r"index_n_heads|indexer_n_heads", 16),
    (r"index_topk|indexer_budget", 4),
    (r"index_block_size|block_size", 4),
    (r"chunk_size_(feed|lm)", 0),
    (r"chunk_size|chunk_length", 8),
    (r"kernel|conv_L_cache|d_conv|conv1d_width|cca_time", 3),
    (r"dt_rank|time_step_rank", 4),
    (r"num_experts_per_tok\w*|moe_topk|moe_k$|top_k_experts", 2),
    (r"(num|n)_\w*shared_experts", 1),
    (r"zero_expert_num", 2),
    (r"num_expert_group|^n_group$", 2),
    (r"topk_group", 1),
    (r"num_\w*experts$|n_routed_experts|num_experts", 4),
    (r"mamba\w*_heads|n_mamba_heads", 8),
    (r"key_value_heads|kv_heads|linear_num_key_heads|num_query_groups", 2),
    (r"heads|n_head$", 4),
    (r"layer_offset|num_kv_shared_layers|first_k_dense_replace|num_dense_layers|max_window_layers", 1),
    (r"layer_(interval|step|period|group_size)|sparse_step|every_n_layers|window_pattern", 2),
    (r"layers|n_layer$|num_blocks|n_layers|layers_per_stack", 2),
    (r"lora_rank|gate_rank|norm_rank|adapter_rank|laurel_rank|lowrank", 8),
    (r"rope_head_dim", 4),
    (r"qk_head_dim", 12),
    (r"head_?dim|d_head|dim_head|kv_channels|head_size", 8),
    (r"state_size|d_state|hidden_size_per_layer_input|d_rel|router_hidden_size|ple_embed_dim", 8),
    (r"intermediate|ffn|d_inner|dff|n_inner|feed_forward|dim_ff|mamba_d_ssm", 64),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|width|embed_dim|embedding_size|dim_model|hidden_dim", 32),
    (r"rotary_dim", 4),
    (r"rel_extent|max_distance|num_buckets", 16),
]
# what scales, caps or multiplies, where it is a number (or may be one): far enough from 1 to be seen
SCALES: list[tuple[str, float]] = [
    (r"^logits_scaling|lm_head_multiplier|logits_mup", 2.5),
    (r"^logit_scale", 0.4),
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 6.0),
    (r"attn_logit_softcapping", 5.0),
    (r"attention_multiplier", 0.3),
    (r"query_pre_attn_scalar", 3),
    (r"embedding_multiplier|^scale_emb$|embedding_scale", 3.0),
    (r"residual_multiplier", 0.6),
    (r"dropout|pdrop|jitter", 0.0),
]


def tiny_config(name: str) -> Any:
    """The shrunk config of a family, or of one of VARIANTS."""
    family, more = VARIANTS.get(name, (name, {}))
    config = CONFIG_MAPPING[family](**INCOMPLETE.get(family, {}))
    values = shrunk(config)
    for key, value in (OWN.get(family, {}) | more).items():
        values[key] = values[key] | value if key.endswith("_config") and values.get(key) else value
    return type(config)(**values)


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Its values, made small."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_OURS}
    before, depth = dict(values), getattr(config, "num_hidden_layers", None) or 0
    picked = picked_layers(values, depth)
    for key, value in values.items():
        part = vars(config).get(key)
        values[key] = shrunk(part) if isinstance(part, PreTrainedConfig) else small(key, value)
        if isinstance(value, list) and depth and len(value) == depth:      # one entry a layer
            values[key] = [small(key, value[layer]) for layer in picked]
        elif isinstance(value, list) and re.search("layer|idx", key) and all(isinstance(n, int) for n in value):
            values[key] = [picked.index(layer) for layer in value if layer in picked]
        elif key == "per_layer_config" and value:
            own = {int(layer): entry for layer, entry in value.items()}
            values[key] = {str(n): {name: 2 * small(name, size) for name, size in own[layer].items()}
                           for n, layer in enumerate(picked) if layer in own}
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if count in before:
        values[count] = len(picked)
    for key, twin in TWINS:                                # what was equal stays so
        if before.get(key) and before[key] == before.get(twin):
            values[key] = values[twin]
    return values


def picked_layers(values: dict[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, where kinds differ in any list with an entry a layer; at least two layers."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth]
    apart = [values.get("per_layer_config") or {}]
    kinds: dict[str, int] = {}
    for layer in range(depth):
        entry = [str(value[layer]) for value in lists if not isinstance(value[layer], int) or value[layer] < 2]
        kinds.setdefault(str([entry, [str(own.get(f"{layer:02}")) for own in apart]]), layer)
    picked = sorted(kinds.values())
    rest = [layer for layer in range(depth) if layer not in picked]
    return sorted(picked + rest[:max(0, 2 - len(picked))])


def small(key: str, value: Any) -> Any:
    """By the key's name; what is off stays off."""
    if isinstance(value, dict):                        # RoPE's parameters, of all layers or of each kind
        return {name: small(str(name), one) for name, one in value.items()}
    if re.search(r"token_id|token_index|_idx$|_index$", key):
        return 0 if isinstance(value, int) and value >= WORDS else value
    for pattern, scale in SCALES:
        if re.search(pattern, key) and isinstance(value, (int, float, type(None))):
            return scale if value is None else type(value)(scale)
    if key == "head_dim" and value is None:
        return 8                                       # families that do not say it cannot do without, or take this
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return value
    return next((size for pattern, size in SIZES if re.search(pattern, key)), value)


def tiny_model(name: str, **sizes: int) -> Any:
    """Seeded, fp32, evaluation mode. Every weight gets noise by its fan-in, whatever the family's own start is. `sizes`: of
    its config, where others are wanted."""
    torch.manual_seed(0)
    config = tiny_config(name)
    for key, value in sizes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config)
    roughen(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    for parameter in model.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 100
        parameter.add_(torch.randn_like(parameter) / fan_in ** 0.5)


# ------------------------------------------------------------------------------------------------------- the sweep
LENGTHS = (60, 50, 30)                                 # tokens of the conversations: beyond every window
EXACT = 1e-3                                           # a larger difference would be another model
DOCS, MARKS = ROOT / "docs" / "models.md", ("<!-- families -->", "<!-- /families -->")
HEAD = "| family | sampled | trained | 4 bits | differs by at most |\n|---|---|---|---|---|"


@dataclass
class Row:
    """What a family comes to."""
    name: str
    refused: str = ""                                  # why; the rest is empty then
    sampled: str = ""
    trained: str = ""
    four: str = ""                                     # do 4 bits load: yes, no
    apart: float = 0.0                                 # largest difference in log-probability, or of a gradient in parts

    def cells(self) -> str:
        if self.refused:
            return f"| {self.name} | refused: {self.refused} | | | |"
        return f"| {self.name} | {self.sampled} | {self.trained} | {self.four} | {self.apart:.0e} |"


def measured(name: str, four: bool) -> Row:
    """Raises whatever of ours is not UserError: a crash."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(place) / "model"
        try:
            save(name, folder)
        except Exception as error:                     # transformers' own: its oldest releases make no config of these values
            return Row(name, refused=f"transformers cannot build it ({' '.join(str(error).split())[:150]})")
        cfg = load_config([str(ROOT / "config.yaml"), "preset=smoke", "context=64", f"model={folder}", "load_in_4bit=false"])
        try:
            policy = Policy.open(cfg, "", "init")
        except UserError as error:
            return Row(name, refused=reason(str(error), str(folder)))
        shake(policy)
        judge = lora.checks().judge_of(policy, LENGTHS)
        found = lora.checks().sampling(judge) | lora.checks().training(judge)
        return Row(name, "", *way_of(policy.model), "" if not four else "yes" if loads_in_4_bits(cfg) else "no",
                   max(float(values.max()) for values in found.values()))


def save(name: str, folder: Path) -> None:
    """As a checkpoint, with a tokenizer that fits. What transformers cannot build (here) has its text part's weights under
    their names in the whole, or none."""
    try:
        tiny_model(name).save_pretrained(folder)
    except (ImportError, AttributeError):
        config = tiny_config(name)
        config.save_pretrained(folder)
        if "text_config" in config.sub_configs:
            torch.manual_seed(0)
            text = AutoModelForCausalLM.from_config(config.text_config)
            roughen(text)
            save_file({re.sub("^model[.]", "model.language_model.", key): value.contiguous()
                       for key, value in text.state_dict().items() if key != "lm_head.weight"},
                      folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "models" / "tiny" / file, folder)


def reason(text: str, folder: str) -> str:
    """Of a refusal, without the file's name and what to do."""
    return text.replace(folder, "").removeprefix("model: ").rpartition("; ")[0].strip(" :") or text


@torch.no_grad()
def shake(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def way_of(model: Any) -> tuple[str, str]:
    slow = "general" + ("" if model.pads else ", by length") + ("" if model.caches else ", nothing cached")
    return "forking" if model.forks else slow, "packed" if model.packs else "general"


def loads_in_4_bits(cfg: Config) -> bool:
    try:
        Policy.open(cfg.but(load_in_4bit=True), "", "init")
        return True
    except UserError:
        return False


def main(args: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if unknown := set(args) - set(FAMILIES):
        raise UserError(f"{sorted(unknown)[0]}: no family of causal language models that transformers "
                        f"{transformers.__version__} lists")
    lines = [HEAD]
    for name in args or FAMILIES:
        lines.append(measured(name, True).cells())
        print(visible(lines[-1]), flush=True)
    if not args:
        text = DOCS.read_text(encoding="utf-8")
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        made = f"(`python -m tools.families`, transformers {transformers.__version__})"
        DOCS.write_text("\n".join([before + MARKS[0], made, "", *lines, MARKS[1] + after]), encoding="utf-8")
        print(visible(f"{DOCS}: {len(FAMILIES)} families of transformers {transformers.__version__}"))


if __name__ == "__main__":
    guarded(main, __doc__ if set(sys.argv[1:]) & {"-h", "--help"} else "")
