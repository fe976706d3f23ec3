import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, PhimoeConfig

import lora
from config import UserError
from conftest import ROOT, family, shake
from lora import (LoRA, adapter_off, add_lora, linear_layers, load_adapter, load_model, loading,
                  lora_layers, lora_parameters, save_adapter, weights_version)
from models.loading import linear_4bit, params_4bit
from models.weights import check_base, most_tokens
from packing import Segment, pack, packed_nll
from run import Policy
from tools.families import tiny_config


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


def test_products_of_sampling_are_torch_s_own_and_those_of_learning_are_left_to_it(own_tiny, monkeypatch):
    model, asked = own_tiny[0], []
    monkeypatch.setattr("models.products.processor", lambda: "AuthenticAMD")
    loading().quicken(model)
    layers, ids = [m for m in model.modules() if type(m) is torch.nn.Linear], torch.randint(6, 400, (1, 200))
    assert all("forward" in vars(layer) for layer in layers)
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (asked.append(1), plain(*args))[1])
    with torch.inference_mode():
        quick = model(input_ids=ids).logits
        assert not asked
        model(input_ids=ids[:, :1])                                # small ones begin sooner that way
        assert len(asked) == len(layers)
        with loading().plain(model):
            assert torch.allclose(model(input_ids=ids).logits, quick, atol=1e-4) and len(asked) == 2 * len(layers)
    model(input_ids=ids)
    assert len(asked) == 3 * len(layers) and all("forward" in vars(layer) for layer in layers)


def test_layers_that_are_cast_after_loading_are_torch_s_again(own_tiny, monkeypatch):
    model, ids, asked = own_tiny[0], torch.randint(6, 400, (1, 200)), []
    monkeypatch.setattr("models.products.processor", lambda: "AuthenticAMD")
    loading().quicken(model)
    layers = [m for m in model.to(torch.bfloat16).modules() if type(m) is torch.nn.Linear]
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (asked.append(1), plain(*args))[1])
    with torch.inference_mode():
        model(input_ids=ids)
    assert len(asked) == len(layers) and all("forward" in vars(layer) for layer in layers)


def test_a_torch_without_quick_products_uses_its_own(monkeypatch):
    def without(*args):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
    monkeypatch.setattr("models.products.processor", lambda: "AuthenticAMD")
    monkeypatch.setattr("models.products.linear", without)
    layer = torch.nn.Linear(8, 8)
    loading().quicken(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("maker, quick", [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_products_are_another_library_s_on_processors_that_it_was_measured_on(maker, quick, monkeypatch):
    monkeypatch.setattr("models.products.processor", lambda: maker)
    layer = torch.nn.Linear(64, 64)
    loading().quicken(layer)
    assert ("forward" in vars(layer)) == quick


def test_an_adapter_that_changes_nothing_costs_no_product_when_sampling_and_learns_all_the_same(own_tiny):
    model, _ = own_tiny
    ids, products = torch.randint(6, 400, (1, 20)), []
    add_lora(model, 4, 8, seed=0)

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            products.extend(args[1:2] if function is torch.Tensor.matmul else [function] if function is torch.addmm else [])
            return function(*args, **kwargs or {})

    def count():
        products.clear()
        with Counted():
            model(input_ids=ids)
        return sum(part is torch.addmm or any(part.data_ptr() == p.data_ptr() for p in lora_parameters(model))
                   for part in products)
    with torch.inference_mode():
        assert count() == 0
    layers = len(lora_layers(model))
    assert count() == 2 * layers                                  # a gradient is wanted: of B, at first
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B[0, 0] = 1.0
    with torch.inference_mode():
        assert count() == 1                                       # the second product, added to the base's


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
    whole = family(name, hidden_size=64, tie_word_embeddings=tied)
    with torch.no_grad():
        for key, value in whole.named_parameters():
            if key.endswith(("bias", "norm.weight")):                     # what is born as zeros and ones
                value.add_(torch.randn_like(value) * 0.1)
    whole.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((ROOT / "models/tiny" / file).read_text())
    straight, _ = load_model(str(tmp_path), True, 768)
    for parent, own, linear in linear_layers(whole):
        four = linear_4bit(linear)
        four.weight = params_4bit(linear.weight.data, "cpu")
        setattr(parent, own, four)
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


# broken files

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


def bytes_of(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def half(file):
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def gone(file):
    return lambda folder: (folder / file).unlink()


def says(file, **changes):
    """The JSON file with these keys changed; ... takes one away."""
    def change(folder):
        found = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return change


def tensors(file, change):
    """`change`: of (name, tensor) a tensor, or None to leave it out."""
    def rewrite(folder):
        found = {key: change(key, value) for key, value in load_file(folder / file).items()}
        save_file({key: value.contiguous() for key, value in found.items() if value is not None}, folder / file)
    return rewrite


def spoiled(part, number):
    def change(key, value):
        if part in key:
            value.view(-1)[3] = number
        return value
    return change


def more(file, extra):
    return lambda folder: save_file(load_file(folder / file) | extra, folder / file)


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(change):
    def split(folder):
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="500KB")
        (folder / "model.safetensors").unlink()
        change(folder)
    return split


def then(*changes):
    return lambda folder: [change(folder) for change in changes]


def words(change):
    def rewrite(folder):
        found = json.loads((folder / "tokenizer.json").read_text())
        found["model"]["vocab"] = change(found["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(found))
    return rewrite


WEIGHTS, CONFIG, TOKENS = "model.safetensors", "config.json", "tokenizer.json"
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00007.safetensors"
BROKEN_MODELS = {
    "empty weights": (bytes_of(WEIGHTS, b""), WEIGHTS + ": the file is empty; copy or download it again"),
    "half weights": (half(WEIGHTS), WEIGHTS + ": SafetensorError: .*not fully covered; copy or download"),
    "text as weights": (bytes_of(WEIGHTS, b"<!DOCTYPE html>" * 9), WEIGHTS + ": SafetensorError"),
    "a pointer": (bytes_of(WEIGHTS, LFS), WEIGHTS + ": this is a pointer of git LFS.*run `git lfs pull`"),
    "no weights": (gone(WEIGHTS), "has no model.safetensors; copy"),
    "half a pickle": (then(pickled, half("pytorch_model.bin")), "pytorch_model.bin: .*; copy or download it again"),
    "a pickled path": (then(pickled, lambda folder: torch.save({"a": folder}, folder / "pytorch_model.bin")),
                       "pytorch_model.bin: UnpicklingError"),
    "a pickled list": (then(pickled, lambda folder: torch.save([1], folder / "pytorch_model.bin")),
                       "pytorch_model.bin: AttributeError"),
    "an absent shard": (sharded(gone(SHARD)), SHARD + ": .*No such file"),
    "half a shard": (sharded(half(SHARD)), SHARD + ": SafetensorError"),
    "an index that is a list": (sharded(bytes_of(INDEX, b"[1]")), INDEX + ": expected a JSON object, found \\[1\\]"),
    "an index of numbers": (sharded(says(INDEX, weight_map={"a": 3})), INDEX + ": TypeError"),
    "an index without a map": (sharded(says(INDEX, weight_map=...)), INDEX + ": KeyError"),
    "no config": (bytes_of(CONFIG, b"null"), CONFIG + ": expected a JSON object, found None"),
    "half a config": (half(CONFIG), CONFIG + ": JSONDecodeError"),
    "a binary config": (bytes_of(CONFIG, b"\xff\xfe\0"), CONFIG + ": UnicodeDecodeError"),
    "no type": (says(CONFIG, model_type=...), "model_type"),
    "an unknown type": (says(CONFIG, model_type="nonsense"), "nonsense"),
    "another type": (says(CONFIG, model_type="qwen3"), "lacks model.layers.0.self_attn.k_norm.weight .and 7 more."),
    "a type of no text": (says(CONFIG, model_type="t5"), "t5 is no causal language model that transformers .* knows"),
    "code of its own": (says(CONFIG, model_type="x", auto_map=dict(AutoConfig="a.B")), "contains custom code"),
    "text for a number": (says(CONFIG, hidden_size="128"), "hidden_size"),
    "a number below 0": (says(CONFIG, hidden_size=-128), "negative dimension"),
    "no heads": (says(CONFIG, num_attention_heads=0), "ZeroDivisionError"),
    "an unknown activation": (says(CONFIG, hidden_act="foo"), "'foo'"),
    "a rope of text": (says(CONFIG, rope_parameters=dict(rope_type="default", rope_theta="x")), "TypeError"),
    "nan": (says(CONFIG, rms_norm_eps=float("nan")), "not finite numbers"),
    "fewer layers": (says(CONFIG, num_hidden_layers=3), "its checkpoint has model.layers.3.input_layernorm.weight"),
    "more layers": (says(CONFIG, num_hidden_layers=5), "lacks model.layers.4.input_layernorm.weight .and 8 more."),
    "absurdly many layers": (says(CONFIG, num_hidden_layers=10**9),
                             "its config.json says 1000000000 layers, more than its checkpoint has tensors"),
    "another vocabulary": (says(CONFIG, vocab_size=500), r"embed_tokens.weight as \(468, 128\), not \(500, 128\)"),
    "another width": (says(CONFIG, intermediate_size=300), r"down_proj.weight as \(128, 256\), not \(128, 300\)"),
    "a head of its own": (says(CONFIG, tie_word_embeddings=False), "lacks lm_head.weight"),
    "a tensor less": (tensors(WEIGHTS, lambda key, value: None if "1.mlp.up_proj" in key else value),
                      "lacks model.layers.1.mlp.up_proj.weight, unlike its config.json"),
    "a tensor more": (more(WEIGHTS, {"foo.weight": torch.ones(3)}), "has foo.weight, unlike its config.json"),
    "a tensor transposed": (tensors(WEIGHTS, lambda key, value: value.T if "1.mlp.up_proj" in key else value),
                            r"1.mlp.up_proj.weight as \(128, 256\), not \(256, 128\)"),
    "inf in a weight": (tensors(WEIGHTS, spoiled("2.mlp.down_proj", float("inf"))), "not finite numbers"),
    "nan in an embedding": (tensors(WEIGHTS, spoiled("embed", float("nan"))), "not finite numbers"),
    "half a tokenizer": (half(TOKENS), TOKENS + ": JSONDecodeError"),
    "no tokenizer": (gone(TOKENS), "tokenizer"),
    "an empty tokenizer": (bytes_of(TOKENS, b"{}"), "KeyError: 'added_tokens'"),
    "a tokenizer without words": (words(lambda vocab: {}), "tokens up to -1"),
    "a larger tokenizer": (words(lambda vocab: vocab | {"w": 468}), "tokens up to 468, its weights have 468 rows"),
    "another's settings": (bytes_of("tokenizer_config.json", b"[]"), "tokenizer_config.json: expected a JSON object"),
    "a pointer as template": (bytes_of("chat_template.jinja", LFS), "chat_template.jinja: .*git lfs pull"),
    "half settings": (half("generation_config.json"), "generation_config.json: JSONDecodeError"),
    "an adapter beside it": (bytes_of("adapter_config.json", b"{}"), "holds an adapter; give that as init= .train.py.")}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_model_folder_that_is_broken_is_one_line(name, settings, tmp_path):
    change, told = BROKEN_MODELS[name]
    folder = shutil.copytree(ROOT / "models/tiny", tmp_path / "copy")
    change(folder)
    for four in (False, True) if "weights" in name or "tensor" in name or "layers" in name else (False,):
        with pytest.raises(UserError, match="(?s)^model: .*" + told) as raised:
            Policy.open(settings(f"model={folder}", f"load_in_4bit={four}".lower(), "context=64"), "", "init")
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize("change", [pickled, sharded(lambda folder: None), gone("generation_config.json"),
                                    more(WEIGHTS, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})])
def test_a_model_folder_in_another_shape_is_loaded_all_the_same(change, tmp_path, tiny):
    change(shutil.copytree(ROOT / "models/tiny", tmp_path / "copy"))
    model, _ = load_model(str(tmp_path / "copy"), False, 64)
    ids = torch.tensor([[1, 2, 300]])
    assert torch.equal(model(input_ids=ids).logits, tiny[0](input_ids=ids).logits)
    assert model.base_weights == tiny[0].base_weights


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "../a", "/a/b", "a/b/c", "~/a", "", "lora.py", "empty"])
def test_a_name_that_is_no_model_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"model: {name} is no folder with a config.json, and no hub name"):
        load_model(name, None, 64)


def test_a_context_that_the_model_does_not_have_is_one_line():
    with pytest.raises(UserError, match="context: 99999 is more"):
        load_model("tiny", None, 99999)


ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
BROKEN_ADAPTERS = {
    "empty": (bytes_of(ADAPTER, b""), ADAPTER + ": the file is empty; copy it again, or delete its folder and train"),
    "half": (half(ADAPTER), ADAPTER + ": SafetensorError"),
    "a pointer": (bytes_of(ADAPTER, LFS), "git lfs pull"),
    "no weights": (gone(ADAPTER), "has no adapter_config.json with adapter_model.safetensors"),
    "no settings": (gone(SETTINGS), "has no adapter_config.json with"),
    "null": (bytes_of(SETTINGS, b"null"), SETTINGS + ": expected a JSON object, found None"),
    "a list": (bytes_of(SETTINGS, b"[]"), SETTINGS + ": expected a JSON object"),
    "half settings": (half(SETTINGS), SETTINGS + ": JSONDecodeError"),
    "another kind": (says(SETTINGS, peft_type="IA3"), "peft_type is 'IA3', but must be LORA"),
    "no kind": (says(SETTINGS, peft_type=...), "peft_type is None"),
    "r is 0": (says(SETTINGS, r=0), "r is 0, but must be a whole number of 1 or more"),
    "r is text": (says(SETTINGS, r="4"), "r is '4'"),
    "r is true": (says(SETTINGS, r=True), "r is True"),
    "no r": (says(SETTINGS, r=...), "r is None"),
    "another r": (says(SETTINGS, r=8), r"lora_A.weight is \(4, 256\), but r is 8"),
    "a huge r": (says(SETTINGS, r=10**9), "but r is 1000000000"),
    "alpha is nan": (says(SETTINGS, lora_alpha=float("nan")), "lora_alpha is nan, but must be a number above 0"),
    "alpha is text": (says(SETTINGS, lora_alpha="8"), "lora_alpha is '8'"),
    "alpha is huge": (says(SETTINGS, lora_alpha=1e37), "not finite .lora_alpha=1e.37."),
    "another base at its start": (says(SETTINGS, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "no targets": (says(SETTINGS, target_modules=None), "target_modules is None"),
    "a numbered base": (says(SETTINGS, base_model_name_or_path=3), "base_model_name_or_path is 3"),
    "half a base": (bytes_of("base.json", b'{"weights": '), "base.json: JSONDecodeError"),
    "DoRA": (says(SETTINGS, use_dora=True), "it lacks the lora_magnitude_vector of .*q_proj"),
    "biases": (says(SETTINGS, bias="all"), "uses bias='all'"),
    "what is not known": (says(SETTINGS, use_tomorrow=True), "uses use_tomorrow=True"),
    "nan": (tensors(ADAPTER, spoiled("2.mlp.down_proj.lora_B", float("nan"))), "2.mlp.down_proj.*no finite number"),
    "inf in 64 bits": (tensors(ADAPTER, lambda key, value: value.double() * 1e300), "no finite number"),
    "whole numbers": (tensors(ADAPTER, lambda key, value: value.to(torch.int8)), "no finite number"),
    "a layer less": (tensors(ADAPTER, lambda key, value: None if "layers.3" in key else value), "it lacks .*layers.3"),
    "half a layer": (tensors(ADAPTER, lambda key, value: None if "3.mlp.up_proj.lora_B" in key else value),
                     "it lacks the lora_B of .*3.mlp.up_proj"),
    "a layer more": (more(ADAPTER, {LAYER.format(4): torch.ones(4, 128)}), "it has .*layers.4.*this model has not"),
    "another tensor": (more(ADAPTER, {"foo": torch.ones(3)}), "foo is none of the tensors of plain LoRA"),
    "a head": (more(ADAPTER, {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 128)}), "it has .*lm_head.lora_A"),
    "another rank in one": (tensors(ADAPTER, lambda key, value: value[:2] if "1.mlp.up_proj.lora_A" in key else value),
                            r"1.mlp.up_proj.lora_A.weight is \(2, 128\), but r is 4"),
    "another width": (tensors(ADAPTER, lambda key, value: value[:, :64] if "lora_A" in key else value),
                      r"is \(4, 64\), not \(4, 128\)")}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of tiny, as a run saves it."""
    model, _ = load_model("tiny", None, 64)
    add_lora(model, 4, 8, seed=0)
    shake(model)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, folder, "tiny")
    return folder


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_an_adapter_that_is_broken_or_no_plain_lora_is_one_line(name, adapter, own_tiny, tmp_path):
    change, told = BROKEN_ADAPTERS[name]
    change(shutil.copytree(adapter, tmp_path / "copy"))
    with pytest.raises(UserError, match=f"^init: {tmp_path}/copy.*" + told) as raised:
        load_adapter(own_tiny[0], tmp_path / "copy", "init: ")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_what_peft_saves_of_some_layers_only_is_read_whole(own_tiny, tmp_path, adapter):
    from peft import LoraConfig, get_peft_model
    ids = torch.randint(6, 400, (2, 30))
    for some in (dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 2]),
                 dict(target_modules=r".*layers\.[03]\..*\.v_proj"), dict(target_modules="all-linear"),
                 dict(target_modules=["mlp.up_proj"], exclude_modules=r".*layers\.0\..*")):
        made = get_peft_model(AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny"),
                              LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **some)).eval()
        made.save_pretrained(tmp_path / "theirs")
        model, _ = load_model("tiny", None, 64)
        load_adapter(model, tmp_path / "theirs")
        assert torch.allclose(model(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-4), some


def other_tiny(folder):
    """A model of tiny's shape, trained on: every number is a little another."""
    shutil.copytree(ROOT / "models/tiny", folder)
    tensors("model.safetensors", lambda key, value: value * 1.05)(folder)
    return folder


def test_an_adapter_of_the_same_base_is_taken_in_float16_which_rounds_it_otherwise(tmp_path):
    for saved_in, taken_in in (("", "float16"), ("float16", "")):
        model = load_model("tiny", False, 64, saved_in)[0]
        add_lora(model, 4, 8, seed=0)
        save_adapter(model, tmp_path / f"a{saved_in}", "tiny")
        load_adapter(load_model("tiny", False, 64, taken_in)[0], tmp_path / f"a{saved_in}", "adapter: ")


@pytest.mark.parametrize("fails", ["adapter_model.safetensors", "base.json"])
def test_an_adapter_that_was_cut_short_is_none(fails, own_tiny, tmp_path, monkeypatch):
    add_lora(own_tiny[0], 4, 8, seed=0)
    plain = lora.aside

    def killed(path):
        if path.name == fails:
            raise KeyboardInterrupt
        return plain(path)
    monkeypatch.setattr(lora, "aside", killed)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(own_tiny[0], tmp_path / "a", "tiny")
    assert not (tmp_path / "a/adapter_config.json").exists()             # by which a rerun knows that a round is done


def test_an_adapter_whose_base_has_other_weights_is_one_line(tmp_path, adapter, own_tiny):
    from peft import LoraConfig, get_peft_model
    other = str(other_tiny(tmp_path / "other"))
    told = f"^adapter: {adapter} was trained on tiny, whose weights are not those of {other}; give model=tiny, or an"
    with pytest.raises(UserError, match=told):
        load_adapter(load_model(other, None, 64)[0], adapter, "adapter: ")
    with pytest.raises(UserError, match="was trained on tiny, whose"):            # in 4 bits, too
        load_adapter(load_model(other, True, 64)[0], adapter)
    # PEFT's says by name alone what it was trained on: a folder that lies here
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(other), LoraConfig(r=4, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=f"theirs was trained on {other}, whose weights are not .*models/tiny; give"):
        load_adapter(own_tiny[0], tmp_path / "theirs")
    load_adapter(load_model(other, None, 64)[0], tmp_path / "theirs")
    torch.save(load_file(tmp_path / "other/model.safetensors"), tmp_path / "other/pytorch_model.bin")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(UserError, match="theirs was trained on .*, whose weights are not"):      # pickled, too
        load_adapter(load_model("tiny", None, 64)[0], tmp_path / "theirs")
    says(SETTINGS, base_model_name_or_path="own/model-1")(tmp_path / "theirs")
    model, _ = load_model("tiny", None, 64)
    model.name_or_path = "own/model-2"
    with pytest.raises(UserError, match="was trained on own/model-1, which is not own/model-2; give model=own/model-1, or"):
        load_adapter(model, tmp_path / "theirs")


@pytest.mark.parametrize("base, here, taken", [
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
    ("unsloth/qwen3-4b-unsloth-bnb-4bit", "Qwen/Qwen3-4B", True), ("unsloth/Qwen3-4B-bnb-4bit", "Qwen/Qwen3-4B", True),
    ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B", False), ("Qwen/Qwen2.5-4B", "Qwen/Qwen3-4B", False)])
def test_a_copy_on_the_hub_under_another_name_is_the_same_base_with_a_note(base, here, taken, capsys):
    model = SimpleNamespace(name_or_path=here, base_weights={b"x"})
    with nullcontext() if taken else pytest.raises(UserError, match=f"init: a was trained on {base}, which is not {here}"):
        check_base(model, "init: a", base, "")
    assert taken == (f"note: init: a was trained on {base}, by its own account, and is used on {here}" in capsys.readouterr().err)


@pytest.mark.parametrize("base, told", [
    ("tiny", ""), ("/another/machine/models/tiny", ""), (None, ""),
    ("/another/machine/renamed", "note: .*was trained on /another/machine/renamed, by its own account")])
def test_an_adapter_from_before_its_base_was_kept_is_loaded(base, told, adapter, own_tiny, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "old")
    (tmp_path / "old/base.json").unlink()
    says(SETTINGS, base_model_name_or_path=base)(tmp_path / "old")
    load_adapter(own_tiny[0], tmp_path / "old")
    assert re.match(told + "$" * (not told), capsys.readouterr().err)
    old, new = load_file(adapter / ADAPTER), load_file(tmp_path / "old" / ADAPTER)
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_an_adapter_is_of_the_same_base_in_4_bits_and_copied_elsewhere(tmp_path, adapter):
    shutil.copytree(ROOT / "models/tiny", tmp_path / "copy")
    for four in (True, False):
        load_adapter(load_model(str(tmp_path / "copy"), four, 64)[0], adapter)


def test_a_full_disk_and_weights_that_are_not_finite_leave_what_was_there(adapter, own_tiny, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "kept")
    model, before = own_tiny[0], (adapter / ADAPTER).read_bytes()
    load_adapter(model, adapter)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("lora.save_file", full)
    with pytest.raises(UserError, match="is the disk full. .*No space left on device.*run the same command again"):
        save_adapter(model, tmp_path / "kept", "tiny")
    lora_parameters(model)[0].data[0, 0] = float("nan")
    with pytest.raises(UserError, match="the adapter is not finite, so it is not saved; lower lr= or lora_alpha="):
        save_adapter(model, tmp_path / "kept", "tiny")
    assert (tmp_path / "kept" / ADAPTER).read_bytes() == before


LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0],
            original_max_position_embeddings=64)
NTK = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
EIGHTHS = torch.arange(0, 8, 2) / 8                     # of a head of 8
ROPES = {                                               # what it is, context= -> 1 / frequency
    "LongRoPE within what it was trained on": (LONG, 64, torch.tensor(LONG["short_factor"]) * 1e4 ** EIGHTHS),
    "LongRoPE beyond": (LONG, 65, torch.tensor(LONG["long_factor"]) * 1e4 ** EIGHTHS),
    "dynamic NTK within": (NTK, 128, 1e4 ** EIGHTHS),
    "dynamic NTK beyond": (NTK, 300, (1e4 * (4 * 300 / 128 - 3) ** (8 / 6)) ** EIGHTHS)}


@pytest.mark.parametrize("name", ROPES)
def test_rope_that_depends_on_length_is_that_of_the_context_whatever_a_batch_holds(name, tiny, tmp_path):
    rope, context, periods = ROPES[name]
    kind = Phi3Config if rope is LONG else LlamaConfig
    more = dict(pad_token_id=0, original_max_position_embeddings=64) if rope is LONG else {}
    torch.manual_seed(0)
    config = kind(vocab_size=470, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  intermediate_size=48, max_position_embeddings=128, initializer_range=0.3, rope_parameters=rope, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny[1].tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), False, context)
    ids = torch.randint(5, 400, (2, context))
    alone = model(input_ids=ids[:1, :20]).logits[0]
    assert torch.allclose(1 / model.model.rotary_emb.inv_freq, periods)
    beside = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :20]
    assert torch.allclose(alone, beside, atol=1e-4)
    assert torch.allclose(1 / model.model.rotary_emb.inv_freq, periods)       # and stays
    most = 512 if rope is NTK else 128
    with pytest.raises(UserError, match=f"context: {most + 1} is more than the {most} tokens of"):
        load_model(str(tmp_path), False, most + 1)


@pytest.mark.parametrize("name, fields, most", [
    ("llama", dict(max_position_embeddings=64), 64), ("llama", dict(max_position_embeddings=-1), 999),
    ("llama", dict(max_position_embeddings=64, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)), 256),
    ("llama", dict(max_position_embeddings=256, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)), 256),
    ("mpt", dict(max_seq_len=64), 64), ("bloom", {}, 999)])
def test_how_long_a_conversation_may_be_is_what_its_positions_allow(name, fields, most):
    config = tiny_config(name)
    for key, value in fields.items():
        setattr(config, key, value)
    assert most_tokens(config, 999) == most
    assert most_tokens(SimpleNamespace(max_target_positions=64), 999) == 64          # Whisper's decoder


def test_phimoe_s_scale_that_depends_on_length_is_that_of_the_context_too(tiny, tmp_path):
    torch.manual_seed(0)
    config = PhimoeConfig(vocab_size=470, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                          intermediate_size=48, num_local_experts=2, max_position_embeddings=128, initializer_range=0.3,
                          rope_parameters=LONG | dict(short_mscale=1.1, long_mscale=1.6, factor=2.0))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny[1].tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), False, 100)
    ids = torch.randint(5, 400, (2, 100))
    alone = model(input_ids=ids[:1, :20]).logits[0]
    assert torch.allclose(alone, model(input_ids=ids).logits[0, :20], atol=1e-4)


def test_lora_wraps_all_seven_projections_of_every_layer(own_tiny):
    model, _ = own_tiny
    add_lora(model, 4, 8, seed=0)
    assert len(lora_layers(model)) == 7 * model.config.num_hidden_layers
    assert all(isinstance(layer, LoRA) for layer in lora_layers(model).values())
