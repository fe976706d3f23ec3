import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from config import UserError
from conftest import ROOT, family, shake
from lora import (LoRA, adapter_off, add_lora, check_attention, linear_4bit, load_adapter, load_model,
                  lora_layers, lora_parameters, projections, save_adapter, weights_version)
from packing import Segment, pack, packed_nll


def test_the_adapter_loads_in_peft_and_peft_s_loads_here(own_tiny, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    model, _ = own_tiny
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny").eval()
    ids = torch.randint(6, 400, (2, 30))
    plain = model(input_ids=ids).logits
    add_lora(model, 8, 16, seed=0)
    shake(model, size=0.1)
    ours = model(input_ids=ids).logits
    save_adapter(model, tmp_path / "ours", "tiny")
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert torch.equal(theirs(input_ids=ids).logits, ours) and not torch.allclose(ours, plain)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny"), LoraConfig(
        r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    made.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")                      # another rank, fewer layers
    left_out = [layer for name, layer in lora_layers(model).items() if "up_proj" in name]
    assert all(layer.lora_A.any() and not layer.lora_B.any() for layer in left_out)     # no change, yet trainable
    assert torch.allclose(model(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5)


def test_the_adapter_switched_off_is_the_base_exactly(own_tiny):
    model, _ = own_tiny
    ids = torch.randint(6, 400, (1, 20))
    plain = model(input_ids=ids).logits
    add_lora(model, 4, 8, seed=0)
    assert torch.equal(model(input_ids=ids).logits, plain)        # B = 0
    shake(model)
    version = weights_version(model)
    with adapter_off(model):
        assert torch.equal(model(input_ids=ids).logits, plain) and weights_version(model) != version
    assert not torch.equal(model(input_ids=ids).logits, plain) and weights_version(model) == version


def test_four_bit_trains_only_the_adapter_and_reloads_to_equal_logits(own_tiny, tmp_path):
    import bitsandbytes as bnb
    ids = torch.randint(6, 400, (1, 20))
    exact = own_tiny[0](input_ids=ids).logits
    model, _ = load_model("tiny", True, 768)
    assert sum(isinstance(m, bnb.nn.Linear4bit)
               for m in model.modules()) == 7 * model.config.num_hidden_layers
    coarse = model(input_ids=ids).logits
    assert 0 < (coarse - exact).abs().mean() < 0.5 * exact.abs().mean()
    add_lora(model, 4, 8, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    losses = []
    for _ in range(5):
        loss = packed_nll(model, [pack([[Segment(ids[0].tolist(), [1.0] * 20, None)]])]).sum()
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name])
               for name, value in model.state_dict().items() if "lora" not in name)
    with adapter_off(model):
        assert torch.equal(model(input_ids=ids).logits, coarse)
    save_adapter(model, tmp_path, "tiny")
    again, _ = load_model("tiny", True, 768)
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loaded_straight_into_4_bit_equals_one_quantised_whole(name, tied, tmp_path):
    whole = family(name, tie_word_embeddings=tied)
    with torch.no_grad():
        for key, value in whole.named_parameters():
            if key.endswith(("bias", "norm.weight")):                     # what is born as zeros and ones
                value.add_(torch.randn_like(value) * 0.1)
    whole.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((ROOT / "models/tiny" / file).read_text())
    straight, _ = load_model(str(tmp_path), True, 768)
    for parent, own, linear in projections(whole):
        setattr(parent, own, linear_4bit(linear, linear.weight.data, "cpu"))
    ids = torch.randint(6, 400, (2, 40))
    assert torch.equal(straight(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert not any(parameter.requires_grad for parameter in straight.parameters())


@pytest.mark.slow
def test_loading_in_4_bit_never_holds_the_checkpoint_whole(tmp_path):
    config = LlamaConfig(vocab_size=470, hidden_size=1024, num_hidden_layers=8, num_attention_heads=8,
                         intermediate_size=4096, max_position_embeddings=768)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40MB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((ROOT / "models/tiny" / file).read_text())
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    script = """if True:
        import re, sys
        import bitsandbytes, torch
        from lora import load_model
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        load_model("tiny", True, 768)
        before = peak()
        load_model(sys.argv[1], sys.argv[2] == "4", 768)
        print(peak() - before)"""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}     # freed memory goes back, as with larger tensors
    four, whole = (int(subprocess.run([sys.executable, "-c", script, str(tmp_path), bits], cwd=ROOT, check=True,
                                      capture_output=True, text=True, env=env).stdout) for bits in ("4", "32"))
    print(f"a checkpoint of {size >> 20} MB: 4 bits take {four >> 20} MB at the highest, 32 bits {whole >> 20}")
    assert size > 250e6 and whole > size and four < size / 4 + 40e6 + 100e6, (size, whole, four)


def test_a_checkpoint_that_lacks_a_tensor_is_named(tmp_path):
    model = family("llama")
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((ROOT / "models/tiny" / file).read_text())
    tensors = {key: value for key, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in key}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint lacks model.layers.1.mlp.up_proj.weight"):
        load_model(str(tmp_path), True, 768)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors in"):
        load_model(str(tmp_path), True, 768)


def test_loading_mistakes_are_one_line(tmp_path, own_tiny):
    for name in ("nowhere", str(tmp_path), "a/b/c"):
        with pytest.raises(UserError, match="model: .*no folder with a config.json"):
            load_model(name, None, 64)
    with pytest.raises(UserError, match="context: 99999 is more"):
        load_model("tiny", None, 99999)
    with pytest.raises(UserError, match="adapter: .*has no adapter_config.json"):
        load_adapter(own_tiny[0], tmp_path)
    other = family("llama")
    add_lora(other, 4, 8, seed=0)
    save_adapter(other, tmp_path / "other", "llama")
    with pytest.raises(UserError, match="adapter: .*was made for another model"):
        load_adapter(own_tiny[0], tmp_path / "other")
    config = json.loads((tmp_path / "other/adapter_config.json").read_text())
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_adapter(other, tmp_path / "other")


def test_a_model_whose_attention_the_engine_cannot_mask_is_refused():
    with pytest.raises(UserError, match="full attention"):
        check_attention("m", MistralConfig(sliding_window=128), 256)
    check_attention("m", MistralConfig(sliding_window=512), 256)
    check_attention("m", Qwen2Config(), 256)


def test_lora_wraps_all_seven_projections_of_every_layer(own_tiny):
    model, _ = own_tiny
    add_lora(model, 4, 8, seed=0)
    assert len(lora_layers(model)) == 7 * model.config.num_hidden_layers
    assert all(isinstance(layer, LoRA) for layer in lora_layers(model).values())
