"""A run: its settings, policy, world, tasks and folder, in one object that travels; JSONL that survives a kill -9.

    Policy   pi: a model with its chat and its adapter; engine() samples from it as it is now
    Run      what every function of the loop is handed: cfg, policy, tasks, folder; world() makes an environment
    Jsonl    append-only, a record a line: whatever stopped a run, the same command goes on where it was
"""
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ContextManager, Iterator, TextIO

import torch
import yaml
from torch import nn

import ranks
from config import Config, Dumper, UserError, kept_config, read_text, visible
from engine import Chat, Engine
from envs import Env, ask, closing, env_class, make_env
from lora import (adapter_off, adapters, add_lora, checks, find_model, general, load_adapter, load_model, lora_layers,
                  lora_parameters, save_adapter)

REACT = ("\nthink first, then act. answer in this form:\n<think>what you know, and what to try next</think>\n"
         "<action>one action</action>")          # behind the rules, with react: true
PLAYBOOK = "\nwhat earlier episodes taught:\n"   # behind the rules, then a lesson a line (methods/ace.py)
NOT_PART_OF_RESULTS = {"out", "captured", "engine", "engine_patience", "engine_sleep", "engine_timeout", "env_timeout", "processes", "slots",
                       "plan", "workers", "snapshot_mb", "checkpoint_every", "ks", "resamples", "evaluate_base", "evaluate_rounds",
                       "test_tasks", "samples", "split", "adapter", "playbook"}


# ------------------------------------------------------------------------------------------------------- the policy
@dataclass
class Policy:
    """pi: the model with its chat. What learns is its adapter; the base stays as it is."""
    model: Any
    chat: Chat
    cfg: Config
    drawn: dict[str, str] = field(default_factory=dict)    # drawn_by: what samples from it, as records say

    @staticmethod
    def open(cfg: Config, adapter: str, key: str) -> "Policy":
        """`key`: where the user named the adapter that it begins with, init or adapter."""
        if adapter:
            adapters().read_config(f"{key}: ", Path(adapter))          # before minutes go into loading a large model
        plans().say(cfg)
        model, tokenizer = load_model(cfg.model, cfg.load_in_4bit, cfg.context, cfg.dtype)
        policy = Policy(model, Chat(tokenizer, cfg.thinking, provenance().today(cfg)), cfg)
        if adapter:
            policy.load(Path(adapter), f"{key}: ")
        checks().check(policy)                         # is what the engine and packed rows compute the model's own?
        return policy

    def engine(self) -> Any:
        """What samples from the policy as it is now: the forking engine, the general one where the model cannot fork, or
        a server (cfg.engine), whose door this is."""
        cfg = self.cfg
        if cfg.slots is None:
            cfg = cfg.but(slots=plans().slots_of(self.model, cfg))
        if not torch.cuda.is_available():              # one memory for all ranks
            cfg = cfg.but(slots=ranks.part(cfg.slots), snapshot_mb=ranks.part(cfg.snapshot_mb))
        if env_class(cfg.env).apart and not env_class(cfg.env).shares:       # a conversation holds a process
            cfg = cfg.but(slots=min(cfg.slots, ranks.part(cfg.workers or ranks.cores())))
        kind = Engine if getattr(self.model, "forks", True) else general().General
        engine = kind(self.model, self.chat.stop, cfg)
        self.drawn["drawn_by"] = provenance().precision(self.model)
        if not cfg.engine:
            return engine
        from scale.serving import Server
        return Server(self, engine)

    def off(self, off: bool = True) -> ContextManager[None]:           # inside, the policy is the base
        return adapter_off(self.model, off)

    def parameters(self) -> list[nn.Parameter]:
        if not lora_layers(self.model):                # the first time, if none was loaded
            add_lora(self.model, self.cfg.lora_rank, self.cfg.lora_alpha, self.cfg.seed)
        return lora_parameters(self.model)

    def save(self, folder: Path) -> None:
        if lora_layers(self.model):                    # else the policy is the base, or the base with a playbook
            save_adapter(self.model, folder, self.cfg.model)

    def load(self, folder: Path, said: str = "") -> None:
        load_adapter(self.model, folder, said)

    def fingerprint(self, rules: str = "") -> str:
        """Names the policy that samples were drawn from, so that a resumed run never mixes two."""
        digest = hashlib.sha256(rules.encode())
        for parameter in lora_parameters(self.model):
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        for layer in lora_layers(self.model).values():
            if not math.isclose(layer.scale, self.cfg.lora_alpha / self.cfg.lora_rank):    # an adapter of init= or adapter=
                digest.update(f"{layer.scale:.6g}".encode())
        return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------- the run
@dataclass
class Run:
    """Made once, in train.py or eval.py, and handed to all that takes part in it."""
    cfg: Config
    policy: Policy
    folder: "RunFolder"
    train_tasks: list[str] = field(default_factory=list)
    test_tasks: list[str] = field(default_factory=list)
    playbook: str = ""                     # lessons behind the rules, a line each

    def world(self) -> Env:
        """An environment; behind its rules, with cfg.react, how to answer, and the playbook."""
        env = make_env(self.cfg.env, self.cfg.data, self.cfg.env_timeout, ranks.part(self.cfg.workers or ranks.cores()))
        env.rules += (REACT if self.cfg.react else "") + (PLAYBOOK + self.playbook if self.playbook else "")
        return env

    def but(self, **settings: Any) -> "Run":                           # the same run under other settings
        return replace(self, cfg=self.cfg.but(**settings))

    def store(self, name: str) -> "Jsonl":
        return self.folder.store(name)

    @property
    def metrics(self) -> "Jsonl":          # every figure that the run prints; rank 0 writes it, all have the same
        return self.folder.store("metrics.jsonl", alone=True)

    def say(self, **figures: Any) -> None:                             # once: a resumed run comes by again
        if figures not in self.metrics.records:
            self.metrics.append(figures)


def open_run(cfg: Config, adapter: str, training: bool) -> Run:
    """The world is examined and the tasks are picked before the folder is made and the model loaded."""
    if cfg.playbook and not Path(cfg.playbook).is_file():
        raise UserError(f"playbook: there is no file {cfg.playbook}; train.py method=ace writes one")
    env, other = (make_env(cfg.env, cfg.data, cfg.env_timeout) for _ in range(2))
    with closing(env), closing(other):
        for note in env.examine(cfg.train_split if training else cfg.split, other):
            if ranks.rank() == 0:
                print(visible(f"note: {note}"), file=sys.stderr)
    test_tasks = pick_tasks(cfg, "test")
    learned = pick_tasks(cfg.but(train_tasks=cfg.train_tasks + cfg.warm_start), "train") if training else []
    shared = sorted(set(test_tasks) & set(learned))
    if shared and not cfg.split.startswith("train"):
        raise UserError(f"split: {len(shared)} of the {len(test_tasks)} tasks of {cfg.env} to test on, like "
                        f"{shared[0]!r}, are trained on, too; let its splits share none, or say "
                        f"split={cfg.train_split} if that is meant")
    playbook = read_text(Path(cfg.playbook)).strip() if cfg.playbook else ""
    find_model(cfg.model)
    folder = RunFolder(cfg)
    policy = Policy.open(cfg, adapter, "init" if training else "adapter")
    return Run(cfg, policy, folder, learned[:cfg.train_tasks], test_tasks, playbook)


def pick_tasks(cfg: Config, use: str) -> list[str]:
    """The tasks to `train` or to `test` on. Raises UserError if the world has too few."""
    split, count = (cfg.train_split, cfg.train_tasks) if use == "train" else (cfg.split, cfg.test_tasks)
    with closing(make_env(cfg.env, cfg.data, cfg.env_timeout)) as env:
        tasks = ask(env, "tasks", split)
    if len(tasks) < count:
        raise UserError(f"{cfg.env}{f' with data={cfg.data}' if cfg.data else ''} has {len(tasks) or 'no'} tasks in "
                        f"its split {split}, not {count}; lower {use}_tasks, or give another split or other data")
    return list(tasks[:count])


# ------------------------------------------------------------------------------------------------ the run's folder
class Jsonl:
    """Append-only records; the file comes with the first. A half-written last line (process killed) is cut off.
    Of several ranks, rank 0 writes to the file, the others to parts of it until `gather` (or nothing, if `alone`)."""
    def __init__(self, path: Path, alone: bool = False):
        self.path = path
        self.file: TextIO | None = None                  # opened when it is first written to
        self.own = path.with_name(f"{path.name}.{ranks.rank()}.part") if ranks.rank() else path
        self.silent = alone and ranks.rank() > 0
        self.stamp: dict[str, str] = {}                  # what each record says besides: who made it,
        self.drawn: dict[str, str] = {}                  # and who drew it (Policy.engine)
        self.records = list(read_jsonl(path, repair=ranks.rank() == 0)) if path.exists() else []

    def append(self, record: dict) -> None:
        self.records.append(record)
        if not self.silent:
            self.file = self.file or open(self.own, "a", encoding="utf-8")
            self.file.write(json.dumps(record | self.stamp | self.drawn, separators=(",", ":")) + "\n")
            self.file.flush()

    def gather(self) -> None:
        """Have what all ranks have appended; to be called by all of them."""
        if ranks.world() > 1:
            self.close()
            ranks.wait_for_all()
            if ranks.rank() == 0:
                absorb(self.path)
            ranks.wait_for_all()
            self.records = list(read_jsonl(self.path)) if self.path.exists() else []
            ranks.wait_for_all()                       # or one rank reads what another appends already

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


def read_jsonl(path: Path, repair: bool = False) -> Iterator[dict]:
    """Every record of a file, once, if it is one (tools/provenance.py, RECORDS). Only the last line may be damaged: it is
    left out, and cut off if `repair`."""
    fresh = provenance().inspector(Path(path))
    with open(path, "rb") as file:
        good = 0
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError
                record = json.loads(line)
            except (ValueError, RecursionError):
                if file.read(1):
                    raise UserError(f"{path}: line {number} is damaged, and is not the last; "
                                    f"restore the file or delete it") from None
                print(visible(f"{path}: the last line was cut short (killed while writing?) and is dropped"),
                      file=sys.stderr)
                break
            good += len(line)
            if fresh(number, line, record):
                yield record
    if repair and good < path.stat().st_size:
        os.truncate(path, good)


def absorb(path: Path) -> None:
    """Move the parts of a JSONL file into it. Killed in between, it can be done again: what is there stays single."""
    parts = sorted(path.parent.glob(path.name + ".*.part"))
    there = set(path.read_bytes().splitlines(keepends=True)) if parts and path.exists() else set()
    for part in parts:
        list(read_jsonl(part, repair=True))
        with open(path, "ab") as file:
            file.writelines(line for line in part.read_bytes().splitlines(keepends=True) if line not in there)
        part.unlink()


def write_aside(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")         # halves of letters, as in JSON
    aside.replace(path)


class RunFolder:
    """out/<name>/, with all that a run leaves; held by one process at a time (of several ranks, by rank 0 for all)."""
    def __init__(self, config: Config):
        self.path = Path(config.out)
        self.stores: dict[str, Jsonl] = {}
        if ranks.rank() == 0:
            self._hold(config)
            provenance().check_folder(self.path)
            self._settle(config)
            provenance().tell(self.path, provenance().today(config))      # run.json
            for name in {part.name.split(".")[0] for part in self.path.glob("*.part")}:      # killed before
                Jsonl(self.path / f"{name}.jsonl")                                           # repairs it
                absorb(self.path / f"{name}.jsonl")
        ranks.wait_for_all()

    def _hold(self, config: Config) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(f"out: cannot write to {config.out}: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"out: another process is running in {config.out}; "
                            f"wait for it, or choose another out=") from None

    def _settle(self, config: Config) -> None:
        """Keep config.yaml; refuse to mix results of two configurations in one folder."""
        kept, now = self.path / "config.yaml", dict(vars(config))
        if kept.exists():
            before = vars(kept_config(self.path))
            if odd := [key for key in now if key not in NOT_PART_OF_RESULTS and before.get(key) != now[key]]:
                raise UserError(f"{self.path} holds a run with {odd[0]}={before.get(odd[0])!r}, "
                                f"not {now[odd[0]]!r}; choose another out=, or delete that folder")
        write_aside(kept, yaml.dump(now, Dumper=Dumper, sort_keys=False))

    def store(self, name: str, alone: bool = False) -> Jsonl:
        if name not in self.stores:
            self.stores[name] = Jsonl(self.path / name, alone)
            ranks.wait_for_all()                       # as in Jsonl.gather: all ranks read the same
        return self.stores[name]

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Add the seconds that the block takes to seconds.json (those of a process that was killed are lost)."""
        before, began = provenance().seconds(self.path), time.time()
        try:
            yield
        finally:
            if ranks.rank() == 0:
                write_aside(self.path / "seconds.json", json.dumps(round(before + time.time() - began, 1)))


def plans() -> ModuleType:
    """The door of models/plan.py: what a run takes of a card, from the model's config alone."""
    from models import plan
    return plan


def provenance() -> ModuleType:
    """The door of tools/provenance.py: what made a run, and whether what its files hold is of that."""
    from tools import provenance
    return provenance


def report_file() -> ModuleType:
    """The door of the report: what Stage 1 gave, what training took, the tables, the page."""
    from tools import report
    return report
