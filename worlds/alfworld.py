"""ALFWorld, the paper's, on its own package, in processes apart from the model's (scale/apart.py).

    pip install alfworld
    python envs.py alfworld data=json_2.1.1       the official download's folder, or files of problems as JSON lines

Actions and observations are the package's own; the horizon of 50 is its config's, ReAct's and later work's.
"""
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator

from config import UserError, installed
from envs import Env, Outcome
from worlds.files import given, is_text, named, read_json, read_lines, walked

OFFICIAL = Counter(train=3553, valid_seen=140, valid_unseen=134)            # games in each folder


@dataclass(frozen=True)
class Game:
    where: str                                     # its file, and the line, for messages
    problem: bytes                                 # PDDL, compressed
    goal: str                                      # what the task is


class ALFWorld(Env):
    """Task ids: `<split>/<type and objects>/<trial>`, as in the official folder. valid is the official valid_seen,
    test is valid_unseen. A refusal says no more than `Nothing happens.`"""
    rules = ("you are in a household and solve a task. actions: go to RECEP, take OBJ from RECEP, move OBJ to "
             "RECEP, open RECEP, close RECEP, use OBJ, heat OBJ with RECEP, cool OBJ with RECEP, clean OBJ with "
             "RECEP, slice OBJ with OBJ, examine OBJ, inventory, look. names have numbers, like cabinet 1. "
             "answer with one action")
    max_turns = 50
    apart = shares = True
    folders = {"train": "train", "valid": "valid_seen", "test": "valid_unseen"}

    def __init__(self, data: str = ""):
        textworld = installed("textworld", "alfworld")
        installed("alfworld", "alfworld")
        self.logic = installed("textworld.envs.pddl", "alfworld").pddl.pddl_logic
        if not hasattr(self.logic.fast_downward.pddl2sas, "cache_info"):       # the slow part of a reset; it is pure
            self.logic.fast_downward.pddl2sas = lru_cache(maxsize=64)(self.logic.fast_downward.pddl2sas)
        if not data:
            raise UserError("data: alfworld needs its games: data=path/to/json_2.1.1; alfworld-download fetches it")
        self.games, self.notes = games(data)
        request = textworld.EnvInfos(won=True, admissible_commands=True)
        self.env = installed("textworld.envs.pddl", "alfworld").PddlEnv(request)

    def tasks(self, split: str) -> list[str]:
        wanted = self.folders.get(split, split) + "/"
        return [task for task in self.games if task.startswith(wanted)]

    def examine(self, split: str, other: Env | None = None) -> list[str]:
        return self.notes + super().examine(split, other)

    def difficulty(self, task: str) -> str:
        return task.split("/")[1].partition("-")[0]

    def reset(self, task: str) -> str:
        if task not in self.games:
            raise UserError(f"alfworld has no task {task!r}; ids look like {next(iter(self.games))}")
        try:
            self._load(self.games[task])
            self.state, self.left = self.env.reset(), self.max_turns
        except Exception as error:                     # the package has no error of its own for a broken game
            raise UserError(f"{self.games[task].where}: {task} cannot be played, its pddl_problem is broken or has no "
                            f"solution ({type(error).__name__}: {error}); take it out") from None
        return self.state.feedback.partition("\n\n")[2].strip()             # without the welcome

    def _load(self, game: Game) -> None:
        data = Path(installed("alfworld", "alfworld").__file__).parent / "data"
        grammar = (data / "alfred.twl2").read_text().replace("UNKNOWN GOAL", game.goal)
        self.env.load(dict(pddl_domain=(data / "alfred.pddl").read_text(), grammar=grammar,
                           pddl_problem=zlib.decompress(game.problem).decode()))
        names = installed("alfworld.agents.utils.misc", "alfworld").Demangler(game_infos=self.env._entity_infos)
        for info in self.env._entity_infos.values():
            info.name = names.demangle_alfred_name(info.id)

    def step(self, action: str) -> Outcome:
        self.left -= 1
        self.state, score, done = self.env.step(action.strip())
        obs = self.state.feedback.strip()
        return Outcome(obs, float(score), done or self.left <= 0, bool(self.state["won"]), obs != "Nothing happens.")

    def actions(self) -> list[str]:
        return list(self.state["admissible_commands"])

    def plan(self) -> list[str]:
        """The planner's way to the goal from here, for tests."""
        return self.env._pddl_state.replan(self.env._entity_infos)


@lru_cache
def games(data: str) -> tuple[dict[str, Game], list[str]]:
    """Task id -> game, all read and looked over; and a note where there are other numbers than the official ones. A
    game is played only if it is said to be solvable: of a folder, by its game.tw-pddl; in files of lines, unless a
    record's `solvable` says otherwise."""
    found: dict[str, Game] = {}
    left_out: Counter[str] = Counter()
    for path in given(data):
        files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
        pairs = [*in_folder(path, left_out)] if path.is_dir() else []
        for file in files:
            pairs += in_lines(file, left_out)
        for task, game in pairs:
            if found.setdefault(task, game).problem != game.problem:
                raise UserError(f"{game.where}: {task} is another game than in {found[task].where.removeprefix('data: ')}")
    if not found:
        raise UserError(f"data: {data} holds no games: neither solvable game.tw-pddl files (alfworld-download fetches "
                        f"them) nor JSON lines with id, task and pddl_problem{told(left_out)}")
    counts = Counter(task.partition("/")[0] for task in found)
    notes = []
    if counts != OFFICIAL:
        has, official = (", ".join(f"{split} {numbers[split]}" for split in sorted({*counts, *OFFICIAL}))
                         for numbers in (counts, OFFICIAL))
        notes = [f"data: {data} has other numbers of games ({has}) than the official ones ({official}){told(left_out)}"]
    return dict(sorted(found.items())), notes


def told(left_out: Counter) -> str:
    parts = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
    return f"; left out: {parts}" if parts else ""


def in_folder(path: Path, left_out: Counter) -> Iterator[tuple[str, Game]]:
    """The games that the official loader picks: SPLIT/TASK/TRIAL/game.tw-pddl."""
    for folder, names in walked(path):
        task = "/".join(Path(os.path.abspath(folder)).parts[-3:])
        if not {"game.tw-pddl", "initial_state.pddl", "traj_data.json"} & set(names) or unsupported(task, left_out):
            continue
        if "game.tw-pddl" not in names:
            left_out["without game.tw-pddl"] += 1
            continue
        game, where = read_json(folder / "game.tw-pddl"), f"data: {folder / 'game.tw-pddl'}"
        if game.get("solvable") is not True:
            left_out["not solvable"] += 1
            continue
        grammar = game.get("grammar")
        goal = re.search(r"Your task is to: [^\"\\]+", grammar) if isinstance(grammar, str) else None
        yield task, made(where, game, goal[0] if goal else grammar)


def in_lines(path: Path, left_out: Counter) -> Iterator[tuple[str, Game]]:
    for where, record in read_lines(path):
        task = record.get("id")
        if not is_text(task) or len(list(filter(None, task.split("/")))) != 3:
            raise UserError(f"{where}: id must be like valid_seen/TASK/TRIAL, not {named(task)}")
        if unsupported(task, left_out):
            continue
        if record.get("solvable", True) is not True:
            left_out["not solvable"] += 1
            continue
        yield task, made(where, record, record.get("task"))


def unsupported(task: str, left_out: Counter) -> bool:
    """As the official loader has it."""
    for kind in ("movable", "Sliced"):
        if kind in task:
            left_out[kind] += 1
            return True
    return False


def made(where: str, record: dict, task: Any) -> Game:
    """A game whose parts are there. That its PDDL makes sense shows only when it is loaded."""
    said = re.fullmatch(r"Your task is to: ([^\"\\#\n]+?)\.?\s*", task) if is_text(task) else None
    if not said or said[1] == "UNKNOWN GOAL":
        raise UserError(f"{where}: the game's task must read 'Your task is to: ...', not {named(task)}")
    problem = record.get("pddl_problem")
    parts = ("(define", "(:domain alfred)", "(:objects", "(:init", "(:goal")
    if not is_text(problem) or not all(part in problem for part in parts) or problem.count("(") != problem.count(")"):
        raise UserError(f"{where}: pddl_problem must be a whole PDDL problem of the domain alfred, not {named(problem)}")
    return Game(where, zlib.compress(problem.encode(), 1), said[1])
