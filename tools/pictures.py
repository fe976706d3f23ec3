"""Pictures for the docs, made from runs' files without a model.

    python -m tools.pictures passk passk.svg out/quest:base out/quest     Pass@k curves with 95 % bands
    python -m tools.pictures passk passk.svg out/compare                  of all methods of a comparison, means over seeds
    python -m tools.pictures tree tree.svg out/quest [task]               a rollback tree
    python -m tools.pictures reward reward.svg out/compare/grpo-*         GRPO: success of its rollouts, wave by wave
"""
from html import escape
from pathlib import Path

from config import UserError, guarded, kept_config, visible
from leafe import read_trees
from run import pick_tasks, read_jsonl, write_aside
from tools.compare import curves, ended
from tools.page import chart
from tools.report import parted, read_samples


def passk(names: list[str]) -> str:
    """Of the policies named, or of all methods of a comparison."""
    if len(names) == 1 and list(Path(names[0]).glob("leafe-*")):
        policies, cfg = ended(Path(names[0]))
    else:
        cfg = kept_config(parted(names[0])[0])
        policies = {name: [read_samples(name)] for name in names}
        short = {own[0].label.rpartition(":")[2]: own for own in policies.values()}
        policies = short if len(short) == len(policies) else policies
    if len({tuple(own[0].by_task) for own in policies.values()}) > 1:
        raise UserError(f"{', '.join(names)}: not sampled on the same tasks")
    return curves(policies, cfg)


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
    return chart(series, [str(i + 1) for i in range(longest)], "wave of rollouts", (0.0, max(0.04, 1.1 * top)))


def tree(names: list[str]) -> str:
    """One rollback tree of a run: the task named, or the smallest tree that more than one rollback won. An attempt a
    line, turn t in column t; a branch hangs on the turn that it replaces, its experience beside the arrow."""
    folder, cfg = Path(names[0]), kept_config(Path(names[0]))
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
        if branch.parent is not None:
            holder = branch.parent                       # or who of its ancestors played that turn
            while one.branches[holder].tau > branch.tau:
                holder = one.branches[holder].parent
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


def main(args: list[str]) -> None:
    kinds = {"passk": passk, "reward": reward, "tree": tree}
    if len(args) < 3 or args[0] not in kinds or not args[1].endswith(".svg"):
        raise UserError("usage: python -m tools.pictures passk|reward|tree picture.svg out/run ...")
    if not Path(args[1]).parent.is_dir():
        raise UserError(f"{args[1]}: there is no folder {Path(args[1]).parent}")
    write_aside(Path(args[1]), kinds[args[0]](args[2:]))
    print(visible(f"results: {args[1]}"))


if __name__ == "__main__":
    guarded(main, __doc__)
