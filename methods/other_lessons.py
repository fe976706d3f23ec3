"""A control: LEAFE, but each branch is given an experience of another task in place of its own.

    python train.py config.yaml method=other_lessons experiences=out/quest out=out/control
"""
from pathlib import Path

from config import Check, Config, UserError
from leafe import explore
from run import Run, read_jsonl
from train import learn

KEYS = """
experiences: ""               # the run whose reflections they are taken from
"""
CHECKS: list[Check] = [("trees", lambda v, s: not v, "this control explores anew")]


def check(cfg: Config) -> None:
    read_lessons(cfg.experiences)


def train(run: Run, round_: int) -> None:
    learn(run, round_, explore(run, run.train_tasks, round_, lessons=read_lessons(run.cfg.experiences)))


def read_lessons(folder: str) -> dict[str, list[str]]:
    """The experiences that a run's reflections gave, by task."""
    if not (Path(folder) / "trees.jsonl").is_file():
        raise UserError(f"experiences: {folder or 'no run was named, and it'} has no trees.jsonl")
    found: dict[str, list[str]] = {}
    records = read_jsonl(Path(folder) / "trees.jsonl")                 # in the order in which attempts ended
    for record in sorted(records, key=lambda record: (record["task"], record["round"], record["name"])):
        found.setdefault(record["task"], []).extend(r["e"] for r in record["reflections"] if r["tau"])
    found = {task: lessons for task, lessons in found.items() if lessons}
    if len(found) < 2:
        raise UserError(f"experiences: {folder} has reflections of {len(found)} tasks; the control needs several")
    return found
