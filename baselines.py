"""What LEAFE is compared with, over the same engine, episodes and budget. So far the contenders of Stage 1
(Table 3):

    python baselines.py config.yaml out=out/quest     needs that run's trees;
                                                      prints who solves more training tasks

    IS    independent sampling: plain rollouts
    IR    iterative refinement: on failure reflect, and retry from the start with all reflections so far
          in view
    IR-1  the same with the latest reflection alone in view
Each gets, for every task alike, the mean number of environment steps that LEAFE's trees took, the steps of
replays included; the attempt in which they run out is cut short.
"""
import math
import random
from collections import deque
from dataclasses import replace

import torch
from tqdm import tqdm

from envs import UserError, make_env
from eval import cell, make_engine, open_policy, pick_tasks, spread
from leafe import Branch, Tree, episode, read_trees
from model import Chat, Engine, Job
from run import Config, Jsonl, RunFolder, guarded, load_config

CONTENDERS = ("IS", "IR", "IR-1")


def contend(chat: Chat, cfg: Config, method: str, task: str, budget: int):
    """Attempts at one task until `budget` steps are used; a generator for the engine, returns a record."""
    refine = method != "IS"
    cfg = replace(cfg, keep_experience=True, reflect_every=10**9)      # reflect on failure, keep e in view
    steps = tokens = attempts = wins = 0
    lessons: list[str] = []
    while steps < budget:
        e = "\nexperience: ".join(lessons[-1:] if method == "IR-1" else lessons)
        left = replace(cfg, horizon=min(cfg.horizon or budget, budget - steps))
        branch: Branch = yield from episode(make_env(cfg.env, cfg.data), chat, left, task, [], e, str(attempts), refine)
        steps, tokens, attempts = steps + branch.steps, tokens + branch.tokens, attempts + 1
        wins += branch.success
        lessons += [r.e for r in branch.reflections if r.tau and r.e not in lessons]
        if branch.end in ("context", "mismatch"):                      # no more room: forget the oldest
            lessons = lessons[1:]
            steps += not branch.steps
    return dict(method=method, task=task, solved=wins > 0, wins=wins, attempts=attempts, steps=steps, tokens=tokens)


def run_contenders(engine: Engine, chat: Chat, cfg: Config, trees: list[Tree], store: Jsonl) -> None:
    done = {(r["method"], r["task"]) for r in store.records}
    budget = math.ceil(sum(b.steps + b.replayed for tree in trees for b in tree.branches) / len(trees))
    queue = deque(Job(contend(chat, cfg, method, tree.task, budget),
                      random.Random(f"{cfg.seed}/{method}/{tree.task}"), tree.task)
                  for method in CONTENDERS for tree in trees if (method, tree.task) not in done)
    for job in tqdm(engine.run(queue), total=len(queue), desc="IS and IR", unit="task", disable=not queue):
        store.append(job.result)


def table(trees: list[Tree], records: list[dict], resamples: int) -> str:
    """Share of training tasks solved, with 95 % intervals over tasks; differences are paired."""
    solved = {"tree": torch.tensor([float(any(b.success for b in tree.branches)) for tree in trees])}
    spent = {"tree": (sum(b.steps for tree in trees for b in tree.branches),
                      sum(b.replayed for tree in trees for b in tree.branches),
                      sum(b.tokens for tree in trees for b in tree.branches))}
    for method in CONTENDERS:
        by_task = {r["task"]: r for r in records if r["method"] == method}
        rows = [by_task[tree.task] for tree in trees]
        solved[method] = torch.tensor([float(r["solved"]) for r in rows])
        spent[method] = (sum(r["steps"] for r in rows), 0, sum(r["tokens"] for r in rows))
    lines = [f"{'%':6}{'tasks solved':>24}{'tree minus this':>24}{'steps':>10}{'replayed':>10}{'tokens':>10}"]
    for method, hits in solved.items():
        own, gap = (spread(lambda index, values=values: values[index].mean(-1), len(trees), resamples)
                    for values in (hits, solved["tree"] - hits))
        difference = cell(gap, "+") if method != "tree" else ""
        lines.append(f"{method:6}{cell(own):>24}{difference:>24}" + "".join(f"{n:10}" for n in spent[method]))
    return "\n".join(lines)


def main(args: list[str]) -> None:
    cfg = load_config(args)
    folder = RunFolder(cfg)
    tree_store = folder.jsonl("trees.jsonl")
    if not tree_store.records:
        raise UserError(f"{folder.path} has no trees yet; run python train.py with out={folder.path} first")
    trees = read_trees(iter(tree_store.records), 1, pick_tasks(cfg, "train", cfg.train_tasks))
    model, chat = open_policy(cfg)
    store = folder.jsonl("stage1.jsonl")
    run_contenders(make_engine(model, chat, cfg), chat, cfg, trees, store)
    print(table(trees, store.records, cfg.resamples))
    print(f"results: {folder.path}/stage1.jsonl")


if __name__ == "__main__":
    guarded(main, __doc__)
