"""A world played by hand, and the list of worlds: `python envs.py`."""
import sys
from types import SimpleNamespace

import envs
from config import UserError
from envs import Env, make_env, open_env, world_names


def play(env: Env, task: str) -> None:
    """A person's episode; `undo` is the very rollback that LEAFE uses."""
    print(f"{env.rules}\n\ntask {task}. `hint`: admissible actions, `undo`: one turn back, `quit`.\n")
    turns = [SimpleNamespace(obs=env.reset(task), action="")]
    print(turns[-1].obs)
    while (typed := read_action(len(turns))) != "quit":
        if typed == "hint":
            print(", ".join(env.actions()))
        elif typed == "undo":
            turns = turns[:-1] or turns
            print(env.rollback(task, turns))
        elif typed:
            turns[-1].action = env.action(typed)
            outcome = env.step(turns[-1].action)
            turns.append(SimpleNamespace(obs=outcome.obs, action=""))
            print(outcome.obs if outcome.valid else f"(refused) {outcome.obs}")
            if outcome.done:
                print(f"{'success' if outcome.success else 'failure'} after {len(turns) - 1} turns")
                return


def read_action(turn: int) -> str:
    """What is typed; a program goes on over several lines, to the end of its block."""
    try:
        typed = input(f"{turn}> ").strip()
        while typed.startswith("```") and typed.count("```") == 1:
            typed += "\n" + input()
    except (EOFError, KeyboardInterrupt):
        return "quit"
    if not sys.stdin.isatty():
        print(typed)                                   # piped in: a transcript, whole
    return typed


def ready(name: str, data: str) -> str:
    """One line on a world: its splits, or what it lacks."""
    try:
        env = make_env(name, data)
        sizes = ", ".join(f"{split} {len(env.tasks(split))}" for split in ("train", "valid", "test"))
        env.close()
        return f"{name:14}ready: {sizes} tasks"
    except UserError as error:
        return f"{name:14}not ready: {error}"


def main(args: list[str]) -> None:
    options = dict(arg.split("=", 1) for arg in args if "=" in arg)
    words = [arg for arg in args if "=" not in arg]
    if not words or set(words) & {"-h", "--help"} or set(options) - {"data"}:
        print(envs.__doc__)
        for name in world_names():
            print(ready(name, options.get("data", "")))
        return
    env = open_env(words[0], options.get("data", ""))
    for note in env.examine("train"):
        print(f"note: {note}\n")
    tasks = env.tasks("train") or env.tasks("test") or [f"{stem}/0" for stem in getattr(env, "files", {})]
    play(env, words[1] if len(words) > 1 else tasks[0])
    env.close()
