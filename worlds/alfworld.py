"""ALFWorld, the paper's, on its own package, each episode in a process of its own (scale/apart.py).

    pip install alfworld
    python envs.py alfworld data=json_2.1.1       the official download's folder, or files of problems as JSON lines

Actions and observations are the package's own; the horizon of 50 is its config's, ReAct's and later work's.
"""
import json
import lzma
import random
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Iterator

from config import UserError, installed
from envs import Env, Outcome


class ALFWorld(Env):
    """Task ids: `<split>/<type and objects>/<trial>`, as in the official folder. valid is the official valid_seen,
    test is valid_unseen. A refusal says no more than `Nothing happens.`"""
    rules = ("you are in a household and solve a task. actions: go to RECEP, take OBJ from RECEP, move OBJ to "
             "RECEP, open RECEP, close RECEP, use OBJ, heat OBJ with RECEP, cool OBJ with RECEP, clean OBJ with "
             "RECEP, slice OBJ with OBJ, examine OBJ, inventory, look. names have numbers, like cabinet 1. "
             "answer with one action")
    max_turns = 50
    apart = True
    folders = {"train": "train", "valid": "valid_seen", "test": "valid_unseen"}

    def __init__(self, data: str = ""):
        textworld = installed("textworld", "alfworld")
        installed("alfworld", "alfworld")
        self.logic = installed("textworld.envs.pddl", "alfworld").pddl.pddl_logic
        if not hasattr(self.logic.fast_downward.pddl2sas, "cache_info"):       # the slow part of a reset; it is pure
            self.logic.fast_downward.pddl2sas = lru_cache(maxsize=64)(self.logic.fast_downward.pddl2sas)
        if not data:
            raise UserError("data: alfworld needs its games: data=path/to/json_2.1.1; alfworld-download fetches it")
        self.problems = games(data)
        request = textworld.EnvInfos(won=True, admissible_commands=True)
        self.env = installed("textworld.envs.pddl", "alfworld").PddlEnv(request)

    def tasks(self, split: str) -> list[str]:
        wanted = self.folders.get(split, split) + "/"
        return [task for task in self.problems if task.startswith(wanted)]

    def difficulty(self, task: str) -> str:
        return task.split("/")[1].partition("-")[0]

    def reset(self, task: str) -> str:
        if task not in self.problems:
            raise UserError(f"alfworld has no task {task!r}; ids look like {next(iter(self.problems))}")
        problem, goal = read_game(self.problems[task])
        data = Path(installed("alfworld", "alfworld").__file__).parent / "data"
        grammar = (data / "alfred.twl2").read_text().replace("UNKNOWN GOAL", goal.rstrip("."))
        self.env.load(dict(pddl_domain=(data / "alfred.pddl").read_text(), grammar=grammar, pddl_problem=problem))
        names = installed("alfworld.agents.utils.misc", "alfworld").Demangler(game_infos=self.env._entity_infos)
        for info in self.env._entity_infos.values():
            info.name = names.demangle_alfred_name(info.id)
        self.state, self.left = self.env.reset(), self.max_turns
        return self.state.feedback.partition("\n\n")[2].strip()             # without the welcome

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
def games(data: str) -> dict[str, tuple]:
    """Task id -> where its game is: ("folder", path), or ("line", problem, what the task is) from a file of lines."""
    found: dict[str, tuple] = {}
    for path in [Path(name) for name in data.split(",")]:
        if path.is_dir():
            for problem in sorted([*path.rglob("game.tw-pddl"), *path.rglob("initial_state.pddl")], reverse=True):
                task = "/".join(problem.parent.parts[-3:])
                solvable = problem.suffix == ".pddl" or b'"solvable": true' in problem.read_bytes()
                if solvable and "movable" not in task and "Sliced" not in task:      # as the official loader picks
                    found[task] = ("folder", str(problem))      # game.tw-pddl before initial_state.pddl
            for file in sorted(path.glob("*.jsonl*")):
                found.update(games(str(file)))
        elif path.is_file():
            for line in lines(path):
                found[line["id"]] = ("line", zlib.compress(line["pddl_problem"].encode(), 1), line["task"])
        else:
            raise UserError(f"data: there is no file or folder {path}")
    if not found:
        raise UserError(f"data: {data} holds no games: neither game.tw-pddl nor initial_state.pddl files, nor JSON "
                        f"lines with id, task and pddl_problem")
    return dict(sorted(found.items()))


def lines(path: Path) -> Iterator[dict]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_game(where: tuple) -> tuple[str, str]:
    """(PDDL problem, what the task is)."""
    if where[0] == "line":
        return zlib.decompress(where[1]).decode(), where[2].removeprefix("Your task is to: ")
    path = Path(where[1])
    if path.name == "game.tw-pddl":
        game = json.loads(path.read_text())
        goal = re.search(r"Your task is to: ([^\"\\]+)", game["grammar"])
        return game["pddl_problem"], goal[1] if goal else "UNKNOWN GOAL"
    about = json.loads((path.parent / "traj_data.json").read_text())
    state = random.getstate()                            # the package draws one of several wordings
    random.seed("/".join(path.parent.parts[-3:]))
    goal = installed("alfworld.agents.utils.misc", "alfworld").get_templated_task_desc(about)
    random.setstate(state)
    return path.read_text(), goal
