"""What is kept of a run that has ended, in docs/results/TABLE.json: enough to make its table again without the run.

A line a run: what made it (command, commit, versions, machine, minutes), for each policy that it sampled the counts of each
task, what Stage 1 gave and how good the reflections were, by round, and what training took.
"""
import fcntl
import json
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator

from config import ROOT, SHIPPED, UserError, kept_config, load_config, short

import torch

from eval import Samples, pass_at_k
from run import NOT_PART_OF_RESULTS, pick_tasks, read_jsonl, write_aside
from tools.compare import whole_cost
from tools.experiments import EXPERIMENTS, RECORDS, RUNS, Made, Table, command, key_of, read_records
from tools.provenance import MADE, read_json
from tools.report import read_policies

MAKER = ("command", "commit", "changed", "date", "python", "torch", "transformers", "bitsandbytes", "processor", "cores", "gpu")


def keep(tables: dict[str, Table], run: Made) -> None:
    """Its record goes into docs/results/TABLE.json, a line each, if there is none. A warm start has none."""
    if run.is_start:
        return
    path = ROOT / RECORDS / f"{run.table}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    check_same(tables, run, ROOT / run.folder)
    with alone():
        records = read_records(run.table)
        if run.key not in records:
            records[run.key] = record_of(ROOT / run.folder)
            lines = [f"{json.dumps(key)}: {json.dumps(records[key], separators=(',', ':'))}" for key in sorted(records)]
            write_aside(path, "{\n" + ",\n".join(lines) + "\n}\n")


@contextmanager
def alone() -> Iterator[None]:
    """Several processes may make a table, each some of its seeds: records and pages are for one at a time."""
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    with open(ROOT / RUNS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_same(tables: dict[str, Table], run: Made, folder: Path) -> None:
    """Raises UserError if the run that lies there is not the one that the experiments mean."""
    settings = [word for word in command(tables, run) if "=" in word]
    meant, have = vars(load_config([str(SHIPPED), *settings])), vars(kept_config(folder))
    free = NOT_PART_OF_RESULTS - {"samples", "split", "test_tasks"} | {"trees", "init", "experiences"}
    if "env_steps" not in map(key_of, [*tables[run.table].words, *tables[run.table].rows[run.row].words]):
        free.add("env_steps")                          # that of trees=, whichever way it was told (experiments.budget)
    for key in [key for key in meant if key not in free and have.get(key) != meant[key]]:
        raise UserError(f"{folder} was made with {key}={have.get(key)}, but {EXPERIMENTS} says {meant[key]} for {run.row} of "
                        f"{run.table}; delete that folder, or mend the file")


def record_of(folder: Path) -> dict[str, Any]:
    """All that the tables need of a run."""
    cfg, told = kept_config(folder), read_json(folder / "run.json", MADE, {})
    maker = {key: told.get(key) for key in MAKER} | dict(minutes=minutes(folder, told))
    if not (folder / "passk.json").exists():           # Stage 1's contenders: a task is tried once by each, so to speak
        said = read_json(folder / "stage1.json", dict(tasks=dict, found=dict), {})
        took = {name: dict(steps=one["steps"] + one["replayed"], sampled=one["sampled"]) for name, one in said["found"].items()}
        return dict(**maker, ks=[1], rounds=1, took=took, stage1={}, tasks=said["tasks"],
                    counts={name: [[1, int(hit), 0, 0] for hit in one["solved"]] for name, one in said["found"].items()})
    policies, metrics, stage1 = read_policies(folder, pick_tasks(cfg, "test")), folder / "metrics.jsonl", {}
    for said in read_jsonl(metrics) if metrics.exists() else []:
        if "stage_1/tasks" in said:
            stage1[said["round"]] = {key.partition("/")[2]: value for key, value in said.items() if "/" in key}
    return dict(**maker, ks=cfg.ks, rounds=cfg.rounds, took=whole_cost(folder), stage1=stage1,
                tasks={task: found[0]["difficulty"] for task, found in policies[-1].by_task.items()},
                counts={policy.label: counts(policy) for policy in policies})


def minutes(folder: Path, told: dict[str, Any]) -> list[float]:
    """What the whole run took; behind it, where that was measured, what all its cores together did. []: nobody knows."""
    again = len(told.get("continued", []))
    if (folder / "minutes.json").exists():
        took, cores, *starts = read_json(folder / "minutes.json", list[float], [])
        return [took, cores] if starts in ([], [1 + again]) else []    # a start that was killed told nothing
    if again or "date" not in told:
        return []
    began = datetime.strptime(told["date"], "%Y-%m-%d %H:%M:%S %z").timestamp()
    last = next(folder / name for name in ("samples.jsonl", "stage1.jsonl") if (folder / name).exists())
    return [round((last.stat().st_mtime - began) / 60, 2)]


def counts(policy: Samples) -> list[list[int]]:
    """For each task: episodes, successes, episodes that met a refusal, successes of these."""
    recovery = policy.recovery().long().tolist()
    return [[len(found), sum(one["success"] for one in found), met, won]
            for (won, met), found in zip(recovery, policy.by_task.values())]


known_pass_at_k = lru_cache(None)(pass_at_k)                 # many tasks have the same counts


class Counted(Samples):
    """A policy's samples as a record has them, all or those of a difficulty: the same figures."""
    def __init__(self, record: dict[str, Any], policy: str, of: str = ""):
        self.label = policy
        self.by_task = {task: found for (task, difficulty), found in zip(record["tasks"].items(), record["counts"][policy])
                        if of in ("", difficulty)}
        if not self.by_task:
            raise UserError(f"{EXPERIMENTS}: no task is of difficulty {short(of)}; there are "
                            f"{', '.join(sorted(set(record['tasks'].values())))}")
        self.n = min(n for n, *_ in self.by_task.values())

    def passes(self, k: int) -> torch.Tensor:
        return torch.tensor([known_pass_at_k(n, won, k) for n, won, _, _ in self.by_task.values()])

    def recovery(self) -> torch.Tensor:
        return torch.tensor([[won, met] for _, _, met, won in self.by_task.values()], dtype=torch.float64)
