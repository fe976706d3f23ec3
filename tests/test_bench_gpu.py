"""tools/bench_gpu.py, the script for a GPU, on the simulated one and on small shapes: no time is asserted."""
import json

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

import run
from config import UserError, load_config
from conftest import ROOT, SHAPE
from fake_cuda import FakeCuda
from lora import checks, lora_layers
from tools import bench, bench_gpu, bench_rollouts, bench_runs, smollm2
from tools.bench_gpu import Sizes

SMALL = SHAPE | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, initializer_range=0.05)
SHAPES = {"135m": LlamaConfig(**SMALL | dict(tie_word_embeddings=True)), "7b": Qwen2Config(**SMALL)}
SIZES = Sizes(episodes=2, rows=(2, 1), prompt=20, new=6, prefill=(2, 40), fork=30, training=((64, True), (48, False)))
MACHINE = dict(processor="simulated", gpu="simulated", gb_a_second=1000.0, gflop_a_second=1e5, torch=torch.__version__)
TRAIN = """
import json, sys
from pathlib import Path
out = Path(sys.argv[-1].removeprefix("out="))
out.mkdir()
(out / "run.json").write_text("{}")
(out / "metrics.jsonl").write_text(json.dumps(dict(round=1, policy="base")) + "\\n")
(out / "passk.json").write_text(json.dumps(dict(base={"Pass@1": dict(estimate=0.25)})))
"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small shapes, and programs that take no time. Batching has a thread of its own, which is not simulated."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(bench_rollouts, "SHAPES", SHAPES)
    monkeypatch.setattr(bench_gpu, "TRAIN", [str(tmp_path / "train.py")])
    monkeypatch.setattr(bench_gpu, "SHORT", dict(temperature=0.0, slots=2, horizon=2, action_tokens=2))
    monkeypatch.setattr(bench_gpu, "paged", lambda model, chat, cfg, count, asks: [[7] * ask.max_new for ask in asks])
    monkeypatch.setattr(smollm2, "unpacked", lambda: None)
    bench_rollouts.policy.cache_clear()
    yield
    bench_rollouts.policy.cache_clear()


def own(**more):
    return bench.OWN | dict(machine=MACHINE) | more


def test_the_whole_script_runs_on_a_simulated_gpu_and_all_its_figures_are_in_the_table(small, settings, capsys):
    cfg = settings("model=7b", "lora_rank=4")
    with FakeCuda():
        found = bench_gpu.gpu(cfg, own(), SIZES)
    assert not {name: one["error"] for name, one in found.items() if "error" in one}
    assert set(found["plan"]) == {"sampling", "training row: 64 tokens, recomputed", "training row: 48 tokens"}
    exact = {name: one for name, one in found.items() if name.startswith("exact: ")}
    assert len(exact) == 6 and all(one["agrees"] for one in exact.values())
    assert exact["exact: tiny, fp32"]["equal"] == exact["exact: 135m, fp32"]["equal"] == 1.0
    assert all(one[key] <= one[f"{key}_limit"] for one in exact.values() for key in bench_gpu.FIGURES)
    assert found["fork"]["tokens"] == 30 and found["prefill"]["tokens_a_second"] > 0
    decoded = [one for name, one in found.items() if name.startswith("decode: ")]
    assert len(decoded) == 2 and all(one["captured"] and one["not_captured"]["step_s"] > 0 for one in decoded)
    assert set(found["attention"]) == {"without_cudnn", "with_cudnn"} and not torch.backends.cuda.cudnn_sdp_enabled()
    assert found["preset=smoke"]["Pass@1 of base"] == found["smollm2"]["Pass@1 of base"] == 0.25
    kept = json.loads((bench_gpu.Path(cfg.out) / "gpu-7b.json").read_text())
    assert kept == dict(machine=MACHINE, model="7b") | json.loads(json.dumps(found))
    table = bench.show("gpu", kept)
    assert all(f"| {name} |" in table for name in (
        "tiny, nf4", "135m, 16 bits", "1 row", "2 rows", "fork", "attention: with cudnn", "plan: sampling", "smollm2"))
    assert capsys.readouterr().out.count(" s)\n") == len(found)


def stages_of(monkeypatch, **stages):
    monkeypatch.setattr(bench_gpu, "stages", lambda sizes: stages.items())


def test_a_stage_that_fails_is_recorded_in_one_line_and_the_next_goes_on(settings, monkeypatch):
    def raises(error):
        def stage(bench):
            raise error
        return stage

    def looks(bench):
        return json.loads((bench_gpu.Path(bench.cfg.out) / "gpu-tiny.json").read_text())
    stages_of(monkeypatch, first=lambda bench: dict(seconds=1.5), memory=raises(torch.OutOfMemoryError("CUDA\n  out of memory")),
              user=raises(UserError("slots: too many")), last=looks)
    found = bench_gpu.gpu(settings(), own())
    assert found["memory"] == dict(error="OutOfMemoryError: CUDA out of memory") and found["user"] == dict(error="slots: too many")
    assert found["last"] == dict(machine=MACHINE, model="tiny", **{name: found[name] for name in ("first", "memory", "user")})
    assert "- user: error slots: too many" in bench_gpu.table(dict(machine=MACHINE, model="tiny") | found)


def test_a_script_that_is_stopped_keeps_what_it_has_and_its_table_can_be_had(settings, monkeypatch, capsys):
    def stopped(bench):
        raise KeyboardInterrupt
    cfg = settings()
    stages_of(monkeypatch, first=lambda bench: dict(seconds=1.5), second=stopped)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.gpu(cfg, own())
    capsys.readouterr()
    bench_gpu.main([f"{cfg.out}/gpu-tiny.json"])
    assert "| first | seconds 1.5 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="usage: python -m tools.bench_gpu"):
        bench_gpu.main([cfg.out])


def test_a_stage_that_would_begin_after_its_minutes_is_left_out(settings, monkeypatch):
    stages_of(monkeypatch, first=lambda bench: 1 / 0)
    found = bench_gpu.gpu(settings(), own(minutes=0))
    assert found == dict(first=dict(left_out="minutes=0 are over"))


def test_a_program_that_takes_too_long_ends_with_its_stages_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_runs, "POLL", 0.02)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run: stopped after 0 seconds \(start 0 s\)"):
        bench_runs.watch(["-c", "import time; time.sleep(4)"], tmp_path / "run", 0.1)


@pytest.mark.parametrize("four", [False, True])
def test_a_shape_is_made_as_a_model_would_be_loaded(four, small, settings):
    for name in SHAPES:
        model, chat = bench_rollouts.policy(name, four, 768, "bfloat16")
        every = [*model.parameters(), *model.buffers()]
        assert not any(value.is_meta or value.requires_grad for value in every) and not model.training
        kinds = {type(layer).__name__ for path, layer in model.named_modules() if path.endswith("_proj")}
        assert kinds == {"Linear4bit" if four else "Linear"}
        checks().check(run.Policy(model, chat, settings(f"model={name}")))
        assert model.forks and model.packs and not lora_layers(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "135m")


def test_words_are_the_same_tokens_beside_any_model(small, tiny):
    text = "find the ring. the ring is in the library. doors: garden, chapel."
    for name in SHAPES:
        chat = bench_rollouts.policy(name, False, 768)[1]
        assert chat.ids(text) == tiny[1].ids(text) and len(chat.ids(text)) < 25
        assert chat.stop == tiny[1].stop


def test_what_a_step_reads_is_counted_in_bytes(small, settings):
    sizes = {}
    for four in (False, True):
        bench_rollouts.policy.cache_clear()
        held = bench_gpu.Bench(settings("model=7b", f"load_in_4bit={four}".lower(), "dtype=bfloat16", "lora_rank=4"), own())
        model = bench_gpu.large(held).model
        assert all(layer.lora_B.any() for layer in lora_layers(model).values())
        sizes[four] = bench_gpu.bytes_read(model)
        body = sum(layer.base.in_features * layer.base.out_features for layer in lora_layers(model).values())
        adapter = sum(2 * p.numel() for layer in lora_layers(model).values() for p in layer.parameters(recurse=False))
        rest = sum(p.nbytes for name, p in model.model.layers.named_parameters() if "norm" in name or "bias" in name)
        scales = sizes[four] - adapter - rest - 2 * model.lm_head.weight.numel() - (0.5 if four else 2) * body
        assert body / 64 <= scales < body / 40 if four else not scales                   # a byte for 64 weights, and theirs
        assert bench_gpu.keys_read(model) == 2 * 1 * 2 * 16 * 2
    assert sizes[True] < sizes[False]


def test_a_model_that_is_not_exact_is_told_in_figures(small, settings, monkeypatch):
    plain = bench_gpu.Engine._hidden

    def off(*args):
        states, draws = plain(*args)
        return states.flip(-1), draws
    monkeypatch.setattr(bench_gpu.Engine, "_hidden", off)
    held = bench_gpu.Bench(settings("model=7b"), own(), SIZES)
    found = bench_gpu.exact(held, "135m", False, "float32")
    assert not found["agrees"] and found["log_probability"] > found["log_probability_limit"] and found["equal"] < 1


def test_memory_that_runs_out_is_told_and_no_figure_is_made_of_fewer_rows(small, settings, monkeypatch):
    held = bench_gpu.Bench(settings("model=7b", "load_in_4bit=false", "lora_rank=4"), own(), SIZES)
    plain, calls = bench_gpu.Engine._hidden, []

    def short(engine, *args):
        calls.append(1)
        if len(calls) > 3 and len(engine.live) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(engine, *args)
    monkeypatch.setattr(bench_gpu.Engine, "_hidden", short)
    monkeypatch.setattr(bench_gpu, "peak_gb", lambda work: work() or 0.0)
    with pytest.raises(UserError, match="there is no memory for 2 rows"):
        bench_gpu.decoding(bench_gpu.large(held), 2, SIZES)


def test_the_run_of_smollm2_has_settings_that_hold():
    load_config([str(ROOT / "config.yaml"), *bench_gpu.SMOLLM2])
