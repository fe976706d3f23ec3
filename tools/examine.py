"""A world looked over before anything is sampled (Env.examine): has it all that it must have, of the right shape, and
can its episodes run side by side? What is wrong is one line, with file and class; what will be regretted is a note.
"""
import re
from collections import Counter
from inspect import signature
from itertools import zip_longest
from os.path import commonprefix
from typing import Any, Iterator, Sequence

from config import UserError
from envs import Env, must, wait_for, where


def examine(env: Env, split: str, other: Env) -> list[str]:
    """Raises UserError for what is wrong, returns the notes. `other`: another instance, or `env` if there is none."""
    for name in ("tasks", "reset", "step"):
        if getattr(type(env), name) is getattr(Env, name) or not callable(getattr(env, name)):
            raise UserError(f"{where(env)}: it must have a method {name}{signature(getattr(Env, name))}")
    rules = getattr(env, "rules", None)
    must(env, rules, str, "rules must be text, the system prompt")
    try:
        env.rules = rules
    except AttributeError:
        raise UserError(f"{where(env)}: rules must be an attribute that can be set, not a property, for more may stand "
                        f"behind them (react=, playbook=); write self.rules = ... in __init__") from None
    turns = getattr(env, "max_turns", None)
    must(env, turns, int, "max_turns must be the turns an episode may have, like max_turns = 20")
    tasks = texts(env, "tasks", split)
    if texts(other, "tasks", split) != tasks:
        raise UserError(f"{where(env)}: tasks({split!r}) returned another list when it was asked again; it must return "
                        f"the same ids in the same order, always")
    if not tasks:
        return []
    said, notes = list(look_around(env, tasks[0])), []
    list(look_around(env, tasks[-1]))
    wait_for(env, "difficulty", tasks[0])
    wait_for(env, "action", "look")
    if differs := differing(said, list(look_around(env, tasks[0]))):
        notes.append(f"{where(env)}: the same actions give other observations, {differs}: branches will be dropped")
    elif other is not env:
        both = zip_longest(look_around(env, tasks[0]), look_around(other, tasks[-1]))
        beside = [one for one, _ in both if one is not None]
        if differs := differing(said, beside):
            raise UserError(f"{where(env)}: with another episode beside it, it gives other observations, {differs}; "
                            f"keep all that changes in self, not in the class or the file")
    for name, before in (("rules", rules), ("max_turns", turns)):
        if getattr(env, name) != before:
            raise UserError(f"{where(env)}: reset or step changes {name}, which is read before it; what belongs to one task "
                            f"goes into its first observation")
    if hasattr(env, "judge"):
        check_verdict(env, wait_for(env, "judge", tasks[0], ["look"], 1, "look"))
    for part in sorted({"train", "valid", "test"} - {split.partition("-")[0]}):
        theirs = texts(env, "tasks", part)
        if shared := sorted(set(tasks) & set(theirs)):
            notes.append(f"{where(env)}: {len(shared)} tasks of {split}, like {shared[0]}, are in {part}, too")
        elif part != "valid" and begin_alike(env, tasks[:3], theirs[:3]):
            notes.append(f"{where(env)}: {tasks[0]} and {theirs[0]}, and those behind them, begin with the same words; "
                         f"are they the same tasks? the splits must share none")
    return notes


def check_verdict(env: Env, verdict: Any) -> None:
    if not isinstance(verdict, (tuple, list)) or len(verdict) != 3 or not all(one in (0, 1) for one in verdict):
        raise UserError(f"{where(env)}: judge must return three of True or False (told what was missing? named it? does it "
                        f"work from that turn?), not {' '.join(repr(verdict).split())[:60]}")


def begin_alike(env: Env, some: list[str], others: list[str]) -> bool:
    """Do tasks of two splits begin alike, one by one, though those of one split do not?"""
    said, again = ([wait_for(env, "reset", task) for task in tasks] for tasks in (some, others))
    return said == again and len(set(said)) == len(said) > 1


def texts(env: Env, what: str, *args: Any) -> list[str]:
    found, form = wait_for(env, what, *args), f"{what}({', '.join(map(repr, args))}) must return a list of texts"
    must(env, found, (list, tuple), form)
    must(env, next((text for text in found if not isinstance(text, str)), ""), str, form)
    text, count = Counter(found).most_common(1)[0] if found else ("", 0)
    if what == "tasks" and count > 1:
        raise UserError(f"{where(env)}: tasks({args[0]!r}) holds {text!r} {count} times; it must hold each task once")
    halves = [text for text in found if re.search("[\ud800-\udfff]", text)]
    if what == "tasks" and halves:
        raise UserError(f"{where(env)}: tasks({args[0]!r}) holds {halves[0]!r}, which has half of a surrogate pair")
    return list(found)


def look_around(env: Env, task: str) -> Iterator[str]:
    """The observations of a short episode."""
    yield wait_for(env, "reset", task)
    for action in [*texts(env, "actions")[:1], "look"]:        # one that is admissible, then one that hardly is
        outcome = wait_for(env, "step", action)
        yield outcome.obs
        if outcome.done:
            break


def differing(said: Sequence[str], again: Sequence[str]) -> str:
    """Where two readings part: once this, and once that; "" if nowhere."""
    for pair in zip(said, again):
        if pair[0] != pair[1]:
            at = max(0, len(commonprefix(pair)) - 30)
            return "once " + " and once ".join(repr(text[at:at + 60]) for text in pair)
    return ""
