"""What the baselines share: rollouts within LEAFE's budget of environment steps, and the successful ones as targets.

No method takes more environment steps than LEAFE's Stage 1 took, replays included: env_steps=, or as many as the trees
of another run took (trees=out/quest).
"""
import random
from pathlib import Path
from typing import Iterator

from config import Check, Config, UserError
from engine import Chat
from leafe import Tree, explore
from packing import Packed, Weights, training_rows
from run import Jsonl, Run, report_file

BUDGET = """
env_steps: null               # budget of environment steps; null: what trees= took
"""
CHECKS: list[Check] = [
    ("env_steps", lambda v, s: v is None or v >= 1, "must be 1 or more, or null for what trees= took"),
    ("rounds", lambda v, s: v == 1, "a baseline has one; rounds are for leafe")]


def budget(cfg: Config) -> int:
    """Environment steps that a method may take for its training."""
    if not (cfg.env_steps or cfg.trees):
        raise UserError(f"env_steps: method={cfg.method} needs a budget: give env_steps=, or trees=out/<run> for as "
                        f"many as that run's trees took")
    if not cfg.env_steps and not (Path(cfg.trees) / "adapter").exists():
        raise UserError(f"trees: {cfg.trees} has not ended, so what its trees took is not known yet; finish that run")
    steps = cfg.env_steps or int(report_file().spent(Path(cfg.trees))["steps"])
    if not steps:
        raise UserError(f"trees: the trees of {cfg.trees} took no steps, so there is no budget; give env_steps=")
    return steps


def taken(store: Jsonl, upto: int) -> int:
    return sum(r["steps"] + r["replayed"] for r in store.records if r["round"] <= upto)


def waves(run: Run, steps: int, size: int, first: int = 1, reflect: bool = False) -> Iterator[list[Tree]]:
    """Waves of cfg.roots plain rollouts of up to `size` tasks, drawn anew each wave, until another episode of full
    length could go over `steps` environment steps. Wave `first` comes first; waves that are on disk are read."""
    cfg, store, env = run.cfg, run.store("trees.jsonl"), run.world()
    longest = min(env.max_turns, cfg.horizon or env.max_turns) * cfg.roots
    wave = first
    if steps < longest:
        raise UserError(f"env_steps: {steps} are too few; an episode, or a group of them, may take {longest}")
    while (room := (steps - taken(store, wave - 1)) // longest) > 0:
        rng = random.Random(f"{cfg.seed}/wave/{wave}")
        chosen = rng.sample(run.train_tasks, min(len(run.train_tasks), size, room))
        trees = explore(run, chosen, wave, reflect)
        if taken(store, wave) == taken(store, wave - 1):
            raise UserError(f"context: {cfg.context} tokens leave no room for a single action; raise it")
        yield trees
        wave += 1


def rollouts(run: Run, steps: int, trees: list[Tree], first: int = 1) -> int:
    """As many plain rollouts as fit into the budget, the tasks in turn, each a root more in its task's tree; from
    wave `first` on. Returns the number of the next wave."""
    by_task = {tree.task: tree for tree in trees}
    plain = run.but(roots=1, attempts=1, max_depth=0)
    for wave in waves(plain, steps, len(run.train_tasks), first):
        for tree in wave:
            branch = tree.branches[0]
            branch.number = len(by_task[tree.task].branches)
            by_task[tree.task].join(branch)
        first += 1
    return first


def successes(trees: list[Tree], chat: Chat) -> list[Weights]:
    """Turns of the successful rollouts, each weighing 1 over their number: L_reh with a share of 1. The first column
    is for what a method learns beside them."""
    pairs = set()
    for k, tree in enumerate(trees):
        for branch in tree.branches:
            if branch.success:
                pairs |= {(k, i) for i in tree.branch_path(branch.number) if tree.turns[i].action_ids[-1] in chat.stop}
    weights: list[Weights] = [{} for _ in trees]
    for k, i in pairs:
        weights[k][i] = 0.0, 1 / len(pairs)
    return weights


def demonstrations(run: Run, trees: list[Tree]) -> list[Packed]:
    """Training rows of the successful rollouts."""
    weights = successes(trees, run.policy.chat)
    if not any(weights):
        print("no rollout succeeded: there is nothing to train on, and the policy stays as it is")
    return training_rows(trees, weights, run.cfg.row_tokens)
