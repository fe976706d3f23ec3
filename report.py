"""Pictures of runs, drawn from their samples.jsonl without a model.

    python report.py passk.svg out/quest:base out/quest     Pass@k curves with 95 % bands
"""
from html import escape
from pathlib import Path

from envs import UserError
from eval import Samples, read_samples
from run import guarded, load_config, write_aside

COLOURS = ("#8a8f98", "#1f6feb", "#d9730d", "#2da44e", "#a475f9")
WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 640, 360, 52, 44, 120, 16


def curves(policies: list[Samples], ks: list[int], resamples: int) -> str:
    """Pass@k against k (logarithmic), with the 95 % interval over tasks as a band."""
    def x(i: int) -> float:
        return LEFT + i * (WIDTH - LEFT - RIGHT) / max(1, len(ks) - 1)

    def y(share: float) -> float:
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for percent in range(0, 101, 25):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(percent / 100):.1f}" '
                     f'y2="{y(percent / 100):.1f}" stroke="#e4e6ea"/><text x="{LEFT - 8}" '
                     f'y="{y(percent / 100) + 4:.1f}" text-anchor="end" fill="#444">{percent} %</text>')
    for i, k in enumerate(ks):
        parts.append(f'<text x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" '
                     f'fill="#444">{k}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
                 f'fill="#444">k, samples a task</text>')
    for policy, colour in zip(policies, COLOURS):
        figures = policy.figures(ks, resamples)
        rows = [figures[f"Pass@{k}"] for k in ks]
        band = [f"{x(i):.1f},{y(high):.1f}" for i, (_, _, high) in enumerate(rows)]
        band += [f"{x(i):.1f},{y(low):.1f}" for i, (_, low, _) in reversed(list(enumerate(rows)))]
        line = " ".join(f"{x(i):.1f},{y(estimate):.1f}" for i, (estimate, _, _) in enumerate(rows))
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.15"/>'
                     f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
                     f'<text x="{x(len(ks) - 1) + 8:.1f}" y="{y(rows[-1][0]) + 4:.1f}" '
                     f'fill="{colour}">{escape(policy.label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(args: list[str]) -> None:
    if len(args) < 2:
        print(__doc__)
        return
    if not args[0].endswith(".svg"):
        raise UserError(f"{args[0]}: the first word names the picture, like passk.svg")
    cfg = load_config([str(Path(args[1].partition(":")[0]) / "config.yaml")])
    policies = [read_samples(name) for name in args[1:]]
    ks = [k for k in cfg.ks if k <= min(policy.n for policy in policies)]
    for policy in policies:
        policy.label = ("base" if policy.label.endswith(":base") else
                        "LEAFE" if len(policies) == 2 and policy.label.endswith(":leafe") else policy.label)
    write_aside(Path(args[0]), curves(policies, ks, cfg.resamples))


if __name__ == "__main__":
    guarded(main, __doc__)
