"""Text worlds behind one small base class: text in, text out. Nothing here knows of models or tokens.

    python envs.py                          what there is, and whether it is ready here
    python envs.py quest                    play by hand: `undo` is a rollback by replay, `hint` lists actions
    python envs.py sokoban test-1-0003      play that task
    python envs.py sokoban data=levels.txt  play level files, Boxoban's or others'
    python envs.py my/world.py:World        a world of your own

    quest                                   here; every other world is a file of worlds/, found by its name
    sokoban, sokoban-words                  rooms made from the task id; sokoban also plays level files
    webshop                                 a small catalogue made there, or data= the public one
    code                                    data= CodeContests, MBPP or HumanEval
    scienceworld                            pip install scienceworld, and Java
    alfworld                                pip install alfworld, data= its games

A world must be deterministic: `reset(task)` and the same actions give the same observations, always. That is all
that backtracking needs, and `rollback` checks it at every turn. Quest is the embedded default, made so that no
fixed habit solves it: one must read the refusals and act on them.
"""
import random
import re
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import getfile
from typing import Any, Generator, Iterator, Sequence

from config import ROOT, UserError, blaming, guarded, load_file, nearest


class ReplayMismatch(UserError):
    """The world did not give the observation that it gave before: this branch cannot be trusted."""


@dataclass
class Outcome:
    """What one action brought. A success ends the episode, and its score counts as 1, whatever else is said."""
    obs: str
    score: float = 0.0        # progress, 0..1; less than 1 without success
    done: bool = False        # no further action counts
    success: bool = False
    valid: bool = True        # False: the world refused the action


class Env:
    """A world. It must have `rules`, `max_turns`, tasks, reset and step; all else has a default that does.
    step, reset, rollback and action may answer with a Future (scale/apart.py): the episode goes on when it is there."""
    rules: str                # system prompt: the world, and how an action is written
    max_turns: int            # horizon T
    apart: bool = False       # True: slow, or cannot run beside another: in other processes than the model (scale/apart.py)
    shares: bool = False      # True: of those, several instances may live in one process, which asks one after the other

    def tasks(self, split: str) -> list[str]: ...      # stable ids; the splits (train, valid, test) are disjoint
    def reset(self, task: str) -> str: ...             # o_1, the task q stated in it; a pure function of the task's id
    def step(self, action: str) -> Outcome: ...

    def action(self, reply: str) -> str:
        """What a model's reply asks for, its thoughts left out: the last line of what stands in its last <action>...</action>
        (one cut off needs no end), or else of the reply."""
        return re.sub(r"</action>.*", "", reply.rpartition("<action>")[2], flags=re.S).strip().rpartition("\n")[2]

    def actions(self) -> list[str]:                    # admissible actions, for people and tests
        return []

    def next_best(self) -> str:                        # a reply that helps to solve it; warm_start= alone asks for it
        return ""

    def difficulty(self, task: str) -> str:            # a group for the tables
        return "all"

    def close(self) -> None: ...                       # a world with something to free overrides it

    def rollback(self, task: str, turns: Sequence) -> str:
        """Reset(E), then replay a_1 .. a_{tau-1} (Algorithm 1, backtrack): len(turns) - 1 environment steps. `turns` are
        those before and including tau (anything with .obs and .action); the last one's action is not replayed; without
        turns it is a reset. Returns o_tau. Raises ReplayMismatch if any observation differs from the recorded one."""
        obs = wait_for(self, "reset", task)
        for t, turn in enumerate(turns, 1):
            if obs != turn.obs:
                raise ReplayMismatch(f"{task}: turn {t} read {turn.obs!r} and now reads {obs!r}")
            if t == len(turns):
                break
            outcome = wait_for(self, "step", turn.action)
            obs = outcome.obs
            if outcome.done:
                raise ReplayMismatch(f"{task}: the replay ended at turn {t} of {len(turns)}")
        return obs

    def examine(self, split: str, other: "Env | None" = None) -> list[str]:      # one in another process: there
        try:
            from tools.examine import examine
        except ModuleNotFoundError:
            return ["tools/examine.py is not here: the world is not examined"]
        with blaming(getfile(type(self)), f"env: {type(self).__name__} failed when it was examined"):
            return examine(self, split, other or self)


def ask(env: Env, what: str, *args: Any) -> Any:
    """env.what(*args). What a world raises is told in two lines: what was asked of it, and its own file and line."""
    shown = repr(args[0])[:80] if args else ""
    with blaming(getfile(type(env)), f"env: {type(env).__name__} failed in {what}({shown})"):
        answer = getattr(env, what)(*args)
    return answer if isinstance(answer, Future) else checked(env, what, answer)


def visit(env: Env, what: str, *args: Any) -> Generator[Future, Any, Any]:
    """`ask` in an episode: where the world answers with a Future, the others go on until its result is there."""
    answer = ask(env, what, *args)
    if isinstance(answer, Future):
        there: Future = Future()                       # of our own: who waits for a cancelled one is never woken
        answer.add_done_callback(lambda _: there.set_result(None))
        yield there
        if answer.cancelled():
            raise UserError(f"{where(env)}: the Future of {what}({repr(args[0])[:80]}) was cancelled")
        with blaming(getfile(type(env)), f"env: {type(env).__name__} failed in {what}({repr(args[0])[:80]})"):
            answer = checked(env, what, answer.result())
    return answer


def wait_for(env: Env, what: str, *args: Any) -> Any:
    """`ask` where nothing else goes on meanwhile."""
    visiting = visit(env, what, *args)
    try:
        while True:
            next(visiting).result()
    except StopIteration as end:
        return end.value


@contextmanager
def closing(env: Env) -> Iterator[Env]:
    """Close the world in the end. What it raises then is told, too, but not in place of what went wrong before."""
    try:
        yield env
    except BaseException:
        with suppress(UserError):
            ask(env, "close")
        raise
    ask(env, "close")


# ------------------------------------------------------------------------------------- what a world answers is checked
RETURN = "return Outcome(obs, score=reward, done=terminated or truncated, success=reward == 1)"
INSTEAD = {(str, 2): "; Gymnasium's pair is (obs, info): return obs alone",
           (Outcome, 4): f"; Gym's four are (obs, reward, terminated or truncated, info): {RETURN}",
           (Outcome, 5): f"; Gymnasium's five are (obs, reward, terminated, truncated, info): {RETURN}"}
TEXTS = {"reset": "reset(task) must return the first observation, which is text",
         "rollback": "rollback(task, turns) must return the observation at tau, which is text",
         "difficulty": "difficulty(task) must return the name of a group, which is text",
         "action": "action(reply) must return the action that the reply asks for, which is text"}
SCORE = (int, float)


def where(env: Env) -> str:
    return f"env: {getfile(type(env))}, class {type(env).__name__}"


def must(env: Env, value: Any, kind: Any, what: str, hint: str = "") -> None:
    """Raises UserError with the file, the class, and what a value must be, if it is not of this kind."""
    wrong = not isinstance(value, kind) or kind in (int, SCORE) and isinstance(value, bool)
    if wrong or kind is int and value < 1 or kind is SCORE and not 0 <= value <= 1:
        text = " ".join(repr(value).split())
        shown = f"{type(value).__name__} {text[:60]}" + "..." * (len(text) > 60)
        hint = INSTEAD.get((kind, len(value)), "") if isinstance(value, (tuple, list)) else hint
        raise UserError(f"{where(env)}: {what}, not {shown}{hint}")


def checked(env: Env, what: str, answer: Any) -> Any:
    """What a world's method returned, if it is of the right shape; see `must`."""
    if what in TEXTS:
        must(env, answer, str, TEXTS[what])
    if what == "step":
        must(env, answer, Outcome, "step(action) must return an Outcome(obs, score, done, success, valid) of envs")
        must(env, answer.obs, str, "the obs of an Outcome must be text")
        must(env, answer.score, SCORE, "the score of an Outcome must be a number of 0..1",
             "; write float(...), scaled to 0..1")
        for name in ("done", "success", "valid"):
            value = getattr(answer, name)
            must(env, value, bool, f"{name} of an Outcome must be True or False", "; write bool(...)")
        if answer.score == 1 and not answer.success:
            raise UserError(f"{where(env)}: an Outcome has score 1 but success=False; write success=True, which ends "
                            f"the episode, or a score below 1")
        if answer.success and not (answer.done and answer.score == 1):
            return Outcome(answer.obs, 1.0, True, True, answer.valid)
    return answer


# ------------------------------------------------------------------------------------------------------------ Quest
ROOMS = "attic cellar chapel garden island kitchen library stable study tower vault workshop".split()
TREASURES = "crown goblet harp mirror ring violin".split()
NEEDS = {"torch": "is dark", "ladder": "is too high", "axe": "is overgrown", "rope": "lies beyond a gap",
         "bone": "is guarded by a dog", "pump": "is flooded", "broom": "is full of webs",
         "brass-key": "is locked", "silver-key": "is locked", "iron-key": "is locked"}
JUNK = "ball bell hat spoon".split()


def listing(things: Sequence[str]) -> str:
    return " and ".join("the " + thing for thing in things) if things else "nothing"


class Quest(Env):
    """A house of rooms; the treasure lies behind a chain of 1..4 needs, each told only by a refusal. Task ids are
    `<split>-<needs>-<number>`; the id alone seeds the world. Parts of a split: see `part`."""
    rules = ("you are in a house and look for a treasure. you can go to a room or take a thing. you can "
             "carry one thing. answer with one action, like: go cellar, or: take lamp")
    slack = 3                                     # turns beyond the shortest solution, without foreknowledge
    max_turns = 3 * 4 + 2 + slack
    sizes = {"train": 1280, "valid": 256, "test": 512, "corpus": 10_000_000}

    def __init__(self, data: str = ""):
        if data:
            raise UserError("data: quest makes its own tasks and reads no file; leave data empty")

    def tasks(self, split: str) -> list[str]:
        name, _, part = split.partition("-")
        ids = [f"{name}-{1 + i % 4}-{i:04d}" for i in range(min(self.sizes.get(name, 0), 4096))]
        return [task for task in ids if not part or self.part(task) == part]

    def part(self, task: str) -> str:
        """For tests out of distribution: deep, three or four needs; of the others unseen, if what each room needs
        is never needed there in a shallow one (half of all pairs); shallow; or mixed."""
        self.reset(task)
        held_out = {(ROOMS.index(room) + list(NEEDS).index(thing)) % 2 for room, thing in self.bars.items()}
        return "deep" if self.needs > 2 else "mixed" if len(held_out) > 1 else ("shallow", "unseen")[held_out.pop()]

    def difficulty(self, task: str) -> str:
        return task.split("-")[1] + " needs"

    def reset(self, task: str) -> str:
        match = re.fullmatch(r"(train|valid|test|corpus)-([1-4])-(\d{4,7})", task)
        if not match or int(match[3]) >= self.sizes[match[1]]:
            raise UserError(f"quest has no task {task!r}; ids look like train-2-0001 (split, needs 1 to 4, number)")
        rng = random.Random("quest/" + task)
        self.needs = needs = int(match[2])
        self.rooms = rng.sample(ROOMS, needs + 4)   # the first `needs` are barred, the first holds the goal
        self.treasure = rng.choice(TREASURES)
        tools = rng.sample(list(NEEDS), needs + 3)  # the first `needs` are of use
        barred, free = self.rooms[:needs], self.rooms[needs:]
        self.bars = dict(zip(barred, tools))        # room -> the thing that opens it
        self.things: dict[str, list[str]] = {room: [] for room in self.rooms}
        self.things[barred[0]].append(self.treasure)
        for i in range(needs):                      # what opens room i lies in room i + 1, or in the open
            place = barred[i + 1] if i + 1 < needs else rng.choice(free)
            self.things[place].append(tools[i])
        for thing in tools[needs:] + rng.sample(JUNK, 2):
            self.things[rng.choice([room for room in self.rooms[1:] if len(self.things[room]) < 2])].append(thing)
        for things in self.things.values():
            rng.shuffle(things)
        self.bridge = rng.choice(free) if rng.random() < 0.3 else ""  # room beyond a bridge that holds once
        self.goal, self.place, self.hand, self.opened, self.gone = barred[0], "hall", "", 0, ""
        self.left = 3 * needs + 2 + self.slack
        doors = rng.sample(self.rooms, len(self.rooms))
        return (f"find the {self.treasure}. the {self.treasure} is in the {self.goal}. your candle lasts "
                f"{self.left} turns. you are in the hall. doors: {', '.join(doors)}.")

    def step(self, action: str) -> Outcome:
        self.left -= 1
        words = action.lower().strip().rstrip(".").replace(" the ", " ").split()
        verb, noun = words if len(words) == 2 else ("", "")
        obs, valid = "you cannot do that.", False
        if verb == "go" and noun in self.rooms:
            obs, valid = self._go(noun)
        elif verb == "take":
            obs, valid = self._take(noun)
        success = self.hand == self.treasure
        done = success or self.left <= 0
        if done and not success:
            obs += " the candle burns out."
        score = 1.0 if success else self.opened / (self.needs + 1)
        return Outcome(obs, score, done, success, valid)

    def _go(self, room: str) -> tuple[str, bool]:
        if room == self.gone:
            return f"the bridge to the {room} is gone.", False
        if room in self.bars:
            tool = self.bars[room]
            if self.hand != tool:
                return self._refuse(room, tool), False
            del self.bars[room]
            self.opened += 1
        obs = ""
        if self.place == self.bridge and room != self.bridge:
            self.gone, obs = self.bridge, "the bridge falls behind you. "
        self.place = room
        if room == self.bridge:
            obs = "you cross a bridge. it holds once. "
        return f"{obs}you are in the {room}. you see {listing(self.things[room])}.", True

    def _where(self, thing: str) -> str:
        """The room in which a thing lies; '' if it is in the hand or broken."""
        return next((room for room, things in self.things.items() if thing in things), "")

    def _refuse(self, room: str, tool: str) -> str:
        why = f"it {NEEDS[tool]}."
        if tool.endswith("-key") and self.hand.endswith("-key"):
            why = f"the {self.hand} breaks in the lock."
            self.hand = ""
        where = f" from the {place}." if (place := self._where(tool)) else ", and it is broken."
        return f"{why} the {room} needs the {tool}{where}"

    def _take(self, thing: str) -> tuple[str, bool]:
        here = self.things.get(self.place, [])
        if thing not in here:
            return (f"there is no {thing} here." if thing in (*NEEDS, *JUNK, *TREASURES) else "you cannot do that."), False
        here.remove(thing)
        obs = f"you take the {thing}."
        if self.hand:
            here.append(self.hand)
            obs += f" you leave the {self.hand}."
        self.hand = thing
        return obs, True

    def actions(self) -> list[str]:
        return [*("go " + room for room in sorted(self.rooms)),
                *("take " + thing for thing in self.things.get(self.place, []))]

    def next_best(self) -> str:
        """The first action of a shortest solution in the world laid open ('' if none)."""
        action, thing = "", self.treasure
        while thing != self.hand:                   # walk the chain of needs from the goal outwards
            place = self._where(thing)
            if place == self.place:
                return "take " + thing
            if place in ("", self.gone):
                return ""
            action = "go " + place
            if place not in self.bars:
                break
            thing = self.bars[place]
        return action

    def judge(self, task: str, actions: list[str], tau: int, e: str) -> tuple[bool, bool, bool]:
        """A failed episode's reflection, seen with the house laid open: was the policy told of something missing
        that it never brought? Does e name such a thing? Can the room that lacks it still be opened from tau?"""
        self.reset(task)
        told: dict[str, str] = {}                   # thing -> the room whose refusal named it
        for action in actions:
            if need := re.search(r"needs the ([a-z-]+)", self.step(action).obs):
                told[need[1]] = action.lower().strip().rstrip(".").split()[-1]
        told = {thing: room for thing, room in told.items() if room in self.bars}
        named = [thing for thing in told if thing in re.findall(r"[a-z-]+", e.lower())]
        if not named or not tau:
            return bool(told), bool(named), False
        self.reset(task)
        for action in actions[:tau - 1]:
            self.step(action)
        room = told[named[0]]
        while room in self.bars and self.left > 0 and (best := self.next_best()):
            self.step(best)
        return True, True, room not in self.bars


# ------------------------------------------------------------------------------------------- the door of the worlds
def world_names() -> list[str]:
    files = sorted((ROOT / "worlds").glob("*.py"))
    return ["quest", *(file.stem.replace("_", "-") for file in files if "def reset(" in file.read_text())]


@lru_cache
def env_class(name: str) -> type[Env]:
    """A world by its name, which is a file of worlds/, or `path/to/file.py:Class`. UserError says what there is."""
    if name == "quest":
        return Quest
    path, suffix, kind = (*re.split(r"(\.py)(?=:[^/]*$|$)", name), "", "")[:3]
    if not suffix and name not in world_names():
        raise UserError(f"env: there is no {name!r}; there are {', '.join(world_names())}, and "
                        f"path/to/file.py:Class{nearest(name, world_names())}")
    file = ROOT / "worlds" / (name.replace("-", "_") + ".py")
    with blaming(f"{file}", f"env: {file} cannot be imported"):
        module = load_file(path + suffix, "env") if suffix else import_module("worlds." + file.stem)
    own = {key: value for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Env)
           and (value.__module__ == module.__name__ or key == kind[1:])}
    if kind and kind[1:] not in own:
        wrong = "; that one there must derive from envs.Env" * isinstance(vars(module).get(kind[1:]), type)
        raise UserError(f"env: {path}{suffix} has no class {kind[1:]}(Env){wrong}")
    if not kind and len(own) != 1:
        raise UserError(f"env: {path}{suffix} has {len(own)} classes derived from envs.Env ({', '.join(own)}); name "
                        f"one: env={path}{suffix}:Class")
    return own[kind[1:]] if kind else next(iter(own.values()))


def open_env(name: str, data: str = "") -> Env:
    """The world in this process."""
    kind = env_class(name)
    with blaming(getfile(kind), f"env: {kind.__name__} failed in __init__({data!r})"):
        return kind(data) if data else kind()          # type: ignore[call-arg]


def make_env(name: str, data: str = "", timeout: float = 1800.0, workers: int = 1) -> Env:
    """The environment; where it asks for it by `apart`, in one of so many processes, which has so many seconds a call."""
    if env_class(name).apart:
        from scale.apart import Remote
        return Remote(name, data, timeout, workers)
    return open_env(name, data)


def main(args: list[str]) -> None:
    """The door of playing by hand."""
    from tools.play import main as play
    play(args)


if __name__ == "__main__":
    import envs                                        # not this second copy of it: worlds derive from envs.Env
    guarded(envs.main)
