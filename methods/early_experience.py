"""Early Experience (arXiv 2510.08558): learn what other actions would have brought, then SFT on demonstrations. These
are the policy's own successful rollouts: there is no expert here.

    python train.py config.yaml method=early_experience trees=out/quest out=out/early
"""
import random
from collections import deque

from tqdm import tqdm

import ranks
from config import Check, Config, within
from engine import Ask, Chat, Job
from envs import ReplayMismatch, ask, visit
from leafe import TURN, Tree, Turn
from methods import rollouts as shared
from methods.rollouts import BUDGET, budget, demonstrations, rollouts, successes, taken
from packing import Segment, Weights, fill, length, pack
from run import Run
from train import fit

KEYS = BUDGET + """
early_experience: world       # world: foresee what actions bring; reflection: reason why one is the best
alternatives: 4               # other actions tried at a demonstrated state
alternatives_share: 0.25      # of the environment steps, for them
lr: 0.001                     # chosen on the validation split (docs/tuning.md)
"""
CHECKS: list[Check] = [
    *shared.CHECKS,
    *within("alternatives", 1, 4096),
    ("alternatives_share", lambda v, s: 0 <= v <= 1, "must lie in 0..1"),
    ("early_experience", lambda v, s: v in ("world", "reflection"), "must be world or reflection"),
    ("early_experience", lambda v, s: v == "world" or s["action_tokens"] > s["reflect_tokens"],
     "that learns a reason before each action: raise action_tokens above reflect_tokens ({reflect_tokens})")]

WORLD = "foresee what an action brings.\n{rules}"                    # a system prompt of its own
WHAT_IF = "\nsuppose the action is: {action}. what comes next?"      # behind the observation
WHY = "\nof these actions:\n{tried}\nthe best is: {action}. why?"


def alternatives(run: Run, tree: Tree, turn: int):
    """Other actions at a demonstrated turn, and what each brings. A generator for the engine, returns a record. Resets
    and replays are counted as in a rollback tree."""
    cfg, chat, env, path = run.cfg, run.policy.chat, run.world(), tree.path(turn)
    h, t = [i for before in path[:-1] for i in before.ids], len(path)
    tried, tokens, why = {path[-1].action: what_followed(tree, turn)}, 0, []
    for _ in range(cfg.alternatives):
        ids = (yield Ask(h + path[-1].obs_ids, cfg.action_tokens)) or []
        tokens += len(ids)
        action = yield from visit(env, "action", chat.text(ids))
        if ids and action not in tried:
            try:
                yield from visit(env, "rollback", tree.task, path)
            except ReplayMismatch:
                break
            tried[action] = (yield from visit(env, "step", action)).obs
    if cfg.early_experience == "reflection":
        text = TURN.format(t=t, obs=glimpse(run, path[-1])) + WHY.format(
            action=path[-1].action, tried="\n".join(f"{action}: {obs}" for action, obs in tried.items()))
        message = chat.first(env.rules, text) if t == 1 else chat.next(text, chat.cut(path[-2].action_ids))
        why = (yield Ask(h + message, cfg.reflect_tokens, cfg.reflect_temperature)) or []
    ask(env, "close")
    return dict(task=tree.task, turn=turn, tried=tried, why=why, steps=len(tried) - 1,
                replayed=(len(tried) - 1) * (t - 1), tokens=tokens + len(why))


def what_followed(tree: Tree, turn: int) -> str:
    """The observation that the turn's own action brought."""
    number = max(n for n, start in enumerate(tree.starts) if -1 < start <= turn)
    branch = tree.branches[number]
    last = turn + 1 == tree.starts[number] + len(branch.turns)
    return branch.last_obs if last else tree.turns[turn + 1].obs


def glimpse(run: Run, turn: Turn) -> str:
    return run.policy.chat.glimpse(turn.obs, run.cfg.observation_tokens)


def live_through(run: Run, trees: list[Tree], weights: list[Weights], steps: int) -> list[dict]:
    """Alternatives at the demonstrated states, drawn at random, as many as are sure to fit into `steps`."""
    cfg, store = run.cfg, run.store("alternatives.jsonl")
    states = sorted((k, i) for k, found in enumerate(weights) for i in found)
    queue, have = deque(), {(r["task"], r["turn"]) for r in store.records}
    for k, i in random.Random(f"{cfg.seed}/alternatives").sample(states, len(states)):
        tree = trees[k]
        cost = cfg.alternatives * len(tree.path(i))
        if cost > steps:
            continue
        steps -= cost
        if (tree.task, i) not in have:
            rng = random.Random(f"{cfg.seed}/alternatives/{tree.task}/{i}")
            queue.append(Job(alternatives(run, tree, i), rng, tree.task))
    queue = deque(ranks.share(queue))
    for job in tqdm(run.policy.engine().run(queue), total=len(queue), desc="alternatives", unit="state",
                    disable=not queue or ranks.rank() > 0):
        store.append(job.result)
    store.gather()
    return sorted(store.records, key=lambda record: (record["task"], record["turn"]))


def foreseen(run: Run, path: list[Turn], tried: dict[str, str]) -> list[Segment]:
    """-log p(s' | s, a) for every action tried at the last turn of `path`."""
    chat, rules = run.policy.chat, WORLD.format(rules=run.world().rules)
    head = []
    if len(path) > 1:
        head = [chat.first(rules, TURN.format(t=1, obs=glimpse(run, path[0]))) + path[0].action_ids,
                *(turn.ids for turn in path[1:-1])]
    trunk = [i for ids in head for i in ids]
    segments = [Segment(trunk, [0.0] * len(trunk), None)] if trunk else []
    for action, obs in tried.items():
        text = TURN.format(t=len(path), obs=glimpse(run, path[-1])) + WHAT_IF.format(action=action)
        asked = chat.next(text, chat.cut(path[-2].action_ids)) if trunk else chat.first(rules, text)
        answer = chat.reply(chat.glimpse(obs, run.cfg.observation_tokens))
        segments.append(Segment(asked + answer, [0.0] * len(asked) + [1.0] * len(answer), 0 if trunk else None))
    return segments


def reasoned(chat: Chat, path: list[Turn], why: list[int]) -> list[Segment]:
    """-log p(why, a | s): the policy's own reason, then the demonstrated action."""
    seen = [i for turn in path[:-1] for i in turn.ids] + path[-1].obs_ids
    answer = [i for i in why if i not in chat.stop] + chat.ids("\n", behind=":") + path[-1].action_ids
    return [Segment(seen + answer, [0.0] * len(seen) + [1.0] * len(answer), None)]


def check(cfg: Config) -> None:
    budget(cfg)


def train(run: Run, round_: int) -> None:
    """The demonstrations are the successful rollouts of a part of the budget; the rest goes into other actions at
    their states, and what that leaves over into rollouts again. `world`: learn what each action brings for one epoch
    (half of the optimiser steps at most), then the demonstrations, as many steps in all as rft. `reflection`: mixed
    with the demonstrations, the policy's reasons why the demonstrated action is the best."""
    cfg, chat, steps = run.cfg, run.policy.chat, budget(run.cfg)
    trees = [Tree(task) for task in run.train_tasks]
    wave = rollouts(run, round(steps * (1 - cfg.alternatives_share)), trees)
    left = steps - taken(run.store("trees.jsonl"), wave - 1)
    records = live_through(run, trees, successes(trees, chat), left)
    steps -= sum(record["steps"] + record["replayed"] for record in records)
    rollouts(run, steps, trees, wave)                  # what they left over
    extra = extra_targets(run, trees, records)
    shown = demonstrations(run, trees)
    rows = [pack(group) for group in fill(extra, cfg.row_tokens)]
    names = ("L_extra", "L_demonstrations")
    if cfg.early_experience == "reflection":
        fit(run, round_, names, shown + rows)
    else:
        per_step = max(1, cfg.batch_tokens // cfg.row_tokens)
        fit(run, round_, names, shown, before=rows[:cfg.steps // 2 * per_step])


def extra_targets(run: Run, trees: list[Tree], records: list[dict]) -> list[list[Segment]]:
    """What is learned beside the demonstrations, each piece weighing 1 over their number in the first loss."""
    cfg, chat = run.cfg, run.policy.chat
    by_task = {tree.task: tree for tree in trees}
    extra: list[list[Segment]] = []
    for record in records:
        path = by_task[record["task"]].path(record["turn"])
        if cfg.early_experience == "reflection":
            extra += [reasoned(chat, path, record["why"])] if record["why"] else []
            continue
        whole = foreseen(run, path, record["tried"])
        if length(whole) <= cfg.row_tokens:
            extra.append(whole)
        else:
            extra += [foreseen(run, path, {action: obs}) for action, obs in record["tried"].items()]
    extra = [piece for piece in extra if length(piece) <= cfg.row_tokens]         # what is longer has no row
    segments = [segment for piece in extra for segment in piece]
    count = sum(any(segment.weights) for segment in segments)
    for segment in segments:
        segment.weights = [(weight / count, 0.0) for weight in segment.weights]
    return extra
