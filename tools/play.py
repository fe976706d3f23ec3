"""A world played by hand, and the list of worlds: `python envs.py`."""
import re
import sys
from types import SimpleNamespace

import envs
from config import UserError, visible
from envs import Env, ask, closing, make_env, open_env, wait_for, world_names
from tools.examine import texts


def play(env: Env, task: str) -> None:
    """A person's episode; `undo` is the very rollback that LEAFE uses."""
    say(f"{env.rules}\n\ntask {task}. `hint`: admissible actions, `undo`: one turn back, `quit`.\n")
    turns = [SimpleNamespace(obs=wait_for(env, "reset", task), action="")]
    say(turns[-1].obs)
    while (typed := read_action(len(turns))) != "quit":
        if typed == "hint":
            say(", ".join(texts(env, "actions")))
        elif typed == "undo":
            turns = turns[:-1] or turns
            say(wait_for(env, "rollback", task, turns))
        elif typed:
            turns[-1].action = wait_for(env, "action", typed)
            outcome = wait_for(env, "step", turns[-1].action)
            turns.append(SimpleNamespace(obs=outcome.obs, action=""))
            say(outcome.obs if outcome.valid else f"(refused) {outcome.obs}")
            if outcome.done:
                say(f"{'success' if outcome.success else 'failure'} after {len(turns) - 1} turns")
                return


def say(text: str) -> None:
    print(visible(text))


def read_action(turn: int) -> str:
    """What is typed; a program goes on over several lines, to the end of its block."""
    try:
        typed = input(f"{turn}> ").strip()
        while typed.startswith("```") and typed.count("```") == 1:
            typed += "\n" + input()
    except (EOFError, KeyboardInterrupt):
        return "quit"
    if not sys.stdin.isatty():
        say(typed)                                     # piped in: a transcript, whole
    return typed


def ready(name: str, data: str) -> str:
    """One line on a world: its splits, or what it lacks."""
    try:
        with closing(make_env(name, data)) as env:
            sizes = ", ".join(f"{split} {len(ask(env, 'tasks', split))}" for split in ("train", "valid", "test"))
        return f"{name:14}ready: {sizes} tasks"
    except UserError as error:
        return f"{name:14}not ready: {error}"


def options_of(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """{key: value} of key=value, and the other words; a folder's name may hold a = too."""
    given = [arg for arg in args if re.match(r"\w+=(?!.*\.py(:|$))", arg)]
    return dict(arg.split("=", 1) for arg in given), [arg for arg in args if arg not in given]


def main(args: list[str]) -> None:
    options, words = options_of(args)
    if not words or set(words) & {"-h", "--help"} or set(options) - {"data"}:
        print(envs.__doc__)
        for name in world_names():
            say(ready(name, options.get("data", "")))
        return
    name, data = words[0], options.get("data", "")
    with closing(open_env(name, data)) as env:
        for note in env.examine("train", None if env.apart else open_env(name, data)):
            say(f"note: {note}\n")
        tasks = ask(env, "tasks", "train") or ask(env, "tasks", "test")
        tasks = tasks or [f"{stem}/0" for stem in getattr(env, "files", {})]
        if len(words) == 1 and not tasks:
            raise UserError(f"env: {name} has tasks neither in train nor in test; name one")
        play(env, words[1] if len(words) > 1 else tasks[0])
