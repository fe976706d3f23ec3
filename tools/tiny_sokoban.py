"""What the embedded base model of Sokoban, models/tiny-sokoban, is taught: `python -m tools.tiny sokoban`. The names are those of
tools/tiny.py. By habit it walks towards the box and pushes it whichever way it happens to go. With an experience in view
("the box at c3 must go left to b3.") it walks around the box and does that. In hindsight it goes through the pushes
of a transcript and stops at the first that brought the box no nearer to the goal (counted in pushes, by a search on
the board, which the transcript tells in full).
"""
import random
import re
from collections import deque
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache

from typing import Any

from envs import env_class

World: Any = env_class("sokoban-words")
MOVES, square = World.moves, World.square
DEPTHS, ROLLBACKS = (1, 1), 4
WORDS = r" ?[a-z]\d| ?[a-z]+(?:-[a-z]+)*| ?\d+| ?[^\sa-z\d]|\s"              # a square is one token
FRAME = frozenset((r, c) for r in range(6) for c in range(6) if r in (0, 5) or c in (0, 5))
SQUARES = [square((r, c)) for r in range(6) for c in range(6)]
NAMES = [*SQUARES, *MOVES]
Cell = tuple[int, int]


def texts() -> list[str]:
    """All that is ever said in Sokoban."""
    rng, found = random.Random(0), [World.rules, " ".join(SQUARES), "so: none. the box at c3 must go left to b3."]
    for task in World().tasks("corpus")[:200:2]:
        env = World()
        found.append(env.reset(task))
        while env.left > 0 and env.boxes != env.level.goals:
            found.append(env.step(rng.choice([*MOVES, "jump"])).obs)
    return found


def cell(name: str) -> Cell:
    return int(name[1:]) - 1, ord(name[0]) - ord("a")


def beside(at: Cell, move: str, steps: int = 1) -> Cell:
    return at[0] + steps * MOVES[move][0], at[1] + steps * MOVES[move][1]


@lru_cache(maxsize=100_000)
def pushes(walls: frozenset, goal: Cell) -> dict[tuple[Cell, Cell], int]:
    """(man, box) -> fewest pushes that bring the box to the goal, for every state that can be solved."""
    free = [(r, c) for r in range(1, 5) for c in range(1, 5) if (r, c) not in walls]
    left = {(man, goal): 0 for man in free if man != goal}
    queue = deque(left)
    while queue:                                       # backwards: a walk costs nothing (first), a pull one
        man, box = queue.popleft()
        for move in MOVES:
            to, behind = beside(man, move), beside(man, move, -1)
            if to in walls or to == box:
                continue
            if left.get((to, box), 99) > left[man, box]:
                left[to, box] = left[man, box]
                queue.appendleft((to, box))
            if behind == box and left.get((to, man), 99) > left[man, box] + 1:
                left[to, man] = left[man, box] + 1
                queue.append((to, man))
    return left


@dataclass
class Reader:
    """What a reader of the transcript knows."""
    walls: frozenset = FRAME
    goal: Cell = (0, 0)
    box: Cell = (0, 0)
    man: Cell = (0, 0)
    refused: bool = False
    left: dict = field(default_factory=dict)           # see pushes

    @property
    def won(self) -> bool:
        return self.box == self.goal

    def start(self, obs: str) -> "Reader":
        inner = re.search(r"walls: (.+?)\.", obs)[1]
        self.walls = FRAME | frozenset(map(cell, re.findall(r"[a-z]\d", inner)))
        self.goal = cell(re.search(r"goal: (\S+)\.", obs)[1])
        self.left = pushes(self.walls, self.goal)
        self.read("", obs)
        return self

    def __deepcopy__(self, memo) -> "Reader":          # nothing in it is changed in place
        return Reader(self.walls, self.goal, self.box, self.man, self.refused, self.left)

    def read(self, action: str, obs: str) -> None:
        self.box, self.man = (cell(re.search(rf"{who}: (\S+)\.", obs)[1]) for who in ("box", "you"))
        self.refused = "cannot" in obs or "answer with" in obs

    def way(self, goal: Cell, box: Cell, man: Cell) -> str:
        """First move of a shortest walk to a square, around the box; '' if there is none."""
        seen, queue = {goal: ""}, deque([goal] if goal not in self.walls else [])
        while queue:                                   # from the end: each square learns its move towards it
            at = queue.popleft()
            for move in MOVES:
                before = beside(at, move, -1)
                if before not in self.walls and before != box and before not in seen:
                    seen[before] = move
                    queue.append(before)
        return seen.get(man, "")

    def plan(self) -> tuple[str, Cell] | None:
        """The direction in which the box must go next, and how far; None if it is lost."""
        now = self.left.get((self.man, self.box))
        if not now:
            return None
        for move in MOVES:
            behind = beside(self.box, move, -1)
            if behind in self.walls or (behind != self.man and not self.way(behind, self.box, self.man)):
                continue
            box, left = self.box, now
            while self.left.get((box, beside(box, move)), 99) == left - 1:
                box, left = beside(box, move), left - 1
            if box != self.box:
                return move, box
        return None


def experience(reader: Reader, move: str, to: Cell) -> str:
    return f"the box at {square(reader.box)} must go {move} to {square(to)}."


def hindsight(first: str, turns: list[tuple[str, str]]) -> tuple[str, str, str]:
    """(thought, tau, experience) for a transcript. The thought names each push's turn, the box's square and the
    direction it should have gone in, up to the first push that went wrong: tau is where the walk to that push began.
    If none went wrong, tau is where the walk after the last one began; "none" if that is the last turn."""
    reader, thought, begins = Reader().start(first), "", 1
    for t, (action, obs) in enumerate(turns, 1):
        before, left = copy(reader), reader.left.get((reader.man, reader.box), 99)
        reader.read(action, obs)
        if reader.box == before.box:
            continue
        good = reader.left.get((reader.man, reader.box), 99) < left
        move, to = (action, reader.box) if good else before.plan()       # the room could be solved up to here
        thought += f" {t} {square(before.box)} {move}"
        if not good:
            return thought, str(begins), experience(before, move, to)
        begins = t + 1
    if begins > len(turns):
        return thought, "none", "none"
    return thought, str(begins), experience(reader, *reader.plan())


def habit(reader: Reader, last: str, rng: random.Random) -> str:
    """The habit: at the box by the shortest way and against it, on and on; never mind where it goes."""
    def far(move: str) -> int:
        return sum(abs(a - b) for a, b in zip(beside(reader.man, move), reader.box))
    if reader.refused and rng.random() < 0.4:
        return rng.choice(list(MOVES))
    if rng.random() < 0.2:
        return rng.choice(list(MOVES))
    return min(MOVES, key=far)                         # 0 where the box itself stands


def heeded(e: str) -> tuple[Cell, str, Cell]:
    at, move, to = re.fullmatch(r"the box at (\S+) must go (\S+) to (\S+)\.", e).groups()
    return cell(at), move, cell(to)


def follow(reader: Reader, e: str) -> str:
    """The action that does what the experience says: walk behind the box, and push."""
    _, move, _ = heeded(e)
    behind = beside(reader.box, move, -1)
    return move if reader.man == behind else reader.way(behind, reader.box, reader.man) or move


def spent(reader: Reader, e: str) -> bool:
    """What e says is done, or cannot be done."""
    at, move, to = heeded(e)
    on_the_way = [beside(at, move, n) for n in range(abs(at[0] - to[0]) + abs(at[1] - to[1]))]
    return reader.refused or reader.box not in on_the_way


def any_lesson(env: Any, reader: Reader, rng: random.Random, true: bool) -> str:
    """What is best, or any push that can be done."""
    best = reader.plan()
    able = [(move, beside(reader.box, move)) for move in MOVES
            if beside(reader.box, move) not in reader.walls
            and (reader.man == (behind := beside(reader.box, move, -1))
                 or (behind not in reader.walls and reader.way(behind, reader.box, reader.man)))]
    choice = best if true and best else rng.choice(able) if able else ("up", beside(reader.box, "up"))
    return experience(reader, *choice)
