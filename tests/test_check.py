"""The check at load: what the engine and packed rows compute, against the model's own forward."""
import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import forward
import lora
import packing
import ranks
from config import UserError
from conftest import ROOT, family, shake
from lora import add_lora, load_model, lora_layers
from models import card, check as check_, plan
from models.check import check, conversations, drift, main, mean, own_answers, sampled, token_of
from run import Policy
from tools.families import tiny_config, tiny_model

WAY = ("forks", "packs", "pads", "caches")


def way_of(model) -> tuple:
    return tuple(vars(model)[name] for name in WAY)


@contextmanager
def every(layers, name, change):
    """Inside, an attribute of each layer's attention is changed."""
    before = [getattr(layer.self_attn, name) for layer in layers]
    for layer, value in zip(layers, before):
        setattr(layer.self_attn, name, change(value))
    try:
        yield
    finally:
        for layer, value in zip(layers, before):
            setattr(layer.self_attn, name, value)


@contextmanager
def mask_of(layer, change):
    """Inside, a layer's attention is given another mask: change(mask, query positions, key indices)."""
    def other(module, args, kwargs):
        mask = kwargs["attention_mask"]
        gone = change(kwargs["position_ids"][..., None], torch.arange(mask.shape[-1]))[:, None]
        hidden = mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, -torch.inf)
        return args, kwargs | {"attention_mask": hidden}
    hook = layer.self_attn.register_forward_pre_hook(other, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def table(model):
    tables = model.get_decoder().rotary_emb
    before = tables.inv_freq
    tables.inv_freq = before * 0.8
    try:
        yield
    finally:
        tables.inv_freq = before


FAULTS = {                                             # in the fast way alone: what is around the decoder's forward
    "a wrong scale of attention": lambda model: every(model.model.layers, "scaling", lambda scale: 1.2 * scale),
    "another rope table": table,
    "one layer has a window": lambda model: mask_of(model.model.layers[1], lambda at, key: at - key > 6),
    "one layer does not see its first token": lambda model: mask_of(model.model.layers[2], lambda at, key: (key == 0) & (at > 0)),
}


def plant(fault: str, monkeypatch) -> None:
    """Let the fast way go wrong, in the engine and in packing."""
    right, head = forward.hidden, forward.logits

    def hidden(model, ids, seen, **more):
        if fault == "positions shifted behind a fork":
            seen = forward.Seen(*[value if n != 1 else value + (value >= 9) for n, value in enumerate(vars(seen).values())])
            return right(model, ids, seen, **more)
        with FAULTS[fault](model):
            return right(model, ids, seen, **more)
    for module in (forward, packing):
        if fault == "logits that are not scaled":
            monkeypatch.setattr(module, "logits", lambda model, states: 1.15 * head(model, states))
        else:
            monkeypatch.setattr(module, "hidden", hidden)


@pytest.fixture
def policy(own_tiny, settings):
    return Policy(*own_tiny, settings())


@pytest.mark.parametrize("name", ["tiny", "bf16", "adapter", "4 bits", "qwen3", "mistral"])
def test_what_agrees_takes_the_fast_way_in_silence(name, policy, settings, capsys):
    if name == "4 bits":
        policy.model = load_model("tiny", True, 768)[0]
    if name in ("qwen3", "mistral"):
        policy.model = family(name)
    if name == "bf16":
        policy.model.to(torch.bfloat16)
    if name == "adapter":
        add_lora(policy.model, 4, 8, seed=0)
        shake(policy.model)
    capsys.readouterr()
    check(policy)
    assert way_of(policy.model) == (True, True, True, True) and capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", [*FAULTS, "positions shifted behind a fork", "logits that are not scaled"])
def test_a_fault_of_the_fast_way_is_found_and_the_general_way_taken(fault, dtype, policy, capsys, monkeypatch):
    policy.model.to(dtype)
    plant(fault, monkeypatch)
    check(policy)
    told = capsys.readouterr().err
    assert way_of(policy.model) == (False, False, True, True)
    assert told.count("\n") == 1 and "differs from the model's own forward by" in told and "engine=http" in told


def test_an_exception_of_the_fast_way_is_named_and_the_general_way_taken(policy, capsys, monkeypatch):
    def hidden(*_, **__):
        raise IndexError("list index out of range")
    monkeypatch.setattr(forward, "hidden", hidden)                   # the engine's; packed rows go on as they are
    check(policy)
    assert way_of(policy.model) == (False, True, True, True)
    assert "sampled another way" in (told := capsys.readouterr().err) and "IndexError: list index out of range" in told


def test_out_of_memory_is_no_fault_of_the_way(policy, monkeypatch):
    def hidden(*_, **__):
        raise torch.OutOfMemoryError("too much")
    monkeypatch.setattr(packing, "hidden", hidden)
    with pytest.raises(torch.OutOfMemoryError):
        check(policy)


def test_where_no_way_agrees_one_line_has_the_figure(policy, monkeypatch):
    plant("another rope table", monkeypatch)
    slow = lora.general().own_logits
    monkeypatch.setattr(lora.general(), "own_logits", lambda *args: 2 * slow(*args))
    with pytest.raises(UserError, match="model: tiny cannot be trained as it computes itself: .* by 0.* in packed") as raised:
        check(policy)
    assert "\n" not in str(raised.value)


def test_what_a_cached_state_loses_token_by_token_is_found(policy):
    policy.model = tiny_model("zamba2")                  # its cached steps leave out a limit; the first few hardly show it
    check(policy)
    talks = conversations(policy, (40, 31, 20))
    own = own_answers(policy.model, talks).logp
    assert mean(torch.stack([drift(logp, own[n][at]) for n, at, logp in sampled(policy, talks)])) < 1e-5


def test_chunks_are_counted_without_padding_however_long_they_are(policy, capsys):
    config = tiny_config("llama4_text")
    config.attention_chunk_size = 256                    # more than the check's conversations have
    torch.manual_seed(0)
    policy.model = AutoModelForCausalLM.from_config(config).eval()
    check(policy)
    assert way_of(policy.model)[::2] == (False, False) and "chunked_attention" in capsys.readouterr().err


def test_a_model_that_sees_what_comes_later_is_refused(policy):
    policy.model = tiny_model("bert")
    with pytest.raises(UserError, match="no causal language model: .* depends on later ones .by 0.*choose another"):
        check(policy)


def test_a_4_bit_layer_that_is_computed_wrongly_is_refused(policy, monkeypatch):
    policy.model = load_model("tiny", True, 768)[0]
    layer = policy.model.model.layers[-1].mlp.up_proj        # on a CPU, one of each shape
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: right(x) * 1.1)
    with pytest.raises(UserError, match="load_in_4bit: bitsandbytes computes .*up_proj wrongly here .off by 0.1"):
        check(policy)


def test_all_ranks_go_the_way_of_the_slowest(policy, capsys, monkeypatch):
    """Another rank found that the engine's fast way differs."""
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda found, op: found.copy_(torch.tensor([3, 0])))
    check(policy)
    assert way_of(policy.model) == (False, True, False, True) and "so another rank found" in capsys.readouterr().err


def test_the_check_is_part_of_every_load(settings, monkeypatch):
    asked = []
    monkeypatch.setattr("models.check.check", asked.append)
    policy = Policy.open(settings("model=tiny"), "", "init")
    assert asked == [policy]


def test_the_command_prints_figures_coverage_turns_and_what_fits(monkeypatch, capsys):
    """python lora.py check tiny"""
    monkeypatch.chdir(ROOT)
    main(["check", "tiny", "context=512"])
    told = capsys.readouterr().out
    for said in ("tiny: LlamaForCausalLM, float32 on ", "sampled by the forking engine, trained in packed rows", "in log-probability",
                 "in gradient", "LoRA: 100 % of the linear layers", "a reply ends with '<|end|>'", "thoughts: ",
                 "cache: 2,048 bytes a token in 16 bits", "context=512", "4 bits", "80"):
        assert said in told
    for args, line in ((["check"], "usage: python lora.py check MODEL"), (["chekc", "tiny"], "usage: "),
                       (["check", "/nowhere"], "model: /nowhere is no folder"), (["check", "tiny", "slotz=3"], "did you mean 'slots'"),
                       (["check", "tiny", "init=/nowhere"], "init: /nowhere has no adapter"),
                       (["check", "tiny", "adapter=/nowhere"], "adapter: /nowhere has no adapter")):
        with pytest.raises(UserError, match=line):
            main(args)


@pytest.mark.parametrize("name, size", [("gemma3_text", lambda text: 2 * text.num_hidden_layers * text.num_key_value_heads *
                                                                      text.head_dim),
                                        ("mamba", None)])
def test_a_token_s_numbers_forget_nothing_behind_a_window_and_states_are_shared_among_all(name, size):
    model = tiny_model(name)
    judge = SimpleNamespace(talks=[list(range(10, 34))], policy=SimpleNamespace(model=model, cfg=SimpleNamespace(context=64)))
    taken = token_of(judge)
    assert taken == size(model.config) if size else taken > 0
    judge.policy.cfg.context = 128
    assert token_of(judge) == (taken if size else pytest.approx(taken / 2))


def test_a_template_s_token_without_a_row_is_one_line(settings, tmp_path):
    """Its tokens were added to the tokenizer, and the embedding was not resized."""
    folder = tmp_path / "tiny"
    shutil.copytree(ROOT / "models/tiny", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'<|fin|>'")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|fin|>"]))
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"says token 468 \(<\|fin\|>\), its weights have 468 rows .* not resized"):
        Policy.open(settings(f"model={folder}"), "", "init")


def test_a_chat_template_beside_an_adapter_is_told(settings, tmp_path, capsys):
    policy = Policy.open(settings("model=tiny", "lora_rank=2"), "", "init")
    policy.parameters()
    policy.save(tmp_path / "a")
    own = policy.chat.tokenizer.chat_template
    for text, told in ((own, False), (own.replace("<|end|>", "<|end|>x"), True)):
        (tmp_path / "a/chat_template.jinja").write_text(text)
        capsys.readouterr()
        Policy.open(settings("model=tiny", f"init={tmp_path}/a"), f"{tmp_path}/a", "init")
        assert (f"note: {tmp_path}/a has a chat template of its own" in capsys.readouterr().err) == told
    (tmp_path / "a/chat_template.jinja").write_text(own)
    policy.chat.tokenizer.chat_template = dict(default=own, tool_use="another")       # of which the default is what counts
    check_.note_other_template(Policy(policy.model, policy.chat, settings("model=tiny", f"init={tmp_path}/a")))
    assert "template" not in capsys.readouterr().err
    (tmp_path / "a/chat_template.jinja").unlink()
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(dict(chat_template="another")))
    Policy.open(settings("model=tiny", f"init={tmp_path}/a"), f"{tmp_path}/a", "init")
    assert "has a chat template of its own" in capsys.readouterr().err


def test_what_the_command_says_of_an_adapter_is_that_adapter_s(settings):
    policy = Policy.open(settings("model=tiny", "lora_rank=2"), "", "init")
    told = plan.measured(policy.model, policy.cfg).adapter
    assert "LoRA: 100 % of the linear layers" in card.lines_of(policy, {}, 8)
    policy.parameters()
    assert plan.measured(policy.model, policy.cfg).adapter == told
    assert f"LoRA: the adapter's {len(lora_layers(policy.model))} layers" in card.lines_of(policy, {}, 8)


def test_what_fits_is_what_a_7b_is_known_to_take(settings):
    """Qwen2.5-7B: 5.55 GB in nf4 with 16-bit embedding and head; LoRA of rank 16 with Adam 0.65 GB, and in 16 bits again."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                             num_attention_heads=28, num_key_value_heads=4))
    policy = SimpleNamespace(model=model, cfg=settings("lora_rank=16", "context=1024", "batch_tokens=1024", "slots=48"))
    sizes = plan.plan_of(plan.measured(model, policy.cfg), policy.cfg, plan.Place(cuda=True), 48)
    assert sizes.weights == pytest.approx(5.55e9, rel=0.02) and sizes.learned == pytest.approx(0.65e9 * 18 / 16, rel=0.02)
    fits = [card.conversations_on(gb, policy, True, 28672) for gb in plan.CARDS]
    assert fits[0] == "6" and 240 < int(fits[2]) < 270 and card.conversations_on(16, policy, False, 28672) == "-"
