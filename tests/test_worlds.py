"""ScienceWorld and ALFWorld for real, on their packages. A user without them sees skips; CI has them."""
import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import SHARED, needs_shared_data
from config import UserError, installed
from envs import make_env

DATA = Path(__file__).parent / "data" / "alfworld_sample.jsonl"


def needs(package: str, program: str = ""):
    if program and not shutil.which(program):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed")
    try:
        __import__(package)
    except ImportError:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{package} is not installed")


@pytest.fixture(scope="module")
def science():
    """Two instances, so that replays are read on another than the first reading."""
    needs("scienceworld", "java")
    from worlds.scienceworld import ScienceWorld
    worlds = ScienceWorld("easy"), ScienceWorld("easy")
    yield worlds
    for world in worlds:
        world.close()


@pytest.fixture(scope="module")
def house():
    needs("alfworld")
    from worlds.alfworld import ALFWorld
    return ALFWorld(str(DATA))


def wander(env, task: str, steps: int, rng: random.Random) -> list[SimpleNamespace]:
    """A random walk, a nonsense action now and then."""
    turns = [SimpleNamespace(obs=env.reset(task), action="")]
    for _ in range(steps):
        turns[-1].action = rng.choice(env.actions()) if rng.random() < 0.9 else "sing a song"
        outcome = env.step(turns[-1].action)
        turns.append(SimpleNamespace(obs=outcome.obs, action=""))
        if outcome.done:
            break
    return turns


@pytest.mark.slow
def test_sixty_scienceworld_episodes_replay_byte_for_byte_on_another_instance(science):
    rng, tasks = random.Random(0), science[0].tasks("train")[:60]
    walks = [wander(science[0], task, 25, rng) for task in tasks]
    for task, walk in zip(tasks, walks):
        assert science[1].rollback(task, walk) == walk[-1].obs
        assert science[0].rollback(task, walk[:5]) == walk[:5][-1].obs
    assert len({task.split("/")[0] for task in tasks}) == 30


def test_both_are_right_when_they_are_examined():
    needs("scienceworld", "java")
    needs("alfworld")
    assert make_env("scienceworld", "easy").examine("train") == []
    assert make_env("alfworld", str(DATA)).examine("valid") == []


def test_scienceworld_has_the_packages_splits(science):
    sizes = {split: len(science[0].tasks(split)) for split in ("train", "valid", "test")}
    assert sizes == dict(train=3592, valid=1796, test=1819) and science[0].tasks("corpus") == []


def test_scienceworlds_own_solution_wins_and_a_wrong_focus_loses(science):
    env = science[0]
    task = env.tasks("test")[0]
    env.reset(task)
    env.env.load(task.split("/")[0], int(task.split("/")[1]), "easy", generateGoldPath=True)
    solution = env.env.get_gold_action_sequence()
    env.reset(task)
    env.left = 1000
    outcomes = [env.step(action) for action in solution]
    assert outcomes[-1].success and outcomes[-1].score == 1 and outcomes[-1].done
    assert any(0 < outcome.score < 1 and not outcome.done for outcome in outcomes)
    env.reset(task)
    outcome = env.step("focus on agent")
    assert outcome.done and not outcome.success and outcome.score == 0


def test_scienceworld_refuses_what_it_does_not_know_and_the_packages_reset(science):
    env = science[0]
    env.reset("boil/0")
    assert not env.step("sing").valid and env.step("look around").valid
    moved = env.step("go to kitchen").obs
    assert not env.step("reset task").valid and env.step("look around").obs in moved + env.step("look around").obs
    assert "kitchen" in env.step("look around").obs and not any("reset task" in a for a in env.actions())
    with pytest.raises(UserError, match="no task 'boil'"):
        env.reset("boil")
    with pytest.raises(UserError, match="no simplification 'hard'"):
        type(env)("hard")


def test_scienceworlds_java_ends_with_its_process():
    needs("scienceworld", "java")
    env = make_env("scienceworld", "easy")
    env.reset("boil/0").result()
    pid = env.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    env.process.kill()
    env.process.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            return
        time.sleep(0.1)
    raise AssertionError("java lives on")


@pytest.mark.slow
def test_twenty_alfworld_games_are_won_by_the_planner_and_replay_byte_for_byte():
    needs_shared_data()
    needs("alfworld")
    from worlds.alfworld import ALFWorld
    env, other = ALFWorld(str(SHARED / "alfworld")), ALFWorld(str(SHARED / "alfworld"))
    assert (len(env.tasks("train")), len(env.tasks("valid")), len(env.tasks("test"))) == (3553, 140, 0)
    rng = random.Random(0)
    tasks = sorted(env.tasks("valid"), key=lambda task: len(env.problems[task][1]))[:20]   # small ones: seconds
    for task in tasks:
        said, plan = env.reset(task), env.plan()
        outcomes = [env.step(action) for action in plan]
        assert outcomes[-1].success and outcomes[-1].done and outcomes[-1].score == 1
        walk = wander(env, task, 8, rng)
        assert walk[0].obs == said and other.rollback(task, walk) == walk[-1].obs
        assert env.rollback(task, walk[:3]) == walk[:3][-1].obs


def test_alfworld_speaks_as_published_and_refuses_in_two_words(house):
    task = house.tasks("valid")[0]
    said = house.reset(task)
    assert said.startswith("You are in the middle of a room.") and "\n\nYour task is to: " in said
    place = next(action for action in house.actions() if action.startswith("go to"))
    outcome = house.step(place)
    assert outcome.valid and outcome.obs.startswith(f"You arrive at {place.removeprefix('go to ')}.")
    assert house.step("take moon 1 from sky 1").obs == "Nothing happens." and not house.step("fly").valid
    with pytest.raises(UserError, match="alfworld has no task"):
        house.reset("nothing")


def test_a_later_reset_of_a_game_is_fast(house):
    task = house.tasks("valid")[0]
    house.reset(task)
    before = house.logic.fast_downward.pddl2sas.cache_info()
    house.reset(task)
    after = house.logic.fast_downward.pddl2sas.cache_info()
    assert after.misses == before.misses and after.hits > before.hits            # nothing is translated again


def test_the_official_folder_is_read_with_either_kind_of_file(house, tmp_path):
    records = [json.loads(line) for line in DATA.read_text().splitlines()]
    for n, record in enumerate(records[:2]):
        folder = tmp_path / "json_2.1.1" / record["id"]
        folder.mkdir(parents=True)
        if n:
            (folder / "initial_state.pddl").write_text(record["pddl_problem"])
            (folder / "traj_data.json").write_text(json.dumps(dict(
                task_type="look_at_obj_in_light", pddl_params=dict(
                    object_target="AlarmClock", toggle_target="DeskLamp", parent_target="", mrecep_target="",
                    object_sliced=False), turk_annotations=dict(anns=[]))))
        else:
            game = dict(pddl_problem=record["pddl_problem"], pddl_domain="other", solvable=True,
                        grammar='task :: "' + record["task"] + '"')
            (folder / "game.tw-pddl").write_text(json.dumps(game))
    for name, change in (("unsolvable", dict(solvable=False)), ("movable", {})):
        folder = tmp_path / "json_2.1.1" / "valid_seen" / f"look-{name}" / "trial"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(json.dumps({**game, **change}))
    env = type(house)(str(tmp_path / "json_2.1.1"))
    assert env.tasks("valid") == sorted(record["id"] for record in records[:2])
    assert env.reset(records[0]["id"]) == house.reset(records[0]["id"])
    said = env.reset(records[1]["id"])
    assert "alarmclock" in said and "desklamp" in said and env.reset(records[1]["id"]) == said


def test_what_is_missing_is_named_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="needs the package some-package .* pip install some-package"):
        installed("no_such_module", "some-package")
    if shutil.which("java"):
        needs("scienceworld")
        from worlds.scienceworld import ScienceWorld
        monkeypatch.setenv("PATH", "")
        with pytest.raises(UserError, match="needs a Java runtime"):
            ScienceWorld()
    needs("alfworld")
    from worlds.alfworld import ALFWorld
    with pytest.raises(UserError, match="alfworld-download fetches it"):
        ALFWorld()
    with pytest.raises(UserError, match="no file or folder nowhere"):
        ALFWorld("nowhere")
