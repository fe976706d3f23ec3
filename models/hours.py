"""How much a run does at most, by its settings, and how many hours that takes, once a pace is measured: a run keeps its own in
pace.json. On a GPU it tells what that comes to, once in each stage; plan=true tells it of the folder out=.
"""
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ranks
from config import Config, UserError, method_file, visible
from envs import closing, make_env
from run import Run, provenance, write_aside

PACED = 20.0                            # seconds of a stage until its pace is told, and between two times that it is kept


def work_of(cfg: Config) -> list[tuple]:
    """(stage, environment steps, tokens drawn or trained on, optimiser steps), each at most. A baseline has a budget of
    steps, and makes of it what it makes."""
    with closing(make_env(cfg.env, cfg.data, cfg.env_timeout)) as env:
        horizon = min(env.max_turns, cfg.horizon or env.max_turns)
    attempts = cfg.rounds * cfg.train_tasks * cfg.attempts * (not cfg.trees)
    drawn = horizon * cfg.action_tokens + (horizon // cfg.reflect_every + 1) * cfg.reflect_tokens
    policies = 1 + cfg.evaluate_base + (cfg.rounds - 1) * cfg.evaluate_rounds
    episodes = policies * cfg.test_tasks * cfg.samples
    steps = cfg.rounds * cfg.steps + cfg.warm_steps * bool(cfg.warm_start)
    per_step = max(1, cfg.batch_tokens // cfg.row_tokens) * cfg.row_tokens
    learned = [("explore", attempts * horizon, attempts * drawn, 0), ("distil", 0, steps * per_step, steps)]
    if hasattr(method_file(cfg.method), "several_runs"):
        raise UserError(f"plan: method={cfg.method} makes several runs; ask for one of them: method=leafe, method=grpo ...")
    if cfg.method != "leafe":
        learned = [(Path(cfg.method).stem, getattr(cfg, "env_steps", None) or "as trees= took", "", "")]
    return [*learned, (f"evaluate, {policies} policies" if policies > 1 else "evaluate", episodes * horizon,
                       episodes * horizon * cfg.action_tokens, 0)]


class Pace:
    """How fast a stage goes, in pace.json of the run's folder: the last of each kind (sampling, training) that took PACED
    seconds. On a GPU it says once what that comes to."""
    def __init__(self, run: Run, kind: str):
        self.run, self.kind, self.began, self.next = run, kind, time.time(), PACED

    def tell(self, tokens: int) -> None:
        """`tokens`: those that this process has drawn or trained on since. Ranks draw alike; they train on the same."""
        seconds = time.time() - self.began
        if ranks.rank() or seconds < self.next:
            return
        tokens *= ranks.world() if self.kind == "sampling" else 1
        found = paces(self.run.folder.path) | {self.kind: dict(tokens=tokens, seconds=round(seconds, 1))}
        write_aside(self.run.folder.path / "pace.json", json.dumps(found))
        if self.next == PACED and torch.cuda.is_available():
            tqdm.write(visible("plan: " + line_of(self.run.cfg, found).replace("\n", "; ")), file=sys.stderr)
        self.next = seconds + PACED


def paces(folder: Path) -> dict[str, dict[str, float]]:
    kind = {"tokens": int, "seconds": float}
    return provenance().read_json(folder / "pace.json", {"sampling?": kind, "training?": kind}, {})


def line_of(cfg: Config, found: dict[str, dict[str, float]]) -> str:
    """What each stage takes at most, by the paces that were measured."""
    told, total, missing, used = [], 0.0, [], {}
    for name, _, tokens, steps in work_of(cfg):
        kind = "training" if steps else "sampling"
        if kind not in found or not isinstance(tokens, int):
            missing.append(name)
            continue
        used[kind] = f"{kind} {found[kind]['tokens'] / max(0.1, found[kind]['seconds']):,.0f} tokens/s over " \
                     f"{found[kind]['seconds']:,.0f} s"
        hours = tokens * found[kind]["seconds"] / max(1, found[kind]["tokens"]) / 3600
        told.append(f"{name} {spoken(hours)}")
        total += hours
    if not told:
        return "hours: not before a pace is measured, which a run keeps in its folder (pace.json); its bars show tokens/s"
    without = f", without {', '.join(missing)} (no pace is known)" if missing else ""
    return (f"hours, at most: {'; '.join(told)}; together {spoken(total)}{without}\n"
            f"an estimate, by the pace in {cfg.out}/pace.json: {', '.join(used.values())}")


def spoken(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
