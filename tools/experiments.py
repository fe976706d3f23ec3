"""The experiments that the tables of docs/results.md are made of: docs/experiments.yaml, read, and as commands.

    read_tables    every table: its rows, and the arguments of their runs
    made_by        the run that a row shows, and the policy of it
    missing        the runs that are still to be made, what one builds on before it
    execute        one of them, in a process of its own
"""
import ctypes
import json
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Container

from config import ROOT, UserError, kept_config, nearest, read_yaml, short
from run import write_aside
from tools.provenance import odd, read_json

EXPERIMENTS, RUNS, RECORDS = "docs/experiments.yaml", "out/results", "docs/results"
FIELDS = {"seeds": list[int], "rows": dict, "shows?": str, "arguments?": str, "warm_start?": str, "columns?": list,
          "each_seed?": bool, "as_printed?": bool, "picture?": str, "whole?": bool}    # each stands in docs/experiments.yaml
ROW = {"says?": str, "arguments?": str}


@dataclass
class Row:
    name: str
    says: str                                          # its first cell
    words: list[str]                                   # arguments of its own
    shows: tuple[str, str] | None                      # or no run of its own: (table/row, policy) of another's


@dataclass
class Table:
    name: str
    words: list[str]                                   # arguments of all its runs
    rows: dict[str, Row]
    set: dict[str, Any]                                # FIELDS, as they stand in the file


@dataclass(frozen=True)
class Made:
    """One run of the experiments."""
    table: str
    row: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.row}-{self.seed}"

    @property
    def folder(self) -> str:                           # as seen from the project's, in which it runs
        return f"{RUNS}/{self.table}/{self.key}"

    @property
    def is_start(self) -> bool:                        # a warm start, made alone
        return self.row == "warm_start"

    @property
    def ended(self) -> bool:
        return has_ended(ROOT / self.folder, self.is_start)


def has_ended(folder: Path, is_start: bool = False) -> bool:
    """Of a run (of train.py, eval.py, methods.stage1), or of a warm start alone, which samples nothing."""
    last = ["warm_start/adapter_config.json"] if is_start else ["passk.json", "stage1.json"]
    return any((folder / name).exists() for name in last)


# ------------------------------------------------------------------------------------------------- what a table is
def read_tables() -> dict[str, Table]:
    found: dict[str, Table] = {}
    for name, told in read_yaml(ROOT / EXPERIMENTS).items():
        told = told if isinstance(told, dict) else {}
        known = [key.rstrip("?") for key in FIELDS]
        unknown = [f"there is no {key}{nearest(key, known)}" for key in told if key not in known]
        if fault := unknown[0] if unknown else odd(told, FIELDS):
            raise UserError(f"{EXPERIMENTS}: {name}: {fault}")
        rows = {row: read_row(name, row, value) for row, value in told["rows"].items()}
        found[name] = Table(name, told.get("arguments", "").split(), rows, told)
    return found


def read_row(table: str, name: str, told: Any) -> Row:
    told = told if isinstance(told, dict) else dict(arguments=told)
    fault = odd(told, ROW) if re.fullmatch(r"[\w.+-]+", name) else "its name, that of a folder, has other signs than letters"
    if fault:
        raise UserError(f"{EXPERIMENTS}: {table}: {name}: {fault}")
    arguments = told.get("arguments", "")
    other = re.fullmatch(r"\{([^{}]+)\}(?::(\S+))?", arguments)
    return Row(name, told.get("says", name), [] if other else arguments.split(),
               (full(table, other[1]), other[2] or "") if other else None)


def full(table: str, row: str) -> str:
    return row if "/" in row else f"{table}/{row}"


def one_of(names: dict[str, Any], name: str, what: str, where: str = EXPERIMENTS) -> Any:
    if name not in names:
        raise UserError(f"{where}: there is no {what} {short(name)}{nearest(name, names)}; there are {', '.join(names)}")
    return names[name]


def made_by(tables: dict[str, Table], name: str, seed: int) -> tuple[Made, str]:
    """The run that a table/row shows, and the policy of it; "": the one that it ends with."""
    table, _, row = name.partition("/")
    own = one_of(tables, table, "table")
    if row == "warm_start" and "warm_start" in own.set:
        return Made(table, row, own.set["seeds"][0]), ""               # one for all seeds
    found = one_of(own.rows, row, "row", f"{EXPERIMENTS}: {table}")
    if not found.shows:
        return Made(table, row, seed), ""
    run, policy = made_by(tables, found.shows[0], seed)
    return run, found.shows[1] or policy


def arguments(tables: dict[str, Table], run: Made) -> list[str]:
    table = tables[run.table]
    if run.is_start:
        return ["methods.warm_start", *(word for word in table.words if "{warm_start}" not in word),
                *table.set["warm_start"].split()]
    words = [*table.words, *table.rows[run.row].words]
    return [budget(tables, run, word) if "method" in map(key_of, words) else word for word in words]


def key_of(word: str) -> str:
    return word.partition("=")[0]


def budget(tables: dict[str, Table], run: Made, word: str) -> str:
    """Of trees={row} a baseline takes the number of their steps alone: where that run is recorded, but its folder is not
    here, they need not be grown again. As env_steps= then. A run that was begun goes on with what it was begun with."""
    row, begun = re.fullmatch(r"trees=\{([^{}]+)\}", word), ROOT / run.folder
    if not row:
        return word
    grown = made_by(tables, full(run.table, row[1]), run.seed)[0]
    if kept_config(begun).trees if (begun / "config.yaml").exists() else grown.ended:
        return word
    record = read_records(grown.table).get(grown.key)
    return f"env_steps={record['took']['steps']}" if record else word


def read_records(table: str) -> dict[str, Any]:
    """What is kept of a table's runs (tools/records.py), by Made.key."""
    return read_json(ROOT / RECORDS / f"{table}.json", dict, {})


def needs(tables: dict[str, Table], run: Made) -> list[Made]:
    """The runs whose folders its arguments name, in their order."""
    names = re.findall(r"\{([^{}]+)\}", " ".join(arguments(tables, run)))
    return [made_by(tables, full(run.table, name), run.seed)[0] for name in names]


def command(tables: dict[str, Table], run: Made) -> list[str]:
    """Its script, config.yaml, its settings."""
    folders = iter([need.folder for need in needs(tables, run)])
    settings = [re.sub(r"\{[^{}]+\}", lambda _: next(folders), word) for word in arguments(tables, run)]
    script = next((word for word in settings if "=" not in word), "train.py")
    last = {key_of(word): word for word in settings if word != script}       # a row's goes over its table's
    words = [script] if script.endswith(".py") else ["-m", script]
    return [*words, "config.yaml", *last.values(), f"seed={run.seed}", f"out={run.folder}"]


# --------------------------------------------------------------------------------------------------- runs are made
def missing(tables: dict[str, Table], asked: list[Made], recorded: Container[Made]) -> list[Made]:
    """The runs that are to be made or recorded. What one builds on comes before it, recorded or not, if its folder is
    not here."""
    found: list[Made] = []

    def visit(run: Made) -> None:
        for need in needs(tables, run) if not run.ended else []:
            if not need.ended:
                visit(need)
        if run not in found:
            found.append(run)
    for run in asked:
        if run not in recorded:
            visit(run)
    return found


def execute(words: list[str], folder: Path) -> None:
    """A script in a process of its own. Its minutes, those of all its cores together, and 1 for this start are added to
    minutes.json."""
    def goes_with_us() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)            # PR_SET_PDEATHSIG: a run survives a kill
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen([sys.executable, *words], cwd=ROOT, preexec_fn=goes_with_us)
    try:
        if child.wait() == 130:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)                             # it has had the Ctrl-C, too
        child.kill()
        raise
    finally:
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = (time.time() - began) / 60, (now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime) / 60, 1
        if folder.is_dir():
            known = read_json(folder / "minutes.json", list[float], [0.0, 0.0, 0])
            write_aside(folder / "minutes.json", json.dumps([round(a + b, 2) for a, b in zip(known, took)]))
