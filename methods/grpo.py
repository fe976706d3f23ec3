"""GRPO: groups of rollouts of one task, a clipped policy gradient of how much better each did than its group.

    python train.py config.yaml method=grpo trees=out/quest out=out/grpo

steps and batch_tokens are not heeded: optimiser steps follow from the budget and grpo_updates; lr does not decay.
Where a server samples (engine=) and says with which probability mu it drew a token, the token's gain weighs pi_old / mu, cut off
at grpo_truncate (truncated importance sampling): in another precision its samples are not quite pi_old's.
"""
import math
import random
from dataclasses import replace
from functools import partial
from typing import Iterator

import torch
from torch import nn

from config import Check, Config, each, within
from leafe import Tree
from methods import rollouts as shared
from methods.rollouts import BUDGET, budget, taken, waves
from packing import Batch, Packed, Weights, pack, rows_of, token_logp
from run import Policy, Run
from train import Objective, optimise

KEYS = BUDGET + """
grpo_tasks: 16                # groups a wave
grpo_group: 8                 # rollouts of one task in a group
grpo_updates: 4               # optimiser steps a wave
grpo_clip: 0.2                # the ratio pi' / pi_old is clipped to 1 - this .. 1 + this
grpo_dual: 3.0                # and the loss, where the advantage is negative, at this times the advantage
grpo_kl: 0.01                 # weight of the KL to where the run starts: the base, init=, warm_start=
grpo_refusal: 0.0             # taken off the reward for each action that the world refused (0.1: docs/differences.md)
grpo_statistics: episodes     # mean and deviation of a group's rewards over its episodes, or over their steps
grpo_truncate: 2.0            # of a server's tokens: the weight pi_old / mu is at most this; 0: as if they were pi_old's
lr: 0.003                     # chosen on the validation split (docs/tuning.md)
"""
CHECKS: list[Check] = [
    *shared.CHECKS,
    *within("grpo_tasks grpo_updates", 1, 1_000_000),
    *within("grpo_kl grpo_refusal grpo_truncate", 0, 1_000_000),
    *each("grpo_clip", lambda v, s: 0 < v < float("inf"), "must be above 0"),
    ("grpo_dual", lambda v, s: 1 < v < float("inf"), "must be above 1"),
    ("grpo_group", lambda v, s: v <= 4096, "must be at most 4,096"),
    ("grpo_statistics", lambda v, s: v in ("episodes", "steps"), "must be episodes or steps"),
    ("grpo_group", lambda v, s: v > 1, "must be 2 or more: a rollout is judged against its group")]


def check(cfg: Config) -> None:
    budget(cfg)


def train(run: Run, round_: int) -> None:
    objective = Objective(("L_clip", "beta_KL"), partial(grpo_loss, run.cfg), None)
    start = [p.detach().clone() for p in run.policy.parameters()]      # a run that goes on comes by here as it began, too
    optimise(run, round_, objective, partial(grpo, run, start))


def grpo(run: Run, start: list[torch.Tensor], first: int) -> Iterator[Batch]:
    """Group Relative Policy Optimisation: waves of groups of rollouts until the budget is used; after each wave
    cfg.grpo_updates optimiser steps, the mean over tokens. Goes on after wave `first`. The reference of the KL is the
    adapter `start`."""
    cfg, store = run.cfg, run.store("trees.jsonl")
    group = run.but(roots=cfg.grpo_group, attempts=cfg.grpo_group, max_depth=0)
    for wave, trees in enumerate(waves(group, budget(cfg), cfg.grpo_tasks, first + 1), first + 1):
        mu = [turn.logp for tree in trees for turn in tree.turns]          # where a server says it
        weights = numbered([advantages(tree, cfg) for tree in trees], trees)
        rows = with_old(run.policy, start, [pack(pieces) for pieces in rows_of(trees, weights, cfg.row_tokens)])
        rows, mismatch = with_mu(rows, mu, cfg.grpo_truncate)
        ended = [branch for tree in trees for branch in tree.branches]
        refused = sum(not turn.valid for branch in ended for turn in branch.turns) / len(ended)
        success = sum(branch.success for branch in ended) / len(ended)
        run.say(wave=wave, reward=success - cfg.grpo_refusal * refused, success=success, refused=refused,
                env_steps=taken(store, wave), **mismatch)
        random.Random(f"{cfg.seed}/grpo/{wave}").shuffle(rows)
        updates = min(len(rows), math.ceil(cfg.grpo_updates * len(trees) / cfg.grpo_tasks))  # the last wave is small
        parts = [rows[n::updates] for n in range(updates)]
        for n, part in enumerate(parts):
            step = (wave - 1) * cfg.grpo_updates + n + 1
            yield Batch(part, 1 / sum(len(row.targets) for row in part), min(1.0, step / (cfg.warmup + 1)),
                        wave if n + 1 == len(parts) else None)


def advantages(tree: Tree, cfg: Config) -> Weights:
    """Turn -> (A, 1) for a group of rollouts of one task: A = (R - mean) / (std + 1e-6), R = 1 for success, less
    cfg.grpo_refusal for each refused action. Mean and std over the episodes, or over their steps."""
    rewards = [float(branch.success) - cfg.grpo_refusal * sum(not turn.valid for turn in branch.turns)
               for branch in tree.branches]
    counted = rewards
    if cfg.grpo_statistics == "steps":
        counted = [reward for reward, branch in zip(rewards, tree.branches) for _ in branch.turns]
    group = torch.tensor(counted)
    std = float(group.std()) if len(group) > 1 else 0.0
    advantage_of: Weights = {}
    for number, reward in enumerate(rewards):
        # every turn of a rollout carries the rollout's advantage
        for turn in tree.branch_path(number):
            advantage_of[turn] = (reward - float(group.mean())) / (std + 1e-6), 1.0
    return advantage_of


def numbered(weights: list[Weights], trees: list[Tree]) -> list[Weights]:
    """Each turn's weights with its number behind them, counted through all trees."""
    first, found = 0, []
    for tree, own in zip(trees, weights):
        found.append({turn: (*weight, first + turn) for turn, weight in own.items()})
        first += len(tree.turns)
    return found


def grpo_loss(cfg: Config, model, row: Packed) -> torch.Tensor:
    """(2,): summed over the row's tokens, the clipped policy loss (dual clip for A < 0) and the k3 estimate of
    KL(pi' || reference) times its weight. row.weights: (N, 3), advantage, log pi_old, log pi_ref."""
    new = token_logp(model, [row])                                                              # (N,)
    advantage, old, ref = row.weights.to(new.device).T
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - cfg.grpo_clip, 1 + cfg.grpo_clip) * advantage)
    gain = gain.where(advantage >= 0, gain.maximum(cfg.grpo_dual * advantage))
    kl = (ref - new).exp() - (ref - new) - 1
    return torch.stack([-gain.sum(), cfg.grpo_kl * kl.sum()])


@torch.no_grad()
def with_old(policy: Policy, start: list[torch.Tensor], rows: list[Packed]) -> list[Packed]:
    """The rows, their weights (A, 1, ...) replaced by (A, log pi_old, log pi_ref, ...); the reference is the adapter
    `start`."""
    old = [token_logp(policy.model, [row]).cpu() for row in rows]
    parameters = policy.parameters()
    now = [p.clone() for p in parameters]
    copy_to(parameters, start)
    ref = [token_logp(policy.model, [row]).cpu() for row in rows]
    copy_to(parameters, now)
    found = []
    for row, *logp in zip(rows, old, ref):
        first = torch.stack([row.weights[:, 0], *logp], 1)
        found.append(replace(row, weights=torch.cat([first, row.weights[:, 2:]], 1)))
    return found


def copy_to(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def with_mu(rows: list[Packed], mu: list[list[float]], most: float) -> tuple[list[Packed], dict[str, float]]:
    """The rows, their weights (A, log pi_old, log pi_ref, turn) replaced by (A w, log pi_old, log pi_ref). w: pi_old / mu, at
    most `most`, of each token of a turn whose mu[turn] is known, log mu of each, else 1. And, if any is known, how far
    log pi_old and log mu lie apart, and the share of tokens whose w was cut off."""
    found, apart, cut = [], [], 0
    for row in rows:
        advantage, old, ref, turn = row.weights.T
        w = torch.ones_like(old)
        for number in turn.unique().long().tolist():
            at = (turn == number).nonzero()[:, 0]          # in the order of its tokens
            if most and len(mu[number]) == len(at):
                gap = old[at] - torch.tensor(mu[number])
                w[at] = gap.exp().clamp(max=most)
                apart.append(gap.abs())
                cut += int((gap.exp() > most).sum())
        found.append(replace(row, weights=torch.stack([advantage * w, old, ref], 1)))
    gaps = torch.cat(apart) if apart else torch.zeros(0)
    return found, dict(mismatch=float(gaps.mean()), truncated=cut / len(gaps)) if apart else {}
