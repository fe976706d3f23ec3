"""The tables of docs/results.md and README.md, and the pictures, made from the records of runs; the runs that they lack.

    python -m tools.results                          pages and pictures anew, from docs/results/*.json alone
    python -m tools.results quest                    run what is missing of a table of docs/experiments.yaml, keep its records
    python -m tools.results quest rft seeds=[0]      of one row and seed, and what these build on
    python -m tools.results quest plan=true          only say what would be run
    python -m tools.results quest from=out/compare   records of runs made before, in folders that are named ROW-SEED

A run is a folder, out/results/TABLE/ROW-SEED/; after Ctrl-C or a kill the same command goes on where it was. Of a run that
has ended the record is kept: what made it, the counts of each policy by task, what Stage 1 gave, what training took. A
record stays as it is, whatever the code is by now: to have a run made anew, delete its line and its folder. A table stands
between <!-- TABLE begin --> and <!-- TABLE end -->, and is replaced whole.
"""
import re
import shlex
import sys
from pathlib import Path
from textwrap import fill
from typing import Any, Callable

from config import Config, ROOT, UserError, fits, guarded, nearest, short, shipped, visible, words    # before torch: Ctrl-C

import torch

from eval import STARTS, Samples, spread
from run import write_aside
from tools.compare import curves
from tools.experiments import (EXPERIMENTS, RECORDS, Made, Table, command, execute, has_ended, made_by, missing, needs,
                               one_of, read_records, read_tables)
from tools.records import Counted, alone, check_same, keep
from tools.report import many, over_seeds, percent, rates

PAGES = ("README.md", "docs/results.md")
COUNTS = {                                             # column -> what it shows of a row: means over its seeds
    "trees solved": "{solved:.3g} of {tasks:.0f}", "by the first rollout": "{solved_first:.3g}",
    "env steps + replayed": "{env_steps:.0f} + {replayed:.0f}",
    "D_cf": "{D_cf:.0f}", "D_reh": "{D_reh:.0f}", "D_ref": "{D_ref:.0f}",
    "reflections right": "{named_share:.1%}", "and from a turn that serves": "{works_share:.1%}",
    "steps": "{took_steps:.0f}", "sampled tokens": "{took_sampled:.0f}", "trained tokens": "{took_trained:.0f}",
    "minutes": "{took_minutes:.1f}"}
OTHERS = ("arguments", "new", "lost")                  # columns of other kinds
FIGURE = re.compile(r"(?P<figure>Pass@(?P<k>\d+)|tasks solved|recovery)(?: of (?P<of>.+?))?(?: minus (?P<minus>\S+))?"
                    "(?P<each> by seed)?")
NOTES = {
    "recovery": "Recovery: success among episodes that met a refused action.",
    "new": "New, lost: tasks solved in any sample that the first row never solves, and the other way round.",
    "steps": "Steps: environment steps of training, replayed ones included.",
    "minutes": "Minutes: of training, without those of another run's trees.",
    "reflections right": "Reflections right: of the failures that were told what was missing, those that name it."}


# --------------------------------------------------------------------------------------------------- runs are made
def make(tables: dict[str, Table], runs: list[Made]) -> None:
    """One after the other; what fails is told in the end, and so is what builds on it."""
    failed: list[Made] = []
    for n, run in enumerate(runs, 1):
        lacking = [need.folder for need in needs(tables, run) if not need.ended and not run.ended]
        does = "it has ended" if run.ended else shlex.join(["python", *command(tables, run)])
        does = f"it builds on {lacking[0]}, which has not ended" if lacking else does
        print(visible(f"\n{run.folder}, {n} of {len(runs)}: {does}"), flush=True)
        if not run.ended and not lacking:
            execute(command(tables, run), ROOT / run.folder)
        if run.ended:
            keep(tables, run)
            rebuild(tables)
        else:
            failed.append(run)
    if failed:
        others = f", nor have {len(failed) - 1} others" * (len(failed) > 1)
        raise UserError(f"{failed[0].folder} has not ended (see above){others}; the same command goes on with what is missing")


def link(tables: dict[str, Table], table: Table, source: Path, rows: list[str], seeds: list[int]) -> list[Made]:
    """The ended runs of another folder, ROW-SEED/ each, as if they had been made here: by links."""
    found, names = [], [row.name for row in table.rows.values() if not row.shows and row.name in (rows or table.rows)]
    for name in names:
        for seed in seeds:
            run = Made(table.name, name, seed)
            theirs, own = source / run.key, ROOT / run.folder
            if not has_ended(theirs):
                print(visible(f"{theirs} {'has not ended' if theirs.is_dir() else 'is not there'}"))
                continue
            if not own.exists():
                check_same(tables, run, theirs)
                own.parent.mkdir(parents=True, exist_ok=True)
                own.symlink_to(theirs.resolve())
            found.append(run)
    if not found:
        raise UserError(f"from: {source} holds no ended run of {table.name}, in a folder like {[*names, 'ROW'][0]}-0")
    return found


# ----------------------------------------------------------------------------------------------- the tables are made
Found = dict[int, tuple[dict[str, Any], str]]          # seed -> a run's record, and the policy of it that is shown

Runs = dict[tuple[str, str], dict[str, Any]]           # (table, ROW-SEED) -> its record


class Book:
    """The experiments with what is known of them."""
    def __init__(self, tables: dict[str, Table]):
        self.tables, self.records = tables, {name: read_records(name) for name in tables}

    def found(self, table: Table, row: str, seeds: list[int]) -> Found:
        found = {}
        for seed in seeds:
            run, policy = made_by(self.tables, f"{table.name}/{row}", seed)
            record = self.records[run.table].get(run.key)
            if record:
                policy = policy or list(record["counts"])[-1]
                one_of(record["counts"], policy, "policy", run.folder)
                found[seed] = record, policy
        return found

    def whole(self, table: Table) -> bool:
        return all(len(self.found(table, row, table.set["seeds"])) == len(table.set["seeds"]) for row in table.rows)


def success(own: Found, asked: re.Match, other: Found | None) -> str:
    """A figure of a policy in %, or what it has more than the other, paired by task and seed; by seed without intervals."""
    seeds = [seed for seed in own if other is None or seed in other]
    ks, name = [int(asked["k"] or 1)], asked["figure"].replace("tasks solved", "Pass@1")    # of one try
    mine: list[Samples] = [Counted(*own[seed], asked["of"] or "") for seed in seeds]
    theirs: list[Samples] = [Counted(*other[seed], asked["of"] or "") for seed in seeds] if other else []
    if not seeds or ks[0] > min(policy.n for policy in mine + theirs):
        return ""
    if len({tuple(policy.by_task) for policy in mine + theirs}) > 1:
        raise UserError(f"{asked[0]}: these were not sampled on the same tasks: "
                        f"{', '.join(record['command'] for record, _ in own.values())}")
    sign, tasks = "+" if theirs else "", len(mine[0].by_task)
    if asked["each"]:
        each = [gap(mine[i:i + 1], theirs[i:i + 1], ks, name)(torch.arange(tasks)[None]) for i in range(len(seeds))]
        return ", ".join(f"{100 * found.item():{sign}.1f}" for found in each)
    return percent(spread(gap(mine, theirs, ks, name), tasks, shipped()["resamples"]), sign)


def gap(mine: list[Samples], theirs: list[Samples], ks: list[int], name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """As over_seeds; what mine has more than theirs, if there is a theirs."""
    high, low = over_seeds(mine, ks, name), over_seeds(theirs, ks, name) if theirs else None
    return lambda index: high(index) - low(index) if low else high(index)


def only(own: Found, other: Found) -> str:
    """How many tasks the one policy solves in any sample and the other never does."""
    pairs = [[Counted(*found[seed]) for found in (own, other)] for seed in own if seed in other]
    each = [int(((a.passes(a.n) > 0) & (b.passes(b.n) == 0)).sum()) for a, b in pairs]
    return f"{sum(each) / len(each):.1f}" if each else ""


def flat(record: dict[str, Any], policy: str) -> dict[str, float]:
    """What Stage 1 gave and what training took, of a policy that comes out of it."""
    if policy in STARTS:
        return {}
    ending, round_ = policy in (list(record["counts"])[-1], *record["took"]), policy.rpartition("-")[2]
    found = dict(record["stage1"].get(str(record["rounds"]) if ending else round_, {}))
    if found.get("told"):
        found |= {f"{name}_share": found[name] / found["told"] for name in ("named", "works")}
    took = record["took"].get(policy, record["took"])
    if ending and any(took.values()):                  # else it only sampled
        found |= {f"took_{key}": value for key, value in took.items()}
    if "took_seconds" in found:
        found["took_minutes"] = found["took_seconds"] / 60
    return found


def counted(form: str, own: Found) -> str:
    each = [flat(*found) for found in own.values()]
    mean = {key: sum(found[key] for found in each) / len(each) for key in each[0] if all(key in found for found in each)}
    try:
        return form.format_map(mean)
    except KeyError:                                   # its method has no such thing
        return ""


def cell(book: Book, table: Table, row: str, column: str, own: Found) -> str:
    asked, seeds = FIGURE.fullmatch(column), list(own)
    if column == "arguments":
        return f"`{' '.join(table.rows[row].words)}`" if table.rows[row].words else ""
    if column in COUNTS:
        return counted(COUNTS[column], own) if own else ""
    first = next(iter(table.rows))
    if column in ("new", "lost"):
        pair = [own, book.found(table, first, seeds)]
        return only(*(pair if column == "new" else pair[::-1])) if row != first else ""
    if not asked:
        raise UserError(f"{EXPERIMENTS}: {table.name}: there is no column {short(column)}"
                        f"{nearest(column, [*COUNTS, *OTHERS, 'Pass@1', 'recovery'])}")
    if asked["minus"] == row:
        return ""
    return success(own, asked, book.found(table, asked["minus"], seeds) if asked["minus"] else None)


def part(book: Book, table: Table, columns: list[str]) -> str:
    """Some of its columns, a line a row; with each_seed, a line a seed behind it."""
    seeds = table.set["seeds"]
    head = ["%" if all(FIGURE.fullmatch(column) for column in columns) else "", *columns]
    lines = [head]
    for name, row in table.rows.items():
        own = book.found(table, name, seeds)
        says = row.says + f" ({len(own)} of {len(seeds)} seeds)" * (len(own) < len(seeds))
        lines.append([says, *(cell(book, table, name, column, own) for column in columns)])
        for seed in own if table.set.get("each_seed") and len(own) > 1 else []:
            lines.append([f"seed {seed}", *(cell(book, table, name, column, {seed: own[seed]}) for column in columns)])
    first, *others = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([first, "|---" * len(head) + "|", *others])


def render(book: Book, table: Table) -> str:
    """A table as it stands on its page."""
    shown = {name: book.found(table, name, table.set["seeds"]) for name in table.rows}
    runs = {(run.table, run.key): book.records[run.table][run.key] for name, found in shown.items() for seed in found
            for run, _ in [made_by(book.tables, f"{table.name}/{name}", seed)]}
    if not runs:
        return f"Not run yet: `python -m tools.results {table.name}`."
    if table.set.get("as_printed"):
        policies: list[Samples] = [Counted(*found) for own in shown.values() for found in own.values()]
        ks = next(iter(runs.values()))["ks"]
        body = "\n".join("    " + line for line in rates(policies, ks, shipped()["resamples"]))
    else:
        body = "\n\n".join(part(book, table, columns) for columns in table.set["columns"])
    says = [table.set["shows"]] if "shows" in table.set else []
    return "\n\n".join([*says, body, footer(table, runs, list(shown.values()))])


def footer(table: Table, runs: Runs, shown: list[Found]) -> str:
    """Of what it is made, and by what: the command, commits, machines, minutes. `shown`: row by row."""
    record, policy = next(iter(next(filter(None, shown)).values()))
    columns = [column for columns in table.set.get("columns", []) for column in columns]
    if table.set.get("whole"):                         # its page says the rest around it
        seed = f"seed {table.set['seeds'][0]}, " * (len(table.set["seeds"]) == 1)
        return f"({seed}{commits(runs)}; {machines(runs, '')}; {took(runs)})"
    made = f"{commits(runs)}; {machines(runs)}; {took(runs)}."
    notes = "".join(f" {text}" for name, text in NOTES.items() if name in columns)
    makers = ", ".join(f"`python -m tools.results {name}`" for name in dict.fromkeys(name for name, _ in runs))
    made_of = {key.rpartition("-")[2] for _, key in runs}             # seeds
    fewer = any(len(found) < len(made_of) for found in shown)
    seeds = f", means over {len(made_of)} seeds{' unless a row says fewer' * fewer}" * (len(made_of) > 1)
    each = f", {Counted(record, policy).n} samples each" * (record["ks"] != [1])
    return fill(f"{len(record['tasks'])} tasks{each}{seeds}; success in %, 95 % intervals over "
                f"tasks.{notes} {makers}: {made}", 128, break_long_words=False, break_on_hyphens=False)


def commits(runs: Runs) -> str:
    found = {f"commit {run['commit'][:7]}" + " (with changes)" * bool(run["changed"]) if run["commit"] else "no commit"
             for run in runs.values()}
    return ", ".join(sorted(found))


def machines(runs: Runs, version: str = ", torch {torch}") -> str:
    found = {f"{run['gpu'] or run['processor']}, {many(run['cores'], 'core')}{version.format_map(run)}" for run in runs.values()}
    return "; ".join(sorted(found))


def took(runs: Runs) -> str:
    """Minutes of the clock, and of one core's, where they are known."""
    known = [run["minutes"] for run in runs.values() if run["minutes"]]
    if not known:
        return "minutes not known"
    clock = f"{sum(minutes[0] for minutes in known):.1f} minutes"
    core = f" ({sum(minutes[1] for minutes in known):.1f} of one core's)" if all(len(one) > 1 for one in known) else ""
    return clock + core + f", of {len(known)} of {len(runs)} runs" * (len(known) < len(runs))


# ------------------------------------------------------------------------------------------------ pages and pictures
def rebuild(tables: dict[str, Table]) -> list[str]:
    """The pages and pictures as the records have them by now; which of them have changed."""
    with alone():
        made = pages(Book(tables))
        changed = [name for name, text in made.items()
                   if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text]
        for name in changed:
            write_aside(ROOT / name, made[name])
    return changed


def pages(book: Book) -> dict[str, str]:
    """Every table at its place, and the pictures: file -> its text."""
    made, placed = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}, set()
    for page in PAGES:
        for name in re.findall(r"<!-- (\S+) begin -->", made[page]):
            table = one_of(book.tables, name, "table", f"{page}, by its marks")
            placed.add(name)
            if not table.set.get("whole") or book.whole(table):
                made[page] = put(page, made[page], name, render(book, table))
    if lost := [name for name in book.tables if name not in placed]:
        raise UserError(f"{EXPERIMENTS}: {lost[0]} has no place: put <!-- {lost[0]} begin --> and <!-- {lost[0]} end --> "
                        f"into {PAGES[-1]}")
    for table in book.tables.values():
        if "picture" in table.set and book.whole(table):
            made[table.set["picture"]] = picture(book, table)
    return made


def put(page: str, text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    text, count = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{table}\n{end}", text, flags=re.S)
    if count != 1:
        raise UserError(f"{page}: {begin} is to stand there once, with {end} behind it")
    return text


def picture(book: Book, table: Table) -> str:
    """Pass@k of its rows."""
    policies: dict[str, list[Samples]] = {}
    for name, row in table.rows.items():
        policies[row.says] = [Counted(*found) for found in book.found(table, name, table.set["seeds"]).values()]
    record = next(iter(book.records[table.name].values()))
    return curves(policies, Config(ks=record["ks"], resamples=shipped()["resamples"]))


def main(args: list[str]) -> None:
    tables = read_tables()
    changed = rebuild(tables)                          # first of all: is every table at its place?
    if not args:
        print(visible(f"results: {', '.join(changed) or 'the pages are as their records have them'}"))
        return
    table, options = one_of(tables, args[0], "table"), dict(arg.split("=", 1) for arg in args[1:] if "=" in arg)
    for key in options:
        if key not in ("seeds", "plan", "from"):
            raise UserError(f"the command line: there is no {short(key)}{nearest(key, ['seeds', 'plan', 'from'])}")
    rows = [arg for arg in args[1:] if "=" not in arg]
    for row in rows:
        one_of(table.rows, row, "row", f"{EXPERIMENTS}: {table.name}")
    seeds = words(options.get("seeds", str(table.set["seeds"])), "seeds")
    if not fits(seeds, list[int]) or not set(seeds) <= set(table.set["seeds"]):
        raise UserError(f"seeds: {short(seeds)} is no list of some of {table.name}'s, {table.set['seeds']}")
    plan = words(options.get("plan", "false"), "plan")
    if not isinstance(plan, bool):
        raise UserError(f"plan: {short(plan)} is neither true nor false")
    if "from" in options:
        runs = link(tables, table, Path(options["from"]), rows, seeds)
    else:
        asked = dict.fromkeys(made_by(tables, f"{table.name}/{row}", seed)[0] for seed in seeds for row in rows or table.rows)
        recorded = {run for run in asked if run.key in read_records(run.table)}
        runs = missing(tables, list(asked), recorded)
    if plan:
        print(visible("\n".join(shlex.join(["python", *command(tables, run)]) for run in runs) or "nothing is missing"))
        return
    make(tables, runs)
    print(visible(f"results: {RECORDS}/{table.name}.json, {', '.join(PAGES)}"))


if __name__ == "__main__":
    guarded(main, __doc__ if sys.argv[1:] else "")     # without arguments it has something to do
