"""All methods side by side: every one on every seed, each a run of its own in out/<method>-<seed>/, with the tasks and
the number of environment steps of LEAFE's Stage 1. grpo+leafe starts LEAFE from GRPO's adapter, as the paper does.

    python train.py config.yaml method=compare out=out/compare
    python train.py config.yaml preset=smollm2 warm_start=96 method=compare out=out/smollm2-compare
    python eval.py compare out/compare                              the tables again, from the files

With warm_start= there is one warm start, made first, in out/warm_start-0/: every run, of every method and seed, goes on
from that adapter (ACE samples with it), and warm_start stands in the tables where base does without. Seeds may then be
run a few at a time, seeds=[1], and still share it: it is made with the seed of the file, whatever seeds= says.
A key of one of the methods (grpo_kl= and the like) is passed on to the runs that know it.
"""
import gc
from pathlib import Path

import eval
from config import Check, Config, UserError, brought_by, load_config, refuse, shipped, visible
from methods import ace, early_experience, grpo, rft, warm_start
from train import whole_run

COMPARED = ("leafe", "rft", "early_experience", "grpo", "grpo+leafe", "ace")


def own_lines(keys: str) -> list[str]:
    """The lines of a method's keys that are its own: what it sets for the loop's keys is for its runs alone."""
    return [line for line in keys.splitlines() if line and line.partition(":")[0] not in shipped()]


OWN = {line.partition(":")[0]: line for module in (rft, early_experience, grpo, ace) for line in own_lines(module.KEYS)}
KEYS = """
seeds: [0, 1, 2]              # a run of each method on each
""" + "\n".join(OWN.values()) + "\n"
CHECKS: list[Check] = [
    ("seeds", lambda v, s: v and min(v) >= 0, "must be a list of numbers of 0 or more, like [0, 1]"),
    *(one for module in (rft, early_experience, grpo, ace) for one in module.CHECKS if one[0] in OWN)]


def several_runs(cfg: Config, args: list[str]) -> None:
    for arg in args:
        key = arg.partition("=")[0]
        if "=" in arg and key in ("seed", "trees", "init", "evaluate_base"):
            raise UserError(f"{key}: method=compare sets it for each of its runs{'; use seeds=' * (key == 'seed')}")
    refuse(cfg, trees="method=compare sets it for each of its runs", init="method=compare sets it for each of its runs")
    if cfg.warm_start:
        print(visible("\nwarm start"))
        warm_start.make(load_config([*arguments(cfg, args, "leafe", cfg.seed), "init=", f"warm_start={cfg.warm_start}",
                                     f"out={start(cfg).parent}"]))
        gc.collect()
    for seed in cfg.seeds:
        for name in COMPARED:
            print(visible(f"\n{name}, seed {seed}"))
            whole_run(load_config(arguments(cfg, args, name, seed)))
            gc.collect()                               # a model may be large: it goes before the next one comes
    eval.main(["compare", cfg.out])


def start(cfg: Config) -> Path:
    """The adapter that all runs start from."""
    return Path(cfg.out) / f"warm_start-{cfg.seed}" / "warm_start"


def arguments(cfg: Config, args: list[str], name: str, seed: int) -> list[str]:
    """The command line of one of the runs."""
    method, out = name.rpartition("+")[2], Path(cfg.out)
    own = dict(method=method, seed=seed, out=out / f"{name}-{seed}", evaluate_base=name == "leafe",
               init=start(cfg) if cfg.warm_start else "", warm_start=0)
    if name == "grpo+leafe":
        own["init"] = out / f"grpo-{seed}" / "adapter"
    if method != "leafe":
        own |= dict(trees=out / f"leafe-{seed}", env_steps=cfg.env_steps, rounds=1)
    known = {*shipped(), *brought_by(method), "preset"}
    own |= {key: value for key, value in vars(cfg).items()             # of a method's own, what a file sets for all
            if key in OWN and key in known and key not in own and value != brought_by("compare")[key]}
    passed = [arg for arg in args if "=" not in arg or arg.partition("=")[0] in known]
    return [*passed, *(f"{key}={'null' if value is None else value}" for key, value in own.items())]
