"""Pictures of runs, drawn from their files without a model.

    python report.py passk passk.svg out/quest:base out/quest     Pass@k curves with 95 % bands
    python report.py passk passk.svg out/compare                  of all methods of a comparison, means over its seeds
    python report.py reward reward.svg out/compare/grpo-*         GRPO: success of the training rollouts, wave by wave
"""
from html import escape
from itertools import cycle
from pathlib import Path

from baselines import over_seeds, read_runs
from envs import UserError
from eval import read_samples, spread
from run import guarded, load_config, read_jsonl, write_aside

COLOURS = ("#8a8f98", "#1f6feb", "#d9730d", "#2da44e", "#a475f9", "#c2255c", "#0b7285", "#846358")
WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 700, 380, 52, 44, 150, 16
Rows = list[tuple[float, float, float]]             # estimate, low, high: one for each mark of the x axis


def chart(series: list[tuple[str, Rows]], marks: list[str], title: str, top: float = 1.0) -> str:
    """Lines with bands over evenly spaced marks; shares in percent, up to `top`. Labels are kept from overlapping."""
    def x(i: int) -> float:
        return LEFT + i * (WIDTH - LEFT - RIGHT) / max(1, len(marks) - 1)

    def y(share: float) -> float:
        return TOP + (1 - share / top) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for share in (top * i / 4 for i in range(5)):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
                     f'stroke="#e4e6ea"/><text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end" fill="#444">'
                     f'{100 * share:.3g} %</text>')
    for i in range(0, len(marks), 1 + len(marks) // 12):
        parts.append(f'<text x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" '
                     f'fill="#444">{escape(marks[i])}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
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


def passk(names: list[str]) -> str:
    """Of the policies named, or of every method that has ended on all seeds of a comparison."""
    if len(names) == 1 and list(Path(names[0]).glob("leafe-*")):
        runs = read_runs(Path(names[0]))
        cfg = load_config([str(next(Path(names[0]).glob("leafe-*/config.yaml")))])
        policies = {name: [samples for samples, _ in found.values()] for name, found in runs.items()
                    if set(found) == set(runs["base"])}
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


def main(args: list[str]) -> None:
    kinds = {"passk": passk, "reward": reward}
    if len(args) < 3 or args[0] not in kinds or not args[1].endswith(".svg"):
        raise UserError("usage: python report.py passk|reward picture.svg out/run ...")
    if not Path(args[1]).parent.is_dir():
        raise UserError(f"{args[1]}: there is no folder {Path(args[1]).parent}")
    write_aside(Path(args[1]), kinds[args[0]](args[2:]))


if __name__ == "__main__":
    guarded(main, __doc__)
