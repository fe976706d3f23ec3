"""The trees and samples of a server beside those of the engine here: how many are equal, and the time both take.

    python -m tools.bench engines preset=smoke engine=http://localhost:8000/v1

Of the base, and of an adapter made at random (or adapter=): greedily, here and there; then at temperature 1, there twice, which
is equal if the server heeds seeds. Exploration takes the preset's training tasks, sampling its test tasks.
"""
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from config import Config, UserError
from eval import sample
from leafe import explore
from run import Policy, Run, RunFolder, pick_tasks

Found = dict[str, dict[tuple, dict]]                   # file -> key -> record
KEYS = {"trees.jsonl": ("task", "name"), "samples.jsonl": ("task", "sample")}


def engines(cfg: Config, own: dict) -> dict[str, Any]:
    if not cfg.engine:
        raise UserError("engine: tools.bench engines needs a server's address, like http://localhost:8000/v1")
    policy, rows = Policy.open(cfg, cfg.adapter, "adapter"), []
    for name in ("base", "adapter"):
        if name == "adapter" and not cfg.adapter:
            shake(policy)
        cold, hot = (cfg.but(temperature=heat, reflect_temperature=heat) for heat in (0.0, 1.0))
        here, seconds_here = drawn(policy, cold.but(engine=""), name)
        there, seconds_there = drawn(policy, cold, name)
        first, second = (drawn(policy, hot, name)[0] for _ in range(2))
        rows.append(dict(policy=name, **equal(here, there, "greedy"), **equal(first, second, "seeded"),
                         seconds_here=seconds_here, seconds_there=seconds_there))
    return dict(server=cfg.engine, rows=rows)


def shake(policy: Policy) -> None:
    """Give a new adapter weights that matter."""
    torch.manual_seed(policy.cfg.seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def drawn(policy: Policy, cfg: Config, name: str) -> tuple[Found, float]:
    """The records of an exploration and of samples, in a folder of their own, and the seconds that they took."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.but(out=folder)
        run = Run(cfg, replace(policy, cfg=cfg), RunFolder(cfg), pick_tasks(cfg, "train"), pick_tasks(cfg, "test"))
        began = time.perf_counter()
        with run.policy.off(name == "base"):
            explore(run, run.train_tasks)
        sample(run, name)
        seconds = time.perf_counter() - began
        run.folder.close()
        return {file: {tuple(record[key] for key in keys): record for record in run.store(file).records}
                for file, keys in KEYS.items()}, seconds


def equal(a: Found, b: Found, what: str) -> dict[str, str]:
    """How many records are the same, of all that either has."""
    counts = {}
    for file in KEYS:
        same = sum(b[file].get(key) == record for key, record in a[file].items())
        counts[f"{what}_{Path(file).stem}"] = f"{same} of {len({*a[file], *b[file]})}"
    return counts


def show_engines(found: dict[str, Any]) -> str:
    lines = ["".join(f"{key:>18}" for key in found["rows"][0])]
    for row in found["rows"]:
        lines.append("".join(f"{value:18.1f}" if isinstance(value, float) else f"{value:>18}" for value in row.values()))
    return "\n".join(lines)
