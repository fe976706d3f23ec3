import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import programs
from config import SHIPPED, UserError, load_config
from conftest import ROOT, run_of
from engine import Job
from envs import Outcome, Quest, ReplayMismatch, make_env, wait_for
from leafe import Attempt, episode, explore
from run import Policy
from scale.apart import Process, Remote

WORLD = '''
import os, signal, subprocess, sys, time
from envs import Outcome, Quest
class Slow(Quest):
    apart = True
    def step(self, action):
        print("noise")
        time.sleep(0.001 * (len(action) % 3))
        return super().step(action)
class Together(Slow):
    shares = True
    def step(self, action):
        if action.startswith("do:"): exec(action[3:])
        return super().step(action)
class Wordy(Together):
    def action(self, reply): return super().action(reply)
class Careless(Together):
    def reset(self, task):
        Careless.moves = 0
        return super().reset(task)
    def step(self, action):
        Careless.moves += 1
        outcome = super().step(action)
        return Outcome(f"{Careless.moves} moves", outcome.score, outcome.done, outcome.success)
class Forgetful(Slow):
    def reset(self, task):
        self.times = getattr(self, "times", 0) + 1
        return super().reset(task) + " " * self.times
class Dying(Slow):
    def step(self, action):
        os._exit(1)
class Ends(Slow):
    def step(self, action): exec(action)
class Texts(Slow):
    """Big, and with halves of surrogate pairs, even two that would make a whole."""
    odd = "\\ud83d \\ude00\\ud83d \\ud83d\\ude00 \\0 \\x1b \\u2028 \\"" + "é" * 3_000_000
    def reset(self, task): return super().reset(task) + self.odd
    def step(self, action): return Outcome(f"{action == self.odd} {self.odd}", 0.1, valid=False)
    def action(self, reply): return reply
    def actions(self): return [self.odd]
    def difficulty(self, task): return self.odd
class Hangs(Slow):
    def step(self, action):
        if action.startswith("hang"): exec(action.partition(":")[2])
        return super().step(action)
class HangsWhen(Slow):
    def step(self, action):
        if self.left == 9: time.sleep(1000)
        return super().step(action)
class HangsAtOnce(Slow):
    def reset(self, task): time.sleep(1000)
class HangsInInit(Slow):
    def __init__(self): time.sleep(1000)
class Says(Slow):
    """Writes wherever it can."""
    def step(self, action):
        print("noise", flush=True)
        sys.stdout.write("x" * 100_000)
        os.write(1, b"more noise")
        subprocess.run(["echo", "noise of a child"])
        return super().step(action)
class Forges(Slow):
    def step(self, action):
        message = action.encode()
        for file in range(3, 20):
            try: os.write(file, len(message).to_bytes(8, "big") + message)
            except OSError: pass
        return super().step(action)
class Closes(Slow):
    def close(self):
        open(os.environ["TOLD"], "a").write("closed")
        if "raise" in os.environ["TOLD"]: raise OSError("\\x1b[2J")
class Extra(Slow):
    """An Outcome that holds more than others do."""
    def step(self, action):
        outcome = super().step(action)
        outcome.info = lambda: 1
        return outcome
class Wrong(Slow):
    bad = None
    def step(self, action):
        if action == "go": return eval(self.bad)
        return super().step(action)
'''


@pytest.fixture
def world(tmp_path):
    (tmp_path / "slow_world.py").write_text(WORLD)
    return lambda kind: f"{tmp_path}/slow_world.py:{kind}"


def processes(name):
    return [process for process in Process.started if process.key[0] == name]


def rollouts(run):
    jobs = [Job(episode(run, run.world(), Attempt(task, str(i)), True), random.Random(f"{task}/{i}"), task,
                snapshot=True) for task in Quest().tasks("valid")[:6] for i in range(2)]
    return sorted(((b := job.result).task, b.name, b.end, [t.action_ids for t in b.turns])
                  for job in run.policy.engine().run(deque(jobs)))


@pytest.fixture(scope="module")
def here(tiny, tmp_path_factory):
    """The episodes in this process."""
    cfg = load_config([str(SHIPPED), "preset=smoke", f"out={tmp_path_factory.mktemp('here')}"])
    return rollouts(run_of(cfg, tiny))


def test_episodes_in_processes_of_their_own_are_those_of_one_process(tiny, settings, world, here):
    found = rollouts(run_of(settings(f"env={world('Slow')}", "workers=3"), tiny))
    assert found == here and len(found) == 12


def test_trees_grown_in_processes_of_their_own_are_those_of_one_process(tiny, settings, world, tmp_path):
    tasks, trees = Quest().tasks("train")[:3], []
    for n, args in enumerate(([f"env={world('Slow')}", "workers=2"], [])):
        run = run_of(settings(*args, f"out={tmp_path}/{n}"), tiny, folder=True)
        trees.append([branch for tree in explore(run, tasks) for branch in tree.branches])
    assert len(processes(world('Slow'))) <= 3 and any(branch.experience for branch in trees[0])
    assert sorted(map(str, trees[0])) == sorted(map(str, trees[1]))


@pytest.mark.parametrize("kind, workers, slots, side_by_side", [("Slow", 2, 192, 2), ("Together", 1, 192, 192),
                                                                ("Together", 3, 5, 5), ("Together", 8, 2, 2)])
def test_conversations_follow_slots_and_only_worlds_that_share_no_process_follow_workers(
        tiny, settings, world, here, kind, workers, slots, side_by_side):
    cfg = settings(f"env={world(kind)}", f"workers={workers}", f"slots={slots}")
    found = rollouts(run_of(cfg, tiny))
    there = processes(world(kind))
    assert found == here and len(found) == 12
    assert Policy(*tiny, cfg).engine().slots == side_by_side
    assert all(not process.held for process in there) and len(there) == min(workers, side_by_side)
    assert sum(len(process.spare) for process in there) == min(12, side_by_side)


def test_trees_are_the_same_whatever_workers_and_slots_are_of_worlds_that_share_processes(tiny, settings, world, tmp_path):
    tasks, trees = Quest().tasks("train")[:2], []
    for n, args in enumerate((["env=quest"], *([f"env={world('Wordy')}", f"workers={workers}", f"slots={slots}"]
                                               for workers, slots in ((1, 192), (3, 2))))):
        run = run_of(settings(*args, f"out={tmp_path}/{n}"), tiny, folder=True)
        trees.append(sorted(str(branch) for tree in explore(run, tasks) for branch in tree.branches))
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) > 4


@pytest.fixture
def three(world):
    """Worlds that share a process, each at its task's beginning."""
    worlds = [make_env(world("Together")) for _ in range(3)]
    for env, task in zip(worlds, Quest().tasks("valid")):
        env.reset(task).result()
    assert len(processes(world("Together"))) == 1
    return worlds


@pytest.mark.parametrize("doing, says", [
    ("os._exit(3)", r"ended by itself, with exit code 3, in"),
    ("os.kill(os.getpid(), 9)", r"was killed \(SIGKILL; out of memory\? then lower workers= or slots=\) in"),
    ("time.sleep(1000)", r"has not answered for 2 seconds, in")])
def test_what_ends_a_shared_process_is_told_of_the_world_that_did_it_whichever_is_asked(three, world, doing, says):
    for env in three:
        env.timeout = 2.0
    asked = [three[1].step("do:" + doing), three[0].step("look"), three[2].step("look")]
    said = {str(future.exception()) for future in [*asked, three[0].step("look")]}
    assert len(said) == 1 and re.match(rf"env: the process of .*:Together {says} step\('do:.*'\) of task "
                                       rf"'{Quest().tasks('valid')[1]}'", next(iter(said))), said
    for env in three:
        env.close()
    again = make_env(world("Together"))
    assert again.reset("valid-1-0000").result() and again.process is not three[0].process      # another takes its place


def test_a_world_that_waits_for_its_turn_in_a_shared_process_does_not_hang(three):
    for env in three:
        env.timeout = 4.0
    asked = [env.step("do:time.sleep(1.5)") for env in three]              # the last one's answer is there after 4.5
    assert [future.result().obs for future in asked] == ["you cannot do that."] * 3


@pytest.mark.parametrize("doing", ["raise KeyError('attic')", "raise MemoryError", "sys.exit()", "raise KeyboardInterrupt"])
def test_what_a_world_raises_in_a_shared_process_leaves_the_others_there_as_they_are(three, doing):
    alone, task = Quest(), Quest().tasks("valid")[0]
    alone.reset(task)
    for action in [*alone.actions()[:4], "look"]:
        failed, outcome = three[1].step("do:" + doing), three[0].step(action)
        assert isinstance(failed.exception(), UserError) and outcome.result() == alone.step(action)
    assert three[1].reset("valid-1-0000").result() == Quest().reset("valid-1-0000")


def test_worlds_that_share_a_process_and_what_changes_are_found_out_when_they_are_examined(world):
    assert make_env(world("Together")).examine("train") == []
    with pytest.raises(UserError, match="class Careless: .*keep all that changes in self, not in the class or the file"):
        make_env(world("Careless")).examine("train")


def test_the_action_of_a_reply_is_not_waited_for_behind_what_other_worlds_are_asked(three, world, tmp_path):
    asked = three[0].step(f"do:while not os.path.exists({str(tmp_path / 'now')!r}): time.sleep(0.01)")
    assert three[1].action("a\nb") == "b" and not asked.done()            # the default needs no world
    (tmp_path / "now").touch()
    assert asked.result().obs == "you cannot do that."
    env = make_env(world("Wordy"))
    assert isinstance(env.action("a"), Future) and wait_for(env, "action", "a\nb") == "b"


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


HANGS = {
    "busy": "while True: pass", "asleep": "time.sleep(1000)", "in C": "import ctypes; ctypes.PyDLL(None).sleep(1000)",
    "stubborn": "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]\nwhile True: time.sleep(1)",
    "parent": "subprocess.Popen(['sleep', MARK]); subprocess.run(['setsid', '-f', 'sleep', MARK]); time.sleep(1000)"}


def running(mark: str) -> list[str]:
    """Processes whose command line has this word."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
        except OSError:
            continue
        found += [pid] if mark in words else []
    return found


@pytest.mark.parametrize("doing", HANGS)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_nothing_is_left_of_a_program_that_is_killed_whatever_its_world_is_doing(world, how, doing):
    mark = f"{random.randrange(10**6, 10**7)}"
    source = (f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom envs import make_env\n"
              f"env, idle = make_env({world('Hangs')!r}), make_env({world('Hangs')!r})\nidle.tasks('test')\n"
              f"env.reset(env.tasks('test')[0]).result()\n"
              f"env.step({('hang:' + HANGS[doing].replace('MARK', repr(mark)))!r})\n"
              f"time.sleep(0.5)\nprint('now', flush=True)\ntime.sleep(1000)")
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == b"now\n"
    assert len(running(mark)) == 2 * (doing == "parent")
    began = time.monotonic()
    process.send_signal(getattr(signal, how))
    while part := os.read(process.stdout.fileno(), 4096):        # until nobody holds the terminal's pipe any more
        assert b"KeyboardInterrupt" in part or how == "SIGINT"
    assert time.monotonic() - began < 5 and process.wait(5) != 0
    assert running(mark) == [] == running(world("Hangs"))


@pytest.mark.parametrize("kind, place", [
    ("HangsWhen", r"step\('.*'\) of task 'train-\d-\d{4}'"), ("HangsAtOnce", r"reset\('train-1-0000'\)"),
    ("HangsInInit", r"__init__\(''\)")])
def test_a_hang_is_one_line_that_names_the_task_and_the_action(world, tiny, settings, kind, place):
    cfg = settings(f"env={world(kind)}", "env_timeout=1.5", "workers=2")
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        if kind != "HangsWhen":
            run_of(cfg, tiny).world().examine("train")
        explore(run_of(cfg, tiny, folder=True), Quest().tasks("train")[:3])
    assert re.fullmatch(rf"env: the process of {world(kind)} has not answered for 1.5 seconds, in {place}; does it "
                        r"hang\? Else give it more: env_timeout=", str(caught.value)), caught.value
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("value", ["0", "-1", "ten", "null"])
def test_a_time_that_is_none_is_one_line(settings, value):
    with pytest.raises(UserError, match="env_timeout is .*, but must be"):
        settings(f"env_timeout={value}")


def test_a_long_replay_has_the_time_of_all_its_steps(world):
    env = make_env(world("Hangs"), timeout=3.0)
    task = env.tasks("test")[0]
    turns, obs = [], env.reset(task).result()
    for action in ["hang:time.sleep(1.1)"] * 4 + ["end"]:
        turns.append(SimpleNamespace(obs=obs, action=action))
        obs = env.step(action).result().obs if action != "end" else obs
    assert env.rollback(task, turns).result() == turns[-1].obs


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_world_hangs_at_the_first_time(world, tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", "config.yaml", "preset=smoke", f"env={world('HangsWhen')}",
                                f"out={tmp_path}/run"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    while b"sample base" not in said:
        said += os.read(process.stdout.fileno(), 4096)
    time.sleep(3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert time.monotonic() - began < 6 and process.wait() == 130
    assert b"stopped; nothing is lost" in said and b"Traceback" not in said


@pytest.mark.parametrize("action, says", [
    ("os._exit(3)", r"ended by itself, with exit code 3, in"), ("os._exit(0)", "with exit code 0, in"),
    ("os.kill(os.getpid(), 9)", r"was killed \(SIGKILL; out of memory\? then lower workers= or slots=\) in"),
    ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV in"), ("os.abort()", "was ended by SIGABRT in"),
    ("os.kill(os.getpid(), 15)", "was ended by SIGTERM in")])
def test_how_a_process_ended_is_told_and_memory_is_suspected_only_of_a_kill(world, action, says):
    env = make_env(world("Ends"))
    task = env.tasks("valid")[0]
    env.reset(task).result()
    with pytest.raises(UserError) as caught:
        env.step(action).result()
    place = re.escape(f"step({action!r}) of task {task!r}")
    assert re.fullmatch(f"env: the process of {world('Ends')} .*{says} {place}", str(caught.value)), caught.value
    env.close()
    assert make_env(world("Ends")).reset(task).result()                  # another process takes its place


@pytest.mark.parametrize("action, says", [
    ("raise KeyError('attic')", r"in step: KeyError: 'attic'"), ("raise MemoryError", "MemoryError: ; out of memory"),
    ("import sys; sys.exit('done')", "SystemExit: done"), ("input()", "EOFError: EOF when reading a line"),
    ("raise KeyboardInterrupt", r"line 1, in <module>: KeyboardInterrupt"),
    ("import sys; sys.stdin.buffer.read(1)[0]", "IndexError: ")])
def test_what_its_world_raises_there_keeps_the_world_s_file_and_line(world, action, says):
    env = make_env(world("Ends"))
    env.reset(env.tasks("valid")[0]).result()
    with pytest.raises(UserError) as caught:
        env.step(action).result()
    first, second = str(caught.value).split("\n")
    assert first.startswith("env: ") and "failed in step" in first
    assert says in second or re.search(says, second), second
    assert world("Ends").rpartition(":")[0] in second and "line " in second or "<string>" in second
    assert env.actions()                                                 # it lives on


def test_big_texts_and_halves_of_letters_come_through_as_they_are(world):
    env, odd = make_env(world("Texts")), "\ud83d \ude00\ud83d \ud83d\ude00 \0 \x1b \u2028 \"" + "é" * 3_000_000
    task = env.tasks("valid")[0]
    assert env.reset(task).result() == Quest().reset(task) + odd
    assert env.step(odd).result() == Outcome("True " + odd, 0.1, valid=False)
    assert env.actions() == [odd] and env.difficulty(task) == odd and wait_for(env, "action", odd) == odd
    turns = [SimpleNamespace(obs=Quest().reset(task) + odd, action=odd), SimpleNamespace(obs="True " + odd, action="")]
    assert env.rollback(task, turns).result() == "True " + odd


def test_what_a_world_and_its_children_print_is_no_answer(world, capfd):
    env = make_env(world("Says"))
    task = env.tasks("valid")[0]
    env.reset(task).result()
    assert env.step("go nowhere").result() == Outcome("you cannot do that.", 0.0, False, False, False)
    said = capfd.readouterr()
    assert said.out == "" and "noise of a child" in said.err and "more noise" in said.err
    assert make_env(world("Extra")).examine("train") == []               # what else an Outcome holds is not sent


@pytest.mark.parametrize("forged", [
    "garbage", "[]", "{}", "null", "[" * 100_000, '{"answer": 1}', '{"answer": ["a", 0.5, false, false]}',
    '{"answer": ["a", "1", false, false, true]}', '{"answer": ["a", 0.5, 0, false, true]}', '{"error": 3}',
    '{"answer": "a", "error": "b"}', '{"doing": 3}', '{"doing": []}', '{"doing": [3]}', '{"what": "a"}'])
def test_what_is_forged_is_one_line_and_no_code(world, forged):
    env = make_env(world("Forges"))
    task = env.tasks("valid")[0]
    env.reset(task).result()
    with pytest.raises(UserError, match=r"^env: the process of .*:Forges gave what is no answer, in .*; it must not"):
        env.step(forged).result()


@pytest.mark.parametrize("bad, says", [
    ("Outcome('a', 10)", "the score of an Outcome must be a number of 0..1, not int 10"),
    ("Outcome('a', 0.5, None)", "done of an Outcome must be True or False, not NoneType None"),
    ("Outcome(None)", "the obs of an Outcome must be text, not NoneType None"),
    ("Outcome('a', 1.0)", "an Outcome has score 1 but success=False"),
    ("('a', 0.5, False, False, {})", "Gymnasium's five are")])
def test_a_bad_outcome_there_names_its_field_and_the_world_s_file(world, bad, says, tmp_path):
    file = tmp_path / "slow_world.py"
    world("Wrong")
    file.write_text(file.read_text().replace("bad = None", f"bad = {bad!r}"))
    env = make_env(f"{file}:Wrong")
    env.reset(env.tasks("valid")[0]).result()
    with pytest.raises(UserError) as caught:
        env.step("go").result()
    said = str(caught.value)
    assert said.startswith(f"env: {file}, class Wrong: ") and says in said and "\n" not in said


def test_a_program_without_streams_has_worlds_all_the_same(world):
    source = (f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport config\nfrom envs import make_env\n"
              f"def main(args):\n env = make_env({world('Says')!r})\n env.reset(env.tasks('test')[0]).result()\n"
              f" sys.exit(7 if env.step('go').result().obs == 'you cannot do that.' else 1)\nconfig.guarded(main)")
    for closed in ("<&- >&- 2>&-", "2>&-", "<&-", ">&-"):
        done = subprocess.run(["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, source], capture_output=True)
        assert done.returncode == 7, (closed, done)


@pytest.mark.parametrize("raises", [False, True])
def test_a_world_is_closed_when_the_program_ends_and_what_it_raises_then_is_a_note(world, tmp_path, raises):
    told = tmp_path / ("raise" if raises else "told")
    source = (f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom envs import make_env\n"
              f"env = make_env({world('Closes')!r})\nenv.tasks('test')")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          env={**os.environ, "TOLD": str(told)})
    assert done.returncode == 0 and told.read_text() == "closed" and "Traceback" not in done.stderr
    assert ("note: env: Closes failed in close()" in done.stderr and r"OSError: \x1b[2J" in done.stderr) == raises


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
    played = programs.run(play, typed="hint\ngo attic\nundo\ngo cellar\ngo garden\ngo attic\n")
    assert "go attic, go cellar, go garden" in played.stdout and "after" in played.stdout, played.stderr
    whole = [*whole, "preset=smoke", f"out={tmp_path / 'run'}"]
    trained = programs.run(whole)
    assert trained.returncode == 0 and "doors: 8 tasks" in trained.stdout, trained.stderr
