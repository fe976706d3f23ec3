"""Sokoban, the paper's: rooms of 6x6 with one or two boxes, made here from the task id alone, or level files in
Boxoban's format (https://github.com/google-deepmind/boxoban-levels). worlds/sokoban_words.py tells the rooms undrawn."""
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from config import UserError
from envs import Env, Outcome

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
WALL, FLOOR, GOAL, BOX, MAN, BOX_ON_GOAL, MAN_ON_GOAL = "# .$@*+"


@dataclass
class Level:
    walls: set[tuple[int, int]]
    goals: set[tuple[int, int]]
    boxes: set[tuple[int, int]]
    man: tuple[int, int]
    size: tuple[int, int]                          # rows, columns


def parse_level(lines: list[str], where: str) -> Level:
    """One level as text. Raises UserError, naming `where`, if it has no man, or not as many goals as boxes."""
    cells = {(r, c): char for r, line in enumerate(lines) for c, char in enumerate(line)}
    pick = lambda chars: {cell for cell, char in cells.items() if char in chars}      # noqa: E731
    men, boxes, goals = (pick(MAN + MAN_ON_GOAL), pick(BOX + BOX_ON_GOAL), pick(GOAL + BOX_ON_GOAL + MAN_ON_GOAL))
    if len(men) != 1 or not boxes or len(boxes) != len(goals):
        raise UserError(f"{where}: not a Sokoban level: {len(men)} men, {len(boxes)} boxes, {len(goals)} goals")
    return Level(pick(WALL), goals, boxes, men.pop(), (len(lines), max(map(len, lines))))


def split_of(name: str) -> str:
    return next((split for split in ("train", "valid", "test") if split in name), "")


@lru_cache                                        # every episode has an environment of its own
def read_boxoban(data: str) -> dict[str, list[str]]:
    """The levels of Boxoban files, and of all in Boxoban folders, as text: blocks of `; N` and rows of `# @ $ .`. A
    file's name here tells its set and split: unfiltered/train/000.txt is unfiltered_train_000."""
    found = {}
    for name in filter(None, data.split(",")):
        paths = sorted(Path(name).rglob("*.txt")) if Path(name).is_dir() else [Path(name)]
        for path in paths or [Path(name, "*.txt")]:
            if not path.is_file():
                raise UserError(f"data: there is no file {path}")
            stem = path.stem if split_of(path.stem) else "_".join(path.resolve().with_suffix("").parts[-3:])
            found[stem] = path.read_text().split(";")[1:]
            if not found[stem]:
                raise UserError(f"{path}: no level found; a Boxoban file has blocks of '; N' and rows of '#@$.'")
            boxoban_level(found[stem][0], f"{path}: level 0")
    return found


def boxoban_level(block: str, where: str) -> Level:
    return parse_level([line for line in block.split("\n")[1:] if line.strip()], where)


def reverse_play(rng: random.Random, boxes: int, side: int = 6) -> Level:
    """A solvable room: start solved and pull the boxes away, which a player can undo by pushing. Every box is at
    least two pushes from every goal."""
    inner = [(r, c) for r in range(1, side - 1) for c in range(1, side - 1)]
    frame = {(r, c) for r in range(side) for c in range(side)} - set(inner)
    while True:
        walls = frame | set(rng.sample(inner, rng.randint(0, 3)))
        free = [cell for cell in inner if cell not in walls]
        goals = rng.sample(free, boxes)
        now, man = set(goals), rng.choice([cell for cell in free if cell not in goals])
        for _ in range(60):
            dr, dc = rng.choice(list(MOVES.values()))
            to, behind = (man[0] + dr, man[1] + dc), (man[0] - dr, man[1] - dc)
            if to in walls or to in now:
                continue
            if behind in now and rng.random() < 0.7:
                now = now - {behind} | {man}
            man = to
        if all(abs(box[0] - goal[0]) + abs(box[1] - goal[1]) > 1 for box in now for goal in goals):
            return Level(walls, set(goals), now, man, (side, side))


def push(walls: set, man: tuple[int, int], boxes: frozenset, move: str):
    """The state after `move`, or None if a wall or a second box is in the way."""
    dr, dc = MOVES[move]
    to, beyond = (man[0] + dr, man[1] + dc), (man[0] + 2 * dr, man[1] + 2 * dc)
    if to in walls or (to in boxes and (beyond in walls or beyond in boxes)):
        return None
    return to, boxes - {to} | {beyond} if to in boxes else boxes


class Sokoban(Env):
    """Task ids: `<split>-<boxes>-<number>`, made here, `<file stem>/<number>` of Boxoban files in `data`. Of a split
    made here, `<split>-one` and `<split>-two` are the rooms with so many boxes."""
    rules = ("you push boxes onto goals. # wall, $ box, . goal, * box on goal, @ you, + you on goal. a box "
             "can be pushed, not pulled, and not two at once. "
             "answer with one action: up, down, left or right")
    max_turns = 40
    moves = MOVES
    splits = {"train": 512, "valid": 256, "test": 512, "corpus": 10_000_000}

    def __init__(self, data: str = ""):
        self.files = read_boxoban(data)
        if self.files:
            self.max_turns = 120                   # usual for Boxoban (Guez et al., 2019)

    def tasks(self, split: str) -> list[str]:
        if self.files:                             # what has no split, like Boxoban's hard set, is for tests
            return [f"{stem}/{i}" for stem, levels in self.files.items() if split == (split_of(stem) or "test")
                    for i in range(len(levels))]
        name, _, part = split.partition("-")
        ids = [f"{name}-{1 + i % 2}-{i:04d}" for i in range(min(self.splits.get(name, 0), 4096))]
        return [task for task in ids if not part or {"one": "1", "two": "2"}.get(part) == task.split("-")[1]]

    def difficulty(self, task: str) -> str:
        return f"{len(self._level(task).boxes)} boxes"

    def _level(self, task: str) -> Level:
        stem, _, number = task.partition("/")
        if stem in self.files and number.isdecimal() and int(number) < len(self.files[stem]):
            return boxoban_level(self.files[stem][int(number)], f"{stem}: level {number}")
        match = re.fullmatch(r"(train|valid|test|corpus)-([12])-(\d{4,7})", task)
        if not match or int(match[3]) >= self.splits[match[1]]:
            raise UserError(f"sokoban has no task {task!r}; ids look like test-1-0003, "
                            f"or file/3 with data=file.txt")
        return reverse_play(random.Random("sokoban/" + task), int(match[2]))

    def reset(self, task: str) -> str:
        self.level = self._level(task)
        self.man, self.boxes = self.level.man, frozenset(self.level.boxes)
        self.left = self.max_turns
        return f"push every box onto a goal within {self.left} moves.\n{self.draw()}"

    def draw(self) -> str:
        def cell(at: tuple[int, int]) -> str:
            if at in self.level.walls:
                return WALL
            bare, on_goal = ((BOX, BOX_ON_GOAL) if at in self.boxes else
                             (MAN, MAN_ON_GOAL) if at == self.man else (FLOOR, GOAL))
            return on_goal if at in self.level.goals else bare
        rows, columns = self.level.size
        return "\n".join("".join(cell((r, c)) for c in range(columns)) for r in range(rows))

    def stuck(self, box: tuple[int, int]) -> bool:
        """A box off its goal in a corner of walls never moves again."""
        wall = [(box[0] + dr, box[1] + dc) in self.level.walls for dr, dc in MOVES.values()]  # as in MOVES
        return box not in self.level.goals and (wall[0] or wall[1]) and (wall[2] or wall[3])

    def step(self, action: str) -> Outcome:
        self.left -= 1
        move = (action.lower().strip().rstrip(".").split() or [""])[-1]
        after = push(self.level.walls, self.man, self.boxes, move) if move in MOVES else None
        if move not in MOVES:
            said = "answer with up, down, left or right."
        elif after is None:
            dr, dc = MOVES[move]
            wall = (self.man[0] + dr, self.man[1] + dc) in self.level.walls
            said = f"you cannot go {move}: " + ("a wall." if wall else "the box does not move.")
        else:
            pushed = after[1] != self.boxes
            said = f"you push a box {move}." if pushed else f"you go {move}."
            self.man, self.boxes = after
            if pushed and any(self.stuck(box) for box in self.boxes):
                said += " the box is stuck in a corner and can never reach a goal."
        success = self.boxes == self.level.goals
        done = success or self.left <= 0
        said += " solved." if success else " no moves are left." if done else ""
        score = len(self.boxes & self.level.goals) / len(self.boxes)
        return Outcome(f"{said}\n{self.draw()}", score, done, success, after is not None)

    def actions(self) -> list[str]:
        return [move for move in MOVES if push(self.level.walls, self.man, self.boxes, move)]
