"""Adapters as peft and others write them: each kind is exact, its gradients too, and is saved so that peft reads the same;
or it is one line."""
import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import UserError
from conftest import family
from lora import (LoRA, add_lora, load_adapter, load_model, lora_layers, lora_parameters, save_adapter,
                  weights_version)
from models.adapters import IDLE, MUST, placed
from models.weights import check_checkpoint
from packing import Segment, pack, token_logp
from run import Policy
from tools.families import tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
IDS = torch.tensor([[7, 300, 12, 45, 9, 9, 120, 33], [401, 8, 7, 77, 250, 6, 31, 19]])


@pytest.fixture(scope="module")
def llama():
    """Small, with biases. Tests change copies of it."""
    return family("llama", attention_bias=True, initializer_range=0.2)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shaken(model, size=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * size)
    return model.eval()


def made(base, folder, **fields):
    """An adapter of peft's on a copy of `base`, as if trained, and saved."""
    from peft import LoraConfig, get_peft_model
    model = shaken(get_peft_model(copy.deepcopy(base), LoraConfig(**PLAIN | fields)))
    model.save_pretrained(folder)
    return model


def loaded(base, folder, key=""):
    model = copy.deepcopy(base).requires_grad_(False)
    load_adapter(model, folder, key)
    return model


def in_peft(base, folder):
    from peft import PeftModel
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
            for name, p in model.named_parameters() if p.grad is not None}


def says(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def converted(base, folder):
    """PiSSA, as peft saves it where it is asked for a change of the base."""
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**PLAIN, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    shaken(model).save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder / "start"))
    return model


KINDS = {
    "plain": dict(),
    "rsLoRA": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 2, r"model.layers.[01].mlp.*": 6},
                     alpha_pattern={"layers.1.self_attn.q_proj": 3, "down_proj": 5}),
    "patterns of rsLoRA": dict(use_rslora=True, rank_pattern={"^model.layers.0.self_attn.q_proj": 7},
                               alpha_pattern={".*up_proj": 5}),
    "the first pattern that matches": dict(rank_pattern={"0.mlp.up_proj": 2, "[01].mlp.*": 5, "up_proj": 3}),
    "some layers": dict(layers_to_transform=[1, 2]),
    "one layer": dict(layers_to_transform=1, layers_pattern="layers"),
    "but one": dict(exclude_modules=["layers.1.self_attn.q_proj"]),
    "but those of a pattern": dict(exclude_modules=r".*layers\.1\..*"),
    "all linear": dict(target_modules="all-linear"),
    "a pattern": dict(target_modules=r".*layers\.[02]\..*(q|v)_proj"),
    "a whole name": dict(target_modules=["model.layers.1.self_attn.o_proj"]),
    "the head": dict(target_modules=["q_proj", "lm_head"]),
    "weights": dict(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"],
                    rank_pattern={"up_proj.weight": 2, "q_proj": 3}),
    "weights by their whole names": dict(target_parameters=["model.layers.1.mlp.up_proj.weight"],
                                         target_modules=["v_proj"], rank_pattern={"1.mlp.up_proj.weight": 3}),
    "the other way round": dict(fan_in_fan_out=True),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "EVA": dict(init_lora_weights="eva"),
    "DoRA": dict(use_dora=True),
    "DoRA with patterns": dict(use_dora=True, use_rslora=True, rank_pattern={"up_proj": 6}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_adapter_is_peft_s_exactly_both_ways_and_so_are_its_gradients(kind, llama, tmp_path):
    theirs = made(llama, tmp_path / "theirs", **KINDS[kind])
    ours = loaded(llama, tmp_path / "theirs")
    assert (logits(ours) - logits(llama)).abs().max() > 0.1
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    wanted, found = gradients(in_peft(llama, tmp_path / "theirs")), gradients(ours)
    assert found.keys() == wanted.keys() and len(found) == len(lora_parameters(ours))
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in found)
    shaken(ours)
    save_adapter(ours, tmp_path / "ours", "llama")
    assert torch.allclose(logits(in_peft(llama, tmp_path / "ours")), logits(ours), atol=1e-5)
    assert torch.equal(logits(loaded(llama, tmp_path / "ours")), logits(ours))


def test_a_model_whose_head_is_adapted_is_trained_in_packed_rows(llama, tmp_path):
    made(llama, tmp_path / "theirs", **KINDS["the head"])
    ours, ids = loaded(llama, tmp_path / "theirs"), IDS[0].tolist()
    row = pack([[Segment(ids[:2], [0.0, 1.0], None), Segment(ids[2:], [1.0] * len(ids[2:]), 0)]])
    own = logits(ours)[0].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
    assert torch.allclose(token_logp(ours, [row]), own, atol=1e-5)


def test_pissa_that_peft_saved_as_a_change_of_its_base_is_read(llama, tmp_path):
    theirs = converted(llama, tmp_path)
    assert torch.allclose(logits(loaded(llama, tmp_path)), logits(theirs), atol=1e-4)


def test_a_plain_adapter_is_saved_as_it_always_was(llama, tmp_path):
    model = copy.deepcopy(llama)
    add_lora(model, 4, 10, seed=0)
    save_adapter(model, tmp_path, "llama")
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path="llama", r=4, lora_alpha=10.0,
                  lora_dropout=0.0, bias="none", fan_in_fan_out=False, inference_mode=True, target_modules=names)
    assert (tmp_path / CONFIG).read_text() == json.dumps(config, indent=1)


def test_an_adapter_with_other_layers_and_ranks_takes_the_place_of_the_one_before(llama, tmp_path):
    """Layers that it leaves out change nothing; the engine sees that the weights are others."""
    made(llama, tmp_path / "first", use_dora=True)
    second = made(llama, tmp_path / "second", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 7})
    model = loaded(llama, tmp_path / "first")
    before = weights_version(model)
    load_adapter(model, tmp_path / "second")
    assert weights_version(model) != before and torch.allclose(logits(model), logits(second), atol=1e-5)
    left = lora_layers(model)["model.layers.0.mlp.up_proj"]
    assert left.lora_A.any() and not left.lora_B.any()                      # no change, yet it can be trained


def test_the_same_tensors_under_another_scale_are_another_policy(llama, plain, settings, tmp_path):
    def named(folder):
        return Policy(loaded(llama, folder), None, settings()).fingerprint()
    says(shutil.copytree(plain, tmp_path / "other"), lora_alpha=10)
    assert named(tmp_path / "other") == named(tmp_path / "other") != named(plain)
    save_adapter(loaded(llama, tmp_path / "other"), tmp_path / "again", "llama")
    assert named(tmp_path / "again") == named(tmp_path / "other")


def test_a_checkpoint_of_training_with_patterned_ranks_is_known_by_its_shapes(llama, tmp_path):
    made(llama, tmp_path, **KINDS["patterns"])
    ours = lora_parameters(loaded(llama, tmp_path))
    moments = {i: dict(exp_avg=p.detach(), exp_avg_sq=p.detach()) for i, p in enumerate(ours)}
    saved = dict(state={"step": 3}, parameters=[p.detach() for p in ours], optimizer=dict(state=moments))
    check_checkpoint(saved, ours, ["step"])
    with pytest.raises(ValueError, match="of another adapter"):
        check_checkpoint(saved | dict(parameters=[p.detach()[:1] for p in ours]), ours, ["step"])


def test_dora_on_4_bits_is_dora_on_the_weights_that_these_stand_for(tmp_path):
    import bitsandbytes as bnb
    four, dense = load_model("tiny", True, 64)[0], load_model("tiny", None, 64)[0]
    made(dense, tmp_path, use_dora=True, base_model_name_or_path="tiny")
    for name, layer in four.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer_weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.get_submodule(name).weight.data = layer_weight.float()
    for model in (four, dense):
        load_adapter(model, tmp_path)
    assert torch.allclose(logits(four), logits(dense), atol=1e-3)


# --------------------------------------------------------------------------------- files as others write them
def renamed(change):
    def rewrite(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({change(name): value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return rewrite


def as_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def in_parts(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where = {name: f"adapter_model-0000{number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for part in set(where.values()):
        save_file({name: value for name, value in tensors.items() if where[name] == part}, folder / part)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(dict(weight_map=where)))


def with_copies(dtype):
    def add(folder, base):
        copies = {f"base_model.model.{name}": base.state_dict()[name].to(dtype).clone()
                  for name in ("lm_head.weight", "model.embed_tokens.weight")}
        save_file(load_file(folder / WEIGHTS) | copies, folder / WEIGHTS)
    return add


FORMS = {
    "pickled": as_bin,
    "in parts": in_parts,
    "with the adapter's name": renamed(lambda name: name.replace(".weight", ".my-own.weight")),
    "without peft's prefix": renamed(lambda name: name.removeprefix("base_model.model.")),
    "of the inner model": renamed(lambda name: name.replace("base_model.model.model.", "base_model.model.")),
    "compiled": renamed(lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.")),
    "wrapped": renamed(lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")),
    "of a whole model that sees": renamed(lambda name: name.replace("model.layers", "model.language_model.layers")),
    "of one of before": renamed(lambda name: name.replace("model.model.layers", "model.language_model.model.layers")),
    "with copies of the base's": with_copies(torch.float32),
    "with rounded copies": with_copies(torch.bfloat16)}


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_in_the_form_of_other_writers_is_read_the_same(form, llama, tmp_path):
    theirs = made(llama, tmp_path, rank_pattern={"q_proj": 2, "layers.[01].mlp.*": 6}, alpha_pattern={"down_proj": 5})
    FORMS[form](*[tmp_path, llama][:FORMS[form].__code__.co_argcount])
    assert torch.allclose(logits(loaded(llama, tmp_path)), logits(theirs), atol=1e-5)


def test_an_adapter_in_16_bits_is_read_as_it_is(llama, tmp_path):
    made(llama, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        save_file({name: value.to(dtype) for name, value in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
        assert torch.allclose(logits(loaded(llama, tmp_path)), logits(in_peft(llama, tmp_path)), atol=1e-5)


def test_patterns_of_a_whole_model_s_names_hold_on_its_text_part(llama, tmp_path):
    theirs = made(llama, tmp_path, rank_pattern={"model.layers.1.self_attn.q_proj": 2}, exclude_modules=r"model\.layers\.0.*")
    FORMS["of a whole model that sees"](tmp_path)
    says(tmp_path, rank_pattern={"model.language_model.layers.1.self_attn.q_proj": 2},
         exclude_modules=r"model\.language_model\.layers\.0.*")
    assert torch.allclose(logits(loaded(llama, tmp_path)), logits(theirs), atol=1e-5)


def test_what_an_adapter_changes_in_a_tower_that_is_not_loaded_is_left_out_and_told(llama, plain, tmp_path, capsys):
    model, folder = copy.deepcopy(llama), shutil.copytree(plain, tmp_path / "copy")
    model.register_module("vision_tower", None)
    model.model.layers[0].register_module("up", None)                          # no tower: a layer may do without a part

    def add(tower):
        name = f"base_model.model.model.{tower}.layers.0.self_attn.q_proj.lora_A.weight"
        save_file(load_file(plain / WEIGHTS) | {name: torch.ones(4, 4)}, folder / WEIGHTS)
    add("layers.0.up")
    with pytest.raises(UserError, match="has not as a linear layer"):
        load_adapter(model, folder)
    add("vision_tower.encoder")
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(loaded(llama, plain)))
    assert "note: the adapter changes vision_tower, too, which is not loaded for text" in capsys.readouterr().err
    save_adapter(model, tmp_path / "ours", "llama")
    whole = json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in whole                          # q_proj would be the tower's, too


def test_dropout_of_before_is_told_where_training_goes_on(llama, tmp_path, capsys):
    made(llama, tmp_path, lora_dropout=0.1)
    loaded(llama, tmp_path, "adapter: ")
    assert capsys.readouterr().err == ""
    loaded(llama, tmp_path, "init: ")
    assert "was trained with lora_dropout=0.1; here it is trained on without" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is one line
OTHER_KINDS = """ADALORA IA3 LOHA LOKR VERA BOFT OFT PREFIX_TUNING PROMPT_TUNING P_TUNING LN_TUNING FOURIERFT HRA XLORA
TRAINABLE_TOKENS RANDLORA MISS ROAD SHIRA C3A""".split()
LINES = {
    **{kind: (dict(peft_type=kind), f"peft_type is '{kind}', but must be LORA.*merge_and_unload") for kind in OTHER_KINDS},
    **{kind: (dict(init_lora_weights=kind), f"init_lora_weights is '{kind}'.*path_initial_model_for_weight_conversion")
       for kind in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")},
    **{kind: (fields, f"uses {next(iter(fields))}=.*merge_and_unload") for kind, fields in {
        "aLoRA": dict(alora_invocation_tokens=[7, 8]), "biases": dict(bias="lora_only"), "B's bias": dict(lora_bias=True),
        "modules": dict(modules_to_save=["lm_head"]), "tokens": dict(trainable_token_indices=[5]),
        "replicas": dict(layer_replication=[[0, 2], [1, 3]]), "megatron": dict(megatron_config=dict(hidden_size=8)),
        "QALoRA": dict(use_qalora=True), "arrow": dict(arrow_config=dict(top_k=3)), "tomorrow's": dict(use_new=1),
        "VeLoRA": dict(velora_config=dict(num_groups=4)), "KaSA": dict(kasa_config=dict(beta=0.1))}.items()},
    "weights as text": (dict(target_parameters="q_proj.weight"), "target_parameters is 'q_proj.weight'"),
    "a rank of 0": (dict(rank_pattern={"q_proj": 0}), "rank_pattern is .* for each pattern"),
    "an alpha of text": (dict(alpha_pattern={"q_proj": "8"}), "alpha_pattern is .* for each pattern"),
    "ranks that are a list": (dict(rank_pattern=[4]), "rank_pattern is"),
    "no pattern": (dict(rank_pattern={"(q_proj": 4}), "unterminated|missing"),
    "layers by name": (dict(layers_to_transform="all"), "layers_to_transform is 'all'"),
    "another rank there": (dict(rank_pattern={"q_proj": 8}), r"q_proj.lora_A.weight is \(4, 48\), but r is 8"),
    "more than there is": (dict(target_modules=["q_proj", "up_proj", "down_proj", "v_proj"]), "it lacks the lora_A of .*v_proj"),
    "more by a pattern": (dict(target_modules=r".*_proj"), "it lacks the lora_A of .*_proj"),
    "all linear, by its word": (dict(target_modules="all-linear"), "it lacks the lora_A of .*_proj"),
    "fewer than there are": (dict(target_modules=["q_proj", "up_proj"]), "it has .*down_proj.*, a layer that .* does not name"),
    "excluded": (dict(exclude_modules=["up_proj"]), "it has .*up_proj.*, a layer that its adapter_config.json does not name"),
    "of one layer": (dict(layers_to_transform=[0]), "it has .*layers.1.*, a layer that its adapter_config.json does not name"),
    "DoRA without magnitudes": (dict(use_dora=True), "it lacks the lora_magnitude_vector of")}


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    made(llama, folder)
    return folder


@pytest.mark.parametrize("kind", LINES)
def test_what_is_not_understood_of_an_adapter_is_one_line(kind, llama, plain, tmp_path):
    fields, told = LINES[kind]
    says(shutil.copytree(plain, tmp_path / "copy"), **fields)
    with pytest.raises(UserError, match=f"^init: {tmp_path}/copy.*({told})") as raised:
        loaded(llama, tmp_path / "copy", "init: ")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_every_field_of_peft_s_config_is_understood_or_must_be_empty():
    """What peft says where nothing was chosen is read; a field of a later peft is not overlooked."""
    from peft import LoraConfig
    said = LoraConfig(**PLAIN).to_dict()
    assert len(said) > 25 and all(not said[name] or said[name] == "none" for name in said.keys() - MUST.keys() - set(IDLE))


FOREIGN = {
    "vision": ("base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight", (4, 48), "has not as a"),
    "an expert": ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", (4, 48), "has not as a linear"),
    "a stack of experts": ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", (8, 48), "not adapted here: have"),
    "an embedding's": ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 470), "none of .*merge_and_unload"),
    "a bias of B": ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", (48,), "none of the tensors"),
    "a magnitude": ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", (48,), "none of the tensors"),
    "another head": ("base_model.model.lm_head.weight", (470, 48), "lm_head.weight is not the base's.*merge_and_unload"),
    "more words": ("base_model.model.model.embed_tokens.weight", (500, 48), "embed_tokens.weight is not the base's"),
    "a module to save": ("base_model.model.lm_head.modules_to_save.weight", (470, 48), "is not the base's"),
    "a second adapter": ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.b.weight", (4, 48), "of two adapters?")}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_tensor_that_changes_no_linear_layer_of_the_model_is_one_line(kind, llama, plain, tmp_path):
    name, shape, told = FOREIGN[kind]
    folder = shutil.copytree(plain, tmp_path / "copy")
    save_file(load_file(folder / WEIGHTS) | {name: torch.ones(shape)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"^init: {folder}.*({told})"):
        loaded(llama, folder, "init: ")


# ------------------------------------------------------------------------------------- families that peft renames
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "dots1", "hunyuan_v1_moe", "qwen2_moe", "gpt2"])
def test_an_adapter_of_a_family_that_peft_treats_specially_is_exact_both_ways(name, tmp_path):
    """Of most models with stacked experts peft takes gate_proj for the experts, though shared ones have it, too."""
    base = tiny_model(name)
    ours = copy.deepcopy(base)
    add_lora(ours, 4, 8, seed=0)
    shaken(ours)
    save_adapter(ours, tmp_path / "ours", name)
    theirs = in_peft(base, tmp_path / "ours")
    assert torch.allclose(logits(theirs), logits(ours), atol=2e-5) and not torch.allclose(logits(ours), logits(base))
    assert len(gradients(theirs)) == len(lora_parameters(ours))                # these layers, and no others
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(logits(loaded(base, tmp_path / "theirs")), logits(ours), atol=2e-5)
    assert any(isinstance(layer, LoRA) for layer in ours.modules())


def test_dora_where_experts_are_stacked_is_saved_so_that_peft_reads_it(tmp_path):
    base = tiny_model("qwen2_moe")
    made(base, tmp_path / "theirs", use_dora=True, target_modules=["q_proj", "shared_expert.gate_proj"])
    ours = loaded(base, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", "x")
    assert torch.allclose(logits(ours), logits(in_peft(base, tmp_path / "theirs")), atol=1e-4)
    assert torch.allclose(logits(ours), logits(in_peft(base, tmp_path / "ours")), atol=1e-4)


def test_an_adapter_of_many_ranks_is_saved_with_one_for_those_who_know_no_patterns(llama, plain, tmp_path):
    """vLLM reads r and lora_alpha, and takes no notice of patterns."""
    made(llama, tmp_path / "theirs", **KINDS["patterns of rsLoRA"])
    model = loaded(llama, tmp_path / "theirs")
    save_adapter(model, tmp_path / "alike", "llama", alike=True)
    config = json.loads((tmp_path / "alike" / CONFIG).read_text())
    assert config["r"] == 7 and not config.keys() & {"rank_pattern", "alpha_pattern", "use_rslora"}
    assert torch.allclose(logits(in_peft(llama, tmp_path / "alike")), logits(model), atol=1e-5)
    model = loaded(llama, plain)
    for alike in (True, False):
        save_adapter(model, tmp_path / f"{alike}", "llama", alike)
    for name in (CONFIG, WEIGHTS):                                             # nothing is changed where nothing need be
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_an_adapter_of_a_layer_that_a_module_multiplies_by_itself_is_told_as_that():
    tensors = {"base_model.model.model.layers.0.mamba.dt_proj.lora_A.weight": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match="dt_proj.*, a layer whose weight the model multiplies by itself, .*have peft merge"):
        placed(tiny_model("jamba"), dict(r=4, lora_alpha=4, target_modules="all-linear"), tensors)
