import gzip
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import UserError
from conftest import ROOT, SHARED, needs_shared_data, run_of
from engine import Job
from envs import Outcome, Quest, ReplayMismatch, make_env
from leafe import Attempt, episode
from tools import tiny as tiny_module
from worlds.sokoban import MOVES, Level, Sokoban, names_of, push, read_levels, reverse_play, split_of
from worlds.sokoban_words import InWords


def solve(level: Level, limit: int = 200_000) -> list[str] | None:
    """Shortest solution by breadth-first search; None if there is none within `limit` states."""
    start = (level.man, frozenset(level.boxes))
    came: dict = {start: None}
    queue = deque([start])
    while queue and len(came) < limit:
        state = queue.popleft()
        if state[1] == level.goals:
            path = []
            while came[state]:
                state, move = came[state]
                path.append(move)
            return path[::-1]
        for move in MOVES:
            after = push(level.walls, *state, move)
            if after and after not in came:
                came[after] = (state, move)
                queue.append(after)
    return None


def solve_by_pushes(level: Level, limit: int = 20_000) -> list[str] | None:
    """A solution of a large level: best-first over pushes, by the boxes' distance to the goals; no box goes into a
    corner. None if there is none within `limit` states."""
    def walks(man, boxes):
        paths, queue = {man: []}, deque([man])
        while queue:
            at = queue.popleft()
            for move, (dr, dc) in MOVES.items():
                to = at[0] + dr, at[1] + dc
                if to not in paths and to not in level.walls and to not in boxes:
                    paths[to] = paths[at] + [move]
                    queue.append(to)
        return paths

    def cornered(box):
        wall = [(box[0] + dr, box[1] + dc) in level.walls for dr, dc in MOVES.values()]
        return box not in level.goals and (wall[0] or wall[1]) and (wall[2] or wall[3])

    def far(boxes):
        return sum(min(abs(box[0] - goal[0]) + abs(box[1] - goal[1]) for goal in level.goals) for box in boxes)
    start = frozenset(level.boxes)
    queue, seen, n = [(far(start), 0, level.man, start, [])], set(), 0
    while queue and len(seen) < limit:
        _, _, man, boxes, path = heappop(queue)
        if boxes == level.goals:
            return path
        paths = walks(man, boxes)
        if (key := (boxes, min(paths))) in seen:
            continue
        seen.add(key)
        for at, way in paths.items():
            for move, (dr, dc) in MOVES.items():
                if (at[0] + dr, at[1] + dc) in boxes and (after := push(level.walls, at, boxes, move)):
                    if not cornered((at[0] + 2 * dr, at[1] + 2 * dc)):
                        n += 1
                        heappush(queue, (far(after[1]), n, *after, path + way + [move]))
    return None


def wander(env, task, turns, rng):
    """A random episode as the turns that a tree would hold."""
    obs, played = env.reset(task), []
    for _ in range(turns):
        action = rng.choice([*env.actions(), "go nowhere", "take crown"])
        played.append(SimpleNamespace(obs=obs, action=action))
        outcome = env.step(action)
        obs = outcome.obs
        if outcome.done:
            break
    return played


@pytest.mark.parametrize("env", [Quest(), Sokoban(), InWords()])
def test_rollback_restores_the_observation_byte_for_byte(env):
    rng = random.Random(0)
    for task in env.tasks("train")[:60]:
        turns = wander(env, task, 12, rng)
        for tau in range(1, len(turns) + 1):
            assert env.rollback(task, turns[:tau]) == turns[tau - 1].obs


def test_rollback_refuses_an_environment_that_does_not_replay():
    class Drifting(Quest):
        resets = 0

        def reset(self, task):
            Drifting.resets += 1
            return super().reset(task)

        def step(self, action):
            outcome = super().step(action)
            return Outcome(f"{outcome.obs} (visit {Drifting.resets})")
    env = Drifting()
    turns = wander(env, "train-4-0003", 4, random.Random(1))
    with pytest.raises(ReplayMismatch, match="turn 2 read"):
        env.rollback("train-4-0003", turns)


def test_rollback_refuses_a_world_in_which_the_action_before_tau_now_ends_the_episode():
    class Ending(Quest):
        def step(self, action):
            outcome = super().step(action)
            return replace(outcome, done=ending and self.left < 15)             # the third of 17 turns
    ending, env = False, Ending()
    turns = wander(env, "train-4-0003", 4, random.Random(1))
    assert env.rollback("train-4-0003", turns) == turns[3].obs
    ending = True
    assert env.rollback("train-4-0003", turns[:3]) == turns[2].obs
    with pytest.raises(ReplayMismatch, match="the replay ended at turn 3 of 4"):
        env.rollback("train-4-0003", turns)


def test_a_world_that_answers_with_futures_is_rolled_back_too():
    class Later(Quest):
        def reset(self, task):
            return pool.submit(super().reset, task)

        def step(self, action):
            return pool.submit(super().step, action)
    with ThreadPoolExecutor(1) as pool:
        turns = wander(Quest(), "train-4-0003", 4, random.Random(1))
        assert Later().rollback("train-4-0003", turns) == turns[-1].obs


def test_quest_tasks_are_a_pure_function_of_their_id_and_splits_share_none():
    env, other = Quest(), Quest()
    seen = {}
    for split in ("train", "valid", "test"):
        for task in env.tasks(split):
            first = env.reset(task)
            other.reset("train-1-0000")
            assert other.reset(task) == first
            world = (first, tuple(sorted(env.bars.items())),
                     tuple((k, tuple(v)) for k, v in sorted(env.things.items())))
            assert seen.setdefault(world, split) == split
    corpus = {env.reset(task) for task in env.tasks("corpus")}
    assert not corpus & {world[0] for world in seen}


def test_the_parts_of_a_split_hold_what_they_are_named_for():
    env, pairs = Quest(), {"shallow": set(), "unseen": set()}
    for part in ("shallow", "unseen", "mixed", "deep"):
        tasks = env.tasks("train-" + part)
        assert set(tasks) < set(env.tasks("train")) and set(env.tasks("test-" + part)) < set(env.tasks("test"))
        for task in tasks:
            env.reset(task)
            assert (env.needs > 2) == (part == "deep") and env.needs == len(env.bars)
            pairs.get(part, set()).update(env.bars.items())
    assert not pairs["shallow"] & pairs["unseen"] and len(pairs["shallow"]) > 50 < len(pairs["unseen"])
    assert sum(len(env.tasks("test-" + part)) for part in ("shallow", "unseen", "mixed", "deep")) == 512
    assert len(env.tasks("train-shallow")) >= 192 and len(env.tasks("test-unseen")) >= 64     # README
    assert env.tasks("test-none") == [] == env.tasks("tests")
    sokoban = Sokoban()
    assert {sokoban.difficulty(task) for task in sokoban.tasks("test-one")} == {"1 boxes"}
    assert sorted(sokoban.tasks("test-one") + sokoban.tasks("test-two")) == sorted(sokoban.tasks("test"))


def test_quest_is_solvable_within_the_candle_by_reading_refusals_alone():
    for task in Quest().tasks("valid"):
        env = Quest()
        reader = tiny_module.Reader().start(env.reset(task))
        while True:
            action = reader.expected()[0]
            outcome = env.step(action)
            reader.read(action, outcome.obs)
            if outcome.done:
                break
        assert outcome.success and outcome.score == 1.0
        assert env.left == env.slack


def test_quest_shortest_solution_needs_two_turns_a_link():
    for task in Quest().tasks("valid"):
        env = Quest()
        env.reset(task)
        turns = 0
        while action := env.next_best():
            outcome, turns = env.step(action), turns + 1
        assert outcome.success and turns == 2 * int(task.split("-")[1]) + 2


def test_no_blind_habit_solves_quest_beyond_one_need():
    """Fetch anything, try the goal's door with it, over and over: what beat LEAFE without these rules."""
    rng, wins = random.Random(0), {n: 0 for n in (1, 2, 3, 4)}
    for task in Quest().tasks("valid"):
        env = Quest()
        reader, last = tiny_module.Reader().start(env.reset(task)), ""
        while True:
            here = sorted(reader.seen.get(reader.place, ()))
            if reader.treasure in here:
                action = "take " + reader.treasure
            elif reader.hand and last != "go " + reader.goal:
                action = "go " + reader.goal
            elif here and last.startswith("go"):
                action = "take " + rng.choice(here)
            else:
                action = "go " + rng.choice(reader.doors)
            outcome, last = env.step(action), action
            reader.read(action, outcome.obs)
            if outcome.done:
                wins[env.needs] += outcome.success
                break
    assert wins[1] > 0 and wins[2] <= 3 and wins[3] == wins[4] == 0, wins


def quest_with(**state):
    env = Quest()
    env.reset("train-1-0000")
    for key, value in state.items():
        setattr(env, key, value)
    return env


def test_a_refusal_says_what_is_missing_and_where_it_lies():
    env = quest_with(bars={"attic": "torch"}, rooms=["attic", "cellar"],
                     things={"attic": [], "cellar": ["torch"]})
    outcome = env.step("go attic")
    assert outcome.obs.startswith(
        "it is dark. the attic needs the torch from the cellar.") and not outcome.valid


def test_a_key_breaks_in_the_wrong_lock_for_good():
    env = quest_with(bars={"attic": "brass-key"}, rooms=["attic", "cellar"], hand="iron-key",
                     things={"attic": [], "cellar": ["brass-key"]})
    assert ("the iron-key breaks in the lock. the attic needs the brass-key from the cellar."
            in env.step("go attic").obs)
    assert env.hand == "" and not any("iron-key" in things for things in env.things.values())


def test_a_bridge_holds_once():
    env = quest_with(bars={}, rooms=["attic", "cellar"], bridge="attic",
                     things={"attic": ["rope"], "cellar": []}, left=9)
    assert "it holds once" in env.step("go attic").obs
    assert env.step("go cellar").obs.startswith("the bridge falls behind you.")
    assert env.step("go attic") == Outcome("the bridge to the attic is gone.", 0.0, False, False, False)


def test_one_thing_fits_in_the_hand():
    env = quest_with(place="attic", rooms=["attic"], bars={}, things={"attic": ["axe", "bone"]})
    env.step("take axe")
    assert (env.step("take bone").obs.startswith("you take the bone. you leave the axe.")
            and env.things["attic"] == ["axe"])


@pytest.mark.parametrize("action", ["", " ", "go", "take", "dance", "go to attic", "go\nattic\ngo",
                                    "take " + "x" * 10_000, "\0", "👻"])
def test_quest_refuses_what_is_not_an_action(action):
    env = Quest()
    env.reset("train-1-0000")
    outcome = env.step(action)
    assert not outcome.valid and outcome.obs == "you cannot do that."


@pytest.mark.parametrize("task", ["train-5-0000", "train-1-9999", "nowhere-1-0000", "", "train-1-0000/../x"])
def test_a_task_id_that_does_not_exist_is_named(task):
    for env in (Quest(), Sokoban(), InWords()):
        with pytest.raises(UserError, match="has no task"):
            env.reset(task)


def test_judge_tells_a_useful_reflection_from_a_useless_one():
    env, task = Quest(), "valid-1-0000"
    env.reset(task)
    room, thing = next(iter(env.bars.items()))
    free = next(r for r in env.rooms if r != room and r not in env.bars)
    actions = ["go " + room] + ["go " + free] * 7
    assert env.judge(task, actions, 2, f"the {room} needs the {thing} from somewhere.") == (True, True, True)
    assert env.judge(task, actions, 8, f"the {room} needs the {thing}.") == (True, True, False)  # too late
    assert env.judge(task, actions, 2, "try harder.") == (True, False, False)
    assert env.judge(task, [f"{a}." for a in actions], 2, f"the {thing}.") == (True, True, True)     # read as step reads it
    assert env.judge(task, ["go " + free] * 8, 1, f"the {room} needs the {thing}.")[0] is False  # never told


def test_sokoban_levels_from_the_generator_are_solvable_and_no_box_is_one_push_from_a_goal():
    for task in islice(Sokoban().tasks("train"), 60):
        level = Sokoban()._level(task)
        assert (level.size == (6, 6) and len(level.boxes) == int(task.split("-")[1])
                and not level.boxes & level.goals)
        assert all(abs(a - c) + abs(b - d) > 1 for a, b in level.boxes for c, d in level.goals)
        assert solve(level)


def test_sokoban_solution_succeeds_when_played():
    env = Sokoban()
    env.reset("test-1-0004")
    for move in solve(env.level):
        outcome = env.step(move)
        assert outcome.valid
    assert outcome.success and outcome.done and outcome.score == 1.0 and "solved" in outcome.obs


def test_sokoban_says_that_a_box_is_stuck_and_refuses_walls_and_double_pushes():
    level = reverse_play(random.Random(0), 1)
    env = Sokoban()
    env.reset("train-1-0000")
    env.level, env.man, env.boxes = level, (1, 3), frozenset({(1, 2)})
    level.goals.clear(), level.goals.add((4, 4))
    level.walls = {(r, c) for r in range(6) for c in range(6) if r in (0, 5) or c in (0, 5)}
    outcome = env.step("left")
    assert "can never reach a goal" in outcome.obs and outcome.valid
    assert not env.step("left").valid and not env.step("up").valid
    assert push(level.walls, (1, 1), frozenset({(2, 1), (3, 1)}), "down") is None
    assert set(env.actions()) <= set(MOVES)


def test_boxoban_files_are_read_as_they_are():
    path = ROOT / "tests/data/medium_train_sample.txt"
    env = make_env("sokoban", str(path))
    levels = [env._level(task) for task in env.tasks("train")]
    assert env.tasks("train") == [
        f"medium_train_sample/{i}" for i in range(len(levels))] and env.tasks("test") == []
    shown = env.reset("medium_train_sample/0").split("\n", 1)[1]
    assert shown == path.read_text().split("\n", 1)[1].split("\n\n")[0].split("\n;")[0]
    assert {len(level.boxes) for level in levels} == {4} and levels[0].size == (10, 10)


@pytest.mark.parametrize("path", ["/levels.txt", "/data/levels.txt", "/data/sets/levels.txt", "levels.txt"])
def test_a_task_of_a_file_near_the_root_has_one_slash(path):
    assert list(names_of([Path(path)])) == ["_".join(Path(path).with_suffix("").parts[path.startswith("/"):])]


def test_a_clone_of_boxoban_is_read_as_a_folder(tmp_path):
    text = (ROOT / "tests/data/medium_train_sample.txt").read_text()
    folder = tmp_path / "levels"                   # a split in the folder's own name would count
    for name in ("unfiltered/train/000.txt", "unfiltered/valid/000.txt", "hard/003.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    env, count = make_env("sokoban", str(folder)), text.count(";")
    assert env.tasks("train") == [f"unfiltered_train_000/{i}" for i in range(count)]
    assert len(env.tasks("valid")) == count and env.tasks("test")[0] == "levels_hard_003/0"
    assert env.reset("unfiltered_valid_000/1") == env.reset(env.tasks("test")[1])


BOARD = "#####\n#@$.#\n#####\n"


def shown_levels(tmp_path, text: str | bytes) -> list[str]:
    """How the levels of a file are shown. Each is then won by the last of two steps to the right."""
    path = tmp_path / "test_levels.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    env = Sokoban(str(path))
    shown = [env.reset(task).partition("\n")[2] for task in env.tasks("test")]
    for task in env.tasks("test"):
        env.reset(task)
        assert env.step("right").success or env.step("right").success
    return shown


@pytest.mark.parametrize("text, count", [
    ("; 0\n" + BOARD + "\n; 1\n" + BOARD, 2),                                # as Boxoban is published
    ("A set (by X. Y)\n\n" + BOARD + "; 1\n\n" + BOARD + "; 2\n", 2),        # as Microban is: names under the boards
    (BOARD + "\n" + BOARD, 2),
    ("; 0\n" + BOARD + "\n" + BOARD, 2),
    (BOARD + "Title: A.B. * $\nAuthor: #2\n", 1),
    (BOARD + "...\n\n***\n" + BOARD, 2),
    ("; 0 a;b\n" + BOARD + ";\n", 1),
    ("#########\n# Mine! #\n#########\n\n" + BOARD, 1),
    ("##########\n# a@b.org #\n##########\n\n" + BOARD, 1),
    (BOARD.replace("\n", "\r\n"), 1),
    (BOARD.replace("\n", "\r"), 1),
    (BOARD[:-1], 1),
    (BOARD.replace("#\n", "# \t\n"), 1),
    ("\t" + BOARD.replace("\n#", "\n\t#"), 1),
    (b"\xef\xbb\xbf" + BOARD.encode(), 1),
    ("; \xe9\n".encode("latin-1") + BOARD.encode(), 1),
    (BOARD.encode("utf-16"), 1),
    (gzip.compress(BOARD.encode(), mtime=0), 1)])
def test_level_files_are_read_as_collections_are_published(tmp_path, text, count):
    assert shown_levels(tmp_path, text) == [BOARD.strip()] * count


@pytest.mark.parametrize("text, shown", [
    ("######\n#@-$.#\n#_####\n###\n", "######\n#@ $.#\n# ####\n###   "),
    ("--#####\n-##@$.#\n-######\n", " #####\n##@$.#\n######"),
    ("#####\n#@$.#\n####\n", "#####\n#@$.#\n#### "),                            # only a corner is missing
    ("#######\n#@$.#*#\n#######\n", "#######\n#@$.#*#\n#######")])
def test_a_board_is_shown_in_one_manner(tmp_path, text, shown):
    assert shown_levels(tmp_path, text) == [shown]


@pytest.mark.parametrize("bad, message", [
    ("####\n# @#\n####\n", "level 1 .at line 5. is no Sokoban level: 1 men, 0 boxes, 0 goals"),
    ("######\n#@$.@#\n######\n", "level 1 .at line 5. .* 2 men"),
    ("#####\n# $.#\n#####\n", "0 men"),
    ("######\n#@$..#\n######\n", "1 boxes, 2 goals; it must have one man, and as many goals as boxes"),
    ("####\n @$.\n####\n", "its walls are not closed around the man"),
    ("## ##\n#@$.#\n#####\n", "not closed"),
    ("#####\n#@$.#\n", "not closed"),
    ("#@$.#\n", "not closed"),
    ("######\n#@ *.#\n######\n", "1 boxes, 2 goals"),
    ("#####\n#@ *#\n#####\n", "every box is on a goal already"),
    ("#####\n#@x.#\n#####\n", "line 6: 'x' is no square of a level"),
    ("#####\n#@$.x\n#####\n", "line 6: 'x' is no square"),
    ("#####\n#@$.#  ; push it\n#####\n", "line 6: ';' is no square"),
    ("5#|#@$.#|5#\n", "line 5: .* is run-length encoded")])
def test_a_bad_level_is_named_before_anything_is_played(tmp_path, bad, message):
    path = tmp_path / "levels.txt"
    path.write_text(BOARD + "\n" + bad)
    with pytest.raises(UserError, match=f"^data: {path}.*{message}") as error:
        make_env("sokoban", str(path))
    assert "\n" not in str(error.value)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name, boards in {"u/train_000.txt": 1, "m/train_000.txt": 2, "m/train_001.txt": 1}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((BOARD + "\n") * boards)
    names = ["m_train_000/0", "m_train_000/1", "train_001/0", "u_train_000/0"]
    assert Sokoban(str(tmp_path)).tasks("train") == names
    (tmp_path / "m/train_001.sok").write_text(BOARD)
    assert Sokoban(f"{tmp_path}/m").tasks("train") == ["train_000/0", "train_000/1", "train_001.sok/0", "train_001.txt/0"]
    both = f"{tmp_path}/u/train_000.txt,{tmp_path}/m/train_000.txt,{tmp_path}/u/../u/train_000.txt"
    assert Sokoban(both).tasks("train") == [names[3], *names[:2]]


def test_a_split_is_a_word_of_a_files_name():
    names = "unfiltered_train_000 training validation contest_validation Test latest contest constrained levels".split()
    assert [split_of(name) for name in names] == ["train", "train", "valid", "valid", "test", "", "", "", ""]


def test_what_is_no_level_file_is_skipped_and_named_in_one_line(tmp_path):
    for name, text in {"a.txt": BOARD, "sub/b.SOK": BOARD, "LICENSE.txt": "#####\n# ...\nMIT; as is\n",
                       "README.md": "# Levels", "empty.xsb": "", ".git/x.txt": "#####\n#@ #\n#####\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    env = make_env("sokoban", str(tmp_path))
    assert sum(len(env.tasks(split)) for split in ("train", "valid", "test")) == 2
    assert env.examine("valid")[:1] == [
        f"data: {tmp_path}: skipped what is no level file: LICENSE.txt, README.md, empty.xsb"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none/LICENSE.txt").write_text("MIT")
    with pytest.raises(UserError, match=r"no level found.*; in a folder, .txt, .sok, .xsb files are read"):
        make_env("sokoban", str(tmp_path / "none"))


@pytest.mark.parametrize("content", ["no levels here", "", b"\0\1\2" * 99, b"\x80\xff" * 99])
def test_a_file_that_holds_no_level_is_named(tmp_path, content):
    path = tmp_path / "levels.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=f"^data: {path}: no level found; a level is rows of "):
        make_env("sokoban", str(path))
    with pytest.raises(UserError, match="for files, use env=sokoban"):
        make_env("sokoban-words", "levels.txt")


def test_all_shared_boxoban_levels_are_read():
    needs_shared_data()
    files, notes = read_levels(str(SHARED / "boxoban"))
    counts = {name: len(file.boards) for name, file in files.items()}
    assert notes == ["data: " + str(SHARED / "boxoban") + ": skipped what is no level file: LICENSE"]
    assert sorted(counts.values()) == [1000, 1000, 1000]


def test_boxoban_levels_that_the_solver_solves_are_solved_when_played():
    needs_shared_data()
    solved = 0
    for path in sorted((SHARED / "boxoban").glob("*.txt")):
        env = make_env("sokoban", str(path))
        assert env.max_turns == 120
        for task in env.tasks(path.stem.split("_")[1])[:8]:
            env.reset(task)
            if moves := solve_by_pushes(env.level):
                env.left = len(moves)                          # not a shortest way
                outcomes = [env.step(move) for move in moves]
                assert outcomes[-1].success and all(outcome.valid for outcome in outcomes)
                solved += 1
    assert solved >= 12


GYM = '''
import numpy

class TextWorld:
    """As Gymnasium has it: a lamp behind one of three doors."""
    def reset(self, *, seed=None, options=None):
        self.random, self.left = numpy.random.default_rng(seed), 3
        self.door = self.random.choice(["red door", "green door", "blue door"])
        return f"it is dark. {self.random.integers(100)} steps away are three doors.", {"door": self.door}

    def step(self, action):
        self.left -= 1
        found = action == f"open {self.door}"
        said = "you find the lamp." if found else f"nothing. {self.random.integers(100)} bats fly by."
        return said, numpy.float32(found), numpy.bool_(found), self.left == 0, {}
'''


def test_a_world_s_folder_may_be_named_like_a_file_of_python(tmp_path):
    for folder in (".pyenv", "old.py"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("from envs import Quest\nclass Mine(Quest):\n    pass\n")
        for name in ("mine.py", "mine.py:Mine"):
            assert type(make_env(f"{tmp_path}/{folder}/{name}")).__name__ == "Mine"


def test_the_page_s_gymnasium_world_is_examined_rolled_back_and_played(tmp_path, tiny, settings):
    page = (ROOT / "docs" / "worlds.md").read_text()
    source = page.partition("(gym_world.py;")[2].split("```")[1].removeprefix("python\n")
    assert len([line for line in source.splitlines() if line.strip()]) == 15
    (tmp_path / "gym_world.py").write_text(source)
    (tmp_path / "my_gym_world.py").write_text(GYM)
    cfg = settings(f"env={tmp_path}/gym_world.py:Wrapped")
    assert make_env(cfg.env).examine("train") == [] == make_env(cfg.env).examine("test")
    env, other = make_env(cfg.env), make_env(cfg.env)
    for task in env.tasks("train")[:9]:
        said = env.reset(task)
        actions = ["look", "look", f"open {env.world.door}", ""]
        outcomes = [env.step(action) for action in actions[:3]]
        observations = [said, *(outcome.obs for outcome in outcomes)]
        turns = [SimpleNamespace(obs=obs, action=action) for obs, action in zip(observations, actions)]
        assert outcomes[-1] == Outcome("you find the lamp.", 1.0, True, True)
        for tau in (1, 2, 3):
            other.reset("train-63")
            assert other.rollback(task, turns[:tau]) == turns[tau - 1].obs
    run = run_of(cfg, tiny)
    job = next(run.policy.engine().run(deque([Job(episode(run, run.world(), Attempt("test-0", "0"), True),
                                                  random.Random(0), "test-0")])))
    assert job.result.end in ("success", "failure") and job.result.turns[0].obs == env.reset("test-0")
