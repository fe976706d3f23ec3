import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from html import escape

import pytest
import torch
from safetensors.torch import load_file
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig,
                          MixtralForCausalLM)

import programs
import tools.provenance
from config import UserError
from conftest import ROOT, SHAPE, run_of
from engine import Chat
from leafe import targets
from lora import load_model, lora_layers, lora_parameters
from packing import Segment, pack, packed_nll, rows_of, training_rows
from run import Jsonl, open_run, read_jsonl
from test_leafe import grow, tree_by_hand
from tools.provenance import about
from tools.report import STAGE_1, chat_pairs, nothing_found, reflections_in_words
from train import Objective, epoch, fit, loss_weights, optimise, recomputable, recomputing, sft_batches


def train(out, *args, env=None):
    return programs.start(["train.py", "config.yaml", "preset=smoke", f"out={out}", *args], env=env)


def train_anew(out, *args, **kwargs):
    """In an interpreter of its own, whose sets have an order of their own."""
    return subprocess.Popen([sys.executable, "train.py", "config.yaml", "preset=smoke", f"out={out}", *args],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def results(out):
    """Everything that a run's end consists of, in an order that does not depend on the schedule."""
    lines = {name: sorted((out / name).read_text().splitlines()) for name in ("trees.jsonl", "samples.jsonl")}
    return (lines, json.loads((out / "passk.json").read_text()),
            load_file(out / "adapter" / "adapter_model.safetensors"))


def figures(out):
    """What metrics.jsonl says, but for the time that it took."""
    return [{key: value for key, value in record.items() if key != "seconds"}
            for record in read_jsonl(out / "metrics.jsonl")]


def assert_same(a, b):
    for name in a[0]:
        assert a[0][name] == b[0][name], name
    assert a[1] == b[1] and a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][key], b[2][key]) for key in a[2])


THREE = '''"""SFT on plain rollouts, with three losses."""
from leafe import explore
from packing import training_rows
from train import fit

KEYS = """
allowed: 0.5                  # what an action weighs that the world allowed
"""

def train(run, round_):
    trees = explore(run, run.train_tasks, round_, reflect=False)
    weights = [{i: (float(turn.success), run.cfg.allowed * turn.valid, 0.1 * (not turn.valid))
                for i, turn in enumerate(tree.turns)} for tree in trees]
    fit(run, round_, ("L_won", "L_allowed", "L_refused"), training_rows(trees, weights, run.cfg.row_tokens))
'''


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted smoke run: (folder, stdout, seconds)."""
    out, began = tmp_path_factory.mktemp("whole") / "run", time.time()
    process = train(out)
    shown, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out, shown, time.time() - began


def test_a_run_ends_with_the_table_the_figures_and_where_the_results_lie(whole):
    out, shown, _ = whole
    assert "stage 1:" in shown and "reflections:" in shown and "name the right thing" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("Pass@")] == [
        "Pass@1", "Pass@2", "Pass@4", "Pass@8"]
    assert f"results: {out}/" in shown
    for name in ("config.yaml", "run.json", "trees.jsonl", "samples.jsonl", "metrics.jsonl", "sft.jsonl",
                 "passk.json", "report.html", "adapter/adapter_model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl") if "step" in record] == list(range(1, 7))


def test_metrics_hold_every_figure_of_stage_1_the_reflections_and_pass_at_k(whole):
    out, shown, _ = whole
    records, passk = figures(out), json.loads((out / "passk.json").read_text())
    explored, = [record for record in records if "stage_1/tasks" in record]
    parts = {part: {key.partition("/")[2]: value for key, value in explored.items() if key.startswith(part + "/")}
             for part in ("stage_1", "reflections")}
    assert STAGE_1.format(**parts["stage_1"]) in shown and reflections_in_words(parts["reflections"]) in shown
    told = {record["policy"]: record for record in records if "policy" in record}
    assert [(name, record["round"]) for name, record in told.items()] == [("base", 0), ("leafe", 1)]
    for name, estimates in passk.items():
        assert set(estimates) == {"Pass@1", "Pass@2", "Pass@4", "Pass@8", "recovery"}
        for key, figure in estimates.items():
            assert told[name][key] == pytest.approx(figure["estimate"], abs=1e-6)
    assert len(records) == 2 + 1 + 6


def test_run_json_says_what_made_a_run_and_who_went_on_with_it(whole, tmp_path):
    out, args = tmp_path / "a run", ["config.yaml", "preset=smoke"]
    shutil.copytree(whole[0], out)
    first = json.loads((out / "run.json").read_text())
    assert first["command"] == shlex.join(["python", "train.py", *args, f"out={whole[0]}"])
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = git.stdout.strip() if (ROOT / ".git").exists() else None
    assert first["commit"] == commit and first["changed"] in ((True, False) if commit else (None,))
    assert first["torch"] == torch.__version__ and first["python"] == platform.python_version()
    assert all(first[key] for key in ("transformers", "processor", "cores", "threads", "processes"))
    assert first["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", first["date"])
    process = train(out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    told = json.loads((out / "run.json").read_text())
    *_, again = told.pop("continued")
    assert told == {key: value for key, value in first.items() if key != "continued"}
    assert again["date"] and again["command"] == shlex.join(["python", "train.py", *args, f"out={out}"])
    assert not {"torch", "processor", "python"} & set(again)           # what is as it was is not said again
    html = (out / "report.html").read_text()
    assert escape(first["command"]) in html and (f"commit {commit[:12]}" if commit else "no commit") in html
    assert "1 starts went on with it" in html or len(first["continued"])


def test_a_copy_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (about()["commit"], about()["changed"]) == (None, None)
    monkeypatch.setenv("PATH", "")                                     # nor is there a git
    assert (about()["commit"], about()["changed"]) == (None, None)


def test_a_mistyped_train_split_is_refused_before_anything_is_written(tmp_path):
    process = train(tmp_path / "run", "train_split=train-shalow")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "no tasks in its split train-shalow" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sokoban_runs_whole_with_its_own_embedded_model_and_its_trees_solve_rooms(tmp_path):
    process = train(tmp_path / "run", "preset=sokoban", "samples=2", "ks=[1]", "steps=2")
    shown, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    solved, of, first = map(int, re.search(r"(\d+) of (\d+) tasks solved \((\d+) by", shown).groups())
    assert first < solved <= of == 8 and "1 boxes: 8 tasks" in shown


def test_the_same_command_again_changes_nothing_and_shows_the_same_table(whole):
    out, shown, _ = whole
    before, told = results(out), (out / "metrics.jsonl").read_text()
    process = train(out)
    again, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(before, results(out))
    assert (out / "metrics.jsonl").read_text() == told
    assert (again.split("%", 1)[1].split("results:")[0]
            == shown[shown.index("%         "):].split("%", 1)[1].split("results:")[0])


@pytest.mark.slow
def test_a_run_killed_at_six_random_moments_ends_as_if_it_had_not_been(whole, tmp_path):
    expected, seconds = results(whole[0]), whole[2]
    rng, killed, out = random.Random(0), 0, tmp_path / "run"
    for _ in range(6):
        process = train(out)
        try:
            process.wait(timeout=rng.uniform(0.3, 0.75) * seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
            process.communicate()
            written = [out / name for name in ("samples.jsonl", "trees.jsonl") if (out / name).exists()]
            ended = (out / "passk.json").exists()                     # killed between its last file and its end
            if killed % 2 and written and not ended:                  # as if in the middle of a line
                path = max(written, key=lambda path: path.stat().st_mtime_ns)
                if path.name == "samples.jsonl" or not (out / "adapter_1").exists():   # in the making
                    os.truncate(path, max(0, path.stat().st_size - 20))
        if (out / "passk.json").exists():                             # it got through: start over
            assert_same(expected, results(out))
            shutil.rmtree(out)
    process = train_anew(out)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert_same(expected, results(out))
    assert figures(out) == figures(whole[0])           # nothing is missing, nothing is there twice
    assert killed >= 3


@pytest.mark.slow
def test_two_rounds_explore_anew_with_the_improved_policy_and_each_is_sampled(tmp_path):
    process = train(tmp_path / "run", "rounds=2", "evaluate_base=false", "corrections=all", "evaluate_rounds=true",
                    "samples=4", "ks=[1,4]")
    shown, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    rounds = [json.loads(line)["round"] for line in (tmp_path / "run/trees.jsonl").read_text().splitlines()]
    assert set(rounds) == {1, 2} and shown.count("stage 1:") == 2
    one, two = (load_file(tmp_path / f"run/adapter_{r}/adapter_model.safetensors") for r in (1, 2))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    heads = next(line.split() for line in shown.splitlines() if line.startswith("%  "))
    assert heads == ["%", "leafe-1", "leafe", "difference"]
    passk = json.loads((tmp_path / "run/passk.json").read_text())
    assert list(passk) == ["leafe-1", "leafe"]
    told = [record for record in figures(tmp_path / "run") if "policy" in record]
    assert [(record["policy"], record["round"]) for record in told] == [("leafe-1", 1), ("leafe", 2)]
    for record in told:
        for key in ("Pass@1", "Pass@4", "recovery"):
            assert record[key] == pytest.approx(passk[record["policy"]][key]["estimate"], abs=1e-6)
    explored = [record["round"] for record in figures(tmp_path / "run") if "stage_1/tasks" in record]
    assert explored == [1, 2] and "<h2>Pass@k</h2>" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_l_reh_alone_runs_on_the_trees_of_another_run(whole, tmp_path):
    process = train(tmp_path / "run", "beta=.inf", f"trees={whole[0]}", "evaluate_base=false",
                    "rehearsal_share=1")
    shown, errors = process.communicate(timeout=600)
    if "nothing to train on" in errors:                               # no success in so small an exploration
        assert process.returncode == 1 and "Traceback" not in errors
    else:
        assert process.returncode == 0, errors
        steps = [record for record in read_jsonl(tmp_path / "run/metrics.jsonl") if "step" in record]
        assert steps and all(record["L_cf"] == 0 < record["beta_L_reh"] for record in steps)
    assert not (tmp_path / "run/trees.jsonl").exists()


def test_ctrl_c_says_that_nothing_is_lost(tmp_path):
    process = train_anew(tmp_path / "run", "samples=64", "ks=[1]",      # a shell's background job ignores SIGINT
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while (not (tmp_path / "run/samples.jsonl").exists()
           or (tmp_path / "run/samples.jsonl").stat().st_size < 500):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing is lost" in errors and "Traceback" not in errors


# distillation alone

def distilled(folder, settings, trees, stop, until=None, **extra):
    """The adapter after cfg.steps; with `until`, killed there first and gone on with from the checkpoint."""
    cfg = settings("corrections=all", "rehearsal_share=1", "steps=7", "checkpoint_every=2", "batch_tokens=1024",
                   "lora_rank=4", "lora_alpha=8", f"out={folder}", *[f"{k}={v}" for k, v in extra.items()])
    rows = training_rows(trees, loss_weights(trees, targets(trees, cfg, stop), cfg.beta), cfg.row_tokens)

    def start():
        model, tokenizer = load_model("tiny", None, 768)
        return run_of(cfg, (model, Chat(tokenizer)), folder=True)
    if until:
        class Killed(Exception):
            pass

        class Dying(Jsonl):
            def append(self, record):
                super().append(record)
                if record["step"] == until:
                    raise Killed
        run = start()
        run.folder.stores["metrics.jsonl"] = Dying(folder / "metrics.jsonl")
        with pytest.raises(Killed):
            fit(run, 1, ("L_cf", "beta_L_reh"), rows)
        run.folder.lock.close()
    run = start()
    fit(run, 1, ("L_cf", "beta_L_reh"), rows)
    return [p.detach().clone() for p in lora_parameters(run.policy.model)], run.metrics.records


def test_a_resumed_distillation_equals_an_uninterrupted_one(grown, tiny, settings, tmp_path):
    trees = grown[1][:4]
    whole, records = distilled(tmp_path / "a", settings, trees, tiny[1].stop)
    assert records[-1]["L_cf"] < records[0]["L_cf"]
    for until in (1, 2, 5, 7):
        again, _ = distilled(tmp_path / f"b{until}", settings, trees, tiny[1].stop, until)
        assert all(torch.equal(p, q) for p, q in zip(whole, again))
    checkpointed, _ = distilled(tmp_path / "c", settings, trees, tiny[1].stop, gradient_checkpointing="true")
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(whole, checkpointed))


NOISY = dict(                                          # each would be noisy in training mode
    llama=lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)),
    mixtral=lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, router_jitter_noise=0.5)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=470, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.5)))


@pytest.mark.parametrize("name, packs", [("llama", True), ("llama", False), ("mixtral", True), ("gpt2", False)])
def test_recomputed_layers_keep_less_and_have_the_gradients_of_kept_ones_without_noise(name, packs):
    torch.manual_seed(0)
    model = NOISY[name]().eval()
    model.packs = packs
    tree = [Segment(list(range(5, 45)), [0.0] * 40, None)] + [Segment([50 + n] * 6, [1.0] * 6, 0) for n in range(3)]
    row, found = pack([tree]), []
    for on in (False, True):
        sizes, calls = [], []
        part = model.get_decoder().get_submodule("h.1.mlp" if name == "gpt2" else "layers.1.mlp")
        seen = part.register_forward_pre_hook(lambda *_: calls.append(1))
        with recomputing(model, on):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
                loss = packed_nll(model, [row]).sum()
            loss.backward()
        seen.remove()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()], sum(sizes), len(calls)))
        model.zero_grad()
    (loss, kept, most, once), (again, recomputed, least, twice) = found
    assert loss == again and twice == 2 * once and least < most / 2 and not model.training
    for one, other in zip(kept, recomputed):
        assert (one - other).norm() <= 1e-6 * one.norm()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_whose_layers_cannot_be_recomputed_is_one_line():
    with pytest.raises(UserError, match="gradient_checkpointing: the layers of Linear do not take it; set it to false"):
        with recomputing(torch.nn.Linear(2, 2), True):
            pass


def test_an_epoch_of_batches_adds_up_to_l_exactly(grown, tiny, settings):
    """A pair is in one batch an epoch; weights add up to 1 (L_cf) and beta (L_reh) times tokens an action."""
    cfg = settings("beta=0.5", "corrections=all", "rehearsal_share=1", "batch_tokens=1024")
    trees = grown[1][:8]
    pairs = targets(trees, cfg, tiny[1].stop)
    rows = training_rows(trees, loss_weights(trees, pairs, cfg.beta), cfg.row_tokens)
    batches = epoch(rows, cfg, 3)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows)) and len(batches) > 1
    total = sum(row.weights.double().sum(0) for row in rows)
    length = [sum(len(trees[k].turns[i].action_ids) for k, i in part) / max(1, len(part))
              for part in (pairs.D_cf, pairs.D_reh)]
    assert total.tolist() == pytest.approx([length[0], 0.5 * length[1]], rel=1e-4)
    orders = {tuple(id(row) for batch in epoch(rows, cfg, number) for row in batch) for number in range(12)}
    assert len(orders) > 1                                            # shuffled anew each epoch


def test_the_steps_of_an_epoch_add_up_to_l_each_row_once(settings):
    cfg = settings("steps=7", "warmup=2", "batch_tokens=1024", "row_tokens=1024", "checkpoint_every=100")
    rows = [pack([[Segment([5, 6], [(0.0,), (1.0,)], None)]]) for _ in range(3)]
    world = [pack([[Segment([7, 8], [(0.0,), (1.0,)], None)]]) for _ in range(2)]
    batches = list(sft_batches(world, rows, cfg, 0))
    ids = [[id(row) for row in batch.rows] for batch in batches]
    assert sorted(sum(ids[:2], [])) == sorted(map(id, world))            # an epoch of what goes before
    assert sorted(sum(ids[2:5], [])) == sorted(map(id, rows))
    assert [batch.scale for batch in batches] == [2, 2, 3, 3, 3, 3, 3]   # M times its share of L
    assert [round(batch.lr, 3) for batch in batches] == [0.333, 0.667, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [batch.resume for batch in batches] == [None] * 6 + [7]
    again = list(sft_batches(world, rows, cfg, 3))                       # from a checkpoint on
    assert [[id(row) for row in batch.rows] for batch in again] == ids[3:]
    assert [batch.lr for batch in again] == [batch.lr for batch in batches[3:]]


def test_the_gradient_of_a_step_is_clipped_and_its_norm_is_told_before(own_tiny, settings):
    run = run_of(settings("clip=0.001", "steps=1"), own_tiny, folder=True)
    row = pack([[Segment([3, 4, 5], [(0.0,), (1.0,), (1.0,)], None)]])
    left, step = [], torch.optim.AdamW.step

    def seen(optimizer, *args):
        left.append(float(torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g["params"]]).norm()))
        return step(optimizer, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", seen)
        fit(run, 1, ("a",), [row])
    assert left == [pytest.approx(0.001, rel=1e-3)] and run.metrics.records[-1]["gradient_norm"] > 0.01


def test_exported_pairs_render_to_the_very_ids_that_are_trained_on(grown, tiny, settings):
    chat = tiny[1]
    cfg = settings("corrections=all", "rehearsal_share=1")
    trees = grown[1][:6]
    pairs = targets(trees, cfg, chat.stop)
    told = [json.loads(line) for line in chat_pairs(run_of(cfg, tiny), trees, pairs)]
    assert [pair["part"] for pair in told] == ["D_cf"] * len(pairs.D_cf) + ["D_reh"] * len(pairs.D_reh)
    assert all(not any("experience:" in m["content"] for m in pair["prompt"]) for pair in told)
    whole = 0
    for pair, (k, i) in zip(told, pairs.D_cf + pairs.D_reh):
        path = trees[k].path(i)
        if all(turn.action_ids[-1] == chat.end for turn in path):        # none cut off
            ids = chat.tokenizer.apply_chat_template(pair["prompt"] + pair["completion"], return_dict=False)
            assert ids == [token for turn in path for token in turn.ids]
            whole += 1
    assert whole > 5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN: CUDNN_STATUS_ALLOC_FAILED")])
def test_a_row_that_fits_in_no_way_is_one_line_with_the_key(error, own_tiny, settings, capsys):
    def fails(*_):
        raise error
    run = run_of(settings(), own_tiny, folder=True)
    with pytest.raises(UserError, match="row_tokens: out of memory in a training row of 3 tokens, which cannot be parted"):
        optimise(run, 1, Objective(("a", "b"), fails, 1), partial(sft_batches, [], three_tokens(), run.cfg))
    said = capsys.readouterr().err
    assert said.index("gradient_checkpointing=true\n") < said.index("rows in halves, of 3 tokens and more\n")


def test_an_error_that_is_not_about_memory_stays_one(own_tiny, settings):
    def fails(*_):
        raise RuntimeError("no kernel image is available")
    run = run_of(settings(), own_tiny, folder=True)
    with pytest.raises(RuntimeError, match="kernel image"):
        optimise(run, 1, Objective(("a", "b"), fails, 1), partial(sft_batches, [], three_tokens(), run.cfg))


@pytest.mark.parametrize("room, says", [(2000, ["gradient_checkpointing=true"]), (700, ["gradient_checkpointing=true", "halves"])])
def test_training_that_runs_out_of_memory_goes_on_with_the_same_losses(room, says, grown, own_tiny, settings, capsys):
    """In every row above `room` tokens without recomputation, and in those above it at all."""
    cfg, trees = settings("corrections=all", "rehearsal_share=1", "steps=2", "lr=0.01", "row_tokens=1200"), grown[1][:8]
    rows = training_rows(trees, loss_weights(trees, targets(trees, cfg, own_tiny[1].stop), 1.0), cfg.row_tokens)
    calls, again = Counter(), cfg.but(out=f"{cfg.out}/again")
    plain = run_of(cfg.but(out=f"{cfg.out}/plain"), own_tiny, folder=True)

    def short(model, row):
        recomputed = "forward" in vars(recomputable(model)[0])
        calls[recomputed, len(row.ids) > room] += 1
        if len(row.ids) > room if recomputed else len(row.ids) > 60:
            raise torch.OutOfMemoryError
        return packed_nll(model, [row])

    def train_with(run, loss):
        optimise(run, 1, Objective(("L_cf", "beta_L_reh"), loss, 2), partial(sft_batches, [], rows, run.cfg))
        found = [[record[name] for name in ("L_cf", "beta_L_reh", "gradient_norm")] for record in run.metrics.records
                 if "step" in record]
        with torch.no_grad():
            for parameter in run.policy.parameters():
                parameter.zero_()
        return found
    started = [p.detach().clone() for p in plain.policy.parameters()]
    expected = train_with(plain, lambda model, row: packed_nll(model, [row]))
    with torch.no_grad():
        for parameter, value in zip(plain.policy.parameters(), started):
            parameter.copy_(value)
    found = train_with(run_of(again, own_tiny, folder=True), short)
    assert len(found) == 2 and torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4)
    said = capsys.readouterr().err
    assert all(word in said for word in says) and ("halves" in said) == ("halves" in says)
    assert calls[False, True] + calls[False, False] == 1


def three_tokens():
    return [pack([[Segment([3, 4, 5], [(0.0, 0.0), (1.0, 0.0), (1.0, 0.0)], None)]])]


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_a_step_that_is_not_finite_is_one_line_and_the_checkpoint_before_it_stays(what, own_tiny, settings):
    run, seen = run_of(settings("checkpoint_every=1", "steps=5", "lr=0.02"), own_tiny, folder=True), []

    def loss(model, row):
        losses = packed_nll(model, [row])
        seen.append(losses)
        if len(seen) == 3 and what == "loss":
            return losses * float("nan")
        if len(seen) == 3 and what == "gradient":
            return losses + (losses - losses.detach()) * 1e30 * 1e30      # the loss stays as it is
        return losses

    def batches(first):
        for batch in sft_batches([], three_tokens(), run.cfg, first):
            yield batch if what != "weights" or batch.resume != 3 else replace(batch, lr=1e38)
    told = (r"^lr: training diverged in step 3 \(a .*, b .*, gradient norm .*\); lower lr=0.02, lora_alpha=.* or a "
            "loss's weight, with another out=; what was before it stays")
    with pytest.raises(UserError, match=told) as raised:
        optimise(run, 1, Objective(("a", "b"), loss, 5), batches)
    assert dict(loss="a nan", gradient="norm nan", weights="a ")[what] in str(raised.value)
    saved = torch.load(run.folder.path / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 2 and all(value.isfinite().all() for value in saved["parameters"])
    told = list(read_jsonl(run.folder.path / "metrics.jsonl"))
    assert len(told) == (3 if what == "weights" else 2) and "NaN" not in json.dumps(told)


def test_a_world_that_switched_gradients_off_is_trained_on_all_the_same(own_tiny, settings):
    run = run_of(settings("steps=2", "lora_rank=2"), own_tiny, folder=True)
    with torch.no_grad():                              # as a world with a network of its own may leave it
        fit(run, 1, ("a", "b"), three_tokens())
    assert any(layer.lora_B.abs().max() > 0 for layer in lora_layers(own_tiny[0]).values())


@pytest.mark.parametrize("setting", ["lr=1e30", "lora_alpha=1e30"])
def test_training_that_diverges_saves_nothing_that_is_not_finite(setting, own_tiny, settings):
    run = run_of(settings("steps=30", "checkpoint_every=1", setting), own_tiny, folder=True)
    key, _, value = setting.partition("=")
    with pytest.raises(UserError, match=f"lr: training diverged in step .*{key}={float(value):g}".replace("+", ".")):
        fit(run, 1, ("a", "b"), three_tokens())
    path = run.folder.path / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)["parameters"] if path.exists() else []
    assert all(value.isfinite().all() for value in saved)


def broken(file, change):
    found = torch.load(file, weights_only=True)
    change(found)
    torch.save(found, file)


BROKEN = {"half": lambda file: os.truncate(file, file.stat().st_size // 2),
          "empty": lambda file: file.write_bytes(b""),
          "text": lambda file: file.write_bytes(b"checkpoint" * 99),
          "another pickle": lambda file: torch.save([1, 2], file),
          "no state": lambda file: broken(file, lambda found: found.pop("state")),
          "a step of text": lambda file: broken(file, lambda found: found["state"].update(step="3")),
          "no optimiser": lambda file: broken(file, lambda found: found.pop("optimizer")),
          "fewer weights": lambda file: broken(file, lambda found: found["parameters"].pop()),
          "another shape": lambda file: broken(
              file, lambda found: found["parameters"].__setitem__(0, torch.ones(1, 128))),
          "nan": lambda file: broken(file, lambda found: found["parameters"][3].fill_(float("nan"))),
          "moments of another shape": lambda file: broken(
              file, lambda found: found["optimizer"]["state"][0].update(exp_avg=torch.ones(2))),
          "moments of nan": lambda file: broken(
              file, lambda found: found["optimizer"]["state"][0]["exp_avg_sq"].fill_(float("nan")))}


def test_a_checkpoint_that_is_broken_is_one_line(own_tiny, settings):
    run = run_of(settings("steps=2", "lora_rank=2"), own_tiny, folder=True)
    fit(run, 1, ("a", "b"), three_tokens())
    file = run.folder.path / "checkpoint.pt"
    whole = file.read_bytes()
    for name, change in BROKEN.items():
        file.write_bytes(whole)
        change(file)
        with pytest.raises(UserError, match=f"^{file}: .*; delete it: the training of round 1 begins anew$") as raised:
            fit(run, 1, ("a", "b"), three_tokens())
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500, name
    file.write_bytes(whole)
    fit(run, 1, ("a", "b"), three_tokens())                            # and whole, it is gone on with


def test_a_checkpoint_that_a_full_disk_cuts_short_leaves_the_one_before(own_tiny, settings, monkeypatch):
    run = run_of(settings("steps=2", "checkpoint_every=1"), own_tiny, folder=True)
    save = torch.save

    def full(found, file):
        if found["state"]["step"] == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        save(found, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="checkpoint.pt.new cannot be written; is the disk full.*nothing is lost"):
        fit(run, 1, ("a", "b"), three_tokens())
    assert torch.load(run.folder.path / "checkpoint.pt", weights_only=True)["state"]["step"] == 1


@pytest.mark.parametrize("key, training", [("init", True), ("adapter", False)])
def test_an_adapter_that_is_not_there_is_blamed_on_the_key_that_names_it_before_the_model_is_loaded(
        key, training, settings, tmp_path, monkeypatch):
    cfg = settings(f"{key}={tmp_path}/nowhere")
    monkeypatch.setattr("run.load_model", None)
    with pytest.raises(UserError, match=f"^{key}: {tmp_path}/nowhere has no adapter_config.json"):
        open_run(cfg, getattr(cfg, key), training)


def test_a_run_s_own_adapter_that_is_broken_is_named_by_its_file(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run/adapter_1/adapter_model.safetensors").write_bytes(b"")
    _, errors = train(tmp_path / "run").communicate(timeout=100)
    assert f"error: {tmp_path}/run/adapter_1/adapter_model.safetensors: the file is empty" in errors
    assert "Traceback" not in errors


def test_beta_infinite_leaves_l_reh_alone(settings):
    cfg = settings("beta=.inf", "corrections=all", "rehearsal_share=1")
    trees = [tree_by_hand()]
    rows = rows_of(trees, loss_weights(trees, targets(trees, cfg, {2}), cfg.beta), cfg.row_tokens)
    total = sum(pack(group).weights.sum(0) for group in rows)
    assert total.tolist() == pytest.approx([0.0, 1.0])


def test_what_weighs_nothing_fills_no_row_and_nothing_else_is_nothing_to_train_on(settings):
    cfg, trees = settings("corrections=all", "rehearsal_share=1"), [tree_by_hand()]
    pairs = targets(trees, cfg, {2})
    assert set(loss_weights(trees, pairs, 0.0)[0]) == {i for _, i in pairs.D_cf} < {i for _, i in [*pairs.D_cf, *pairs.D_reh]}
    assert not any(loss_weights(trees, replace(pairs, D_cf=[]), 0.0))          # L_cf alone, and no correction
    assert not any(loss_weights(trees, replace(pairs, D_reh=[]), float("inf")))
    said = nothing_found(trees, settings("beta=0"), {2})
    assert "found nothing to train on: no correction, and beta=0 leaves the successes out" in said


def test_no_row_is_longer_than_its_budget(tiny, settings):
    cfg = settings("corrections=all", "rehearsal_share=1", "attempts=12", "row_tokens=768")
    trees = grow(tiny, cfg, tasks=6)
    pairs = targets(trees, cfg, tiny[1].stop)
    rows = training_rows(trees, loss_weights(trees, pairs, cfg.beta), cfg.row_tokens)
    assert max(len(row.ids) for row in rows) <= 768
    bearing = sum(len(trees[k].turns[i].action_ids) for k, i in {*pairs.D_cf, *pairs.D_reh})
    assert sum(len(row.targets) for row in rows) == bearing           # every target once
