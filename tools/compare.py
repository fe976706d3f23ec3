"""Several runs side by side: the tables of a comparison (train.py method=compare), and its report.html.

    python eval.py compare out/compare
"""
from html import escape
from pathlib import Path
from urllib.parse import quote

import torch

import ranks
from config import Config, UserError, kept_config, visible
from eval import Samples, spread
from run import write_aside
from tools.page import chart, framed, verdict
from tools.report import cell, over_seeds, read_samples, spent


def show(folder: Path) -> None:
    """The tables on the screen, the page into the folder."""
    print(visible(comparison(folder)))
    if ranks.rank() == 0:
        write_aside(folder / "report.html", page(folder))
    print(visible(f"results: {folder}/report.html"))


def read_runs(folder: Path) -> dict[str, dict[str, tuple[Samples, dict]]]:
    """The ended runs of a folder, <name>-<seed>/ each: name -> seed -> (samples, what training took). The first name is
    of what they start from, base or warm_start; its samples are those of leafe-<seed>/. What a warm start took, which
    all share, counts for it alone. Raises UserError if they were not sampled on the same tasks."""
    warm = any(starts_warm(kept_config(path.parent)) for path in folder.glob("leafe-*/config.yaml"))
    start = "warm_start" if warm else "base"
    runs: dict[str, dict[str, tuple[Samples, dict]]] = {start: {}}
    for run in sorted(path.parent for path in folder.glob("*-*/passk.json")):
        (name, _, seed), own, took = run.name.rpartition("-"), kept_config(run), whole_cost(run)
        runs.setdefault(name, {})[seed] = read_samples(str(run)), took
        if name == "leafe" and own.evaluate_base:
            runs[start][seed] = read_samples(f"{run}:{start}"), spent(where(run, own.init)) if warm else dict.fromkeys(took, 0)
    if not runs[start]:
        raise UserError(f"{folder}: no leafe-<seed>/ that has ended; name a comparison's folder (train.py "
                        f"method=compare out=...), or two runs")
    expected = next(iter(runs[start].values()))[0]
    for name, by_seed in runs.items():
        for seed, (samples, _) in by_seed.items():
            if (list(samples.by_task), samples.n) != (list(expected.by_task), expected.n):
                raise UserError(f"{folder}/{name}-{seed} was not sampled on the same tasks, as often; run train.py "
                                f"with its out= again (same split=, test_tasks=, samples=), or move it away")
    return runs


def starts_warm(cfg: Config) -> bool:
    return Path(cfg.init).name == "warm_start"


def whole_cost(run: Path) -> dict[str, float]:
    """What the training of a run took (report.spent), with what its start, if not a warm one, took, and the steps and
    sampled tokens of the trees that it reused: their minutes are not known apart."""
    own, took = kept_config(run), spent(run)
    if own.init and not starts_warm(own):
        took = {key: value + spent(where(run, own.init).parent)[key] for key, value in took.items()}
    if own.trees and own.method == "leafe":
        took |= {key: took[key] + spent(where(run, own.trees))[key] for key in ("steps", "sampled")}
    return took


def where(run: Path, name: str) -> Path:
    """Another folder that a run's settings name, as seen from where it ran."""
    here, out = run.resolve(), Path(kept_config(run).out)
    above = Path(*here.parts[:-len(out.parts)]) if here.parts[-len(out.parts):] == out.parts else Path()
    return above / name


def comparison(folder: Path) -> str:
    """The runs of a folder side by side. Figures are means over seeds, intervals are over tasks, differences are
    paired. new: tasks that the policy solves in any of its samples and what it started from, of that seed, in none;
    lost: the other way round."""
    runs = read_runs(folder)
    start = next(iter(runs))
    cfg, seeds = kept_config(next(folder.glob("leafe-*/config.yaml")).parent), list(runs[start])
    base, leafe = ([runs[name][seed][0] for seed in seeds] for name in (start, "leafe"))
    tasks, last = len(base[0].by_task), f"Pass@{cfg.ks[-1]}"
    figures = [f"Pass@{k}" for k in sorted({cfg.ks[0], cfg.ks[len(cfg.ks) // 2], cfg.ks[-1]})] + ["recovery"]

    gaps = [(f"{last} minus {start}", last), (f"leafe minus this, {figures[0]}", figures[0]),
            (f"leafe minus this, {last}", last)]
    first = [f"{'%':18}" + "".join(f"{name:>24}" for name in figures)]
    second = [f"{'':18}" + "".join(f"{title:>28}" for title, _ in gaps) + f"{'new':>6}{'lost':>6}"]
    third = [f"{'training took':18}" + "".join(
        f"{name:>16}" for name in ("env steps", "sampled tokens", "trained tokens", "minutes"))]
    for name, found in sorted(runs.items(), key=lambda item: (item[0] != start, item[0])):
        if missing := set(seeds) - set(found):
            first.append(f"{name:18}{len(base) - len(missing)} of {len(base)} seeds so far")
            continue
        own, meters = [found[seed][0] for seed in seeds], [found[seed][1] for seed in seeds]
        cells = [cell(spread(over_seeds(own, cfg.ks, figure), tasks, cfg.resamples)) for figure in figures]
        first.append(f"{name:18}" + "".join(f"{shown:>24}" for shown in cells))
        cells = [f"{name:18}"]
        for (_, figure), (more, less) in zip(gaps, ((own, base), (leafe, own), (leafe, own))):
            high, low = (over_seeds(policies, cfg.ks, figure) for policies in (more, less))
            gap = cell(spread(lambda index: high(index) - low(index), tasks, cfg.resamples), "+") if more != less else ""
            cells.append(f"{gap:>28}")
        for a, b in ((own, base), (base, own)):
            only = [int(((x.passes(x.n) > 0) & (y.passes(y.n) == 0)).sum()) for x, y in zip(a, b)]
            cells.append(f"{sum(only) / len(base):6.1f}")
        second.append("".join(cells))
        took = {key: sum(meter[key] for meter in meters) / len(base) for key in meters[0]}
        minutes = f"{took['seconds'] / 60:.1f}" if took["seconds"] else "-"
        third.append(f"{name:18}" + "".join(f"{took[key]:16.0f}" for key in ("steps", "sampled", "trained"))
                     + f"{minutes:>16}")
    return "\n".join([*first, *second, *third,
                      f"{tasks} tasks, {base[0].n} samples each, means over {len(base)} seeds"
                      f"; env steps with replays; new, lost: tasks solved that {'the ' * (start == 'base')}{start} never solves, and back"
                      + "; what warm_start took is shared, and counts in its row alone" * (start == "warm_start")])


def ended(folder: Path) -> tuple[dict[str, list[Samples]], Config]:
    """Every method of a comparison that has ended on all its seeds: name -> one policy a seed."""
    runs, cfg = read_runs(folder), kept_config(next(folder.glob("leafe-*/config.yaml")).parent)
    return {name: [samples for samples, _ in found.values()] for name, found in runs.items()
            if set(found) == set(runs[next(iter(runs))])}, cfg


def curves_of(folder: Path) -> str:
    """Pass@k curves of all methods that have ended."""
    policies, cfg = ended(folder)
    return curves(policies, cfg)


def curves(policies: dict[str, list[Samples]], cfg: Config) -> str:
    ks = [k for k in cfg.ks if k <= min(one.n for own in policies.values() for one in own)]
    series = [(label, [spread(over_seeds(own, [k], f"Pass@{k}"), len(own[0].by_task), cfg.resamples) for k in ks])
              for label, own in policies.items()]
    return chart(series, [str(k) for k in ks], "k, samples a task")


def page(folder: Path) -> str:
    """report.html of a comparison: all methods' curves, the tables with what each took, and where their runs lie."""
    policies, cfg = ended(folder)
    tasks = torch.arange(len(policies["leafe"][0].by_task))
    best = max((name for name in policies if name != "leafe"),
               key=lambda name: over_seeds(policies[name], [1], "Pass@1")(tasks))
    runs = sorted(path.parent.name for path in folder.glob("*-*/report.html"))
    picture = f'<figure role="img" aria-label="Pass@k curves of all methods">{curves_of(folder)}</figure>'
    links = "".join(f'<li><a href="{escape(quote(name))}/report.html">{escape(name)}</a></li>' for name in runs)
    parts = [("Pass@k", picture), ("The runs", f"<ul>{links}</ul>"),
             ("Figures, differences, budgets", f'<pre class="wide">{escape(comparison(folder))}</pre>')]
    return framed(f"methods on {cfg.env}, {cfg.model}: {folder}", verdict(policies, "leafe", best, cfg), parts, [])
