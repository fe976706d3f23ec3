"""What a checkpoint becomes (models/loading.py), against transformers' own loading, and which layers are reached."""
import json
import logging
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)

from config import UserError
from conftest import ROOT, family, shake
from lora import add_lora, linear_layers, load_adapter, load_model, lora_layers, lora_parameters, save_adapter, widths
from models.loading import stacks_of
from models.plan import shape_of
from models.weights import reading
from tools.families import roughen, tiny_model

IDS = torch.randint(6, 400, (2, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS = "model.safetensors"


def saved(model, folder, **how):
    """A folder as the hub has one."""
    model.save_pretrained(folder, **how)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models/tiny" / file, folder)
    return folder


def says(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def there_and_back(weight, kind="nf4", nested=True):
    packed, state = bnb.functional.quantize_4bit(weight.contiguous(), quant_type=kind, compress_statistics=nested)
    return bnb.functional.dequantize_4bit(packed, state)


@torch.no_grad()
def rounded(model):
    """The model in full, with the numbers that its linear layers and experts have in 4 bits."""
    for _, _, layer in linear_layers(model):
        turned = type(layer).__name__ == "Conv1D"
        value = there_and_back(layer.weight.T if turned else layer.weight)
        layer.weight.copy_(value.T if turned else value)
    for module in model.modules():
        for name in stacks_of(module):
            getattr(module, name).copy_(there_and_back(getattr(module, name)))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name, routers", [
    ("llama", set()), ("phi3", set()), ("gpt2", set()), ("glm4", set()), ("starcoder2", set()), ("falcon", set()),
    ("mixtral", set()), ("afmoe", {"router.gate"}), ("qwen2_moe", {"shared_expert_gate"}), ("bamba", {"mamba.out_proj"})])
def test_the_linear_layers_are_those_of_peft_s_all_linear_but_routers_and_what_is_passed_by(name, routers):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as theirs_of
    model = tiny_model(name)
    names = {id(module): name for name, module in model.named_modules()}
    ours = {names[id(layer)] for _, _, layer in linear_layers(model)}
    theirs = set(theirs_of(LoraConfig(target_modules="all-linear"), model).target_modules)
    assert ours <= theirs and len(ours) > 3
    assert {end for end in routers if any(name.endswith(end) for name in theirs - ours)} == routers
    assert all(name.endswith(tuple(routers)) for name in theirs - ours)


WIDE = dict(hidden_size=64, head_dim=16)                # rows of blocks of 64 weights


@pytest.mark.parametrize("name, reached", [
    ("phi3", "note: {}: 4 bits: 48 % of the weights; LoRA: 100 % of the linear layers\n"),
    ("gpt2", "note: {}: 4 bits: 60 % of the weights; LoRA: 100 % of the linear layers\n"),
    ("qwen3_moe", "note: {}: 4 bits: 58 % of the weights; LoRA: 43 % of the linear layers\n"),
    ("gpt_oss", "note: {}: 4 bits: 66 % of the weights; LoRA: 20 % of the linear layers\n")])
def test_in_4_bits_a_model_and_its_gradients_are_those_of_its_dequantised_weights(name, reached, tmp_path, capsys):
    folder = saved(tiny_model(name, **(dict(n_embd=64) if name == "gpt2" else WIDE)), tmp_path)
    whole, _ = load_model(str(folder), False, 64)
    capsys.readouterr()
    four, _ = load_model(str(folder), True, 64)
    assert capsys.readouterr().err.endswith(reached.format(folder)) and four.base_weights == whole.base_weights
    gradients = []
    for model in (four, rounded(whole)):
        add_lora(model, 4, 8, seed=0)
        shake(model, size=0.1)
        for parameter in lora_parameters(model):
            parameter.requires_grad_(True)
        loss = model(input_ids=IDS).logits.square().mean()
        loss.backward()
        gradients.append([loss.detach()[None], *(parameter.grad.flatten() for parameter in lora_parameters(model))])
    both = [torch.cat(found) for found in gradients]
    assert torch.allclose(*both, rtol=1e-4, atol=1e-4 * both[0].abs().max()), (both[0] - both[1]).abs().max()


def test_experts_in_4_bits_are_dequantised_once_a_pass_and_not_kept_for_the_backward_pass(tmp_path, monkeypatch):
    model, _ = load_model(str(saved(tiny_model("qwen3_moe", **WIDE), tmp_path)), True, 64)
    add_lora(model, 4, 8, seed=0)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    calls, kept = [], []
    undo = bnb.nn.parametrize.Bnb4bitParametrization
    own = undo.forward
    monkeypatch.setattr(undo, "forward", lambda self, packed: calls.append(self) or own(self, packed))
    logits(model)
    stacks = {id(call) for call in calls}
    assert len(calls) == len(stacks) == 2 * sum(hasattr(module, "parametrizations") for module in model.modules())
    least = min(call.quant_state.shape.numel() for call in calls)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        loss = model(input_ids=IDS).logits.sum()
    head = model.get_output_embeddings().weight
    assert max(value.untyped_storage().nbytes() for value in kept if value.is_floating_point()
               and value.data_ptr() != head.data_ptr() and value.shape[-1] != len(head)) < 4 * least
    loss.backward()
    assert len(calls) <= 3 * len(stacks) and lora_parameters(model)[1].grad.abs().sum() > 0


# checkpoints in 4 bits, and quantised otherwise

def in_4_bits(folder, kind, nested, storage="uint8", plain="layers.1.self_attn.q_proj"):
    """The folder's checkpoint as bitsandbytes saves it; returns the numbers that it stands for. `plain` stays."""
    stored, values = {}, {}
    for key, value in load_file(folder / WEIGHTS).items():
        stored[key], values[key] = value.bfloat16(), value.bfloat16().float()
        if key.endswith("proj.weight") and plain not in key:
            stored[key], state = bnb.functional.quantize_4bit(value, quant_type=kind, compress_statistics=nested)
            stored |= {f"{key}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
            values[key] = bnb.functional.dequantize_4bit(stored[key], state)
            stored[key] = stored[key].view(-1).view(getattr(torch, storage)).view(-1, 1)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    says(folder, quantization_config=dict(
        quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, _load_in_4bit=True, _load_in_8bit=False,
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage=storage, llm_int8_skip_modules=["lm_head", plain]))
    return values


@pytest.mark.parametrize("kind, nested, storage", [("nf4", True, "uint8"), ("fp4", False, "uint8"),
                                                   ("nf4", True, "bfloat16")])
def test_a_checkpoint_in_bitsandbytes_4_bits_loads_as_it_is_and_trains(kind, nested, storage, settings, tmp_path):
    whole = family("llama", hidden_size=64)
    folder = saved(whole, tmp_path)
    whole.load_state_dict(in_4_bits(folder, kind, nested, storage))
    packed = shape_of(settings(f"model={folder}", "context=64")).packed
    assert packed and not shape_of(settings("model=tiny")).packed              # the plan counts it so, too, whatever is asked
    for four in (None, True):
        model, _ = load_model(str(folder), four, 64)
        assert torch.allclose(logits(model), logits(whole), atol=1e-4)
        assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 7 * 3 - 1
    add_lora(model, 4, 8, seed=0)
    assert len(lora_layers(model)) == 7 * 3
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    model(input_ids=IDS).logits.sum().backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in lora_layers(model).values())


def test_a_mixture_s_adapter_from_peft_is_of_a_copy_of_its_base_and_of_no_other(tmp_path):
    from peft import LoraConfig, get_peft_model
    saved(tiny_model("qwen3_moe"), tmp_path / "base")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    other = tiny_model("qwen3_moe")
    roughen(other)
    saved(other, tmp_path / "other")
    for four in (False, True):
        load_adapter(load_model(str(tmp_path / "copy"), four, 64)[0], tmp_path / "adapter")
        with pytest.raises(UserError, match="whose weights are not those of"):
            load_adapter(load_model(str(tmp_path / "other"), four, 64)[0], tmp_path / "adapter")


def test_experts_that_a_checkpoint_has_in_4_bits_one_by_one_are_one_line(tmp_path):
    folder = saved(tiny_model("qwen3_moe", **WIDE), tmp_path)
    in_4_bits(folder, "nf4", True)
    with pytest.raises(UserError, match="^model: .*experts.* is in 4 bits, which is not read here of experts; take the"):
        load_model(str(folder), None, 64)


@pytest.mark.parametrize("found, told", [
    (dict(quant_method="gptq", bits=4), "gptq"), (dict(quant_method="awq"), "awq"), (dict(quant_method="fp8"), "fp8"),
    (dict(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes"), (dict(quant_method="tomorrow"), "tomorrow"),
    (dict(quant_method="compressed-tensors"), "compressed-tensors"), (dict(bits=4), "{'bits': 4}"),
    ([4], r"\[4\], but must be an object")])
def test_a_checkpoint_quantised_in_another_way_is_one_line(found, told, tmp_path):
    shutil.copytree(ROOT / "models/tiny", tmp_path / "copy")
    says(tmp_path / "copy", quantization_config=found)
    for four in (True, False):
        with pytest.raises(UserError, match=f"^model: .*{told}.*(take its original in 16 bits|copy)"):
            load_model(str(tmp_path / "copy"), four, 64)


def test_rows_that_bitsandbytes_would_unpack_wrongly_on_a_cpu_stay_as_they_are(tmp_path):
    whole = family("llama", num_attention_heads=3, num_key_value_heads=1, hidden_size=48, intermediate_size=128)
    folder = saved(whole, tmp_path)
    four, _ = load_model(str(folder), True, 64)
    kinds = {name.split(".")[-1]: type(layer).__name__ for name, layer in four.named_modules() if "proj" in name}
    assert kinds == {name: "Linear4bit" if name == "down_proj" else "Linear" for name in kinds} and len(kinds) == 7
    in_4_bits(folder, "nf4", True)
    with pytest.raises(UserError, match="^model: .* is in 4 bits in rows of 48, which bitsandbytes unpacks wrongly on a CPU"):
        load_model(str(folder), None, 64)


# forms of checkpoints

def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pickled_as_of_old(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / WEIGHTS).unlink()


def without_prefix(folder):
    found = {key.removeprefix("model."): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def with_another_head(folder):
    says(folder, tie_word_embeddings=True)


@pytest.mark.parametrize("how, change", [
    ({}, pickled), ({}, pickled_as_of_old), (dict(variant="fp16"), None), (dict(variant="fp16", max_shard_size="60KB"), None),
    ({}, without_prefix), ({}, with_another_head)], ids=["bin", "old bin", "variant", "shards", "prefix", "tied with a head"])
def test_a_checkpoint_is_read_as_from_pretrained_reads_it_in_full_and_in_4_bits(how, change, tmp_path):
    whole = family("llama", hidden_size=64)
    folder = saved(whole, tmp_path, **how)
    if change:
        change(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, variant=how.get("variant"))
    full, four = (load_model(str(folder), bits, 64)[0] for bits in (False, True))
    assert torch.equal(logits(full), logits(theirs)) and torch.equal(logits(theirs), logits(whole))
    assert torch.equal(logits(four), logits(rounded(theirs))) and four.base_weights == full.base_weights


@pytest.mark.parametrize("name, keys, told", [
    ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"], ""),
    ("gpt2", ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"], ""),
    ("glm", ["transformer.rotary_pos_emb.inv_freq"], ""), ("xglm", ["model.embed_positions.weights"], ""),
    ("llama", ["v_head.summary.weight", "v_head.summary.bias"], "its value head (v_head) is left out")])
def test_what_a_checkpoint_holds_besides_its_weights_is_left_out(name, keys, told, tmp_path, capsys):
    folder = saved(tiny_model(name), tmp_path)
    before = [logits(load_model(str(folder), bits, 64)[0]) for bits in (False, True)]
    save_file(load_file(folder / WEIGHTS) | {key: torch.ones(1, 1, 4, 4) for key in keys}, folder / WEIGHTS, metadata={"format": "pt"})
    for bits in (False, True):
        assert torch.equal(logits(load_model(str(folder), bits, 64)[0]), before[bits])
    assert told in capsys.readouterr().err


EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize("change, told", [
    (lambda found: found.pop(EXPERT), r"has not what model.layers.1.mlp.experts.gate_up_proj is made of|as \(3, "),
    (lambda found: found.update({EXPERT: found[EXPERT][:8]}), "has not what model.layers.1.mlp.experts.gate_up_proj"),
    (lambda found: found.update({"model.norm.weight": torch.ones(3)}), r"has model.norm.weight as \(3,\), not \(32,\)"),
    (lambda found: found.update({"model.layers.0.more": torch.ones(3)}), "has model.layers.0.more, unlike")],
    ids=["an expert less", "a smaller expert", "a misshapen norm", "a tensor more"])
def test_a_mixture_whose_checkpoint_does_not_fit_is_one_line_with_the_tensor(change, told, tmp_path):
    folder = saved(tiny_model("qwen3_moe"), tmp_path)
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    for four in (False, True):
        with pytest.raises(UserError, match=f"^model: .*its checkpoint ({told})"):
            load_model(str(folder), four, 64)


# the text part of a model that sees

TEXT = dict(vocab_size=470, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=128, max_position_embeddings=512, head_dim=16)


def sees(name):
    if name == "gemma3":
        eyes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                    patch_size=14)
        return Gemma3ForConditionalGeneration(Gemma3Config(
            text_config=TEXT, vision_config=eyes, mm_tokens_per_image=4, image_token_index=469))
    eyes = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64,
                deepstack_visual_indexes=[0])
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=TEXT | dict(rope_parameters=rope), vision_config=eyes, image_token_id=469, video_token_id=468,
        vision_start_token_id=467, vision_end_token_id=466))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_of_a_model_that_sees_the_text_part_is_loaded_and_its_adapter_is_the_whole_s(name, tmp_path):
    from peft import PeftModel
    torch.manual_seed(0)
    whole = sees(name).eval()
    roughen(whole)
    folder = saved(whole, tmp_path / "model")
    four, _ = load_model(str(folder), True, 64)
    text, _ = load_model(str(folder), False, 64)
    assert not [key for key in text.state_dict() if "language_model" not in key and "lm_head" not in key]
    assert torch.equal(logits(text), logits(whole))
    add_lora(text, 4, 8, seed=0)
    shake(text, size=0.1)
    assert len(lora_layers(text)) == 7 * 2
    save_adapter(text, tmp_path / "adapter", str(folder))
    ours, plain = logits(text), logits(whole)
    theirs = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert torch.allclose(logits(theirs), ours, atol=1e-4) and not torch.allclose(ours, plain, atol=0.1)
    rounding = rounded(load_model(str(folder), False, 64)[0])
    assert torch.equal(logits(four), logits(rounding))


def test_a_layer_of_gpt_2_is_as_wide_as_its_weight_turned():
    model = tiny_model("gpt2")
    assert all(widths(layer) == tuple(layer.weight.shape) for _, _, layer in linear_layers(model))


def test_what_bitsandbytes_advises_to_install_for_speed_is_not_said():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("raised, told", [
    (ImportError("it needs mistral-common"), "ImportError: it needs mistral-common; install what it names"),
    (ValueError("The checkpoint you are trying to load has model type `new` but Transformers does not recognize this architecture."),
     "has no model type new; pip install -U transformers")])
def test_what_transformers_cannot_read_is_not_to_be_copied_again(raised, told, tmp_path):
    with pytest.raises(UserError, match=f"^model: .*{told}"), reading("model: ", tmp_path):
        raise raised
