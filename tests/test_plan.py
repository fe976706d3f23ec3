"""The plan: what it says a run takes, against what a process takes, and against what our code makes of tensors at 7B shapes."""
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig

import forward
import lora
import packing
import programs
import train
from cache import SlotCache
from config import SHIPPED, UserError, load_config
from conftest import ROOT
from engine import Engine
from lora import add_lora, lora_parameters, save_adapter
from models import plan
from models.loading import model_class
from models.plan import Place, changes, fitting, plan_of, row_of, shape_of
from packing import Segment, pack
from run import Policy
from scale.captured import Steps

GIB = 2**30
QWEN2 = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=152064, max_position_embeddings=32768)
QWEN3 = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, max_position_embeddings=40960,
             head_dim=128, num_key_value_heads=8)
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, max_position_embeddings=131072,
             num_key_value_heads=8)


def sizes(hidden, wide, layers, heads, tied=False):
    return dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
                tie_word_embeddings=tied)


HUB = {                                  # the shapes in these models' config.json
    "Qwen/Qwen3-1.7B": QWEN3 | sizes(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": QWEN3 | sizes(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": QWEN3 | sizes(4096, 12288, 36, 32),
    "Qwen/Qwen2.5-7B-Instruct": QWEN2 | sizes(3584, 18944, 28, 28) | dict(num_key_value_heads=4),
    "Qwen/Qwen2.5-14B-Instruct": QWEN2 | sizes(5120, 13824, 48, 40) | dict(num_key_value_heads=8),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA | sizes(4096, 14336, 32, 32)}
CARD = {"8gb": 8, "16gb": 16, "qwen7b": 24, "llama8b": 24, "qwen3": 24, "paper": 24, "48gb": 48, "80gb": 80}      # GB
ROOM = {name: gb * 1e9 * (1 - plan.KEPT_FREE) for name, gb in CARD.items()}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """(cfg, shape) of a preset, its model a folder that holds config.json alone."""
    kept = {}

    def read(name, *args):
        cfg = load_config([str(SHIPPED), f"preset={name}", *args])
        folder = tmp_path_factory.getbasetemp() / "shapes" / cfg.model
        if cfg.model not in kept:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(HUB[cfg.model]))
            kept[cfg.model] = shape_of(cfg.but(model=str(folder)))
        return cfg.but(model=str(folder)), kept[cfg.model]
    return read


# ------------------------------------------------------------------------------------ against a process that is measured
MEASURE = """
import ctypes, json, random, sys
from collections import deque
sys.path.insert(0, sys.argv[1])
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from config import load_config
from engine import Ask, Engine, Job
from lora import add_lora, lora_parameters
from models.plan import Place, measured, plan_of
from packing import Segment, pack, packed_nll
from tools.bench import SHAPES
from tools.machine import peak
from train import recomputing

ctypes.CDLL(None).mallopt(-3, 2**16)              # M_MMAP_THRESHOLD: or glibc keeps much of what was freed
what, shape = sys.argv[2], SHAPES["135m"]
shape.num_hidden_layers = 8                       # of 30: for time
cfg = load_config([sys.argv[1] + "/config.yaml", "context=384", "row_tokens=1024", "slots=8", "snapshot_mb=32", "batch_tokens=1024",
                   f"gradient_checkpointing={what == 'recomputed'}"])


def told(n):
    yield Ask([n * 16 + i for i in range(cfg.context - 8)], 4)


def adapted(shape):
    model = LlamaForCausalLM(shape).eval().requires_grad_(False)
    add_lora(model, cfg.lora_rank, cfg.lora_alpha, 0)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data += 0.01             # or it would be passed by
    return model


def work(model, cfg):
    if what == "sampling":
        engine = Engine(model, set(), cfg)
        jobs = deque(Job(told(n), random.Random(n), str(n)) for n in range(2 * cfg.slots))
        assert len(list(engine.run(jobs))) == 2 * cfg.slots
        return
    ids = random.Random(0).choices(range(400), k=cfg.row_tokens)
    row = pack([[Segment(ids, [(1.0,)] * len(ids), None)]])
    optimizer = torch.optim.AdamW(lora_parameters(model))
    with recomputing(model, cfg.gradient_checkpointing):
        packed_nll(model, [row]).sum().backward()
    optimizer.step()


small = LlamaConfig(vocab_size=10000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
work(adapted(small), cfg.but(slots=1, row_tokens=32))            # what the libraries themselves take is there before
model = adapted(shape)
there = sum(value.nbytes for value in model.parameters())
plan = plan_of(measured(model, cfg), cfg, Place(cuda=False, number=4), cfg.slots)
assert there == plan.weights + plan.adapter / 2                 # which lies there twice from the first forward on
most = peak(lambda: work(model, cfg)) * 2**20
print(json.dumps([most, (plan.sampling if what == "sampling" else plan.training) - there]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sampling", "plain", "recomputed"])
def test_the_plan_of_a_135m_shape_is_what_a_process_takes_beside_the_weights(what, tmp_path):
    (tmp_path / "measure.py").write_text(MEASURE)
    done = programs.run([str(tmp_path / "measure.py"), str(ROOT), what])
    assert done.returncode == 0, done.stderr
    taken, planned = json.loads(done.stdout)
    assert planned == pytest.approx(taken, rel=0.15), f"{planned / 1e6:.0f} MB planned, {taken / 1e6:.0f} taken"


# --------------------------------------------------------------- against our code at 7B shapes, where tensors have no memory
class Meter(TorchDispatchMode):
    """Bytes of tensors of the meta device that are made inside and alive at once, at most; of weights not their views."""
    def __init__(self, model):
        super().__init__()
        self.weights = {value.untyped_storage()._cdata for value in model.parameters()}
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for key, (storage, size) in list(self.alive.items()):
            if storage.expired():
                self.now -= size
                del self.alive[key]
        for storage in [x.untyped_storage() for x in tree_iter(made) if isinstance(x, torch.Tensor) and x.is_meta]:
            if storage._cdata not in self.alive and storage._cdata not in self.weights:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return made


class Attention(torch.autograd.Function):
    """What a GPU's keeps, and nothing computed."""
    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3])) + (None,)


@pytest.fixture
def shadow(preset, monkeypatch):
    """(model, cfg, shape) of a preset: two layers of it on the meta device, with an adapter."""
    def attention(q, k, v, attn_mask=None, **_):
        return Attention.apply(q, k, v, attn_mask.to(q.dtype))        # torch, too, makes numbers of booleans

    def make(name):
        cfg, _ = preset(name)
        config = AutoConfig.from_pretrained(cfg.model)
        config.num_hidden_layers = 2
        with torch.device("meta"):
            model = model_class(config)._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        for parent, child, layer in lora.linear_layers(model):
            # made elsewhere, or its draws would need a generator of the meta device
            setattr(parent, child, lora.LoRA(layer, cfg.lora_rank, cfg.lora_alpha, torch.Generator()))
        monkeypatch.setattr(lora.LoRA, "folded", lambda self, dtype: (self.lora_A.T.to(dtype), self.lora_B.T.to(dtype)))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        return model, cfg, plan.measured(model, cfg)
    return make


def test_an_mlp_s_width_is_read_of_configs_that_say_it_of_each_layer_or_not_at_all():
    class Each:
        hidden_size = 8

        @property
        def intermediate_size(self):
            raise RuntimeError("ask a layer")
    said = [forward.middle(SimpleNamespace(hidden_size=8, **more)) for more in ({}, dict(intermediate_size=[16, 24]),
                                                                                dict(intermediate_size=20))]
    assert [*said, forward.middle(Each())] == [32, 24, 20, 32]


@pytest.mark.parametrize("name", ["qwen7b", "llama8b", "8gb"])
def test_the_largest_prefill_is_what_our_code_takes_at_a_7b_s_shape(name, shadow):
    model, cfg, shape = shadow(name)
    size = forward.limits(model.config, model.config.vocab_size, 2)[0] // 8
    parts = [forward.Part(slice(n * size, (n + 1) * size), n, slice(0, cfg.context)) for n in range(8)]
    with torch.inference_mode(), torch.device("meta"):
        ids, rows, at = torch.empty(3, 1, 8 * size, dtype=torch.long)
        places = forward.places(parts)
        places = places.on([torch.empty(len(numbers), dtype=torch.long) for numbers in places.numbers])
        cache = SlotCache(8, cfg.context)
        cache.hold(8, cfg.context)
        cache.aim(rows, at, cfg.context)
        with Meter(model) as meter:
            keys = torch.arange(cfg.context)
            seen = forward.Seen(keys <= at[..., None], at, keys[None], parts, places)
            forward.hidden(model, ids, seen, use_cache=True, cache=cache)
    taken = meter.most - sum(x.nbytes for layer in cache.layers for x in layer)
    assert plan.prefill_of(shape, cfg, Place(cuda=True), 64) == pytest.approx(taken, rel=0.03)
    assert 0.85 < taken / GIB < 1.05                                 # what the engine promises


@pytest.mark.parametrize("name", ["qwen7b", "llama8b", "8gb"])
def test_a_captured_step_is_what_our_code_takes_at_a_7b_s_shape(name, shadow, preset):
    """Its graphs share one memory: of a step, and of the logits that it leaves."""
    model, cfg, shape = shadow(name)
    slots = 48
    with torch.inference_mode(), torch.device("meta"):
        cache = SlotCache(slots, cfg.context)
        cache.hold(slots, cfg.context)
        steps = Steps.__new__(Steps)
        steps.engine = SimpleNamespace(model=model, device=torch.device("meta"), cache=cache, cache_name="cache", slots=slots,
                                       _draw=partial(Engine._draw, None))
        steps.numbers, steps.out = torch.empty(5 * slots, dtype=torch.long), None
        with Meter(model) as meter:
            steps.work(slots, cfg.context, True)              # some are greedy: the larger kind
    taken = meter.most - sum(x.nbytes for layer in cache.layers for x in layer)
    planned = plan_of(shape, cfg.but(load_in_4bit=False), Place(cuda=True), slots).graphs
    assert planned == pytest.approx(taken, rel=0.1)
    for other, place in ((cfg.but(captured=False), Place(cuda=True)), (cfg, Place(False))):
        assert not plan_of(shape, other, place, slots).graphs


@pytest.mark.parametrize("name", ["qwen7b", "llama8b", "8gb"])
@pytest.mark.parametrize("again", [False, True])
def test_a_training_row_is_what_our_code_takes_at_a_7b_s_shape(name, again, shadow):
    model, cfg, shape = shadow(name)
    row = pack([[Segment(list(range(cfg.row_tokens)), [(1.0,)] * cfg.row_tokens, None)]])
    with Meter(model) as meter, train.recomputing(model, again):
        torch.autograd.grad(packing.token_logp(model, [row]).sum(), lora.lora_parameters(model))
    assert row_of(shape, cfg, 2, again) == pytest.approx(meter.most, rel=0.04)


@pytest.mark.parametrize("name, gib, kib", [("qwen7b", 5.17, 56), ("llama8b", 5.31, 128), ("qwen3", 5.66, 144)])
def test_weights_and_cache_are_what_was_counted(name, gib, kib, preset):
    cfg, shape = preset(name)
    found = plan_of(shape, cfg, Place(cuda=True), 48)
    assert found.weights / GIB == pytest.approx(gib, rel=0.02) and found.slot == kib * 2**10 * cfg.context
    assert (name != "qwen7b") or found.adapter / GIB == pytest.approx(0.15 * 3 / 2, rel=0.02)         # in fp32, and in 16 bits again


# ---------------------------------------------------------------------------------------------------------- what fits
@pytest.mark.parametrize("name", CARD)
def test_a_preset_fits_its_card_and_says_the_plan_s_figures(name, preset):
    cfg, shape = preset(name)
    assert changes(shape, cfg, Place(cuda=True), ROOM[name]) == {} and cfg.slots is None
    slots = fitting(shape, cfg, Place(cuda=True), ROOM[name])
    found = plan_of(shape, cfg, Place(cuda=True), slots)
    said = (f"The plan, GB: weights {found.weights / 1e9:.1f}, {slots} slots {slots * found.slot / 1e9:.1f}, prefill "
            f"{found.prefill / 1e9:.1f}, sampling {found.sampling / 1e9:.1f}, training {found.training / 1e9:.1f}.")
    first = (ROOT / f"configs/{name}.yaml").read_text().replace("\n# ", " ")
    assert slots >= plan.FEW and said in first, said


@pytest.mark.parametrize("gb", plan.CARDS)
@pytest.mark.parametrize("name, args", [("qwen7b", ["slots=48", "snapshot_mb=8192", "gradient_checkpointing=false"]),
                                        ("48gb", ["load_in_4bit=false", "context=8192", "row_tokens=16384"])])
def test_what_is_to_be_changed_makes_it_fit(name, args, gb, preset):
    cfg, shape = preset(name, *args)
    room, place = gb * 1e9 * (1 - plan.KEPT_FREE), Place(cuda=True)
    found = changes(shape, cfg, place, room)
    if found is None:
        assert gb <= 16
        return
    now = cfg.but(**found)
    fits = plan_of(shape, now, place, now.slots or fitting(shape, now, place, room))
    assert fits.slots and fits.sampling <= room and fits.training <= room
    before = plan_of(shape, cfg, place, cfg.slots or 1)
    assert found or max(before.sampling, before.training) <= room


def test_one_slot_more_than_fit_does_not_fit(preset):
    cfg, shape = preset("qwen7b")
    for place, room in ((Place(cuda=True), 22e9), (Place(False, 4, 2), 40e9)):
        slots = fitting(shape, cfg, place, room)
        assert plan_of(shape, cfg, place, slots).sampling <= room < plan_of(shape, cfg, place, slots + place.processes).sampling
    assert fitting(shape, cfg, Place(cuda=True), 5e9) == 0


# ------------------------------------------------------------------------------------------------------------ slots: null
def test_slots_that_are_left_open_are_what_fits(tiny, settings, monkeypatch):
    policy = Policy(*tiny, settings("slots=null"))
    assert policy.engine().slots == plan.USUAL
    shape = plan.measured(tiny[0], policy.cfg)
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert shape == replace(plan.measured(tiny[0], policy.cfg, plan.numbers_a_token(tiny[0], ids, 768)), limits=shape.limits)
    room = plan_of(shape, policy.cfg, plan.here(policy.cfg), 5).sampling
    monkeypatch.setattr(plan, "numbers_a_token", lambda model, ids, context: 4 * shape.token)      # a cache of another size
    bigger = plan_of(replace(shape, token=4 * shape.token), policy.cfg, plan.here(policy.cfg), 5).sampling
    monkeypatch.setattr(plan, "room_here", lambda place: bigger)
    assert policy.engine().slots == 5
    monkeypatch.undo()
    monkeypatch.setattr(plan, "room_here", lambda place: room)
    assert policy.engine().slots == 5
    monkeypatch.setattr(plan, "room_here", lambda place: 1e6)
    with pytest.raises(UserError, match="slots: by the plan not one conversation fits"):
        policy.engine()
    assert Policy(*tiny, settings("slots=7")).engine().slots == 7


def test_the_adapter_that_a_run_begins_with_is_planned_with_its_own_ranks(own_tiny, settings, tmp_path):
    model = own_tiny[0]
    add_lora(model, 64, 8, seed=0)
    save_adapter(model, tmp_path / "wide", "tiny")
    wide, plain = (plan.shape_of(settings("lora_rank=4", f"init={init}")) for init in (tmp_path / "wide", ""))
    assert wide.adapter == sum(value.numel() for value in lora_parameters(model)) == 16 * plain.adapter
    assert wide.ranks == 16 * plain.ranks


def test_a_processor_has_room_for_what_is_free_and_what_is_there_already():
    whole, shared = (plan.room_here(Place(False, 4, count)) for count in (1, 2))
    assert 2**27 < shared < whole < 2**44


# ------------------------------------------------------------------------------------------------------------- plan=true
def test_the_plan_is_printed_from_config_json_alone_and_nothing_is_made(preset, tmp_path, capsys):
    cfg, _ = preset("qwen7b")
    train.main([str(SHIPPED), "preset=qwen7b", f"model={cfg.model}", "slots=48", f"out={tmp_path}/run", "plan=true"])
    told = capsys.readouterr().out
    for said in ("Qwen2ForCausalLM, 7.62 billion weights in 28 layers", "weights ", "5.57", "48 slots", "peak of training",
                 "80 GB", "here, no GPU", "environment steps", "hours: not before"):
        assert said in told
    assert not (tmp_path / "run").exists() and max(map(len, told.splitlines())) <= 140


def test_the_plan_of_a_run_is_printed_by_the_command(tmp_path):
    done = programs.run(["train.py", "config.yaml", "plan=true", f"out={tmp_path}/run"])
    assert done.returncode == 0 and done.stderr == "" and "192 slots" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("model, says", [("nobody/nothing", "model: nobody/nothing: .*; a local folder works offline"),
                                         ("{}", r"model: {}.*config.json.*copy or download"), ("/nowhere", "is no folder")])
def test_a_config_that_cannot_be_read_is_one_line(model, says, tmp_path, settings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=says.format(tmp_path)) as error:
        plan.lines_of(settings(f"model={model.format(tmp_path)}"))
    assert "\n" not in str(error.value)


def test_a_run_on_a_gpu_begins_with_the_plan_in_short(preset, monkeypatch, capsys):
    cfg, _ = preset("qwen7b", "slots=192")
    plan.say(cfg)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (23 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    plan.say(cfg)
    first, second = capsys.readouterr().err.splitlines()
    plan.say(cfg.but(model="/nowhere"))
    assert capsys.readouterr().err.startswith("plan: none; model: /nowhere is no folder")
    assert "in sampling (weights 5.57, 192 slots 45.1" in first and "of 23.7" in first and "plan: to fit: slots=" in second


def test_a_run_takes_no_more_steps_and_tokens_than_the_plan_says(grown, settings):
    _, trees = grown
    (_, steps, tokens, _), (_, _, _, learned), evaluated = plan.hours.work_of(settings("train_tasks=10", "attempts=8"))
    branches = [branch for tree in trees for branch in tree.branches]
    assert 0 < sum(branch.steps for branch in branches) <= steps and sum(branch.tokens for branch in branches) <= tokens
    assert learned == 6 and evaluated[1] == 2 * 8 * 8 * (steps // 80)


@pytest.mark.parametrize("env, slots, says", [
    ("scienceworld", 3, "scienceworld: a process for each conversation, at most 3 side by side (workers=)"),
    ("alfworld", 64, "alfworld: the worlds of all conversations in 3 processes (workers=)"),
    ("code", 64, "code: the worlds of all conversations in 3 processes (workers=)"), ("quest", 64, None)])
def test_the_plan_says_how_many_conversations_and_worlds_there_are_side_by_side(env, slots, says, settings, tiny):
    cfg = settings(f"env={env}", "workers=3", "slots=64")
    assert plan.side_by_side(cfg, 64) == slots == Policy(*tiny, cfg).engine().slots
    assert plan.worlds_lines(cfg) == ([says] if says else [])


def test_the_plan_of_a_world_that_runs_apart_has_its_slots_and_its_processes(settings):
    told = "\n".join(plan.lines_of(settings("env=code", f"data={ROOT}/tests/data/mbpp_sample.jsonl", "workers=3", "slots=64")))
    assert "64 slots" in told and "code: the worlds of all conversations in 3 processes" in told


def test_a_server_s_memory_is_not_planned_here(preset):
    cfg, shape = preset("qwen7b", "engine=http://localhost:8000/v1")
    found = plan_of(shape, cfg, Place(cuda=True), 48)
    assert found.sampling - found.weights - found.adapter < 2e8
