"""The page of a run, report.html: its Pass@k curves, losses and rollback trees, made from its files without a model; the
charts of docs/ as well.

    python -m tools.page out/quest       out/quest/report.html anew, as train.py writes it at the end
"""
import json
import math
import re
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from config import Config, UserError, guarded, kept_config, read_text, visible        # before torch: Ctrl-C

from eval import Samples, spread
from leafe import Tree, read_trees
from run import pick_tasks, read_jsonl, write_aside
from tools.provenance import MADE, read_json
from tools.report import by_difficulty, lacking, many, over_seeds, part, percent, read_policies, spent

COLOURS = ("#8a8f98", "#1f6feb", "#d9730d", "#2da44e", "#a475f9", "#c2255c", "#0b7285", "#846358")
WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 700, 380, 52, 44, 150, 16
Rows = list[tuple[float, float, float]]             # estimate, low, high: one for each mark of the x axis


def chart(series: list[tuple[str, Rows]], marks: list[str], title: str, span: tuple[float, float] = (0.0, 1.0),
          percent: bool = True) -> str:
    """Lines with bands over evenly spaced marks, within `span`; shares in percent. Labels are kept from overlapping."""
    low, high = span

    def x(i: int) -> float:
        return LEFT + i * (WIDTH - LEFT - RIGHT) / max(1, len(marks) - 1)

    def y(share: float) -> float:
        return TOP + (high - share) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'font-family="sans-serif" font-size="12">',
             f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for share in (low + (high - low) * i / 4 for i in range(5)):
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
        band = [f"{x(i):.1f},{y(upper):.1f}" for i, (_, _, upper) in enumerate(rows)]
        band += [f"{x(i):.1f},{y(lower):.1f}" for i, (_, lower, _) in reversed(list(enumerate(rows)))]
        line = " ".join(f"{x(i):.1f},{y(estimate):.1f}" for i, (estimate, _, _) in enumerate(rows))
        below = max(below + 13, y(rows[-1][0]) + 4)
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.12"/>'
                     f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
                     f'<text x="{x(len(rows) - 1) + 8:.1f}" y="{below:.1f}" fill="{colour}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


# ------------------------------------------------------------------------------------------- the page of a run

SHOWN = 40                                          # trees that a page holds whole
WORDS = 4000                                        # characters of one text that it shows


def page(folder: Path) -> str:
    """report.html of a run: one file that needs nothing else. Raises UserError where the run has no samples."""
    cfg = kept_config(folder)
    policies = read_policies(folder, pick_tasks(cfg, "test"))
    drawn: list[dict] = []

    def drawings() -> str:
        records = list(read_jsonl(folder / "trees.jsonl"))
        round_ = max((record["round"] for record in records), default=1)
        trees, says = chosen(read_trees(records, round_, pick_tasks(cfg, "train")), folder, round_)
        drawn.extend(trees)
        return f'<p>{says}</p><div id="list"></div>'

    def settings() -> str:
        return (made(folder) + "<details><summary>config.yaml</summary><pre>"
                + escape(read_text(folder / "config.yaml")) + "</pre></details>")
    makes = {"Pass@k": lambda: curves(policies, cfg), "Success by difficulty": lambda: difficulties(policies)}
    if (folder / "metrics.jsonl").exists():
        makes["Training"] = lambda: training(folder)
    if (folder / "trees.jsonl").exists() and (cfg.method == "leafe" or (folder / "distilled.json").exists()):
        makes["Rollback trees"] = drawings
    makes["Settings"] = settings
    parts = [(title, part(f"{folder}/report.html lacks {title}", make, "<p>{}</p>")) for title, make in makes.items()]
    says = part(f"{folder}/report.html lacks its verdict", lambda: verdict(
        {one.label: [one] for one in policies}, policies[-1].label, policies[0].label, cfg), "{}")
    says += "".join(f"<br>{escape(line)}" for line in lacking(policies, cfg, pick_tasks(cfg, "test")))
    return framed(f"{cfg.method} on {cfg.env}, {cfg.model}: {folder}", says, parts, drawn)


def made(folder: Path) -> str:
    """A line on how the run came about (run.json)."""
    told = read_json(folder / "run.json", MADE, {})
    if not told:
        return ""
    commit = f"commit {told['commit'][:12]}" + " (with changes)" * told["changed"] if told["commit"] else "no commit"
    versions = ", ".join(f"{name} {told[name]}" for name in ("python", "torch", "transformers", "bitsandbytes"))
    machine = told["gpu"] or f"{told['processor']}, {many(told['cores'], 'core')}, {many(told['threads'], 'thread')}"
    again = f"; {len(told['continued'])} starts went on with it" * bool(told["continued"])
    where = f"{commit}; {versions}; {machine}; {told['date']}{again}"
    return f"<p>{escape(told['command'])}<br>{escape(where)}</p>"

def framed(title: str, verdict_: str, parts: list[tuple[str, str]], trees: list[dict]) -> str:
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    body = "\n".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in parts)
    data = json.dumps(trees, separators=(",", ":")).replace("<", "\\u003c")         # ends no script, opens no comment
    whole = dict(TITLE=escape(title), BODY=body, TREES=data, VERDICT=verdict_)
    return re.sub("@(TITLE|BODY|TREES|VERDICT)@", lambda mark: whole[mark[1]], html)

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
    found = [by_difficulty(policy) for policy in policies]
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
        losses = [point[0] for _, points in series for point in points]
        title = f"optimiser step, {f'round {round_}' if round_ else 'warm start'}"
        if len(own) > 1 and any(losses):
            marks = [str(record["step"]) for record in own]
            span = min(0.0, *losses), max(0.0, *losses)    # a policy gradient's may be negative
            text += f"<figure>{chart(series, marks, title, span, percent=False)}</figure>"
    return text


def chosen(trees: list[Tree], folder: Path, round_: int) -> tuple[list[dict], str]:
    """The trees to draw, at most SHOWN, and a sentence on which they are."""
    pairs: dict[str, Any] = read_json(folder / "distilled.json", dict(round=int, pairs=list), dict(round=0))
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
    if len(args) != 1:
        raise UserError("usage: python -m tools.page out/run")
    write_aside(Path(args[0]) / "report.html", page(Path(args[0])))
    print(visible(f"results: {args[0]}/report.html"))


if __name__ == "__main__":
    guarded(main, __doc__)
