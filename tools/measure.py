"""What a world costs: splits, whether random walks replay on another instance, steps a second, memory.

    python -m tools.measure quest
    python -m tools.measure webshop data=products_1000.jsonl.xz
"""
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

from config import UserError, guarded
from envs import ReplayMismatch, open_env


def memory() -> int:
    """Resident bytes of this process and those below it."""
    parents, resident = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:                                  # it ended meanwhile
            continue
        parents[int(folder.name)], resident[int(folder.name)] = int(fields[1]), int(fields[21])
    own = [os.getpid()]
    for pid in own:
        own += [child for child, parent in parents.items() if parent == pid]
    return sum(resident[pid] for pid in own) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, data: str) -> str:
    """Splits, whether random walks replay on another instance, speed and memory of a world."""
    before = memory()
    env, other, rng = open_env(name, data), open_env(name, data), random.Random(0)
    splits = {split: env.tasks(split) for split in ("train", "valid", "test")}
    tasks = next(found for found in splits.values() if found)
    same = steps = 0
    seconds = 0.0
    for task in rng.sample(tasks, min(20, len(tasks))):
        turns = [SimpleNamespace(obs=env.reset(task), action="")]
        for _ in range(min(25, env.max_turns)):
            turns[-1].action = rng.choice(env.actions() or ["nothing"]) if rng.random() < 0.9 else "nothing"
            began = time.perf_counter()
            outcome = env.step(turns[-1].action)
            seconds, steps = seconds + time.perf_counter() - began, steps + 1
            turns.append(SimpleNamespace(obs=outcome.obs, action=""))
            if outcome.done:
                break
        try:
            same += other.rollback(task, turns) == turns[-1].obs
        except ReplayMismatch:
            pass
    sizes = ", ".join(f"{split} {len(found)}" for split, found in splits.items())
    text = (f"{name}: {sizes} tasks; {same} of {min(20, len(tasks))} random episodes replay byte for byte on another "
            f"instance; {steps / seconds:.0f} steps a second; {(memory() - before) / 2**21:.0f} MB an instance")
    env.close()
    other.close()
    return text


def main(args: list[str]) -> None:
    options = dict(arg.split("=", 1) for arg in args if "=" in arg)
    names = [arg for arg in args if "=" not in arg]
    if len(names) != 1 or set(options) - {"data"}:
        raise UserError("usage: python -m tools.measure NAME [data=...]")
    print(measure(names[0], options.get("data", "")))


if __name__ == "__main__":
    guarded(main, __doc__)
