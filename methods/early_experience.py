"""What LEAFE is compared with: each is one short function over the same engine, episodes, packed rows and optimiser,
and none takes more environment steps than LEAFE's Stage 1 took (replays included).

    python train.py config.yaml method=rft trees=out/quest out=out/rft     rft, early_experience, grpo, ace
    python baselines.py config.yaml out=out/quest     the contenders of Stage 1 (the paper's Table 3) on that
                                                      run's training tasks: who solves more of them

    rft               rejection sampling: SFT on the successful rollouts
    early_experience  Early Experience (arXiv 2510.08558): learn what other actions would have brought, then SFT
    grpo              Group Relative Policy Optimisation: groups of rollouts of one task, clipped policy gradient
    ace               a playbook of lessons in the prompt, grown by reflection; no training
    IS, IR, IR-1      independent sampling; iterative refinement: on failure reflect, and retry from the start with
                      all reflections so far in view, or with the latest alone
"""
import math
import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from tqdm import tqdm

import ranks
from envs import Env, ReplayMismatch, UserError
from eval import cell, make_engine, make_worlds, open_policy, pick_tasks, spread
from leafe import PLAYBOOK, TURN, Branch, Tree, episode, explore, fill, read_trees, rows_of
from model import Ask, Chat, Job
from packing import Batch, Packed, Segment, length, pack, token_logp
from run import Config, Jsonl, RunFolder, guarded, load_config, read_jsonl, spent
from weights import adapter_off
from workers import act, back

# ------------------------------------------------------------------------------------ rollouts within a budget


def budget(cfg: Config) -> int:
    """Environment steps that a method may take for its training."""
    if not (cfg.env_steps or cfg.trees):
        raise UserError(f"env_steps: method={cfg.method} needs a budget: give env_steps=, or trees=out/<run> for as "
                        f"many as that run's trees took")
    if not cfg.env_steps and not (Path(cfg.trees) / "adapter").exists():
        raise UserError(f"trees: {cfg.trees} has not ended, so what its trees took is not known yet; finish that run")
    return cfg.env_steps or int(spent(Path(cfg.trees))["steps"])


def taken(store: Jsonl, upto: int) -> int:
    return sum(r["steps"] + r["replayed"] for r in store.records if r["round"] <= upto)


def waves(engine: Callable[[], Any], chat: Chat, make: Callable[[], Env], cfg: Config, tasks: list[str],
          store: Jsonl, steps: int, size: int, first: int = 1, reflect: bool = False) -> Iterator[list[Tree]]:
    """Waves of cfg.roots plain rollouts of up to `size` tasks, drawn anew each wave, until another episode of full
    length could go over `steps` environment steps. Wave `first` comes first; waves that `store` holds are read."""
    longest = min(make().max_turns, cfg.horizon or make().max_turns) * cfg.roots
    wave = first
    if steps < longest:
        raise UserError(f"env_steps: {steps} are too few; an episode, or a group of them, may take {longest}")
    while (room := (steps - taken(store, wave - 1)) // longest) > 0:
        chosen = random.Random(f"{cfg.seed}/wave/{wave}").sample(tasks, min(len(tasks), size, room))
        trees = explore(engine(), chat, make, cfg, chosen, store, wave, reflect)
        if taken(store, wave) == taken(store, wave - 1):
            raise UserError(f"context: {cfg.context} tokens leave no room for a single action; raise it")
        yield trees
        wave += 1


def rollouts(model, chat: Chat, cfg: Config, make: Callable[[], Env], tasks: list[str], store: Jsonl, steps: int,
             trees: list[Tree], first: int = 1) -> int:
    """As many plain rollouts as fit into the budget, the tasks in turn, each a root more in its task's tree; from
    wave `first` on. Returns the number of the next wave."""
    by_task, plain = {tree.task: tree for tree in trees}, replace(cfg, roots=1, attempts=1, max_depth=0)
    for wave in waves(lambda: make_engine(model, chat, cfg), chat, make, plain, tasks, store, steps, len(tasks),
                      first):
        for tree in wave:
            by_task[tree.task].join(tree.branches[0], None)
        first += 1
    return first


# --------------------------------------------------------------------------- rejection sampling, Early Experience

Weights = list[dict[int, tuple[float, float]]]


def successes(trees: list[Tree], chat: Chat) -> Weights:
    """Turns of the successful rollouts, each weighing 1 over their number: L_reh with a share of 1."""
    pairs = {(k, i) for k, tree in enumerate(trees) for n, branch in enumerate(tree.branches) if branch.success
             for i in tree.branch_path(n) if tree.turns[i].action_ids[-1] in chat.stop}
    weights: Weights = [{} for _ in trees]
    for k, i in pairs:
        weights[k][i] = 0.0, 1 / len(pairs)
    return weights


def packed_rows(trees: list[Tree], weights: Weights, cfg: Config) -> list[Packed]:
    if not any(weights):
        print("no rollout succeeded: there is nothing to train on, and the policy stays as it is")
    return [pack(group) for group in rows_of(trees, weights, cfg.row_tokens)]


def rft(model, chat: Chat, cfg: Config, make: Callable[[], Env], tasks: list[str], store: Jsonl,
        folder: RunFolder) -> tuple[list[Packed], list[Packed]]:
    """Rejection-sampling fine-tuning: the whole budget goes into rollouts; the successful ones are the data. Returns
    rows to be seen for an epoch first (none), and the rest."""
    trees = [Tree(task) for task in tasks]
    rollouts(model, chat, cfg, make, tasks, store, budget(cfg), trees)
    return [], packed_rows(trees, successes(trees, chat), cfg)


WORLD = "foresee what an action brings.\n{rules}"                    # a system prompt of its own
WHAT_IF = "\nsuppose the action is: {action}. what comes next?"      # behind the observation
WHY = "\nof these actions:\n{tried}\nthe best is: {action}. why?"


def alternatives(env: Env, chat: Chat, cfg: Config, task: str, turn: int, path: list, after: str):
    """Other actions at the last turn of `path` (a demonstration up to there, which led to `after`), and what each
    brings. A generator for the engine, returns a record. Resets and replays are counted as in a rollback tree."""
    h, t = [i for before in path[:-1] for i in before.ids], len(path)
    tried, tokens, why = {path[-1].action: after}, 0, []
    for _ in range(cfg.alternatives):
        ids = (yield Ask(h + path[-1].obs_ids, cfg.action_tokens)) or []
        tokens += len(ids)
        action = env.action(chat.text(ids))
        if ids and action not in tried:
            try:
                yield from back(env, task, path)
            except ReplayMismatch:
                break
            tried[action] = (yield from act(env, action)).obs
    if cfg.early_experience == "reflection":
        text = TURN.format(t=t, obs=path[-1].obs) + WHY.format(
            action=path[-1].action, tried="\n".join(f"{action}: {obs}" for action, obs in tried.items()))
        message = chat.first(env.rules, text) if t == 1 else chat.next(text, path[-2].action_ids[-1] not in chat.stop)
        why = (yield Ask(h + message, cfg.reflect_tokens, cfg.reflect_temperature)) or []
    env.close()
    return dict(task=task, turn=turn, tried=tried, why=why, steps=len(tried) - 1,
                replayed=(len(tried) - 1) * (t - 1), tokens=tokens + len(why))


def live_through(engine: Any, chat: Chat, cfg: Config, make: Callable[[], Env], trees: list[Tree],
                 weights: Weights, store: Jsonl, steps: int) -> list[dict]:
    """Alternatives at the demonstrated states, drawn at random, as many as are sure to fit into `steps`."""
    states = sorted((k, i) for k, found in enumerate(weights) for i in found)
    queue, have = deque(), {(r["task"], r["turn"]) for r in store.records}
    for k, i in random.Random(f"{cfg.seed}/alternatives").sample(states, len(states)):
        tree, path = trees[k], trees[k].path(i)
        if (cost := cfg.alternatives * len(path)) > steps:
            continue
        steps -= cost
        if (tree.task, i) not in have:
            n = max(n for n, start in enumerate(tree.starts) if -1 < start <= i)
            last = i + 1 == tree.starts[n] + len(tree.branches[n].turns)
            after = tree.branches[n].last_obs if last else tree.turns[i + 1].obs
            queue.append(Job(alternatives(make(), chat, cfg, tree.task, i, path, after),
                             random.Random(f"{cfg.seed}/alternatives/{tree.task}/{i}"), tree.task))
    queue = deque(ranks.share(queue))
    for job in tqdm(engine.run(queue), total=len(queue), desc="alternatives", unit="state",
                    disable=not queue or ranks.rank() > 0):
        store.append(job.result)
    store.gather()
    return sorted(store.records, key=lambda record: (record["task"], record["turn"]))


def foreseen(chat: Chat, rules: str, path: list, tried: dict[str, str]) -> list[Segment]:
    """-log p(s' | s, a) for every action tried at the last turn of `path`."""
    head = [chat.first(WORLD.format(rules=rules), TURN.format(t=1, obs=path[0].obs)) + path[0].action_ids,
            *(turn.ids for turn in path[1:-1])] if len(path) > 1 else []
    trunk = [i for ids in head for i in ids]
    segments = [Segment(trunk, [0.0] * len(trunk), None)] if trunk else []
    for action, obs in tried.items():
        text = TURN.format(t=len(path), obs=path[-1].obs) + WHAT_IF.format(action=action)
        asked = (chat.next(text, path[-2].action_ids[-1] not in chat.stop) if trunk else
                 chat.first(WORLD.format(rules=rules), text))
        answer = chat.ids(obs) + [chat.end]
        segments.append(Segment(asked + answer, [0.0] * len(asked) + [1.0] * len(answer), 0 if trunk else None))
    return segments


def reasoned(chat: Chat, path: list, why: list[int]) -> list[Segment]:
    """-log p(why, a | s): the policy's own reason, then the demonstrated action."""
    seen = [i for turn in path[:-1] for i in turn.ids] + path[-1].obs_ids
    answer = [i for i in why if i not in chat.stop] + chat.ids("\n") + path[-1].action_ids
    return [Segment(seen + answer, [0.0] * len(seen) + [1.0] * len(answer), None)]


def early_experience(model, chat: Chat, cfg: Config, make: Callable[[], Env], tasks: list[str], store: Jsonl,
                     folder: RunFolder) -> tuple[list[Packed], list[Packed]]:
    """Early Experience: the demonstrations are the successful rollouts of a part of the budget; the rest goes into
    other actions at their states, and what that leaves over into rollouts again. `world`: learn what each action
    brings for one epoch (half of the optimiser steps at most), then the demonstrations, as many steps in all as rft.
    `reflection`: mixed with the demonstrations, the policy's reasons why the demonstrated action is the best."""
    steps, lived, trees = budget(cfg), folder.jsonl("alternatives.jsonl"), [Tree(task) for task in tasks]
    wave = rollouts(model, chat, cfg, make, tasks, store, round(steps * (1 - cfg.alternatives_share)), trees)
    by_task = {tree.task: tree for tree in trees}
    records = live_through(make_engine(model, chat, cfg), chat, cfg, make, trees, successes(trees, chat), lived,
                           steps - taken(store, wave - 1))
    lived.close()
    steps -= sum(record["steps"] + record["replayed"] for record in records)
    rollouts(model, chat, cfg, make, tasks, store, steps, trees, wave)       # what they left over
    weights = successes(trees, chat)
    if cfg.early_experience == "world":
        rules, extra = make().rules, []
        for r in records:
            path = by_task[r["task"]].path(r["turn"])
            whole = foreseen(chat, rules, path, r["tried"])
            extra += [whole] if length(whole) <= cfg.row_tokens else [
                foreseen(chat, rules, path, {action: obs}) for action, obs in r["tried"].items()]
    else:
        extra = [reasoned(chat, by_task[r["task"]].path(r["turn"]), r["why"]) for r in records if r["why"]]
    extra = [piece for piece in extra if length(piece) <= cfg.row_tokens]         # what is longer has no row
    count = sum(any(segment.weights) for piece in extra for segment in piece)
    for segment in (segment for piece in extra for segment in piece):
        segment.weights = [(weight / count, 0.0) for weight in segment.weights]
    demonstrations = packed_rows(trees, weights, cfg)
    rows = [pack(group) for group in fill(extra, cfg.row_tokens)]
    if cfg.early_experience == "reflection":
        return [], demonstrations + rows
    per = max(1, cfg.batch_tokens // cfg.row_tokens)
    return rows[:cfg.steps // 2 * per], demonstrations


# ------------------------------------------------------------------------------------------------------- GRPO

def advantages(tree: Tree, cfg: Config) -> dict[int, tuple[float, float]]:
    """Turn -> (A, 1) for a group of rollouts of one task: A = (R - mean) / (std + 1e-6), R = 1 for success, less
    cfg.grpo_refusal for each refused action. Mean and std over the episodes, or over their steps."""
    rewards = [float(branch.success) - cfg.grpo_refusal * sum(not turn.valid for turn in branch.turns)
               for branch in tree.branches]
    group = torch.tensor(rewards if cfg.grpo_statistics == "episodes" else
                         [r for r, branch in zip(rewards, tree.branches) for _ in branch.turns])
    spread_ = float(group.std()) if len(group) > 1 else 0.0
    return {i: ((r - float(group.mean())) / (spread_ + 1e-6), 1.0)
            for n, r in enumerate(rewards) for i in tree.branch_path(n)}


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
def with_old(model, row: Packed) -> Packed:
    """The row, its weights (A, 1) replaced by (A, log pi_old, log pi_ref); the reference is the adapter off."""
    old = token_logp(model, [row])
    with adapter_off(model):
        ref = token_logp(model, [row])
    return replace(row, weights=torch.stack([row.weights[:, 0], old.cpu(), ref.cpu()], 1))


def grpo(model, chat: Chat, cfg: Config, make: Callable[[], Env], tasks: list[str], store: Jsonl, metrics: Jsonl,
         first: int) -> Iterator[Batch]:
    """Group Relative Policy Optimisation: waves of groups of rollouts until the budget is used; after each wave
    cfg.grpo_updates optimiser steps, the mean over tokens. Goes on after wave `first`."""
    group = replace(cfg, roots=cfg.grpo_group, attempts=cfg.grpo_group, max_depth=0)
    for wave, trees in enumerate(waves(lambda: make_engine(model, chat, cfg), chat, make, group, tasks, store,
                                       budget(cfg), cfg.grpo_tasks, first + 1), first + 1):
        rows = [with_old(model, pack(pieces))
                for pieces in rows_of(trees, [advantages(tree, cfg) for tree in trees], cfg.row_tokens)]
        ended = [branch for tree in trees for branch in tree.branches]
        refused = sum(not turn.valid for branch in ended for turn in branch.turns) / len(ended)
        success = sum(branch.success for branch in ended) / len(ended)
        metrics.append(dict(wave=wave, reward=success - cfg.grpo_refusal * refused, success=success, refused=refused,
                            env_steps=taken(store, wave)))
        random.Random(f"{cfg.seed}/grpo/{wave}").shuffle(rows)
        updates = min(len(rows), math.ceil(cfg.grpo_updates * len(trees) / cfg.grpo_tasks))  # the last wave is small
        parts = [rows[n::updates] for n in range(updates)]
        for n, part in enumerate(parts):
            step = (wave - 1) * cfg.grpo_updates + n + 1
            yield Batch(part, 1 / sum(len(row.targets) for row in part), min(1.0, step / (cfg.warmup + 1)),
                        wave if n + 1 == len(parts) else None)


# -------------------------------------------------------------------------------------------------------- ACE

def ace(model, chat: Chat, cfg: Config, make: Callable[[], Env], tasks: list[str], store: Jsonl) -> str:
    """Agentic Context Engineering: generator, rollouts with the playbook in view; reflector, the policy's experience
    after each failure; curator, append what is new while there is room (cfg.playbook_tokens). Nothing is trained."""
    playbook: list[str] = []

    def seen() -> Env:
        env = make()
        env.rules += PLAYBOOK + "\n".join(playbook) if playbook else ""
        return env
    alone = replace(cfg, roots=1, attempts=1, max_depth=0, reflect_every=10**9)     # reflect on failure only
    for trees in waves(lambda: make_engine(model, chat, cfg), chat, seen, alone, tasks, store, budget(cfg),
                       cfg.grpo_tasks, reflect=True):
        lessons = [r.e for tree in trees for branch in tree.branches for r in branch.reflections if r.tau]
        for e in lessons:
            if e not in playbook and len(chat.ids("\n".join([*playbook, e]))) <= cfg.playbook_tokens:
                playbook.append(e)
    return "\n".join(playbook) + "\n"


def read_lessons(folder: str) -> dict[str, list[str]]:
    """The experiences that a run's reflections gave, by task; for the control that gives branches another task's."""
    found: dict[str, list[str]] = {}
    for record in read_jsonl(Path(folder) / "trees.jsonl"):
        found.setdefault(record["task"], []).extend(r["e"] for r in record["reflections"] if r["tau"])
    found = {task: lessons for task, lessons in found.items() if lessons}
    if len(found) < 2:
        raise UserError(f"experiences: {folder} has reflections of {len(found)} tasks; the control needs several")
    return found


# ---------------------------------------------------------------------------------------- Stage 1's contenders

CONTENDERS = ("IS", "IR", "IR-1")


def contend(chat: Chat, cfg: Config, make: Callable[[], Env], method: str, task: str, steps_: int):
    """Attempts at one task until `steps_` steps are used; a generator for the engine, returns a record."""
    refine = method != "IS"
    cfg = replace(cfg, keep_experience=True, reflect_every=10**9)      # reflect on failure, keep e in view
    steps = tokens = attempts = wins = 0
    lessons: list[str] = []
    while steps < steps_:
        e = "\nexperience: ".join(lessons[-1:] if method == "IR-1" else lessons)
        left = replace(cfg, horizon=min(cfg.horizon or steps_, steps_ - steps))
        branch: Branch = yield from episode(make(), chat, left, task, [], e, str(attempts), refine)
        steps, tokens, attempts = steps + branch.steps, tokens + branch.tokens, attempts + 1
        wins += branch.success
        lessons += [r.e for r in branch.reflections if r.tau and r.e not in lessons]
        if branch.end in ("context", "mismatch"):                      # no more room: forget the oldest
            lessons = lessons[1:]
            steps += not branch.steps
    return dict(method=method, task=task, solved=wins > 0, wins=wins, attempts=attempts, steps=steps, tokens=tokens)


def run_contenders(engine: Any, chat: Chat, cfg: Config, trees: list[Tree], store: Jsonl) -> None:
    done = {(r["method"], r["task"]) for r in store.records}
    mean = math.ceil(sum(b.steps + b.replayed for tree in trees for b in tree.branches) / len(trees))
    queue = deque(Job(contend(chat, cfg, make_worlds(cfg), method, tree.task, mean),
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
    trees = read_trees(iter(tree_store.records), 1, pick_tasks(cfg, "train"))
    model, chat = open_policy(cfg, str(folder.path / "warm_start") if cfg.warm_start else cfg.init)
    store = folder.jsonl("stage1.jsonl")
    run_contenders(make_engine(model, chat, cfg), chat, cfg, trees, store)
    print(table(trees, store.records, cfg.resamples))
    print(f"results: {folder.path}/stage1.jsonl")


if __name__ == "__main__":
    guarded(main, __doc__)
