"""The contenders of Stage 1 (the paper's Table 3): who solves more of the training tasks with the environment steps
that the rollback trees of a run took?

    python -m methods.stage1 config.yaml out=out/quest                  on that run's training tasks, into its folder
    python -m methods.stage1 config.yaml trees=out/quest out=out/other  the same, into another

    IS, IR, IR-1      independent sampling; iterative refinement: on failure reflect, and retry from the start with
                      all reflections so far in view, or with the latest alone
"""
import json
import math
import random
from collections import deque
from pathlib import Path

from config import UserError, guarded, load_config, refuse, visible    # before torch: Ctrl-C

import torch
from tqdm import tqdm

from engine import Job
from eval import spread
from envs import ask
from leafe import Attempt, Branch, Tree, episode, read_trees
from run import Policy, Run, RunFolder, pick_tasks, provenance, read_jsonl, report_file, write_aside

CONTENDERS = ("IS", "IR", "IR-1")


def contend(run: Run, method: str, task: str, steps_: int):
    """Attempts at one task until `steps_` steps are used; a generator for the engine, returns a record."""
    refine = method != "IS"
    run = run.but(keep_experience=True, reflect_every=10**9)           # reflect on failure, keep e in view
    steps = tokens = attempts = wins = 0
    lessons: list[str] = []
    while steps < steps_:
        e = "\nexperience: ".join(lessons[-1:] if method == "IR-1" else lessons)
        left = run.but(horizon=min(run.cfg.horizon or steps_, steps_ - steps))
        branch: Branch = yield from episode(left, run.world(), Attempt(task, str(attempts), e=e), refine)
        steps, tokens, attempts = steps + branch.steps, tokens + branch.tokens, attempts + 1
        wins += branch.success
        lessons += [r.e for r in branch.reflections if r.tau and r.e not in lessons]
        if branch.end in ("context", "mismatch"):                      # no more room: forget the oldest
            lessons = lessons[1:]
            steps += not branch.steps
    return dict(method=method, task=task, solved=wins > 0, wins=wins, attempts=attempts, steps=steps, tokens=tokens)


def run_contenders(run: Run, trees: list[Tree]) -> None:
    store = run.store("stage1.jsonl")
    done = {(r["method"], r["task"]) for r in store.records}
    mean = math.ceil(sum(b.steps + b.replayed for tree in trees for b in tree.branches) / len(trees))
    queue: deque[Job] = deque()
    for method in CONTENDERS:
        for tree in trees:
            if (method, tree.task) not in done:
                rng = random.Random(f"{run.cfg.seed}/{method}/{tree.task}")
                queue.append(Job(contend(run, method, tree.task, mean), rng, tree.task))
    for job in tqdm(run.policy.engine().run(queue), total=len(queue), desc="IS and IR", unit="task", disable=not queue):
        store.append(job.result)


def outcome(trees: list[Tree], records: list[dict]) -> dict[str, dict]:
    """Of the tree and of each contender: was a task solved, and what did all of them take?"""
    branches = [b for tree in trees for b in tree.branches]
    found = {"tree": dict(solved=[any(b.success for b in tree.branches) for tree in trees],
                          steps=sum(b.steps for b in branches), replayed=sum(b.replayed for b in branches),
                          sampled=sum(b.tokens for b in branches))}
    for method in CONTENDERS:
        by_task = {r["task"]: r for r in records if r["method"] == method}
        rows = [by_task[tree.task] for tree in trees]
        found[method] = dict(solved=[r["solved"] for r in rows], steps=sum(r["steps"] for r in rows), replayed=0,
                             sampled=sum(r["tokens"] for r in rows))
    return found


def table(trees: list[Tree], records: list[dict], resamples: int) -> str:
    """Share of training tasks solved, with 95 % intervals over tasks; differences are paired."""
    found, cell = outcome(trees, records), report_file().cell
    solved = {method: torch.tensor(one["solved"], dtype=torch.float) for method, one in found.items()}
    lines = [f"{'%':6}{'tasks solved':>24}{'tree minus this':>24}{'steps':>10}{'replayed':>10}{'tokens':>10}"]
    for method, hits in solved.items():
        own, gap = (spread(lambda index, values=values: values[index].mean(-1), len(trees), resamples)
                    for values in (hits, solved["tree"] - hits))
        difference = cell(gap, "+") if method != "tree" else ""
        lines.append(f"{method:6}{cell(own):>24}{difference:>24}"
                     + "".join(f"{found[method][key]:10}" for key in ("steps", "replayed", "sampled")))
    return "\n".join(lines)


def main(args: list[str]) -> None:
    cfg = load_config(args)
    refuse(cfg, plan="is what train.py prints", adapter="the contenders have what the trees were grown with: trees=, init=",
           playbook="is what eval.py puts into the rules")
    source = Path(cfg.trees or cfg.out)
    path = source / "trees.jsonl"
    grown = list(read_jsonl(path)) if path.exists() else []
    if not grown:
        raise UserError(f"{source} has no trees yet; run python train.py with out={source} first")
    folder = RunFolder(cfg)
    trees = read_trees(grown, 1, pick_tasks(cfg, "train"))
    start = str(source / "warm_start") if cfg.warm_start else cfg.init
    run = Run(cfg, Policy.open(cfg, start, "init"), folder)
    provenance().check_trees(run, path, grown, provenance().of_trees(provenance().makers(run)))
    run_contenders(run, trees)
    records, world = run.store("stage1.jsonl").records, run.world()
    found = dict(tasks={tree.task: ask(world, "difficulty", tree.task) for tree in trees}, found=outcome(trees, records))
    write_aside(folder.path / "stage1.json", json.dumps(found) + "\n")
    print(visible(table(trees, records, cfg.resamples)))
    print(visible(f"results: {folder.path}/stage1.jsonl, {folder.path}/stage1.json"))


if __name__ == "__main__":
    guarded(main, __doc__)
