"""Several processes of one run: they end as one does, however they are stopped, and leave nothing behind."""
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import programs
import ranks
from conftest import ROOT
from test_train import THREE, figures

SMALL = ["train_tasks=6", "test_tasks=4", "samples=4", "ks=[1]"]
STOPPED = "stopped; nothing is lost: the same command goes on from here"

WORLD = '''
import os
from envs import Quest
class Slow(Quest):
    """Where it says so, it raises: in the ranks WHERE, from their step number WHEN on."""
    steps = 0
    def step(self, action):
        Slow.steps += 1
        if os.environ["LOCAL_RANK"] in os.environ.get("WHERE", "") and Slow.steps > int(os.environ["WHEN"]):
            raise ValueError("the roof came down")
        return super().step(action)
class Apart(Quest):
    apart = True
'''


def train(out, *args, script="train.py", **env):
    """A run under way; its threads are one for each process, unless it is told otherwise."""
    return programs.start([script, "config.yaml", "preset=smoke", f"out={out}", *SMALL, *args],
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def whole(process):
    """What it said on stdout, on stderr."""
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return shown, errors


def until(there, process):
    deadline = time.time() + 200
    while not there():
        assert time.time() < deadline and programs.alive(process.pid), process.communicate()[1]
        time.sleep(0.02)


def all_gone(pids, seconds=2.0):
    deadline = time.time() + seconds
    while left := [pid for pid in pids if programs.alive(pid)]:
        if time.time() > deadline:
            return left
        time.sleep(0.02)
    return []


def killed(process, out):
    """Its parent is killed; nothing else is, and nothing stays."""
    pids = [process.pid, *programs.started_by(process.pid)]
    os.kill(process.pid, signal.SIGKILL)
    assert all_gone(pids) == []
    process.communicate()
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return pids


def results(out):
    """All that a run leaves, to the byte, but for times and the order of lines."""
    lines = {name: sorted((out / name).read_bytes().splitlines()) for name in ("trees.jsonl", "samples.jsonl")}
    files = ("sft.jsonl", "passk.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    return lines | {name: (out / name).read_bytes() for name in files} | dict(figures=figures(out))


def table(shown):
    return [line for line in shown.splitlines() if "results: " not in line]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process: (folder, stdout)."""
    out = tmp_path_factory.mktemp("one") / "run"
    return out, whole(train(out, "processes=1"))[0]


def test_two_processes_end_as_one_does_and_say_it_once(one, tmp_path):
    shown, errors = whole(train(tmp_path / "run", "processes=2"))
    assert results(tmp_path / "run") == results(one[0])
    assert table(shown) == table(one[1]) and not list(tmp_path.glob("run/*.part"))
    bars = [line.partition(":")[0] for line in errors.replace("\r", "\n").splitlines() if " 0%|" in line]
    assert bars == ["Loading weights", "sample base", "explore, round 1", "train, round 1", "sample leafe"]


@pytest.mark.slow
def test_two_threads_of_one_process_end_as_two_processes_do(tmp_path):
    args = ["train_tasks=2", "test_tasks=1", "samples=1", "steps=2", "evaluate_base=false"]
    for count, threads in ((1, 2), (2, 1)):
        whole(train(tmp_path / f"{count}", f"processes={count}", *args, OMP_NUM_THREADS=f"{threads}"))
    assert results(tmp_path / "1") == results(tmp_path / "2")


@pytest.mark.slow
def test_a_run_killed_goes_on_with_any_number_of_processes_and_ends_in_the_same_bytes(one, tmp_path):
    out = tmp_path / "run"
    for processes, file in ((1, "samples.jsonl"), (2, "trees.jsonl.1.part"), (3, "checkpoint.pt")):
        process = train(out, f"processes={processes}")
        until((out / file).exists, process)
        assert len(killed(process, out)) == 1 + processes * (processes > 1)
    assert not (out / "passk.json").exists()
    whole(train(out, "processes=1"))
    assert results(out) == results(one[0]) and not list(out.glob("*.part"))


@pytest.mark.slow
def test_two_ranks_of_torchrun_end_as_one_process_does(one, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py",
                           "config.yaml", "preset=smoke", f"out={tmp_path}/run", *SMALL], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == results(one[0]) and table(done.stdout) == table(one[1])


@pytest.mark.slow
def test_two_processes_with_three_losses_end_as_one_does(tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    args = [f"method={tmp_path}/three.py", "evaluate_base=false", "test_tasks=2", "samples=2", "steps=3"]
    for count in (1, 2):
        whole(train(tmp_path / f"{count}", f"processes={count}", *args))
    assert figures(tmp_path / "1") == figures(tmp_path / "2")
    adapters = [(tmp_path / f"{count}/adapter/adapter_model.safetensors").read_bytes() for count in (1, 2)]
    assert adapters[0] == adapters[1]
    steps = [record for record in figures(tmp_path / "1") if "step" in record]
    assert len(steps) == 3 and all(record[name] > 0 for record in steps for name in ("L_allowed", "L_refused"))


def test_an_evaluation_by_more_processes_than_tasks_is_that_of_one(one, tmp_path):
    shown = [whole(train(tmp_path / f"{count}", f"processes={count}", f"adapter={one[0]}/adapter", "test_tasks=1",
                         script="eval.py"))[0] for count in (1, 3)]
    for name in ("samples.jsonl", "passk.json"):
        assert sorted((tmp_path / f"1/{name}").read_text().splitlines()) == sorted(
            (tmp_path / f"3/{name}").read_text().splitlines())
    assert table(shown[0]) == table(shown[1])


@pytest.mark.slow
def test_a_comparison_by_two_processes_is_that_of_one(tmp_path):
    args = ["method=compare", "train_tasks=3", "test_tasks=2", "samples=2", "steps=2"]
    shown = [whole(train(tmp_path / f"{count}", f"processes={count}", *args))[0] for count in (1, 2)]
    first, second = ([re.sub(r" +\d+\.\d$", "", line) for line in table(text)] for text in shown)      # minutes
    assert first == second
    runs = sorted(path.name for path in (tmp_path / "1").glob("*-0"))
    assert len(runs) == 6
    for run in runs:
        assert figures(tmp_path / "1" / run) == figures(tmp_path / "2" / run), run


# stopped

@pytest.mark.parametrize("way", ["the parent alone", "all, as a terminal does", "twice", "one of them suspended"])
def test_ctrl_c_is_one_line_and_ends_all(way, tmp_path):
    process = train(tmp_path / "run", "processes=2", "samples=4096")
    until((tmp_path / "run/samples.jsonl.1.part").exists, process)
    pids = programs.started_by(process.pid)
    if "suspended" in way:
        os.kill(pids[0], signal.SIGSTOP)
    os.kill(-process.pid if "all" in way else process.pid, signal.SIGINT)
    if way == "twice":
        time.sleep(0.02)
        os.kill(-process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.count(STOPPED) == 1 and errors.endswith(f"\n{STOPPED}\n"), errors
    assert "Traceback" not in errors and "rror" not in errors and len(pids) == 2 and all_gone(pids) == []


def test_a_world_in_a_process_of_its_own_ends_with_the_run_that_was_killed(tmp_path):
    (tmp_path / "own.py").write_text(WORLD)
    process = train(tmp_path / "run", "processes=2", "workers=2", "samples=4096", f"env={tmp_path}/own.py:Apart")
    until((tmp_path / "run/samples.jsonl.1.part").exists, process)
    assert len(killed(process, tmp_path / "run")) >= 1 + 2 * (1 + 2)   # two ranks; in each a keeper and its world


# what fails

def one_error(errors):
    """It, without the progress bars before it."""
    said = errors.replace("\r", "\n")
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    return said[said.index("error: "):]


@pytest.mark.parametrize("where, when", [("1", 0), ("0", 300), ("1", 300), ("0 1", 0), ("0 1", 300)])
def test_a_world_that_fails_in_one_or_in_all_is_one_error(where, when, tmp_path):
    (tmp_path / "own.py").write_text(WORLD)
    process = train(tmp_path / "run", "processes=2", f"env={tmp_path}/own.py:Slow", WHERE=where, WHEN=str(when))
    _, errors = process.communicate(timeout=60)
    lines = one_error(errors).splitlines()
    assert process.returncode == 1 and len(lines) == 2 and "ValueError: the roof came down" in lines[1]


@pytest.mark.slow
def test_training_that_diverges_in_two_processes_is_one_line(tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    process = train(tmp_path / "run", "processes=2", f"method={tmp_path}/three.py", "evaluate_base=false", "train_tasks=2",
                    "steps=3", "lr=1e30")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and one_error(errors).startswith("error: lr: training diverged in step")
    assert not (tmp_path / "run/checkpoint.pt").exists()


SCRIPT = f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import config, ranks
def main(args):
    ranks.start(2)
    first, second = ranks.rank() == 0, ranks.rank() == 1
    def wait():
        while True: ranks.wait_for_all(); time.sleep(0.01)
    CODE
config.guarded(main)
"""


def said_by(code, tmp_path, way=None):
    """(exit code, stdout, stderr) of two processes that do it; `way`: of a shell, for its streams."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("CODE", code))
    if way:
        line = f"set -o pipefail; {sys.executable} {tmp_path}/script.py {way}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    else:
        done = programs.run([tmp_path / "script.py"], timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kill", ["SIGKILL", "SIGSEGV"])
def test_a_process_that_is_killed_is_one_line(kill, rank, tmp_path):
    code = f"ranks.rank() == {rank} and os.kill(os.getpid(), signal.{kill}); wait()"
    ended, _, errors = said_by(code, tmp_path)
    assert ended == 1 and one_error(errors) == (
        f"error: process {rank + 1} of 2 was ended by {kill} (out of memory? then lower processes= or slots=); nothing is "
        "lost: the same command goes on from here\n")


KILLED = '''
import os, subprocess
def train(run, round_):
    if os.environ["LOCAL_RANK"] == "1":
        parent = os.getppid()
        subprocess.Popen(["sh", "-c", f"sleep 0.05; kill -CONT {parent}"])
        os.kill(parent, 19)                            # it notices last
        os.kill(os.getpid(), 9)
    run.store("notes.jsonl")
'''


def test_a_method_is_not_blamed_for_a_process_that_was_killed(tmp_path):
    (tmp_path / "mine.py").write_text(KILLED)
    process = train(tmp_path / "run", "processes=2", "evaluate_base=false", f"method={tmp_path}/mine.py")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and one_error(errors).startswith("error: process 2 of 2 was ended by SIGKILL")


@pytest.mark.parametrize("code, says", [
    ("if second: raise config.UserError('no')\n    wait()", "error: no\n"),
    ("if first: raise config.UserError('no')\n    wait()", "error: no\n"),
    ("raise config.UserError('no')", "error: no\n"),
    ("if second: open('/dev/full', 'w', 0 + 1).write('x' * 99999)\n    wait()", "error: out: No space left on device; nothing is"),
    ("if second: raise MemoryError\n    wait()", "error: out of memory; lower slots=")])
def test_what_one_process_or_all_find_is_told_once(code, says, tmp_path):
    ended, _, errors = said_by(code, tmp_path)
    assert ended == 1 and one_error(errors).startswith(says) and one_error(errors).count("\n") == 1


def test_a_fault_of_ours_in_one_process_is_one_traceback(tmp_path):
    ended, _, errors = said_by("if second: raise KeyError('ours')\n    wait()", tmp_path)
    assert ended == 1 and errors.count("Traceback") == 1 and errors.endswith("KeyError: 'ours'\n")


def test_a_method_that_fails_in_one_process_alone_is_told_with_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("import os\ndef train(run, round_):\n    1 / (os.environ['LOCAL_RANK'] == '0')\n"
                                      "    run.store('notes.jsonl')\n")
    process = train(tmp_path / "run", "processes=2", "evaluate_base=false", f"method={tmp_path}/mine.py")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and one_error(errors) == (
        f"error: method: train of {tmp_path}/mine.py failed\n  {tmp_path}/mine.py, line 3, in train: ZeroDivisionError: "
        "division by zero\n")


@pytest.mark.parametrize("way, ends", [("| head -1", 141), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0)])
def test_processes_go_on_whoever_reads_what_they_say(way, ends, tmp_path):
    code = f"[print('line', i) for i in range(3000)]; wait_ = ranks.wait_for_all(); first and open('{tmp_path}/x', 'w')"
    ended, shown, errors = said_by(code, tmp_path, way)
    assert (ended, errors) == (ends, "") and (tmp_path / "x").exists()
    assert shown.count("line 0\n") == (">&-" not in way.replace("2>&-", "")) and shown.count("line 2999\n") <= 1


def test_what_else_a_parent_has_started_may_end_before_them(tmp_path):
    """The first process of a container has to wait for all that lost their parent."""
    (tmp_path / "script.py").write_text("import subprocess\nsubprocess.Popen(['sleep', '0.1'])\n"
                                        + SCRIPT.replace("CODE", "time.sleep(0.3); first and print('whole')"))
    done = programs.run([tmp_path / "script.py"], timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")


def test_a_machine_that_starts_no_more_processes_says_so_in_one_line(tmp_path):
    patch = ("import os\nreal, calls = os.fork, []\ndef fork():\n    calls.append(1)\n"
             "    if len(calls) == 2: raise BlockingIOError(11, 'Resource temporarily unavailable')\n    return real()\n"
             "os.fork = fork\n")
    (tmp_path / "script.py").write_text(patch + SCRIPT.replace("CODE", "wait()"))
    done = programs.run([tmp_path / "script.py"], timeout=60)
    assert done.returncode == 1 and one_error(done.stderr) == (
        "error: processes: this machine starts 1, not 2: Resource temporarily unavailable\n")


def test_without_a_network_of_its_own_a_machine_says_so_in_one_line(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("CODE", "wait()"))
    line = ["unshare", "-rn", sys.executable, tmp_path / "script.py"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    if done.stderr.startswith("unshare: "):
        pytest.skip(done.stderr)
    assert done.returncode == 1 and one_error(done.stderr).endswith("; processes=1 needs no network\n")


def test_cores_are_those_of_the_affinity_and_of_a_container_s_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for quota, count in (("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)):
        monkeypatch.setattr(Path, "read_text", lambda path: f"{quota}\n")
        assert ranks.cores() == count
    monkeypatch.undo()
    assert 1 <= ranks.cores() <= len(os.sched_getaffinity(0))


def test_tasks_are_shared_by_lot_each_to_one_rank_in_their_order(monkeypatch):
    tasks, shares = [f"train-{1 + i % 4}-{i:04}" for i in range(192)], []
    monkeypatch.setattr(ranks, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(ranks.lot(tasks))
    assert sorted(sum(shares, [])) == sorted(tasks) and len(shares[0]) == len(shares[1])
    for mine in shares:
        assert [tasks.index(task) for task in mine] == sorted(map(tasks.index, mine))
        assert all(12 < sum(task.split("-")[1] == needs for task in mine) < 36 for needs in "1234")      # of 48 each
