"""Reflections as targets of their own, off by default and not in the paper: a policy that was tuned on actions alone may
forget how to reflect, and its next round has little to learn from (with preset=rounds it does not: docs/results.md).

    python train.py config.yaml preset=rounds rehearse_reflections=0.2 gamma=0.1

D_ref holds a share of the reflections that led to a success: pi's own answers, at the contexts that they answered.
L = L_cf + beta * L_reh + gamma * L_ref, where L_ref is the mean over D_ref of -log pi'(reflection | h_{t+1}, q).
"""
import random
from dataclasses import replace

from leafe import REFLECT, TURN, Reflection, Targets, Tree, Turn, best_scores
from run import Run


def with_reflections(run: Run, trees: list[Tree], pairs: Targets) -> list[Tree]:
    """The trees with these reflections as turns behind all others: the question is what was observed, the answer the
    action. Sets pairs.D_ref. The indices of the turns before stay as they are."""
    cfg, chat = run.cfg, run.policy.chat
    rng = random.Random(f"reflections/{cfg.seed}")
    found = [(k, *one) for k, tree in enumerate(trees) for one in fruitful(tree)
             if one[1].ids and one[1].ids[-1] in chat.stop]
    count = min(len(found), max(1, round(cfg.rehearse_reflections * len(found))))
    grown = [replace(tree, turns=list(tree.turns)) for tree in trees]
    for n in sorted(rng.sample(range(len(found)), count)):
        k, number, reflection = found[n]
        pairs.D_ref.append((k, len(grown[k].turns)))
        grown[k].turns.append(as_turn(run, trees[k], number, reflection))
    return grown


def fruitful(tree: Tree) -> list[tuple[int, Reflection]]:
    """(a branch's number, a reflection of its) for each that asked for a branch from which it, or what grew from it,
    succeeded."""
    best, found = best_scores(tree), []
    for branch, start in zip(tree.branches, tree.starts):
        if branch.parent is None or start < 0 or best[start] < 1:
            continue
        asked = [one for one in tree.branches[branch.parent].reflections
                 if (one.tau, one.e) == (branch.tau, branch.experience)]
        found += [(branch.parent, one) for one in asked[:1]]
    return found


def as_turn(run: Run, tree: Tree, number: int, reflection: Reflection) -> Turn:
    """What leafe.episode asked after turn t of the branch, and what came back."""
    chat, path, t = run.policy.chat, tree.branch_path(number), reflection.t
    obs = tree.turns[path[t]].obs if t < len(path) else tree.branches[number].last_obs
    question = chat.glimpse(obs, run.cfg.observation_tokens) + REFLECT
    acted = tree.turns[path[t - 1]].action_ids
    ids = chat.next(TURN.format(t=t + 1, obs=question), chat.cut(acted))
    return Turn(question, ids, reflection.text, reflection.ids, path[t - 1])
