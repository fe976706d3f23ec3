import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file

from baselines import packed_rows
from conftest import ROOT
from envs import Quest, UserError
from eval import comparison
from leafe import chat_pairs, rows_of, targets
from model import Chat
from packing import Segment, pack
from run import Jsonl, spent
from test_leafe import grow, tree_by_hand
from train import COMPARED, epoch, fit, loss_weights, optimise, sft_batches
from weights import add_lora, load_model, lora_parameters


def train(out, *args, **kwargs):
    return subprocess.Popen([sys.executable, "train.py", "config.yaml", "preset=smoke", f"out={out}", *args],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def results(out):
    """Everything that a run's end consists of, in an order that does not depend on the schedule."""
    lines = {name: sorted((out / name).read_text().splitlines()) for name in ("trees.jsonl", "samples.jsonl")}
    return (lines, json.loads((out / "passk.json").read_text()),
            load_file(out / "adapter" / "adapter_model.safetensors"))


def assert_same(a, b):
    for name in a[0]:
        assert a[0][name] == b[0][name], name
    assert a[1] == b[1] and a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][key], b[2][key]) for key in a[2])


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
    for name in ("config.yaml", "sft.jsonl", "trees.jsonl", "samples.jsonl", "metrics.jsonl", "passk.json",
                 "adapter/adapter_model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert [json.loads(line)["step"]
            for line in (out / "metrics.jsonl").read_text().splitlines()] == list(range(1, 7))


def test_a_mistyped_train_split_is_refused_before_anything_is_written(tmp_path):
    process = train(tmp_path / "run", "train_split=train-shalow")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "no tasks in its split train-shalow" in errors and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sokoban_runs_whole_with_its_own_embedded_model_and_its_trees_solve_rooms(tmp_path):
    process = train(tmp_path / "run", "preset=sokoban", "samples=2", "ks=[1]", "steps=2")
    shown, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    solved, of, first = map(int, re.search(r"(\d+) of (\d+) tasks solved \((\d+) by", shown).groups())
    assert first < solved <= of == 8 and "1 boxes: 8 tasks" in shown


def test_the_same_command_again_changes_nothing_and_shows_the_same_table(whole):
    out, shown, _ = whole
    before = results(out)
    process = train(out)
    again, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(before, results(out))
    assert (again.split("%", 1)[1].split("results:")[0]
            == shown[shown.index("%         "):].split("%", 1)[1].split("results:")[0])


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_as_if_it_had_not_been(whole, tmp_path):
    expected, seconds = results(whole[0]), whole[2]
    rng, killed, out = random.Random(0), 0, tmp_path / "run"
    for _ in range(10):
        process = train(out, start_new_session=True)
        try:
            process.wait(timeout=rng.uniform(0.3, 0.75) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
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
    process = train(out)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert_same(expected, results(out))
    assert killed >= 5


@pytest.mark.slow
def test_two_ranks_end_as_one_process_does_and_killed_as_one_goes_on_alone(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1")        # products are summed in an order that depends on threads
    small = ["train_tasks=6", "test_tasks=4", "samples=4", "ks=[1]"]

    def ranks(out):
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone",
             "train.py", "config.yaml", "preset=smoke", f"out={out}", *small],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    alone = train(one, *small, env=env)
    assert alone.wait(timeout=300) == 0, alone.stderr.read()
    both = ranks(two)
    shown, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    assert_same(results(one), results(two))
    assert shown.count("stage 1:") == 1 and not list(two.glob("*.part"))
    assert (one / "sft.jsonl").read_text() == (two / "sft.jsonl").read_text()
    dying, until = ranks(killed), time.time() + 200
    while not (killed / "trees.jsonl.1.part").exists() and time.time() < until:
        time.sleep(0.02)
    os.killpg(dying.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", f"out={killed}"])
    dying.communicate()
    assert list(killed.glob("trees.jsonl.*.part")) and not (killed / "passk.json").exists()
    alone = train(killed, *small, env=env)
    assert alone.wait(timeout=300) == 0, alone.stderr.read()
    assert_same(results(one), results(killed))
    assert not list(killed.glob("*.part"))


@pytest.mark.slow
def test_two_rounds_explore_anew_with_the_improved_policy(tmp_path):
    process = train(tmp_path / "run", "rounds=2", "evaluate_base=false", "corrections=all")
    shown, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    rounds = [json.loads(line)["round"] for line in (tmp_path / "run/trees.jsonl").read_text().splitlines()]
    assert set(rounds) == {1, 2} and shown.count("stage 1:") == 2
    one, two = (load_file(tmp_path / f"run/adapter_{r}/adapter_model.safetensors") for r in (1, 2))
    assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_l_reh_alone_runs_on_the_trees_of_another_run(whole, tmp_path):
    process = train(tmp_path / "run", "beta=.inf", f"trees={whole[0]}", "evaluate_base=false",
                    "rehearsal_share=1")
    shown, errors = process.communicate(timeout=600)
    if "nothing to train on" in errors:                               # no success in so small an exploration
        assert process.returncode == 1 and "Traceback" not in errors
    else:
        assert process.returncode == 0, errors
        assert all(json.loads(line)["L_cf"] == 0
                   for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert not (tmp_path / "run/trees.jsonl").exists()


def test_ctrl_c_says_that_nothing_is_lost(tmp_path):
    process = train(tmp_path / "run", "samples=64", "ks=[1]",           # a shell's background job ignores SIGINT
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while (not (tmp_path / "run/samples.jsonl").exists()
           or (tmp_path / "run/samples.jsonl").stat().st_size < 500):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing is lost" in errors and "Traceback" not in errors


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of all methods: (folder, stdout)."""
    out = tmp_path_factory.mktemp("compared") / "run"
    process = train(out, "method=compare")
    shown, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return out, shown


@pytest.mark.slow
def test_a_comparison_runs_every_method_within_leafes_steps_and_shows_one_table(compared):
    out, shown = compared
    assert {path.name for path in out.iterdir()} == {f"{name}-0" for name in COMPARED} | {"report.html"}
    *lines, where = shown[shown.rindex("%  "):].splitlines()
    html = (out / "report.html").read_text()
    assert where == f"results: {out}/report.html" and html.count("<polyline") == len(COMPARED) + 1
    assert re.search(r"<b>leafe</b> wins .*: a difference of", html) and escape(lines[-1]) in html
    links = [unquote(link) for link in re.findall('href="([^"]*)"', html)]
    assert links == sorted(f"{name}-0/report.html" for name in COMPARED) and all((out / one).exists() for one in links)
    assert [line.split()[0] for line in lines[1:len(COMPARED) + 2]] == ["base", *sorted(COMPARED)]
    allowed = spent(out / "leafe-0")["steps"]
    for name in COMPARED:
        took = spent(out / f"{name}-0")
        assert took["seconds"] > 0 and (took["steps"] <= allowed or name == "grpo+leafe") and took["steps"] > 0
        assert (took["trained"] == 0) == (name == "ace" or not (out / f"{name}-0/checkpoint.pt").exists())
    policies = {json.loads(line)["policy"] for line in (out / "leafe-0/samples.jsonl").read_text().splitlines()}
    assert policies == {"base", "leafe"} and (out / "ace-0/playbook.txt").exists()
    again = subprocess.run([sys.executable, "eval.py", "compare", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.splitlines() == lines


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_killed(compared, tmp_path):
    """Late in GRPO and late in ACE; every method's part then ends as if it had not been."""
    out, rows = compared[0], lambda path: sorted(path.read_text().splitlines())                      # noqa: E731
    shutil.copytree(out, tmp_path / "whole")
    for name in ("grpo-0", "ace-0"):
        folder = out / name
        for made in ("adapter", "adapter_1", "playbook.txt", "samples.jsonl", "passk.json"):
            path = folder / made
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.truncate(folder / "trees.jsonl", (folder / "trees.jsonl").stat().st_size - 2000)
    (out / "grpo-0/checkpoint.pt").unlink()
    process = train(out, "method=compare")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    for name in ("grpo-0", "ace-0"):
        for made in ("trees.jsonl", "samples.jsonl"):
            assert rows(out / name / made) == rows(tmp_path / "whole" / name / made), (name, made)


@pytest.mark.slow
def test_a_comparison_shows_which_methods_are_unfinished(compared, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(compared[0], out)
    (out / "leafe-0").rename(out / "leafe-1")
    shutil.copytree(out / "leafe-1", out / "leafe-2")
    shown = comparison(out)
    assert "grpo              0 of 2 seeds so far" in shown and "means over 2 seeds" in shown


# distillation alone

def distilled(folder, settings, trees, stop, until=None, **extra):
    """The adapter after cfg.steps; with `until`, killed there first and gone on with from the checkpoint."""
    cfg = settings("corrections=all", "rehearsal_share=1", "steps=7", "checkpoint_every=2",
                   "batch_tokens=1024", *[f"{k}={v}" for k, v in extra.items()])
    rows = packed_rows(trees, loss_weights(trees, targets(trees, cfg, stop), cfg.beta), cfg)

    def start():
        model, tokenizer = load_model("tiny", None, 768)
        add_lora(model, 4, 8, seed=0)
        return model, Chat(tokenizer)
    folder.mkdir(exist_ok=True)
    model, _ = start()
    if until:
        class Killed(Exception):
            pass

        class Dying(Jsonl):
            def append(self, record):
                super().append(record)
                if record["step"] == until:
                    raise Killed
        with pytest.raises(Killed):
            fit(model, [], rows, ("L_cf", "beta_L_reh"), cfg, folder, Dying(folder / "metrics.jsonl"), 1)
        model, _ = start()
    metrics = Jsonl(folder / "metrics.jsonl")
    fit(model, [], rows, ("L_cf", "beta_L_reh"), cfg, folder, metrics, 1)
    return [p.detach().clone() for p in lora_parameters(model)], metrics.records


def test_a_resumed_distillation_equals_an_uninterrupted_one(tiny, settings, tmp_path):
    cfg = settings("attempts=6")
    trees = grow(tiny, cfg, tmp_path / "t.jsonl", tasks=6)
    whole, records = distilled(tmp_path / "a", settings, trees, tiny[1].stop)
    assert records[-1]["L_cf"] < records[0]["L_cf"]
    for until in (1, 2, 5, 7):
        again, _ = distilled(tmp_path / f"b{until}", settings, trees, tiny[1].stop, until)
        assert all(torch.equal(p, q) for p, q in zip(whole, again))
    checkpointed, _ = distilled(tmp_path / "c", settings, trees, tiny[1].stop, gradient_checkpointing="true")
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(whole, checkpointed))


def test_an_epoch_of_batches_adds_up_to_l_exactly(tiny, settings, tmp_path):
    """A pair is in one batch an epoch; weights add up to 1 (L_cf) and beta (L_reh) times tokens an action."""
    cfg = settings("beta=0.5", "corrections=all", "rehearsal_share=1", "batch_tokens=1024")
    trees = grow(tiny, cfg, tmp_path / "t.jsonl", tasks=8)
    pairs = targets(trees, cfg, tiny[1].stop)
    rows = packed_rows(trees, loss_weights(trees, pairs, cfg.beta), cfg)
    batches = epoch(rows, cfg, 3)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows)) and len(batches) > 1
    total = sum(row.weights.double().sum(0) for row in rows)
    length = [sum(len(trees[k].turns[i].action_ids) for k, i in part) / max(1, len(part))
              for part in (pairs.D_cf, pairs.D_reh)]
    assert total.tolist() == pytest.approx([length[0], 0.5 * length[1]], rel=1e-4)
    orders = {tuple(id(row) for batch in epoch(rows, cfg, number) for row in batch) for number in range(12)}
    assert len(orders) > 1                                            # shuffled anew each epoch


def test_exported_pairs_render_to_the_very_ids_that_are_trained_on(tiny, settings, tmp_path):
    chat = tiny[1]
    cfg = settings("corrections=all", "rehearsal_share=1")
    trees = grow(tiny, cfg, tmp_path / "t.jsonl", tasks=6)
    pairs = targets(trees, cfg, chat.stop)
    told = list(chat_pairs(trees, pairs, chat, Quest.rules))
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


def test_out_of_memory_in_training_is_one_line_with_the_key(own_tiny, settings, tmp_path):
    model, _ = own_tiny
    add_lora(model, 4, 8, seed=0)

    def fails(*_):
        raise torch.OutOfMemoryError
    rows = [pack([[Segment([3, 4, 5], [(0.0, 0.0), (1.0, 0.0), (1.0, 0.0)], None)]])]
    with pytest.raises(UserError, match="row_tokens: out of memory in a training row of 3 tokens; lower row_tokens="):
        optimise(model, lambda first: sft_batches([], rows, settings(), first), fails, ("a", "b"), settings(), tmp_path,
                 Jsonl(tmp_path / "m.jsonl"), 1, 1)


def test_beta_infinite_leaves_l_reh_alone(settings):
    cfg = settings("beta=.inf", "corrections=all", "rehearsal_share=1")
    trees = [tree_by_hand()]
    rows = rows_of(trees, loss_weights(trees, targets(trees, cfg, {2}), cfg.beta), cfg.row_tokens)
    total = sum(pack(group).weights.sum(0) for group in rows)
    assert total.tolist() == pytest.approx([0.0, 1.0])


def test_no_row_is_longer_than_its_budget(tiny, settings, tmp_path):
    cfg = settings("corrections=all", "rehearsal_share=1", "attempts=12", "row_tokens=768")
    trees = grow(tiny, cfg, tmp_path / "t.jsonl", tasks=6)
    pairs = targets(trees, cfg, tiny[1].stop)
    rows = packed_rows(trees, loss_weights(trees, pairs, cfg.beta), cfg)
    assert max(len(row.ids) for row in rows) <= 768
    bearing = sum(len(trees[k].turns[i].action_ids) for k, i in {*pairs.D_cf, *pairs.D_reh})
    assert sum(len(row.targets) for row in rows) == bearing           # every target once
