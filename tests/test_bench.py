"""tools/bench.py: what it compares is equal, what it prints is what it measured. No time is asserted."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import programs
import ranks
from config import UserError, load_config
from conftest import ROOT, SHAPE
from tools import bench, bench_rollouts, bench_runs, measure
from tools.bench_worlds import Talk
from tools.families import tiny_model


def own(**more):
    return bench.OWN | dict(repetitions=2, episodes=8) | more


def test_conversations_have_the_shape_that_is_promised():
    talk, lengths = Talk(), set()
    for n in range(40):
        first, turns, done = talk.reset(f"{n}/1"), 0, False
        assert first == Talk().reset(f"{n}/2") != talk.reset(f"{n + 1}/1")       # samples share their task
        talk.reset(f"{n}/1")
        while not done:
            done, turns = talk.step("go").done, turns + 1
        lengths.add(turns)
    assert lengths == set(range(8, 17))
    assert [talk.reset("1/0"), talk.step("x").obs] == [talk.reset("1/0"), talk.step("y").obs]     # it replays


@pytest.mark.slow
def test_all_ways_of_sampling_reply_alike_and_each_is_timed(settings, tmp_path):
    done = programs.run(["-m", "tools.bench", "rollout", "episodes=4", "repetitions=1", "horizon=4",
                         "action_tokens=4", f"out={tmp_path}"], timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rollout-tiny.json").read_text())
    assert [row["name"] for row in found["contenders"]] == list("abcd")
    assert all(row["equal"] == 1 and len(row["seconds"]) == 1 for row in found["contenders"])
    assert found["machine"]["gb_a_second"] > 0 and 0 < found["limit_s"] and 0 < found["products_s"]
    assert 0.5 < found["cached"] < 1 and found["sampled"] >= 4 * 4
    assert "last is" in done.stdout and "of prompt tokens from the cache" in done.stdout


def test_an_engine_that_replies_otherwise_is_not_timed(settings, monkeypatch):
    right = bench_rollouts.forking

    def wrong(*args):
        ended = right(*args)
        ended[0].turns[0].action_ids[0] += 1
        return ended
    cfg = settings("temperature=0")
    bench_rollouts.policy.cache_clear()
    monkeypatch.setattr(bench_rollouts, "forking", wrong)
    with pytest.raises(UserError, match="greedy replies are not generate's: nothing is timed"):
        bench_rollouts.rollout(cfg, own(contenders="d", repetitions=1))


def test_all_layouts_of_the_training_data_give_the_same_gradient(settings):
    bench_rollouts.policy.cache_clear()
    found = bench.training(settings("train_tasks=3", "corrections=all"), own(contenders="abc"))
    a, b, c = found["contenders"]
    assert found["pairs"] > 5 and max(row["equal"] for row in (a, b, c)) < 1e-4
    assert a["tokens"] > b["tokens"] > c["tokens"] >= found["tokens_at_least"]
    assert all(len(row["seconds"]) == 2 and row["peak_mb"] >= 0 for row in (a, b, c))
    assert "distinct tokens of the trees" in bench.show("train", found)


def test_a_layout_with_another_gradient_is_not_timed(settings, monkeypatch):
    bench_rollouts.policy.cache_clear()
    monkeypatch.setattr(bench, "packed_nll", lambda model, rows: 1.01 * bench.padded_nll(
        model, (rows[0].ids[None], torch.ones_like(rows[0].ids)[None], torch.ones(1, len(rows[0].ids), 2))))
    with pytest.raises(UserError, match="the gradient of c is not a's"):
        bench.training(settings("train_tasks=2", "corrections=all"), own(contenders="ac"))


def test_stored_turns_are_counted_and_measured(settings, tiny):
    found = bench.stored(settings(), tiny[1], 2000)
    assert found["turns"] == 2000 and found["pairs"] > 200
    assert all(found[f"{step}_{unit}"] >= 0 for step in ("load", "targets", "pack", "report") for unit in ("s", "mb"))


GROWING = """
import json, sys
sys.path[0] = sys.argv[1]
from transformers import LlamaConfig
from tools import bench_memory
print(json.dumps(bench_memory.growing(LlamaConfig(**json.loads(sys.argv[2])), 768, rows=16)))
"""


def test_a_growing_cache_is_measured_against_what_it_holds(tmp_path):
    (tmp_path / "growing.py").write_text(GROWING)              # alone: here other tests have left memory in disorder
    done = programs.run([str(tmp_path / "growing.py"), str(ROOT),
                         json.dumps(SHAPE | dict(num_hidden_layers=8, hidden_size=1024))])
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 16 and found["held_mb"] == pytest.approx(8 * found["layer_mb"])
    assert found["layer_mb"] == pytest.approx(2 * 16 * 2 * 768 * 256 * 4 / 2**20)            # k, v; heads, capacity, D
    assert 0.5 * found["held_mb"] < found["peak_mb"] < 1.25 * found["held_mb"]               # two layers of eight more


TRAIN = """
import json, sys, time
from pathlib import Path
import yaml
cfg = yaml.safe_load(open(sys.argv[1]))
out = Path(cfg["out"])
if cfg["seed"] == 1:
    sys.exit("error: seed: no")
(out / "adapter").mkdir(parents=True)
(out / "adapter_1").mkdir()
for name, line in [("run.json", {}), ("metrics.jsonl", dict(round=0, policy="base")),
                   ("metrics.jsonl", dict(round=1, trees=8)), ("metrics.jsonl", dict(round=1, step=1)),
                   ("adapter_1/adapter_config.json", {}), ("metrics.jsonl", dict(round=1, policy="leafe"))]:
    with open(out / name, "a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep(0.1)
lines = ["a\\n", "b\\n"][::-1 if cfg["processes"] else 1]
(out / "samples.jsonl").write_text("".join(lines))
(out / "trees.jsonl").write_text("c\\n" + "d\\n" * bool(cfg["processes"]))
(out / "passk.json").write_text("".join(lines))
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A train.py that takes no time: its trees, and the order of its lines, depend on processes=."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(bench_runs, "ROOT", tmp_path)
    monkeypatch.setattr(bench_runs, "POLL", 0.02)


def test_runs_in_turns_are_told_with_stages_memory_and_what_differs(settings, made_up, tmp_path):
    (tmp_path / "run" / "run" / "null-1").mkdir(parents=True)             # of before: it is not gone on with
    found = bench_runs.whole_runs(settings(), own(processes="null,2"))
    base, two = found["contenders"]
    assert base["same"] == [{"trees.jsonl": True, "samples.jsonl": True, "passk.json": True}] * 2
    assert two["same"] == [{"trees.jsonl": False, "samples.jsonl": True, "passk.json": False}] * 2
    stages = ["start", "sample base", "explore", "train", "sample leafe", "rest"]
    assert all(list(spent) == stages and min(spent.values()) >= 0 for row in (base, two) for spent in row["stages"])
    assert all(sum(spent.values()) >= 0.6 for spent in base["stages"])                        # of its sleep
    assert all(mb > 1 for row in (base, two) for mb in row["peak_mb"])
    shown = bench.show("run", found)
    assert "null  run 2: trees.jsonl same" in shown and "2  run 1: trees.jsonl differs, samples.jsonl same" in shown


def test_a_run_that_fails_is_one_line(settings, made_up):
    with pytest.raises(UserError, match=r"run/null-1\.log: seed: no"):
        bench_runs.whole_runs(settings("seed=1"), own(processes="null,2"))


def alive(pid):
    try:
        return "State:\tZ" not in open(f"/proc/{pid}/status").read()
    except OSError:
        return False


def test_busy_neighbours_end_with_what_they_were_beside():
    before = set(measure.below(os.getpid()))
    with pytest.raises(ZeroDivisionError), bench_runs.busy(2):
        loops = set(measure.below(os.getpid())) - before
        1 / 0
    assert len(loops) == 2 and not loops & set(measure.below(os.getpid()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_busy_neighbours_end_when_the_program_is_stopped_or_killed(number):
    words = ("import signal, time; from tools.bench_runs import busy; signal.signal(2, signal.default_int_handler)\n"
             "with busy(2):\n print('there', flush=True); time.sleep(99)")
    with subprocess.Popen([sys.executable, "-c", words], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"there\n"
        loops = measure.below(process.pid)[1:]
        assert len(loops) == 2 and all(map(alive, loops))
        process.send_signal(number)
        process.wait(20)
    deadline = time.monotonic() + 20
    while any(map(alive, loops)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, loops))


@pytest.mark.slow
def test_exploration_is_timed_alone_and_beside_neighbours(settings, tmp_path):
    done = programs.run(["-m", "tools.bench", "neighbours", "preset=smoke", "tasks=2", "attempts=2", "loops=1",
                         "processes=null,1", f"out={tmp_path}"], timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "neighbours-tiny.json").read_text())["contenders"]
    assert [(row["processes"], row["loops"]) for row in rows] == [("null", 0), ("null", 1), ("1", 0), ("1", 1)]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows)
    assert rows[1]["fair"] == (1 + ranks.cores()) / ranks.cores() and "fair share" in done.stdout
    for n in ("null-0-1", "1-1-1"):
        assert len({json.loads(line)["task"] for line in open(tmp_path / "neighbours" / n / "trees.jsonl")}) == 2


def test_model_and_worlds_that_run_apart_are_told_how_long_they_wait(settings):
    import engine
    plain = engine.wait
    cfg = settings(f"env={bench_runs.BUSY}", "data=1", "action_tokens=2", "horizon=2")
    found = bench_runs.waiting(cfg, own(episodes=4))
    rows = found["contenders"]
    assert [row["workers"] for row in rows] == sorted({1, ranks.cores(), 2 * ranks.cores()})
    assert all(row["turns"] == 8 and row["seconds"] > 0 for row in rows)
    assert all(0 < row[share] < 1 for row in rows for share in ("model_waits", "worlds_wait"))
    assert engine.wait is plain and "model waits" in bench.show("waiting", found)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "two", "1,-2"])
def test_contenders_that_are_no_numbers_of_processes_are_one_line(text):
    with pytest.raises(UserError, match="must be numbers of processes or null, like 1,2"):
        bench_runs.contenders(text)


@pytest.mark.parametrize("args, said", [
    (["rolout"], "did you mean 'rollout'"), (["gpu"], "there is no GPU here"), (["contenders=x"], "some of abcd"),
    (["episodes=many"], "episodes is 'many', but must be a whole number"), (["slot=3"], "there is no key 'slot'"),
    (["task=3"], "there is no key 'task'; did you mean 'tasks'"), (["repetitions=0"], "must be 1 or more")])
def test_bad_input_is_one_line(args, said):
    if args == ["gpu"] and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=said):
        bench.main(args)


def test_its_own_defaults_are_known_keys():
    for what, more in bench.DEFAULTS.items():
        own_keys, rest = bench.parted(more)
        assert set(own_keys) == set(bench.OWN) and load_config([str(ROOT / "config.yaml"), *rest]), what


def test_a_model_of_the_general_way_is_one_line(monkeypatch, settings, tiny):
    model = tiny_model("lfm2")
    monkeypatch.setattr(bench_rollouts, "policy", lambda *_: (model, tiny[1]))
    with pytest.raises(UserError, match="goes the general way, which is not measured here"):
        bench.training(settings(), {})
