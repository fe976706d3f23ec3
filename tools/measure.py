"""What a world costs: splits, whether random walks replay, steps a second, memory.

    python -m tools.measure quest
    python -m tools.measure webshop data=products_1000.jsonl.xz

Two instances walk at random, a step of one, then a step of the other, each through a task of its own. Then each goes
its way again, alone, and rolls back to the end of the other's: what instances share, and what one keeps from an episode
to the next, is found, and told with task and action.
"""
import os
import random
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator

from config import UserError, guarded, visible
from envs import Env, Outcome, ReplayMismatch, ask, closing, env_class, make_env, wait_for
from tools.examine import texts
from tools.play import options_of

TASKS, TURNS = 20, 25                                    # of a measurement


def below(pid: int) -> list[int]:
    """A process and those below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:                                  # it ended meanwhile
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def memory() -> int:
    """Resident bytes of this process and those below it."""
    pages = 0
    for pid in below(os.getpid()):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Walk:
    """A random episode: the first observation, then each action and what it brought."""
    task: str
    obs: str = ""
    steps: list[tuple[str, Outcome]] = field(default_factory=list)
    seconds: float = 0.0                                 # in the world's step


def walk(env: Env, walked: Walk, rng: random.Random) -> Iterator[None]:
    """Walk at random, a step at a time."""
    walked.obs = wait_for(env, "reset", walked.task)
    for _ in range(min(TURNS, env.max_turns)):
        yield
        action = rng.choice(ask(env, "actions") or ["nothing"]) if rng.random() < 0.9 else "nothing"
        began = time.perf_counter()
        outcome = wait_for(env, "step", action)
        walked.seconds += time.perf_counter() - began
        walked.steps.append((action, outcome))
        if outcome.done:
            break


def differs(env: Env, walked: Walk) -> str:
    """Where the same actions bring something else now, in words; "" if nowhere."""
    obs = wait_for(env, "reset", walked.task)
    if obs != walked.obs:
        return f"{walked.task}, reset: once {walked.obs[:200]!r}, then {obs[:200]!r}"
    for t, (action, before) in enumerate(walked.steps, 1):
        now = wait_for(env, "step", action)
        for what in ("obs", "score", "done", "success", "valid"):
            once, then = getattr(before, what), getattr(now, what)
            if once != then:
                return (f"{walked.task}, action {t}, {action[:80]!r}: {what} once {repr(once)[:200]}, "
                        f"then {repr(then)[:200]}")
    return ""


def lost(env: Env, walked: Walk) -> str:
    """What rollback says to the walk; "" if it is content."""
    turns = [SimpleNamespace(obs=walked.obs, action="")]
    for action, outcome in walked.steps:
        if outcome.done:                               # a tree has no turn behind it
            break
        turns[-1].action = action
        turns.append(SimpleNamespace(obs=outcome.obs, action=""))
    try:
        obs = wait_for(env, "rollback", walked.task, turns)
    except ReplayMismatch as error:
        return f"on another instance: {error}"[:600]
    last = turns[-1].obs
    return "" if obs == last else f"{walked.task}: rollback returned {obs[:200]!r}, not {last[:200]!r}"


def measure(name: str, data: str) -> str:
    """Splits, whether random walks replay, speed and memory of a world."""
    before, rng = memory(), random.Random(0)
    with closing(make_env(name, data)) as env, closing(make_env(name, data)) as other:
        splits = {split: texts(env, "tasks", split) for split in ("train", "valid", "test")}
        first = next((split for split, tasks in splits.items() if tasks), "")
        if not first:
            raise UserError(f"env: {name} has no tasks in train, valid or test")
        process = memory() - before if env_class(name).shares else 0       # that instances share
        before += process
        notes, tasks = env.examine(first), splits[first]
        walks = [Walk(task) for task in rng.sample(tasks, min(TASKS, len(tasks)))]
        odd = {}
        for one, two in zip_longest(walks[::2], walks[1::2]):
            pairs = [(env, one)] + ([(other, two)] if two else [])
            for _ in zip_longest(*(walk(world, own, rng) for world, own in pairs)):
                pass
            for world, own in pairs:
                said = differs(world, own) or lost(other if world is env else env, own)
                if said:
                    odd[own.task] = said
        steps = sum(len(own.steps) for own in walks)
        sizes = ", ".join(f"{split} {len(found)}" for split, found in splits.items())
        text = (f"{name}: {sizes} tasks; {len(walks) - len(odd)} of {len(walks)} random episodes replay byte for byte, "
                f"beside another and alone, on the same instance and on another; "
                f"{steps / sum(own.seconds for own in walks):.0f} steps a second; "
                f"{(memory() - before) / 2**21:.0f} MB an instance"
                + (f", beside {process / 2**20:.0f} MB of the process that they share" if process else ""))
    return "\n".join([text, *(f"  differs: {said}" for said in odd.values()), *(f"  note: {note}" for note in notes)])


def main(args: list[str]) -> None:
    options, names = options_of(args)
    if len(names) != 1 or set(options) - {"data"}:
        raise UserError("usage: python -m tools.measure NAME [data=...]")
    print(visible(measure(names[0], options.get("data", ""))))


if __name__ == "__main__":
    guarded(main, __doc__)
