"""Sokoban, the paper's: rooms of 6x6 with one or two boxes, made here from the task id alone, or level files: Boxoban's
(https://github.com/google-deepmind/boxoban-levels), and collections as they are published. worlds/sokoban_words.py
tells the rooms undrawn."""
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from config import UserError
from envs import Env, Outcome
from worlds.files import WIDE, given, read_bytes, walked

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
WALL, FLOOR, GOAL, BOX, MAN, BOX_ON_GOAL, MAN_ON_GOAL = "# .$@*+"


@dataclass
class Level:
    walls: set[tuple[int, int]]
    goals: set[tuple[int, int]]
    boxes: set[tuple[int, int]]
    man: tuple[int, int]
    size: tuple[int, int]                          # rows, columns


def parse_level(board: str) -> Level:
    lines = board.split("\n")
    cells = {(r, c): char for r, line in enumerate(lines) for c, char in enumerate(line)}
    pick = lambda chars: {cell for cell, char in cells.items() if char in chars}      # noqa: E731
    return Level(pick(WALL), pick(GOAL + BOX_ON_GOAL + MAN_ON_GOAL), pick(BOX + BOX_ON_GOAL),
                 pick(MAN + MAN_ON_GOAL).pop(), (len(lines), max(map(len, lines))))


# ---------------------------------------------------------------------------------------------------- level files
ENDINGS = (".txt", ".sok", ".xsb")                # what is read of a folder
BOARD = re.compile(r"(?:^[ \t_-]*[#.$@*+][#.$@*+ \t_-]*(?:\n|\Z))+", re.M)           # rows next to each other
PLAIN = re.compile(r"#[#.$@*+ ]*#(?:\n#[#.$@*+ ]*#)*\n?")                            # as Boxoban draws a board
RUNS = re.compile(r"[\d#.$@*+ |_-]*(?:\d#|#\||\|#)[\d#.$@*+ |_-]*$")                 # 5#|#@$.#|5#


@dataclass
class LevelFile:
    split: str                                     # train, valid or test, as its name says, or its folders'
    boards: list[str]                              # drawn as Boxoban draws them


def split_of(name: str) -> str:
    """The split that a word of a name begins with, '' if none does: `latest` and `contest` are no tests."""
    for split in ("train", "valid", "test"):
        if re.search(f"(?<![a-z]){split}", name.lower()):
            return split
    return ""


@lru_cache                                        # every episode has an environment of its own
def read_levels(data: str) -> tuple[dict[str, LevelFile], list[str]]:
    """The level files that data= names, and those in its folders, by their names here; and notes on what was skipped.
    All levels are read and checked."""
    boards: dict[Path, list[str]] = {}
    notes = []
    for path in given(data):
        if path.is_dir():
            found, skipped = read_folder(path)
            notes += skipped
        else:
            found = {path: read_boards(path)}
        if not any(found.values()):
            where = f"; in a folder, {', '.join(ENDINGS)} files are read" if path.is_dir() else ""
            raise UserError(f"data: {path}: no level found; a level is rows of '#@$.', like Boxoban's{where}")
        boards |= {file.parent.resolve() / file.name: levels for file, levels in found.items()}
    files = {}
    for name, path in names_of(list(boards)).items():
        files[name] = LevelFile(split_of(path.stem) or split_of(name) or "test", boards[path])
    return files, notes


def read_folder(folder: Path) -> tuple[dict[Path, list[str]], list[str]]:
    """The level files of a folder and of those below it, and a note on its other files. What is hidden, like a clone's
    .git, is none of them."""
    found, others = {}, []
    for path in sorted(place / name for place, names in walked(folder) for name in names):
        boards = read_boards(path) if path.suffix.lower() in ENDINGS else []
        if boards:
            found[path] = boards
        else:
            others.append(str(path.relative_to(folder)))
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    notes = [f"data: {folder}: skipped what is no level file: {', '.join(others[:5])}{more}"] if others else []
    return found, notes


def names_of(paths: list[Path]) -> dict[str, Path]:
    """A name here for each file: its own, if that tells the split, as Boxoban's do once they are sorted; else with the
    two folders above. Files that would have one name are told apart by more of their folders."""
    stems = Counter((path.parent, path.stem) for path in paths)
    parts = {path: (*path.parent.parts[path.is_absolute():],                   # without the root's "/"
                    path.stem if stems[path.parent, path.stem] == 1 else path.name) for path in paths}
    depth = {path: 1 if split_of(path.stem) else 3 for path in paths}
    while True:
        names = {path: "_".join(parts[path][-depth[path]:]) for path in paths}
        times = Counter(names.values())
        alike = [path for path in paths if times[names[path]] > 1]
        if not alike:
            return {name: path for path, name in names.items()}
        for path in alike:
            depth[path] += 1
            if depth[path] > len(parts[path]) + 1:
                raise UserError(f"data: {path} and another file are both called {names[path]} here; rename one")


def read_boards(path: Path) -> list[str]:
    """The levels of a file, drawn. What stands between them (headers, titles, blank lines) is text. Raises UserError
    for what was meant as a level and is none."""
    text, boards = level_text(read_bytes(path)), []
    refuse_odd_rows(path, text)
    for match in BOARD.finditer(text):
        board = drawn(match[0])
        if is_meant(board):
            if wrong := wrong_with(board):
                line = text.count("\n", 0, match.start()) + 1
                raise UserError(f"data: {path}: level {len(boards)} (at line {line}) is no Sokoban level: {wrong}")
            boards.append(board)
    return boards


def refuse_odd_rows(path: Path, text: str) -> None:
    """A row with a typing error, or in the short hand of some collections, would be taken as text between levels."""
    board = "\0"
    lines = BOARD.sub(board + "\n", text).split("\n")
    for before, row, after in zip(["", *lines], lines, [*lines[1:], ""]):
        letters = re.sub(r"[#.$@*+ \t_-]", "", row) if re.search(r"[$@*+]", row) else ""
        framed = row.strip().startswith(WALL) and row.strip().endswith(WALL)
        within = before == after == board
        few = len(letters) <= 2                                # more, and framed, is a title
        if letters and (few and (framed or within) or within and WALL in row and not framed):
            wrong = f"{letters[0]!r} is no square of a level; squares are # . $ @ * + - _"
        elif WALL in row and RUNS.match(row):
            wrong = f"{row[:30]!r} is run-length encoded; write its rows out"
        else:
            continue
        line = text.count("\n", 0, text.index(row)) + 1
        raise UserError(f"data: {path}, line {line}: {wrong}")


def level_text(raw: bytes) -> str:
    """Boards are ASCII, in whatever encoding the titles around them are."""
    if raw.startswith(WIDE):
        text = raw.decode("utf-16", errors="replace")
    else:
        text = raw.decode("latin-1").removeprefix("\xef\xbb\xbf")          # UTF-8's mark
    return re.sub(r"\r*\n|\r", "\n", text)


def drawn(rows: str) -> str:
    """A board in one manner: blanks for floor, no margin, and no row beyond its walls."""
    if PLAIN.fullmatch(rows):
        return rows.rstrip("\n")
    lines = [line.expandtabs().replace("-", FLOOR).replace("_", FLOOR).rstrip() for line in rows.split("\n")]
    walled = [n for n, line in enumerate(lines) if WALL in line]
    lines = lines[walled[0]:walled[-1] + 1] if walled else []
    margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return "\n".join(line[margin:] for line in lines)


def is_meant(board: str) -> bool:
    """Is it a level, good or bad, or an ornament, like a line of # or dots?"""
    whole = board.count("\n") >= 2 or any(man in board for man in (MAN, MAN_ON_GOAL)) and BOX in board
    return whole and board.strip(WALL + "\n") != ""


def wrong_with(board: str) -> str:
    men, boxes, goals = (sum(map(board.count, kind)) for kind in (MAN + MAN_ON_GOAL, BOX + BOX_ON_GOAL,
                                                                  GOAL + BOX_ON_GOAL + MAN_ON_GOAL))
    if men != 1 or not boxes or boxes != goals:
        return f"{men} men, {boxes} boxes, {goals} goals; it must have one man, and as many goals as boxes"
    if BOX not in board:
        return "every box is on a goal already"
    return "" if is_closed(board) else "its walls are not closed around the man"


def is_closed(board: str) -> bool:
    """Do walls keep the man within the drawing?"""
    rows = board.split("\n")
    if not (rows[0] + rows[-1]).strip(WALL) and all(
            len(row) == len(rows[0]) and row[0] == row[-1] == WALL for row in rows):
        return True                                    # a frame of walls, as all of Boxoban's have
    level = parse_level(board)
    reached, todo = {level.man}, [level.man]
    while todo:
        r, c = todo.pop()
        if not (0 <= r < level.size[0] and 0 <= c < level.size[1]):
            return False
        near = {(r + dr, c + dc) for dr, dc in MOVES.values()} - level.walls - reached
        reached |= near
        todo += near
    return True


# ------------------------------------------------------------------------------------------------------ the rooms
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
    """Task ids: `<split>-<boxes>-<number>`, made here, `<file's name>/<number>` of level files in `data`. Of a split
    made here, `<split>-one` and `<split>-two` are the rooms with so many boxes."""
    rules = ("you push boxes onto goals. # wall, $ box, . goal, * box on goal, @ you, + you on goal. a box "
             "can be pushed, not pulled, and not two at once. "
             "answer with one action: up, down, left or right")
    max_turns = 40
    moves = MOVES
    splits = {"train": 512, "valid": 256, "test": 512, "corpus": 10_000_000}

    def __init__(self, data: str = ""):
        self.files, self.notes = read_levels(data) if data else ({}, [])
        if data:
            self.max_turns = 120                   # usual for Boxoban (Guez et al., 2019)

    def tasks(self, split: str) -> list[str]:
        if self.files:                             # what has no split, like Boxoban's hard set, is for tests
            return [f"{name}/{i}" for name, file in self.files.items() if split == file.split
                    for i in range(len(file.boards))]
        name, _, part = split.partition("-")
        ids = [f"{name}-{1 + i % 2}-{i:04d}" for i in range(min(self.splits.get(name, 0), 4096))]
        return [task for task in ids if not part or {"one": "1", "two": "2"}.get(part) == task.split("-")[1]]

    def examine(self, split: str, other: Env | None = None) -> list[str]:
        return self.notes + super().examine(split, other)

    def difficulty(self, task: str) -> str:
        return f"{len(self._level(task).boxes)} boxes"

    def _level(self, task: str) -> Level:
        name, _, number = task.partition("/")
        if name in self.files and number.isdecimal() and int(number) < len(self.files[name].boards):
            return parse_level(self.files[name].boards[int(number)])
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
