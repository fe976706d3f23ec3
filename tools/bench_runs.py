"""Whole programs side by side, and what waits for what: three lines of tools/bench.py, which says how each is called.

    run           whole runs of train.py, in turns, by how many processes share one: seconds of the whole and of each
                  stage, memory of all its processes, and whether what it leaves is byte for byte the same
    neighbours    exploration beside so many busy programs, each of which would take a core for itself
    waiting       worlds in processes of their own: the share of the time that model and worlds wait for each other

    python -m tools.bench_runs explore config.yaml [key=value ...]      what neighbours runs: Stage 1 alone, timed

Every folder that is written is a fresh one, below out=; what a program says lies beside it, in a .log file.
"""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Iterator

import yaml

from config import ROOT, Config, Dumper, UserError, guarded, load_config, visible

from tqdm import tqdm

import engine
import ranks
from engine import Job
from envs import closing, env_class
from leafe import Attempt, episode, explore
from run import Policy, Run, open_run, write_aside
from tools.machine import memory_of

RESULTS = ("trees.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors", "passk.json")
POLL = 0.2                                               # seconds between two looks at a program
LOOP = ("import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6): pass\n")
BUSY, CODE = str(ROOT / "tools" / "bench_worlds.py:Busy"), str(ROOT / "tests" / "data" / "mbpp_sample.jsonl")


# -------------------------------------------------------------------------------------------- a program, from outside
@contextmanager
def program(words: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A program under way; what it says goes to `log`. With the block it ends, however the block does; raises UserError
    if it failed of itself."""
    with open(log, "wb") as said:
        process = subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        yield process
    finally:
        end(process)
    if process.returncode:
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
        told = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise UserError(f"{log}: {told.removeprefix('error: ') or f'exit code {process.returncode}'}")


def end(process: subprocess.Popen) -> None:
    """As Ctrl-C would, which it may have heard already; in the end by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many one-core loops. They end with the block, and by themselves when this program is gone without a word."""
    words = [sys.executable, "-c", LOOP, str(os.getpid())]
    with ExitStack() as stack:
        for _ in range(count):
            # Ctrl-C is not for it; yet of this session, for each session gets a share of the cores of its own
            loop = subprocess.Popen(words, stderr=subprocess.DEVNULL, preexec_fn=os.setpgrp)
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        yield


def fresh(cfg: Config, folder: Path, processes: str) -> str:
    """Remove a run's folder, and write beside it the config of a run there; returns its path."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = cfg.but(out=str(folder), processes=None if processes == "null" else int(processes))
    write_aside(path := Path(f"{folder}.yaml"), yaml.dump(vars(settings), Dumper=Dumper, sort_keys=False))
    return str(path)


def contenders(text: str) -> list[str]:
    if not re.fullmatch(r"(null|[1-9]\d{0,3})(,(null|[1-9]\d{0,3}))*", text):
        raise UserError(f"processes: {text!r} must be numbers of processes or null, like 1,2: the first is the base")
    return list(dict.fromkeys(text.split(",")))


# --------------------------------------------------------------------------------------------------------- whole runs
class Stages:
    """The seconds of a run's stages, told from outside: a stage has ended when its line stands in metrics.jsonl."""
    def __init__(self, folder: Path):
        self.folder, self.read, self.adapters, self.last = folder, 0, 0, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def ended(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def look(self) -> None:
        """`start`: until the run's folder is made; then stages by their lines, and the adapter, which ends `train`."""
        if "start" not in self.seconds and (self.folder / "run.json").exists():
            self.ended("start")
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        for line in lines[self.read:]:
            if not line.endswith("\n"):                  # it is being written
                break
            record = json.loads(line)
            self.read += 1
            stage = "train" if "step" in record else "explore"
            self.ended(f"sample {record['policy']}" if "policy" in record else stage)
        adapters = len(list(self.folder.glob("adapter_*/adapter_config.json")))
        if adapters > self.adapters:
            self.adapters = adapters
            self.ended("train")


def watch(words: list[str], folder: Path, limit: float = float("inf")) -> tuple[float, dict[str, float], float]:
    """Run a program that writes to `folder` to its end: its seconds, those of its stages, its memory at most in MB.
    Raises UserError after `limit` seconds."""
    began, stages, most = time.perf_counter(), Stages(folder), 0.0
    with program(words, Path(f"{folder}.log")) as process:
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            stages.look()
            if time.perf_counter() - began > limit:
                spent = ", ".join(f"{name} {took:.0f} s" for name, took in stages.seconds.items())
                raise UserError(f"{folder}: stopped after {limit:.0f} seconds ({spent or 'not begun'})")
            try:
                process.wait(POLL)
            except subprocess.TimeoutExpired:
                pass
        took = time.perf_counter() - began
    stages.look()
    stages.ended("rest")
    return took, stages.seconds, most


def left(folder: Path) -> dict[str, str]:
    """Digests of what a run leaves; of JSON lines in no order, since attempts end in the order that time gives them."""
    found = {}
    for name in RESULTS:
        if (folder / name).exists():
            text = (folder / name).read_bytes()
            lines = sorted(text.splitlines(keepends=True)) if name.endswith(".jsonl") else [text]
            found[name] = hashlib.sha256(b"".join(lines)).hexdigest()
    return found


def whole_runs(cfg: Config, own: dict) -> dict:
    """train.py as the contenders of processes=, in turns; the first one's first run is what the others are held to."""
    rows: list[dict[str, Any]] = [dict(processes=name, seconds=[], stages=[], peak_mb=[], same=[])
                                  for name in contenders(own["processes"])]
    base = None
    for n, row in tqdm([(n, row) for n in range(1, own["repetitions"] + 1) for row in rows], unit="run", leave=False):
        folder = Path(cfg.out) / "run" / f"{row['processes']}-{n}"
        took, stages, most = watch([str(ROOT / "train.py"), fresh(cfg, folder, row["processes"])], folder)
        row["seconds"].append(took)
        row["stages"].append(stages)
        row["peak_mb"].append(most)
        found = left(folder)
        base = base or found
        row["same"].append({name: found.get(name) == base.get(name) for name in {**base, **found}})
    return dict(contenders=rows)


def show_runs(found: dict) -> str:
    rows, names = found["contenders"], list(found["contenders"][0]["stages"][0])
    first = median(rows[0]["seconds"])
    lines = [f"{'processes':>10}{'seconds':>10}{'least':>9}{'most':>9}{'of first':>10}{'peak MB':>9}"]
    for row in rows:
        middle = median(row["seconds"])
        lines.append(f"{row['processes']:>10}{middle:10.1f}{min(row['seconds']):9.1f}{max(row['seconds']):9.1f}"
                     f"{middle / first:10.2f}{max(row['peak_mb']):9.0f}")
    lines.append("its stages:")
    for row in rows:
        spent = [f"{name} {median(stages.get(name, 0.0) for stages in row['stages']):.1f}" for name in names]
        lines.append(f"{row['processes']:>10}  " + ", ".join(spent))
    lines.append("results, beside those of the first one's first run:")
    for row in rows:
        for n, same in enumerate(row["same"], 1):
            told = [f"{name} {'same' if same[name] else 'differs'}" for name in RESULTS if name in same]
            lines.append(f"{row['processes']:>10}  run {n}: {', '.join(told) or 'there are none'}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- busy neighbours
def neighbours(cfg: Config, own: dict) -> dict:
    """Exploration alone, then beside so many busy loops, as the contenders of processes=; in turns."""
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", own["loops"]):
        raise UserError(f"loops: {own['loops']!r} must be numbers of busy programs beside it, like 2,4")
    loops = [0, *map(int, own["loops"].split(","))]
    cfg, cores = cfg.but(train_tasks=own["tasks"]), ranks.cores()
    rows: list[dict[str, Any]] = [dict(processes=name, loops=n, fair=(n + cores) / cores, seconds=[])
                                  for name in contenders(own["processes"]) for n in loops]
    for n, row in tqdm([(n, row) for n in range(1, own["repetitions"] + 1) for row in rows], unit="run", leave=False):
        folder = Path(cfg.out) / "neighbours" / f"{row['processes']}-{row['loops']}-{n}"
        words = ["-m", "tools.bench_runs", "explore", fresh(cfg, folder, row["processes"])]
        with busy(row["loops"]), program(words, Path(f"{folder}.log")) as process:
            process.wait()
        row["seconds"].append(json.loads((folder / "explored.json").read_text()))
    return dict(tasks=own["tasks"], cores=cores, contenders=rows)


def show_neighbours(found: dict) -> str:
    lines = [f"exploring {found['tasks']} tasks on {found['cores']} cores",
             f"{'processes':>10}{'neighbours':>12}{'seconds':>10}{'of alone':>10}{'fair share':>12}"]
    alone = {row["processes"]: median(row["seconds"]) for row in found["contenders"] if not row["loops"]}
    for row in found["contenders"]:
        middle = median(row["seconds"])
        lines.append(f"{row['processes']:>10}{row['loops']:>12}{middle:10.1f}{middle / alone[row['processes']]:10.2f}"
                     f"{row['fair']:12.2f}")
    return "\n".join(lines)


def main(args: list[str]) -> None:
    """Stage 1 alone, in as many processes as train.py would take."""
    if args[0] != "explore":
        raise UserError("usage: python -m tools.bench_runs explore config.yaml [key=value ...]")
    cfg = load_config(args[1:])
    ranks.start(cfg.processes)
    run = open_run(cfg, cfg.init, training=True)
    began = time.perf_counter()
    trees = explore(run, run.train_tasks)
    took = time.perf_counter() - began
    run.folder.close()
    if ranks.rank() == 0:
        write_aside(run.folder.path / "explored.json", json.dumps(took))
    print(visible(f"{len(trees)} trees, {took:.1f} seconds"))


# ---------------------------------------------------------------------------------------------------- waiting worlds
@contextmanager
def timed(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    """While the block runs, every call of owner.name adds its seconds."""
    plain = getattr(owner, name)

    def call(*args, **more):
        began = time.perf_counter()
        try:
            return plain(*args, **more)
        finally:
            spent.append(time.perf_counter() - began)
    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def waiting(cfg: Config, own: dict) -> dict:
    """The same episodes with workers= at 1, cores, and twice that, in the world of env=, if it runs apart; else in one
    that computes for world_ms= a step, and in one of programs, which are sandboxed and judged."""
    worlds = {f"{own['world_ms']} ms a step": (BUSY, str(own["world_ms"])), "code": ("code", CODE)}
    if env_class(cfg.env).apart:
        worlds = {cfg.env: (cfg.env, cfg.data)}
    policy, rows, cores = Policy.open(cfg, cfg.init, "init"), [], ranks.cores()
    if not getattr(policy.model, "forks", True):
        raise UserError(f"model: {cfg.model} goes the general way, which is not measured here; choose another model")
    for name, (env, data) in worlds.items():
        for workers in sorted({1, cores, 2 * cores}):
            settings = cfg.but(env=env, data=data, workers=workers)
            run = Run(settings, Policy(policy.model, policy.chat, settings), folder=None)
            rows.append(dict(world=name, workers=workers, **waits(run, own["episodes"] or 32)))
    return dict(contenders=rows)


def waits(run: Run, count: int) -> dict[str, float]:
    """Sample `count` episodes. `model_waits`: the share of the time in which no episode has anything for the model;
    `worlds_wait`: the share of all workers' time in which they are asked nothing."""
    workers = run.cfg.workers
    worlds = [run.world() for _ in range(workers)]
    tasks = worlds[0].tasks(run.cfg.split)
    if not tasks:
        raise UserError(f"split: {run.cfg.env} has no tasks in {run.cfg.split}")
    with ExitStack() as stack:                           # each world in its process, and begun: not counted
        for world in worlds:
            stack.enter_context(closing(world))
        begun: list[Any] = [world.reset(tasks[0]) for world in worlds]
        for future in begun:
            future.result()
    queue = deque(Job(episode(run, run.world(), Attempt(tasks[n % len(tasks)], str(n)), reflect=False),
                      random.Random(n), tasks[n % len(tasks)]) for n in range(count))
    model, calls, turns, remote = [], [], 0, type(worlds[0])
    began = time.perf_counter()
    with timed(engine, "wait", model), timed(remote, "_ask", calls):
        for job in run.policy.engine().run(queue):
            turns += job.result.steps
    took = time.perf_counter() - began
    return dict(episodes=count, turns=turns, seconds=took, model_waits=sum(model) / took,
                worlds_wait=1 - sum(calls) / (workers * took))


def show_waiting(found: dict) -> str:
    lines = [f"{'world':>16}{'workers':>9}{'turns':>7}{'seconds':>9}{'model waits':>13}{'worlds wait':>13}"]
    for row in found["contenders"]:
        lines.append(f"{row['world']:>16}{row['workers']:>9}{row['turns']:>7}{row['seconds']:9.1f}"
                     f"{row['model_waits']:>13.0%}{row['worlds_wait']:>13.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    guarded(main, __doc__)
