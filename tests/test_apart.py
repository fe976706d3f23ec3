import os
import random
import signal
import subprocess
import sys
import time
from collections import deque

import pytest

from config import UserError
from conftest import ROOT, run_of
from engine import Job
from envs import Quest, ReplayMismatch, make_env
from leafe import Attempt, episode, explore
from scale.apart import Remote

WORLD = '''
import os, sys, time
from envs import Quest
class Slow(Quest):
    apart = True
    def step(self, action):
        print("noise")
        time.sleep(0.001 * (len(action) % 3))
        return super().step(action)
class Forgetful(Slow):
    def reset(self, task):
        self.times = getattr(self, "times", 0) + 1
        return super().reset(task) + " " * self.times
class Dying(Slow):
    def step(self, action):
        os._exit(1)
'''


@pytest.fixture
def world(tmp_path):
    (tmp_path / "slow_world.py").write_text(WORLD)
    return lambda kind: f"{tmp_path}/slow_world.py:{kind}"


def rollouts(run):
    jobs = [Job(episode(run, run.world(), Attempt(task, str(i)), True), random.Random(f"{task}/{i}"), task,
                snapshot=True) for task in Quest().tasks("valid")[:6] for i in range(2)]
    return sorted(((b := job.result).task, b.name, b.end, [t.action_ids for t in b.turns])
                  for job in run.policy.engine().run(deque(jobs)))


def test_episodes_in_processes_of_their_own_are_those_of_one_process(tiny, settings, world):
    found = rollouts(run_of(settings(f"env={world('Slow')}", "workers=3"), tiny))
    assert found == rollouts(run_of(settings(), tiny)) and len(found) == 12


def test_trees_grown_in_processes_of_their_own_are_those_of_one_process(tiny, settings, world, tmp_path):
    tasks, trees = Quest().tasks("train")[:3], []
    for n, args in enumerate(([f"env={world('Slow')}", "workers=2"], [])):
        run = run_of(settings(*args, f"out={tmp_path}/{n}"), tiny, folder=True)
        trees.append([branch for tree in explore(run, tasks) for branch in tree.branches])
    assert max(map(len, Remote.idle.values())) <= 3 and any(branch.experience for branch in trees[0])
    assert sorted(map(str, trees[0])) == sorted(map(str, trees[1]))


def test_a_world_that_does_not_replay_is_found_out_there_too(world):
    env = make_env(world("Forgetful"))
    task = env.tasks("valid")[0]
    env.reset(task).result()
    with pytest.raises(ReplayMismatch):
        env.submit("rollback", task, [("other", "go attic")]).result()
    with pytest.raises(UserError, match="quest has no task"):
        env.reset("nothing").result()


def test_processes_are_used_again_and_a_world_plays_by_hand(world):
    env = make_env(world("Slow"))
    assert isinstance(env, Remote) and env.rules == Quest.rules and env.max_turns == Quest.max_turns
    task = env.tasks("valid")[0]
    pid = env.process.pid
    assert env.rollback(task, []).result() == Quest().reset(task) and env.actions() and env.difficulty(task)
    assert env.step("go nowhere").result().valid is False and env.action("a\nb") == "b"
    env.close()
    again = make_env(world("Slow"))
    assert again.process is None and again.actions() and again.process.pid == pid


def test_a_process_that_dies_is_one_clear_line(world):
    env = make_env(world("Dying"))
    env.reset(env.tasks("valid")[0]).result()
    with pytest.raises(UserError, match="ended by itself"):
        env.step("go attic").result()


def test_its_processes_end_with_the_program_however_it_ends(world):
    source = (f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom envs import make_env\n"
              f"env = make_env({world('Slow')!r})\nenv.tasks('test')\nprint(env.process.pid, flush=True)\n"
              f"time.sleep(60)")
    for how in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        pid = int(process.stdout.readline())
        process.send_signal(how)
        process.wait(20)
        for _ in range(100):
            try:
                with open(f"/proc/{pid}/stat") as file:
                    if file.read().split(")")[1].split()[0] == "Z":
                        break
            except OSError:
                break
            time.sleep(0.1)
        else:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("it lives on")


@pytest.mark.parametrize("name, message", [("nothing", "there is no 'nothing'"),
                                           ("no.py:A", "there is no file no.py"),
                                           ("envs.py:Nothing", r"has no class Nothing\(Env\)"),
                                           ("envs.py:Outcome", r"has no class Outcome\(Env\)")])
def test_a_world_that_is_not_there_is_one_clear_line(name, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        make_env(name)


@pytest.mark.slow
def test_the_page_s_world_of_your_own_plays_and_trains(tmp_path):
    text = (ROOT / "docs" / "worlds.md").read_text()
    source, commands = text.partition("(doors.py):")[2].split("```")[1:3]
    assert len([line for line in source.removeprefix("python\n").splitlines() if line.strip()]) <= 25
    (tmp_path / "doors.py").write_text(source.removeprefix("python\n"))
    play, whole = [line.split("#")[0].replace("doors.py", str(tmp_path / "doors.py")).split()[1:]
                   for line in commands.splitlines() if line.startswith("    python")][:2]
    played = subprocess.run([sys.executable, *play], input="hint\ngo attic\nundo\ngo cellar\ngo garden\ngo attic\n",
                            cwd=ROOT, text=True, capture_output=True)
    assert "go attic, go cellar, go garden" in played.stdout and "after" in played.stdout, played.stderr
    whole = [*whole, "preset=smoke", f"out={tmp_path / 'run'}"]
    trained = subprocess.run([sys.executable, *whole], cwd=ROOT, text=True, capture_output=True)
    assert trained.returncode == 0 and "doors: 8 tasks" in trained.stdout, trained.stderr
