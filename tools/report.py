"""Runs to look at, made from their files without a model.

    python report.py page out/quest               out/quest/report.html anew, as train.py writes it at the end (of a
                                                  comparison, too)
    python report.py passk passk.svg out/quest:base out/quest     Pass@k curves with 95 % bands
    python report.py passk passk.svg out/compare                  of all methods of a comparison, means over its seeds
    python report.py tree tree.svg out/quest [task]               a rollback tree
    python report.py reward reward.svg out/compare/grpo-*         GRPO: success of the training rollouts, wave by wave
"""
import json
import math
import re
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from envs import UserError
from eval import Samples, comparison, over_seeds, pick_tasks, read_policies, read_runs, read_samples, spread
from leafe import Tree, read_trees
from run import Config, guarded, load_config, read_jsonl, spent, write_aside

COLOURS = ("#8a8f98", "#1f6feb", "#d9730d", "#2da44e", "#a475f9", "#c2255c", "#0b7285", "#846358")
WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 700, 380, 52, 44, 150, 16
Rows = list[tuple[float, float, float]]             # estimate, low, high: one for each mark of the x axis


def chart(series: list[tuple[str, Rows]], marks: list[str], title: str, top: float = 1.0,
          percent: bool = True) -> str:
    """Lines with bands over evenly spaced marks, up to `top`; shares in percent. Labels are kept from overlapping."""
    def x(i: int) -> float:
        return LEFT + i * (WIDTH - LEFT - RIGHT) / max(1, len(marks) - 1)

    def y(share: float) -> float:
        return TOP + (1 - share / top) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'font-family="sans-serif" font-size="12">',
             f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for share in (top * i / 4 for i in range(5)):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
                     f'stroke="#e4e6ea" class="rule"/><text class="ink" x="{LEFT - 8}" y="{y(share) + 4:.1f}" '
                     f'text-anchor="end" fill="#444">{f"{100 * share:.3g} %" if percent else f"{share:.3g}"}</text>')
    for i in range(0, len(marks), 1 + len(marks) // 12):
        parts.append(f'<text class="ink" x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" '
                     f'fill="#444">{escape(marks[i])}</text>')
    parts.append(f'<text class="ink" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
                 f'fill="#444">{escape(title)}</text>')
    below = 0.0                                     # the y of the label above: they are set from the top down
    for (label, rows), colour in sorted(zip(series, cycle(COLOURS)), key=lambda line: -line[0][1][-1][0]):
        band = [f"{x(i):.1f},{y(high):.1f}" for i, (_, _, high) in enumerate(rows)]
        band += [f"{x(i):.1f},{y(low):.1f}" for i, (_, low, _) in reversed(list(enumerate(rows)))]
        line = " ".join(f"{x(i):.1f},{y(estimate):.1f}" for i, (estimate, _, _) in enumerate(rows))
        below = max(below + 13, y(rows[-1][0]) + 4)
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.12"/>'
                     f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
                     f'<text x="{x(len(rows) - 1) + 8:.1f}" y="{below:.1f}" fill="{colour}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def ended(folder: Path) -> tuple[dict[str, list[Samples]], Config]:
    """Every method of a comparison that has ended on all its seeds: name -> one policy a seed."""
    runs, cfg = read_runs(folder), load_config([str(next(folder.glob("leafe-*/config.yaml")))])
    return {name: [samples for samples, _ in found.values()] for name, found in runs.items()
            if set(found) == set(runs["base"])}, cfg


def passk(names: list[str]) -> str:
    """Of the policies named, or of all methods of a comparison."""
    if len(names) == 1 and list(Path(names[0]).glob("leafe-*")):
        policies, cfg = ended(Path(names[0]))
    else:
        cfg = load_config([str(Path(names[0].partition(":")[0]) / "config.yaml")])
        policies = {name: [read_samples(name)] for name in names}
        short = {own[0].label.rpartition(":")[2]: own for own in policies.values()}
        policies = short if len(short) == len(policies) else policies
    if len({tuple(own[0].by_task) for own in policies.values()}) > 1:
        raise UserError(f"{', '.join(names)}: not sampled on the same tasks")
    ks = [k for k in cfg.ks if k <= min(one.n for own in policies.values() for one in own)]
    series = [(label, [spread(over_seeds(own, [k], f"Pass@{k}"), len(own[0].by_task), cfg.resamples) for k in ks])
              for label, own in policies.items()]
    return chart(series, [str(k) for k in ks], "k, samples a task")


def reward(names: list[str]) -> str:
    """Share of successful rollouts in each wave of GRPO's training."""
    series = []
    for name in names:
        path = Path(name) / "metrics.jsonl"
        waves = {r["wave"]: r for r in read_jsonl(path) if "wave" in r} if path.exists() else {}   # twice if killed
        if not waves:
            raise UserError(f"{name}: no wave of GRPO in metrics.jsonl; a run of method=grpo has them")
        series.append((Path(name).name, [(r["success"],) * 3 for r in waves.values()]))
    longest = max(len(rows) for _, rows in series)
    top = max(share for _, rows in series for share, _, _ in rows)
    return chart(series, [str(i + 1) for i in range(longest)], "wave of rollouts", max(0.04, 1.1 * top))


def tree(names: list[str]) -> str:
    """One rollback tree of a run: the task named, or the smallest tree that more than one rollback won. An attempt a
    line, turn t in column t; a branch hangs on the turn that it replaces, its experience beside the arrow."""
    folder, cfg = Path(names[0]), load_config([str(Path(names[0]) / "config.yaml")])
    trees = read_trees(list(read_jsonl(folder / "trees.jsonl")), 1, pick_tasks(cfg, "train"))
    found = {tree.task: tree for tree in trees}
    won = [one for one in found.values() if any(b.success and b.name.count(".") > 1 for b in one.branches)]
    if names[1:] and names[1] not in found or not names[1:] and not won:
        raise UserError(f"{folder}: no tree of task {names[1]}" if names[1:] else
                        f"{folder}: no tree was won after two rollbacks; name a task")
    one = found[names[1]] if names[1:] else min(won, key=lambda one: len(one.branches))
    column, lane, left = 104, 64, 16
    width = left + column * max(branch.tau + len(branch.turns) - 1 for branch in one.branches) + 60
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {lane * len(one.branches) + 30}" '
             f'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']

    def say(x: float, y: float, text: str, colour: str, anchor: str = "start") -> None:
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>')
    for n, branch in enumerate(one.branches):
        x, y = left + column // 2 + column * (branch.tau - 1), 40 + lane * n
        holder = next(k for k in range(n, -1, -1) if branch.name.startswith(one.branches[k].name + ".")
                      and one.branches[k].tau <= branch.tau) if n else 0
        if n:
            parts.append(f'<path d="M{x} {67 + lane * holder} V{y - 11} m-4 -6 l4 6 l4 -6" fill="none" '
                         f'stroke="#8250df" stroke-width="1.5"/>')
            say(x + 8, y - 16, f"turn {branch.tau} again: “{branch.experience}”", "#8250df")
        parts.append(f'<path d="M{x} {y} h{column * max(0, len(branch.turns) - 1)}" stroke="#57606a"/>')
        for i, turn in enumerate(branch.turns):
            at, colour = x + column * i, "#1a7f37" if turn.success else "#57606a" if turn.valid else "#b35900"
            parts.append(f'<circle cx="{at}" cy="{y}" r="7" fill="{colour if turn.success else "white"}" '
                         f'stroke="{colour}" stroke-width="2"/>')
            say(at, y + 22, turn.action[:17] + "…" * (len(turn.action) > 17), colour, "middle")
            if not turn.valid:
                say(at, y + 4, "×", colour, "middle")
        say(x + column * max(0, len(branch.turns) - 1) + 14, y + 4, branch.end,
            "#1a7f37" if branch.success else "#b35900")
    return "\n".join([*parts, "</svg>"]) + "\n"


# ------------------------------------------------------------------------------------------- the page of a run

SHOWN = 40                                          # trees that a page holds whole
WORDS = 4000                                        # characters of one text that it shows


def page(folder: Path) -> str:
    """report.html of a run: one file that needs nothing else. Raises UserError where the run has no samples."""
    cfg = load_config([str(folder / "config.yaml")])
    policies = read_policies(folder, pick_tasks(cfg, "test"))
    parts = [("Pass@k", curves(policies, cfg)), ("Success by difficulty", difficulties(policies))]
    if (folder / "metrics.jsonl").exists():
        parts.append(("Training", training(folder)))
    trees, says = [], ""
    if (folder / "trees.jsonl").exists() and cfg.method == "leafe":
        records = list(read_jsonl(folder / "trees.jsonl"))
        round_ = max(record["round"] for record in records)
        trees, says = chosen(read_trees(records, round_, pick_tasks(cfg, "train")), folder, round_)
        parts.append(("Rollback trees", f'<p>{says}</p><div id="list"></div>'))
    parts.append(("Settings", "<details><summary>config.yaml</summary><pre>"
                  + escape((folder / "config.yaml").read_text(encoding="utf-8")) + "</pre></details>"))
    return framed(f"{cfg.method} on {cfg.env}, {cfg.model}: {folder}",
                  verdict({one.label: [one] for one in policies}, policies[-1].label, policies[0].label, cfg), parts,
                  trees)


def comparison_page(folder: Path) -> str:
    """report.html of a comparison: all methods' curves, the tables with what each took, and where their runs lie."""
    policies, cfg = ended(folder)
    tasks = torch.arange(len(policies["leafe"][0].by_task))
    best = max((name for name in policies if name != "leafe"),
               key=lambda name: over_seeds(policies[name], [1], "Pass@1")(tasks))
    runs = sorted(path.parent.name for path in folder.glob("*-*/report.html"))
    picture = f'<figure role="img" aria-label="Pass@k curves of all methods">{passk([str(folder)])}</figure>'
    links = "".join(f'<li><a href="{escape(quote(name))}/report.html">{escape(name)}</a></li>' for name in runs)
    parts = [("Pass@k", picture), ("The runs", f"<ul>{links}</ul>"),
             ("Figures, differences, budgets", f'<pre class="wide">{escape(comparison(folder))}</pre>')]
    return framed(f"methods on {cfg.env}, {cfg.model}: {folder}", verdict(policies, "leafe", best, cfg), parts, [])


def framed(title: str, verdict_: str, parts: list[tuple[str, str]], trees: list[dict]) -> str:
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    body = "\n".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in parts)
    data = json.dumps(trees, separators=(",", ":")).replace("<", "\\u003c")         # ends no script, opens no comment
    whole = dict(TITLE=escape(title), BODY=body, TREES=data, VERDICT=verdict_)
    return re.sub("@(TITLE|BODY|TREES|VERDICT)@", lambda mark: whole[mark[1]], html)


def percent(figure: tuple[float, float, float], sign: str = "") -> str:
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(100 * v for v in figure), s=sign)


def verdict(policies: dict[str, list[Samples]], last: str, other: str, cfg: Config) -> str:
    """What came out, in a sentence, with its interval; means over the seeds of a policy."""
    a, b = (over_seeds(policies[name], [1], "Pass@1") for name in (last, other))
    tasks, seeds = len(policies[last][0].by_task), len(policies[last])
    own, others, gap = (spread(estimate, tasks, cfg.resamples) for estimate in (a, b, lambda i: a(i) - b(i)))
    text = f"<b>{escape(last)}</b> wins {percent(own)} % of its rollouts"
    if last != other:
        noise = "" if gap[1] > 0 or gap[2] < 0 else ", which cannot be told from noise"
        text += (f", <b>{escape(other)}</b> {percent(others)} %: a difference of {percent(gap, '+')} points{noise}")
    return text + (f" ({tasks} tasks, {policies[last][0].n} samples each{f', {seeds} seeds' if seeds > 1 else ''}; "
                   f"95 % intervals over tasks).")


def rows(head: list[str], lines: list[list[str]]) -> str:
    def line(cells: list[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(text)}</{kind}>" for text in cells) + "</tr>"
    return ('<div class="wide"><table><thead>' + line(head, "th") + "</thead><tbody>"
            + "".join(line(cells, "td") for cells in lines) + "</tbody></table></div>")


def curves(policies: list[Samples], cfg: Config) -> str:
    columns = [policy.figures(cfg.ks, cfg.resamples) for policy in policies]
    ks = [k for k in cfg.ks if all(f"Pass@{k}" in column for column in columns)]
    picture = chart([(policy.label, [column[f"Pass@{k}"] for k in ks]) for policy, column in zip(policies, columns)],
                    [str(k) for k in ks], "k, samples a task")
    names = [*(f"Pass@{k}" for k in ks), "recovery"]
    return (f'<figure role="img" aria-label="Pass@k curves; the figures are in the table below">{picture}</figure>'
            + rows(["%", *(policy.label for policy in policies)],
                   [[name, *(percent(column[name]) for column in columns)] for name in names])
            + "<p><small>recovery: success among episodes that met at least one refused action</small></p>")


def difficulties(policies: list[Samples]) -> str:
    found = [policy.difficulties() for policy in policies]
    return rows(["", "tasks", *(f"{policy.label}: {what}" for policy in policies for what in ("Pass@1", "ever"))],
                [[name, str(tasks), *(f"{100 * value:.1f}" for column in found for value in column[name][1:])]
                 for name, (tasks, _, _) in found[0].items()])


def training(folder: Path) -> str:
    """What training took, and its losses, step by step (GRPO's waves apart)."""
    took = spent(folder)
    text = (f"<p>{took['steps']} environment steps (replayed ones included), {took['sampled']} sampled tokens, "
            f"{took['trained']} trained tokens, {took['seconds'] / 60:.1f} minutes.</p>")
    steps = {(record["round"], record["step"]): record                                          # twice if killed
             for record in read_jsonl(folder / "metrics.jsonl") if "step" in record}
    known = ("round", "step", "gradient_norm", "lr", "tokens", "seconds")
    for round_ in sorted({round_ for round_, _ in steps}):
        own = [record for (number, _), record in sorted(steps.items()) if number == round_]
        series = [(name, [(record[name],) * 3 for record in own]) for name in own[0] if name not in known]
        top = max(point[0] for _, points in series for point in points)
        title = f"optimiser step, {f'round {round_}' if round_ else 'warm start'}"
        if len(own) > 1 and top > 0:
            marks = [str(record["step"]) for record in own]
            text += f"<figure>{chart(series, marks, title, top, percent=False)}</figure>"
    return text


def chosen(trees: list[Tree], folder: Path, round_: int) -> tuple[list[dict], str]:
    """The trees to draw, at most SHOWN, and a sentence on which they are."""
    path = folder / "distilled.json"
    pairs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(round=0)
    seen = {(task, turn): both for task, turn, *both in pairs["pairs"]} if pairs["round"] == round_ else {}
    solved = [any(branch.success for branch in tree.branches) for tree in trees]
    grown = [k for k, tree in enumerate(trees) if solved[k] and not tree.branches[0].success]
    some = spaced(grown, SHOWN * 3 // 4)
    some = sorted(some + spaced([k for k in range(len(trees)) if k not in some], SHOWN - len(some)))
    drawn = [drawing(trees[k], seen) for k in some]
    text = (f"{sum(solved)} of {len(trees)} training tasks were solved, "
            f"{sum(tree.branches[0].success for tree in trees)} by the first rollout.")
    if len(trees) > SHOWN:
        rest = ", ".join(f"{tree.task} ({'solved' if solved[k] else 'not solved'})"
                         for k, tree in enumerate(trees) if k not in some)
        text += (f" Drawn are {SHOWN}, evenly spaced: up to three in four of those that a branch solved, then of the "
                 f"others. <details><summary>The other {len(trees) - SHOWN}, which are in trees.jsonl</summary>"
                 f"{escape(rest)}</details>")
    return drawn, text


def spaced(items: list[int], count: int) -> list[int]:
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def drawing(tree: Tree, seen: dict[tuple[str, int], tuple[float, float]]) -> dict:
    """A tree as page.html draws it."""
    attempts = []
    for branch, start in zip(tree.branches, tree.starts):
        turns = []
        for i, turn in enumerate(branch.turns, start):
            shown = dict(obs=turn.obs[:WORDS], action=turn.action[:WORDS], valid=turn.valid, success=turn.success)
            if (tree.task, i) in seen:
                before, after = (math.exp(value) for value in seen[tree.task, i])
                shown["seen"] = f"{before:.2%} before distillation, {after:.2%} after"
            turns.append(shown)
        attempts.append(dict(name=branch.name, tau=branch.tau, experience=branch.experience[:WORDS], end=branch.end,
                             last_obs=branch.last_obs[:WORDS], turns=turns, reflections=[
                                 dict(t=r.t, text=r.text[:WORDS], flaw=r.flaw) for r in branch.reflections]))
    wins = sum(branch.success for branch in tree.branches)
    return dict(task=tree.task, says=f"{len(attempts)} attempts, {wins} successful", attempts=attempts)


def main(args: list[str]) -> None:
    kinds = {"passk": passk, "reward": reward, "tree": tree}
    if len(args) == 2 and args[0] == "page":
        folder = Path(args[1])
        write_aside(folder / "report.html", (comparison_page if list(folder.glob("leafe-*")) else page)(folder))
        print(f"results: {folder}/report.html")
        return
    if len(args) < 3 or args[0] not in kinds or not args[1].endswith(".svg"):
        raise UserError("usage: python report.py page out/run, or passk|reward|tree picture.svg out/run ...")
    if not Path(args[1]).parent.is_dir():
        raise UserError(f"{args[1]}: there is no folder {Path(args[1]).parent}")
    write_aside(Path(args[1]), kinds[args[0]](args[2:]))
    print(f"results: {args[1]}")


if __name__ == "__main__":
    guarded(main, __doc__)
