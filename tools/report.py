"""What a run gave: the figures of Stage 1, its table, what Stage 2 learned, made from its files without a model. Its page
is drawn by tools/page.py.
"""
import json
from collections import Counter
from contextlib import contextmanager
from errno import EACCES, EPERM, EROFS
from html import escape
from math import isnan
from pathlib import Path
from typing import Any, Callable, Iterator

from config import Config, UserError, kept_config, read_yaml, visible        # before torch: Ctrl-C

import torch

import ranks
from eval import STARTS, Samples, spread
from envs import Env, ask, where
from leafe import TURN, Targets, Tree
from packing import pack, rows_of, token_logp
from run import Run, pick_tasks, read_jsonl, write_aside
from tools.provenance import once, seconds

# --------------------------------------------------------------------------------------- what Stage 1 cost and gave

STAGE_1 = ("stage 1: {solved} of {tasks} tasks solved ({solved_first} by the first rollout), {attempts} attempts, "
           "{env_steps} environment steps + {replayed} replayed, {sampled} sampled tokens; dropped: {mismatch} replays "
           "that differed, {context} out of context; |D_cf| = {D_cf}, |D_reh| = {D_reh}")


def stage_1(trees: list[Tree], pairs: Targets, env: Env) -> tuple[dict[str, int], str]:
    """What exploration cost and gave, and how good the reflections were: as figures, and in words."""
    figures, reflections = stage1_figures(trees, pairs), reflection_figures(trees, env)
    words = STAGE_1.format(**figures)
    words += f", |D_ref| = {len(pairs.D_ref)}" * bool(pairs.D_ref)
    if figures["clipped"]:
        words += f"; {figures['clipped']} observations shown in part (observation_tokens)"
    record = {f"stage_1/{key}": count for key, count in figures.items()}
    record |= {f"reflections/{key}": count for key, count in reflections.items()}
    return record, f"{words}\n{reflections_in_words(reflections)}"


def stage1_figures(trees: list[Tree], pairs: Targets) -> dict[str, int]:
    """What exploration cost and gave."""
    branches = [b for tree in trees for b in tree.branches]
    ends = Counter(b.end for b in branches)
    return dict(tasks=len(trees), solved=sum(any(b.success for b in tree.branches) for tree in trees),
                solved_first=sum(tree.branches[0].success for tree in trees), attempts=len(branches),
                env_steps=sum(b.steps for b in branches), replayed=sum(b.replayed for b in branches),
                sampled=sum(b.tokens for b in branches), mismatch=ends["mismatch"], context=ends["context"],
                clipped=sum(b.clipped for b in branches), D_cf=len(pairs.D_cf), D_reh=len(pairs.D_reh),
                **(dict(D_ref=len(pairs.D_ref)) if pairs.D_ref else {}))


def reflection_figures(trees: list[Tree], env: Env) -> dict[str, int]:
    """How good the policy's reflections are, which bounds what Stage 1 can give; where the world can judge them
    (env.judge), of the failures whose transcript says what was missing."""
    judges = hasattr(env, "judge")
    found = Counter(asked=0, told=0, named=0, works=0)
    for tree in trees:
        for branch in tree.branches:
            for reflection in branch.reflections:
                found["asked"] += 1
                found[f"flaw {reflection.flaw}"] += bool(reflection.flaw)
                if judges and reflection.final:
                    actions = [tree.turns[i].action for i in tree.branch_path(branch.number)]
                    verdict = ask(env, "judge", tree.task, actions, reflection.tau, reflection.e)
                    found.update(marks(env, verdict))
    return {key: count for key, count in sorted(found.items()) if count or not key.startswith("flaw")}


def marks(env: Env, verdict: Any) -> dict[str, int]:
    """A verdict of env.judge, counted; its shape was seen before anything was sampled (tools/examine.py), for one."""
    try:
        return dict(zip(("told", "named", "works"), map(int, verdict), strict=True))
    except (TypeError, ValueError):
        raise UserError(f"{where(env)}: judge must return three of True or False, not {' '.join(repr(verdict).split())[:60]}") from None


def reflections_in_words(figures: dict[str, int]) -> str:
    flaws = {key.removeprefix("flaw "): count for key, count in figures.items() if key.startswith("flaw")}
    line = f"reflections: {figures['asked']}, not understood: {sum(flaws.values())}"
    line += f" ({', '.join(visible(f'{flaw} {count}', '') for flaw, count in flaws.items())})" if flaws else ""
    if told := figures["told"]:
        line += (f"; of {told} failures that were told what was missing, {figures['named'] / told:.1%} name the right "
                 f"thing, {figures['works'] / told:.1%} also a turn from which the fix works")
    return line


def nothing_found(trees: list[Tree], cfg: Config, stop: set[int]) -> str:
    """Why exploration gave nothing to train on, and what to change."""
    ends = [branch.end for tree in trees for branch in tree.branches]
    turns = [turn for tree in trees for turn in tree.turns]
    cut = sum(turn.action_ids[-1] not in stop for turn in turns)
    if 2 * ends.count("context") > len(ends):
        why = (f"context: {ends.count('context')} of {len(ends)} attempts ended for want of room; raise "
               f"context={cfg.context}")
    elif 2 * cut > len(turns):
        why = f"action_tokens: {cut} of {len(turns)} actions were cut off; raise action_tokens={cfg.action_tokens}"
    else:
        why = "see trees.jsonl, and try more attempts=, train_tasks=, or a stronger model="
    found = "no correction, and beta=0 leaves the successes out" if not cfg.beta else "no correction and no success"
    return f"exploration found nothing to train on: {found}; {why}"


def spent(folder: Path) -> dict[str, float]:
    """What training took so far: environment steps (replayed ones included), sampled tokens, trained tokens, seconds;
    from the run's files. Of out/<run>/warm_start, its trained tokens, and its seconds where the run is nothing else
    (else they are not kept apart)."""
    def records(of: Path, name: str) -> list[dict]:
        return list(read_jsonl(of / name)) if (of / name).exists() else []
    run = folder.parent if folder.name == "warm_start" else folder
    trained = {r.get("round"): r["tokens"] for r in records(run, "metrics.jsonl") if "tokens" in r}  # of the last step
    if folder.name == "warm_start":
        alone = not (run / "trees.jsonl").exists()
        return dict(steps=0, sampled=0, trained=trained.get(0, 0), seconds=seconds(run) if alone else 0.0)
    lived = records(folder, "trees.jsonl") + records(folder, "alternatives.jsonl")
    return dict(steps=sum(r["steps"] + r["replayed"] for r in lived), sampled=sum(r["tokens"] for r in lived),
                trained=sum(trained.values()), seconds=seconds(folder))


# ------------------------------------------------------------------------------------------------------ its table

def cell(figure: tuple[float, float, float], sign: str = "") -> str:
    """Of a table in print; a recovery where no action was refused is none."""
    return "-" if isnan(figure[0]) else "{:{s}6.1f} [{:{s}5.1f}, {:{s}5.1f}]".format(*(100 * v for v in figure), s=sign)


def many(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def over_seeds(policies: list[Samples], ks: list[int], figure: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A figure's mean over the policies of several seeds, as a function of task indices (R, tasks)."""
    known = [policy.estimates(ks)[figure] for policy in policies]
    return lambda index: torch.stack([estimate(index) for estimate in known]).mean(0)


def percent(figure: tuple[float, float, float], sign: str = "") -> str:
    """The same of a page."""
    return "-" if isnan(figure[0]) else "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(100 * v for v in figure), s=sign)


def report(folder: Path, cfg: Config, tasks: list[str], ended: bool = True) -> str:
    """The printed table of a run, from its samples.jsonl alone, and passk.json, which says that it has ended."""
    found = read_policies(folder, tasks)

    def passk() -> str:
        return json.dumps({p.label: {name: dict(zip(("estimate", "low", "high"), f))
                                     for name, f in p.figures(cfg.ks, cfg.resamples).items() if not isnan(f[0])}
                           for p in found}, indent=1)
    text = part("there is no passk.json", passk) if ended and ranks.rank() == 0 else ""
    try:
        if text:
            write_aside(folder / "passk.json", text + "\n")
    except OSError as error:
        if error.errno not in (EACCES, EPERM, EROFS):  # those: another's run, which may be read alone
            raise
        once(f"note: there is no passk.json: {error}")
    return "\n".join([part("there is no table", lambda: table(found, cfg.ks, cfg.resamples)), *lacking(found, cfg, tasks)])


def lacking(policies: list[Samples], cfg: Config, tasks: list[str]) -> list[str]:
    """Of a run that has not ended: how much is there of each policy. The episodes that end first are short ones."""
    counts = [(policy.label, sum(map(len, policy.by_task.values()))) for policy in policies]
    return [f"not ended: {visible(label, '')} has {count} of {len(tasks) * cfg.samples} samples, of episodes that were soon over"
            for label, count in counts if count < len(tasks) * cfg.samples]


def page(folder: Path) -> str:
    """The door of tools/page.py: report.html, which is drawn of what stands here."""
    from tools import page as drawn
    return drawn.page(folder)


def part(lacks: str, make: Callable[[], str], instead: str = "") -> str:
    """A part of the report. One that fails is told in a line, and the others are written all the same."""
    try:
        return make()
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        once(f"note: {lacks}: {' '.join(what.split())}")
        return instead.format(escape(" ".join(what.split())))


def parted(name: str) -> tuple[Path, str]:
    """(folder, policy or "") of `out/run` and `out/run:base`; a folder's own name may hold a colon."""
    folder, _, policy = name.rpartition(":")
    return (Path(folder), policy) if folder and not (Path(name) / "config.yaml").exists() else (Path(name), "")


def read_samples(name: str, policy: str | None = None, tasks: list[str] | None = None) -> Samples:
    """`out/run` (its trained policy if it has one) or `out/run:base`, on `tasks`; None: those of its config.yaml."""
    folder, wanted = parted(name)
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: there is no samples.jsonl; run train.py or eval.py with out={folder} first")
    records = list(read_jsonl(path))
    cfg = kept_config(folder)
    tasks = tasks or pick_tasks(cfg, "test")
    there = {record["policy"]: None for record in records}                     # in order, each once
    trained = [name for name in there if name not in STARTS] or [*there, "any"]
    own = Path(cfg.method).stem                        # of a method of one's own, its file's name
    wanted = wanted or policy or (own if own in there else trained[0])
    chosen = [r for r in records if r["policy"] == wanted and r["task"] in set(tasks)]
    return Samples(chosen, f"{folder}:{wanted}" if policy is None else wanted)


def policy_name(cfg: Config) -> str:
    """What eval.py's samples are called: the method of the run that the adapter or the playbook came from."""
    made = Path(cfg.playbook or cfg.adapter).parent / "config.yaml"
    if Path(cfg.adapter).name == "warm_start" and not cfg.playbook:
        return "warm_start"
    if not (cfg.adapter or cfg.playbook):
        return "base"
    return Path(str(read_yaml(made).get("method", "trained"))).stem if made.is_file() else "trained"


def read_policies(folder: Path, tasks: list[str]) -> list[Samples]:
    """All policies that a run's samples.jsonl holds: where it started from, after each round, in the end."""
    there = {r["policy"] for r in read_jsonl(folder / "samples.jsonl") if r["task"] in set(tasks)}
    if not there:
        raise UserError(f"{folder}: samples.jsonl has no sample of these tasks")

    def place(name: str) -> tuple:
        round_ = name.rpartition("-")[2]               # leafe-1, leafe-2, ..., and in the end leafe
        return name not in STARTS, not round_.isdigit(), int(round_) if round_.isdigit() else name
    return [read_samples(str(folder), policy, tasks) for policy in sorted(there, key=place)]


def by_difficulty(samples: Samples) -> dict[str, tuple[int, float, float]]:
    """Group -> (tasks, success rate of one rollout, share of tasks solved at least once)."""
    groups: dict[str, list[tuple[float, bool]]] = {}
    for rs in samples.by_task.values():
        wins = [r["success"] for r in rs]
        groups.setdefault(rs[0]["difficulty"], []).append((sum(wins) / len(wins), any(wins)))
    return {name: (len(g), sum(p for p, _ in g) / len(g), sum(a for _, a in g) / len(g))
            for name, g in sorted(groups.items())}


def policy_figures(samples: Samples, ks: list[int]) -> dict[str, float]:
    """What the table says of a policy, for metrics.jsonl: no intervals; no recovery where no refusal was met."""
    found = {name: estimate for name, (estimate, *_) in samples.figures(ks, 1).items() if not isnan(estimate)}
    found |= {f"mean {key}": value for key, value in means(samples).items()}
    for group, (_, one, ever) in by_difficulty(samples).items():
        found |= {f"{group}/Pass@1": one, f"{group}/solved": ever}
    return {name: round(value, 6) for name, value in found.items()}


def means(samples: Samples) -> dict[str, float]:
    """Of an episode: turns, sampled tokens, refused actions."""
    records = [record for found in samples.by_task.values() for record in found]
    return {key: sum(record[key] for record in records) / len(records) for key in ("turns", "tokens", "refused")}


def compare(a: Samples, b: Samples, ks: list[int], resamples: int) -> dict[str, tuple[float, float, float]]:
    """b minus a: estimate and paired 95 % interval of each figure. UserError if their tasks differ."""
    if list(a.by_task) != list(b.by_task):
        raise UserError(f"{a.label} and {b.label} were not sampled on the same tasks "
                        f"({len(a.by_task)} and {len(b.by_task)}); run both with the same split= and test_tasks=, "
                        f"to the end")
    fa, fb = a.estimates(ks), b.estimates(ks)
    return {name: spread(lambda index, name=name: fb[name](index) - fa[name](index), len(a.by_task), resamples)
            for name in fa if name in fb}


def rates(policies: list[Samples], ks: list[int], resamples: int) -> list[str]:
    """Success in %, with 95 % intervals over tasks; with two policies, their paired difference."""
    columns = [p.figures(ks, resamples) for p in policies]
    heads, signs = [visible(p.label, "") for p in policies], [""] * len(policies)
    if len(policies) == 2:
        columns.append(compare(policies[0], policies[1], ks, resamples))
        heads, signs = [*heads, "difference"], [*signs, "+"]
    wide = max(24, *(len(head) + 2 for head in heads))
    lines = [f"{'%':10}" + "".join(f"{head:>{wide}}" for head in heads)]
    for name in columns[0]:
        if all(name in column for column in columns):
            lines.append(f"{name:10}" + "".join(f"{cell(column[name], sign):>{wide}}"
                                                for column, sign in zip(columns, signs)))
    return lines


def table(policies: list[Samples], ks: list[int], resamples: int) -> str:
    """Their rates, and what an episode of each is like."""
    lines = rates(policies, ks, resamples)
    for policy in policies:
        mean = means(policy)
        lines.append(f"{visible(policy.label, '')}: {len(policy.by_task)} tasks x {policy.n} samples; an episode takes "
                     f"{mean['turns']:.1f} turns, {mean['tokens']:.0f} sampled tokens, meets {mean['refused']:.1f} "
                     f"refusals")
        lines += [f"  {visible(name, '')}: {tasks} tasks, Pass@1 {100 * one:.1f}, solved at least once {100 * any_:.1f}"
                  for name, (tasks, one, any_) in by_difficulty(policy).items()]
    lines.append("recovery: success among episodes that met at least one refused action")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- what Stage 2 learned

@contextmanager
def distilled(run: Run, round_: int, trees: list[Tree], pairs: Targets) -> Iterator[None]:
    """Around Stage 2: sft.jsonl, its targets as text, and distilled.json, what it did to each pair of D_cf."""
    if ranks.rank():
        yield
        return
    folder, model, row_tokens = run.folder.path, run.policy.model, run.cfg.row_tokens
    write_aside(folder / "sft.jsonl", "".join(chat_pairs(run, trees, pairs)))
    early = without_e(model, trees, pairs.D_cf, row_tokens)
    yield
    late = without_e(model, trees, pairs.D_cf, row_tokens)
    found = [(trees[k].task, i, before, after) for (k, i), before, after in zip(pairs.D_cf, early, late)]
    write_aside(folder / "distilled.json", json.dumps(dict(round=round_, pairs=found)))


def chat_pairs(run: Run, trees: list[Tree], pairs: Targets) -> Iterator[str]:
    """The targets as text, a line each, for other trainers (TRL: a conversational prompt and completion)."""
    chat, rules = run.policy.chat, run.world().rules
    for part in ("D_cf", "D_reh", "D_ref"):
        for k, i in getattr(pairs, part):
            messages = [dict(role="system", content=rules)] if chat.system_role else []
            path = trees[k].path(i)
            for t, turn in enumerate(path, 1):
                asked = part == "D_ref" and turn is path[-1]           # to look back: that stays whole
                text = TURN.format(t=t, obs=turn.obs if asked else chat.glimpse(turn.obs, run.cfg.observation_tokens))
                messages.append(dict(role="user", content=text if messages else f"{rules}\n\n{text}"))
                messages.append(dict(role="assistant", content=chat.text(turn.action_ids)))
            yield json.dumps(dict(prompt=messages[:-1], completion=messages[-1:], part=part, task=trees[k].task)) + "\n"


def without_e(model, trees: list[Tree], pairs: list[tuple[int, int]], row_tokens: int) -> list[float]:
    """log pi'(a'_t | h_t, q) of each pair of D_cf, the experience out of view: what L_cf raises."""
    numbers: list[dict[int, tuple]] = [{} for _ in trees]
    for n, (k, i) in enumerate(pairs):
        numbers[k][i] = (n + 1.0,)                     # in place of weights: whose token it is
    found = torch.zeros(len(pairs), dtype=torch.float64)
    with torch.no_grad():
        for group in rows_of(trees, numbers, row_tokens):
            row = pack(group)
            found.index_add_(0, row.weights[:, 0].long() - 1, token_logp(model, [row]).double().cpu())
    return found.tolist()
