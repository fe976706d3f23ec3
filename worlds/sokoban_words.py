"""Sokoban told in words: the rooms of worlds/sokoban.py undrawn, for models too small to read a drawing."""
from config import UserError
from worlds.sokoban import Sokoban


def square(at: tuple[int, int]) -> str:
    """A square's name: columns a, b, c ... from the left, rows 1, 2, 3 ... from the top."""
    return "abcdefghijklmnopqrstuvwxyz"[at[1]] + str(at[0] + 1)


class InWords(Sokoban):
    """The rooms made here, squares named as in chess, since a small model cannot count the columns of a drawing. The
    room is b2 to e5; which of these are walls, and the goal, is told once."""
    rules = ("you push a box onto the goal. squares have names, b2 is up and left of c3. a box can be pushed, not "
             "pulled, and not two at once. answer with one action: up, down, left or right")
    max_turns = 20
    square = staticmethod(square)

    def __init__(self, data: str = ""):
        if data:
            raise UserError("data: sokoban-words tells the rooms that are made here; for files, use env=sokoban")
        super().__init__()

    def reset(self, task: str) -> str:
        super().reset(task)
        inner = [cell for cell in self.level.walls if 0 < cell[0] < self.level.size[0] - 1
                 and 0 < cell[1] < self.level.size[1] - 1]
        return (f"push every box onto a goal within {self.left} moves. walls: "
                f"{', '.join(map(square, sorted(inner))) or 'none'}. goal: "
                f"{', '.join(map(square, sorted(self.level.goals)))}.\n{self.draw()}")

    def draw(self) -> str:
        return f"box: {', '.join(map(square, sorted(self.boxes)))}. you: {square(self.man)}."
