"""ScienceWorld and ALFWorld for real, on their packages. A user without them sees skips; CI has them."""
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import SHARED, needs_shared_data
import worlds.alfworld as alfworld
from config import UserError, installed
from envs import Outcome, make_env
from worlds.alfworld import games

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
    """Two instances, so that replays are read on another than the first reading. Its search for a solution, which no run
    asks for, may need more memory than a world is given."""
    needs("scienceworld", "java")
    from worlds.scienceworld import ScienceWorld
    os.environ["JDK_JAVA_OPTIONS"] = "-Xmx768m"            # the last one counts
    worlds = ScienceWorld("easy"), ScienceWorld("easy")
    del os.environ["JDK_JAVA_OPTIONS"]
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
        if outcome.done:
            break
        turns.append(SimpleNamespace(obs=outcome.obs, action=""))
    return turns


@pytest.mark.slow
def test_sixty_scienceworld_episodes_replay_byte_for_byte_on_another_instance(science):
    rng, tasks = random.Random(0), science[0].tasks("train")[:60]
    walks = [wander(science[0], task, 15, rng) for task in tasks]
    for task, walk in zip(tasks, walks):
        assert science[1].rollback(task, walk) == walk[-1].obs
        assert science[0].rollback(task, walk[:5]) == walk[:5][-1].obs
    assert len({task.split("/")[0] for task in tasks}) == 30


def test_both_are_right_when_they_are_examined():
    needs("scienceworld", "java")
    needs("alfworld")
    assert make_env("scienceworld", "easy").examine("train") == []
    assert make_env("alfworld", str(DATA)).examine("valid") == [
        f"data: {DATA} has other numbers of games (train 0, valid_seen 3, valid_unseen 0) than the official ones "
        f"(train 3553, valid_seen 140, valid_unseen 134)"]


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
    children = [str(env.process.pid)]                  # the keeper, the world, java
    for pid in children:
        children += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= 3 and "java" in Path(f"/proc/{children[2]}/comm").read_text()
    del children[0]
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
    tasks = sorted(env.tasks("valid"), key=lambda task: len(env.games[task].problem))[:20]   # small ones: seconds
    for task in tasks:
        said, plan = env.reset(task), env.plan()
        outcomes = [env.step(action) for action in plan]
        assert outcomes[-1].success and outcomes[-1].done and outcomes[-1].score == 1
        walk = wander(env, task, 8, rng)
        assert walk[0].obs == said and other.rollback(task, walk) == walk[-1].obs
        assert env.rollback(task, walk[:3]) == walk[:3][-1].obs


def test_alfworld_conversations_in_one_process_are_those_of_each_alone(house):
    def going(env, task: str, seed: int):
        rng, outcome = random.Random(seed), Outcome(env.reset(task))
        while True:
            yield outcome, env.actions()
            outcome = env.step(rng.choice(env.actions()) if rng.random() < 0.9 else "sing a song")
    episodes = [(task, seed) for task in house.tasks("valid") for seed in range(2)]
    worlds = [going(type(house)(str(DATA)), *episode) for episode in episodes]
    beside = [[next(world) for world in worlds] for _ in range(10)]               # a turn of each, then the next turn
    for n, episode in enumerate(episodes):
        alone = going(house, *episode)
        assert [next(alone) for _ in range(10)] == [turn[n] for turn in beside]
    assert len({outcome.obs for turn in beside for outcome, _ in turn}) > 20


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


def records() -> list[dict]:
    return [json.loads(line) for line in DATA.read_text().splitlines()]


def write_trial(folder: Path, record: dict, **change) -> None:
    """As the official download has a trial."""
    folder.mkdir(parents=True)
    game = dict(pddl_problem=record["pddl_problem"], pddl_domain="other", grammar=f'"rhs": "{record["task"]}"')
    (folder / "game.tw-pddl").write_text(json.dumps({**game, "solvable": True, **change}))
    (folder / "initial_state.pddl").write_text(record["pddl_problem"])
    (folder / "traj_data.json").write_text(json.dumps(dict(task_type="look_at_obj_in_light")))


def test_alfworld_plays_the_games_that_the_official_loader_picks_and_no_other(house, tmp_path):
    own = records()
    for record in own:
        write_trial(tmp_path / record["id"], record)
    for name, change in (("unsolvable", dict(solvable=False)), ("unknown", dict(solvable=None)), ("movable", {}),
                         ("Sliced-Apple", {})):
        write_trial(tmp_path / "valid_seen" / name / "trial_1", own[0], **change)
    write_trial(tmp_path / "valid_seen" / "without" / "trial_1", own[0])
    (tmp_path / "valid_seen" / "without" / "trial_1" / "game.tw-pddl").unlink()
    official = installed("alfworld.agents.environment.alfred_tw_env", "alfworld").AlfredTWEnv
    loader = official(dict(dataset=dict(eval_id_data_path=str(tmp_path / "valid_seen"), num_eval_games=0),
                           env=dict(task_types=[1, 2, 3, 4, 5, 6], goal_desc_human_anns_prob=0)), "eval_in_distribution")
    env = type(house)(str(tmp_path))
    assert env.tasks("valid") == sorted("/".join(Path(file).parts[-4:-1]) for file in loader.game_files)
    assert env.tasks("valid") == sorted(record["id"] for record in own) and env.tasks("train") == env.tasks("test") == []
    assert env.notes == [
        f"data: {tmp_path} has other numbers of games (train 0, valid_seen 3, valid_unseen 0) than the official ones "
        f"(train 3553, valid_seen 140, valid_unseen 134); left out: 1 Sliced, 1 movable, 2 not solvable, "
        f"1 without game.tw-pddl"]
    assert type(house)(str(tmp_path / "valid_seen")).games == env.games
    assert env.reset(own[0]["id"]) == house.reset(own[0]["id"])


def test_the_same_filter_holds_for_files_of_lines(tmp_path):
    own = records()
    extra = [{**own[0], "id": f"train/{name}/trial_1", **change} for name, change in
             (("unsolvable", dict(solvable=False)), ("movable", {}), ("Sliced", {}), ("right", dict(solvable=True)))]
    path = tmp_path / "games.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*own, *extra, own[0]]))
    found, notes = games(str(path))
    assert list(found) == ["train/right/trial_1", *sorted(record["id"] for record in own)]
    assert notes[0].endswith("; left out: 1 Sliced, 1 movable, 1 not solvable")


def test_nothing_is_said_of_the_official_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(alfworld, "OFFICIAL", Counter(valid_seen=3))
    path = tmp_path / "games.jsonl"
    path.write_text(DATA.read_text())
    assert games(str(path))[1] == []


@pytest.mark.parametrize("change, message", [
    (dict(pddl_problem=""), "pddl_problem must be a whole PDDL problem of the domain alfred, not \"\"$"),
    (dict(pddl_problem="(define (problem x)"), "pddl_problem must be a whole"),
    (dict(pddl_problem=None), "pddl_problem must be .*, not null"),
    (dict(task="put a mug"), "the game's task must read 'Your task is to: ...', not \"put a mug\""),
    (dict(task='Your task is to: put a "mug".'), "the game's task must read"),
    (dict(task="Your task is to: UNKNOWN GOAL."), "the game's task must read"),
    (dict(task=None), "the game's task must read .*, not null"),
    (dict(id="train/x"), "id must be like valid_seen/TASK/TRIAL, not \"train/x\""),
    (dict(id=7), "id must be like .*, not 7"),
    (dict(pddl_problem="half"), "pddl_problem must be a whole")])
def test_a_game_that_cannot_be_read_is_named_at_the_start(tmp_path, change, message):
    first, second = records()[:2]
    if change == dict(pddl_problem="half"):
        change = dict(pddl_problem=second["pddl_problem"][:9000])
    (tmp_path / "x.jsonl").write_text(json.dumps(first) + "\n" + json.dumps({**second, **change}) + "\n")
    with pytest.raises(UserError, match=f"^data: {tmp_path}/x.jsonl, line 2: {message}"):
        games(str(tmp_path / "x.jsonl"))
    folder = tmp_path / "json_2.1.1" / second["id"]
    write_trial(folder, second, **({"grammar": change["task"]} if "task" in change else change))
    if "id" not in change and "mug" not in str(change.get("task")):
        with pytest.raises(UserError, match=f"^data: {folder}/game.tw-pddl: ") as error:
            games(str(tmp_path / "json_2.1.1"))
        assert "\n" not in str(error.value)


def test_one_id_is_one_game(tmp_path):
    first, second = records()[:2]
    (tmp_path / "x.jsonl").write_text(json.dumps(first) + "\n" + json.dumps({**second, "id": first["id"]}) + "\n")
    with pytest.raises(UserError, match=f"x.jsonl, line 2: {first['id']} is another game than in {tmp_path}/x.jsonl, line 1"):
        games(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("change", [("?r ToiletPaperHangerType", "?r FridgeType"), ("agent1 - agent", ""),
                                    ("(:init", "(:init (inReceptacle cup1 shelf1)")])
def test_a_game_without_a_solution_ends_in_one_line_with_its_file(house, tmp_path, change):
    record = records()[0]
    record["pddl_problem"] = record["pddl_problem"].replace(*change)
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"^data: {tmp_path}/x.jsonl, line 1: .* cannot be played, .*; take it out$") as error:
        type(house)(str(tmp_path / "x.jsonl")).reset(record["id"])
    assert "\n" not in str(error.value)


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
