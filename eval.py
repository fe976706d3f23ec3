"""Pass@k: sampling, the unbiased estimator, intervals, tables. At test time there is one plain rollout: no
reflection, no rollback, no hint.

    python eval.py config.yaml                  sample the base's episodes on the test split, print the tables
    python eval.py config.yaml adapter=out/quest/adapter   the same for a trained policy
    python eval.py table out/quest              the tables again, from samples.jsonl, without a model
    python eval.py compare out/a out/b          the second minus the first, paired; out/a:base is the base in run a
    python eval.py compare out/compare          all methods of a comparison (train.py method=compare)

n samples a task, c successes: pass@k = 1 - C(n-c, k) / C(n, k) (Chen et al. 2021), mean over tasks. Intervals are
95 % percentile bootstraps over tasks; a difference is bootstrapped over the tasks that both have (paired).
"""
import hashlib
import json
import os
import random
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch
from tqdm import tqdm

import ranks
from envs import Env, UserError, env_class, make_env
from leafe import PLAYBOOK, REACT, episode
from model import Chat, Engine, Job
from run import (STARTS, Config, Jsonl, RunFolder, guarded, load_config, policy_name, read_jsonl, refuse, spent,
                 write_aside)
from serving import Server
from weights import adapter_off, load_adapter, load_model, lora_layers, lora_parameters, save_adapter


def make_engine(model, chat: Chat, cfg: Config) -> Any:
    """What samples from the policy as it is now: the forking engine (model.Engine), or with cfg.engine a server that
    answers as it does (serving.Server)."""
    slots = min(cfg.slots, cfg.workers or os.cpu_count()) if env_class(cfg.env).apart else cfg.slots
    engine = Engine(model, chat.stop, slots, cfg.context, cfg.temperature, cfg.snapshot_mb)
    if not cfg.engine:
        return engine
    if not any(layer.on and layer.lora_B.any() for layer in lora_layers(model).values()):
        return Server(cfg, chat, engine)
    served = Path(cfg.out) / "served" / f"leafe-{fingerprint(model, '')}"
    for older in served.parent.glob("leafe-*"):
        if older != served and ranks.rank() == 0:
            shutil.rmtree(older)
    save_adapter(model, served, cfg.model)
    return Server(cfg, chat, engine, served)


def make_worlds(cfg: Config) -> Callable[[], Env]:
    """A function that makes an environment; behind its rules, with cfg.react, how to answer, and cfg.playbook."""
    if cfg.playbook and not Path(cfg.playbook).is_file():
        raise UserError(f"playbook: there is no file {cfg.playbook}; train.py method=ace writes one")
    lessons = Path(cfg.playbook).read_text(encoding="utf-8").strip() if cfg.playbook else ""

    def make() -> Env:
        env = make_env(cfg.env, cfg.data)
        env.rules += (REACT if cfg.react else "") + (PLAYBOOK + lessons if lessons else "")
        return env
    return make


def pick_tasks(cfg: Config, use: str) -> list[str]:
    """The tasks to `train` or to `test` on. Raises UserError if the world has too few."""
    split, count = (cfg.train_split, cfg.train_tasks) if use == "train" else (cfg.split, cfg.test_tasks)
    tasks = make_env(cfg.env, cfg.data).tasks(split)
    if len(tasks) < count:
        raise UserError(f"{cfg.env}{f' with data={cfg.data}' if cfg.data else ''} has {len(tasks) or 'no'} tasks in "
                        f"its split {split}, not {count}; lower {use}_tasks, or give another split or other data")
    return tasks[:count]


def fingerprint(model, rules: str) -> str:
    """Names the policy that samples were drawn from, so that a resumed run never mixes two."""
    digest = hashlib.sha256(rules.encode())
    for parameter in lora_parameters(model):
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def sample(model, chat: Chat, cfg: Config, store: Jsonl, policy: str, tasks: list[str]) -> None:
    """Draw what is missing of cfg.samples episodes for each task; `policy`: base (adapter off), warm_start, or the
    method."""
    make = make_worlds(replace(cfg, playbook="") if policy in STARTS else cfg)
    weights = "base" if policy == "base" else fingerprint(model, make().rules if cfg.playbook else "")
    held = [record for record in store.records if record["policy"] == policy]
    if others := {record["weights"] for record in held} - {weights}:
        raise UserError(f"{store.path} holds {policy} samples of another policy "
                        f"({others.pop()}, not {weights}); choose another out=")
    done = {(record["task"], record["sample"]) for record in held}
    world = make()

    def plain(task: str, i: int):
        branch = yield from episode(make(), chat, cfg, task, [], "", str(i), reflect=False)
        return dict(policy=policy, weights=weights, task=task, sample=i, difficulty=world.difficulty(task),
                    success=branch.success, score=branch.turns[-1].score if branch.turns else 0.0,
                    turns=branch.steps, refused=sum(not turn.valid for turn in branch.turns),
                    tokens=branch.tokens, end=branch.end)

    queue = deque(Job(plain(task, i), random.Random(f"{cfg.seed}/sample/{task}/{i}"), task)
                  for task in tasks for i in range(cfg.samples) if (task, i) not in done)
    queue = deque(ranks.share(queue))
    bar, successes = tqdm(total=len(queue), desc=f"sample {policy}", unit="episode",
                          disable=not queue or ranks.rank() > 0), 0
    with adapter_off(model, policy == "base"):
        engine = make_engine(model, chat, cfg)
        for n, job in enumerate(engine.run(queue), 1):
            store.append(job.result)
            successes += job.result["success"]
            bar.update()
            bar.set_postfix_str(f"success {successes / n:.1%}, {engine.pace(bar.format_dict['elapsed'])}",
                                refresh=False)
    bar.close()
    store.gather()


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate from n samples with c successes. Raises ValueError if k > n."""
    if k > n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    miss = 1.0
    for i in range(n - c + 1, n + 1):                 # C(n-c, k) / C(n, k), as a product: no overflow
        miss *= 1 - k / i
    return 1 - miss


def bootstrap(tasks: int, resamples: int) -> torch.Tensor:
    """Indices (R, tasks) of resampled tasks; the same for as many tasks, so that differences are paired."""
    return torch.randint(tasks, (resamples, tasks), generator=torch.Generator().manual_seed(0))


def interval(values: torch.Tensor) -> tuple[float, float]:
    ends, known = torch.tensor([0.025, 0.975], dtype=torch.float64), values[~values.isnan()].double()
    return tuple(known.quantile(ends).tolist()) if len(known) else (float("nan"), float("nan"))


def spread(estimate: Callable, tasks: int, resamples: int) -> tuple[float, float, float]:
    """(estimate on all tasks, 95 % interval over resampled ones) of a function of task indices (R, tasks)."""
    return float(estimate(torch.arange(tasks)[None])[0]), *interval(estimate(bootstrap(tasks, resamples)))


class Samples:
    """One policy's samples: counts by task, and every figure that the tables show."""
    def __init__(self, records: list[dict], label: str):
        self.label, self.by_task = label, {}
        for record in sorted(records, key=lambda record: record["task"]):
            self.by_task.setdefault(record["task"], []).append(record)
        if not self.by_task:
            raise UserError(f"{label}: there are no samples")
        self.n = min(len(rs) for rs in self.by_task.values())

    def passes(self, k: int) -> torch.Tensor:         # (tasks,)
        return torch.tensor([pass_at_k(len(rs), sum(r["success"] for r in rs), k) for rs in self.by_task.values()])

    def recovery(self) -> torch.Tensor:               # (tasks, 2): of episodes with a refusal: successes, all
        met = [[r["success"] for r in rs if r["refused"]] for rs in self.by_task.values()]
        return torch.tensor([[sum(wins), len(wins)] for wins in met], dtype=torch.float64)

    def estimates(self, ks: list[int]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Name -> function from task indices (R, tasks) to (R,) estimates."""
        def mean(values: torch.Tensor):
            return lambda index: values[index].mean(-1)
        found = {f"Pass@{k}": mean(self.passes(k)) for k in ks if k <= self.n}
        counts = self.recovery()
        found["recovery"] = lambda index: counts[index][..., 0].sum(-1) / counts[index][..., 1].sum(-1)
        return found

    def figures(self, ks: list[int], resamples: int) -> dict[str, tuple[float, float, float]]:
        return {name: spread(f, len(self.by_task), resamples) for name, f in self.estimates(ks).items()}

    def difficulties(self) -> dict[str, tuple[int, float, float]]:
        """Group -> (tasks, success rate of one rollout, share of tasks solved at least once)."""
        groups: dict[str, list[tuple[float, bool]]] = {}
        for rs in self.by_task.values():
            wins = [r["success"] for r in rs]
            groups.setdefault(rs[0]["difficulty"], []).append((sum(wins) / len(wins), any(wins)))
        return {name: (len(g), sum(p for p, _ in g) / len(g), sum(a for _, a in g) / len(g))
                for name, g in sorted(groups.items())}


def compare(a: Samples, b: Samples, ks: list[int], resamples: int) -> dict[str, tuple[float, float, float]]:
    """b minus a: estimate and paired 95 % interval of each figure. UserError if their tasks differ."""
    if list(a.by_task) != list(b.by_task):
        raise UserError(f"{a.label} and {b.label} were not sampled on the same tasks "
                        f"({len(a.by_task)} and {len(b.by_task)}); run both with the same split= and test_tasks=, "
                        f"to the end")
    fa, fb = a.estimates(ks), b.estimates(ks)
    return {name: spread(lambda index, name=name: fb[name](index) - fa[name](index), len(a.by_task), resamples)
            for name in fa if name in fb}


def cell(figure: tuple[float, float, float], sign: str = "") -> str:
    return "{:{s}6.1f} [{:{s}5.1f}, {:{s}5.1f}]".format(*(100 * v for v in figure), s=sign)


def table(policies: list[Samples], ks: list[int], resamples: int) -> str:
    """Success in %, with 95 % intervals over tasks; with two policies, their paired difference."""
    columns = [p.figures(ks, resamples) for p in policies]
    heads = [p.label for p in policies]
    if len(policies) == 2:
        columns.append(compare(policies[0], policies[1], ks, resamples))
        heads.append("difference")
    wide = max(24, *(len(head) + 2 for head in heads))
    lines = [f"{'%':10}" + "".join(f"{head:>{wide}}" for head in heads)]
    for name in columns[0]:
        if all(name in column for column in columns):
            lines.append(f"{name:10}" + "".join(f"{cell(c[name], '+' if i == 2 else ''):>{wide}}"
                                                for i, c in enumerate(columns)))
    for policy in policies:
        rs, n = [r for found in policy.by_task.values() for r in found], len(policy.by_task)
        means = {key: sum(r[key] for r in rs) / len(rs) for key in ("turns", "tokens", "refused")}
        lines.append(f"{policy.label}: {n} tasks x {policy.n} samples; an episode takes {means['turns']:.1f} "
                     f"turns, {means['tokens']:.0f} sampled tokens, meets {means['refused']:.1f} refusals")
        lines += [f"  {name}: {tasks} tasks, Pass@1 {100 * one:.1f}, solved at least once {100 * any_:.1f}"
                  for name, (tasks, one, any_) in policy.difficulties().items()]
    lines.append("recovery: success among episodes that met at least one refused action")
    return "\n".join(lines)


def read_samples(name: str, policy: str | None = None, tasks: list[str] | None = None) -> Samples:
    """`out/run` (its trained policy if it has one) or `out/run:base`, on `tasks`; None: those of its config.yaml."""
    folder, _, wanted = name.partition(":")
    path = Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: there is no samples.jsonl; run train.py or eval.py with out={folder} first")
    records = list(read_jsonl(path))
    tasks = tasks or pick_tasks(load_config([f"{folder}/config.yaml"]), "test")
    trained = next((r["policy"] for r in records if r["policy"] not in STARTS), records[0]["policy"])
    wanted = wanted or policy or trained
    chosen = [r for r in records if r["policy"] == wanted and r["task"] in set(tasks)]
    return Samples(chosen, f"{folder}:{wanted}" if policy is None else wanted)


def read_policies(folder: Path, tasks: list[str]) -> list[Samples]:
    """All policies that a run's samples.jsonl holds, where it started from first."""
    there = {r["policy"] for r in read_jsonl(folder / "samples.jsonl") if r["task"] in set(tasks)}
    if not there:
        raise UserError(f"{folder}: samples.jsonl has no sample of these tasks")
    return [read_samples(str(folder), policy, tasks)
            for policy in sorted(there, key=lambda name: (name not in STARTS, name))]


def report(folder: Path, cfg: Config, tasks: list[str]) -> str:
    """passk.json and the printed table of a run, from its samples.jsonl alone."""
    found = read_policies(folder, tasks)
    passk = {p.label: {name: dict(zip(("estimate", "low", "high"), f))
                       for name, f in p.figures(cfg.ks, cfg.resamples).items()} for p in found}
    if ranks.rank() == 0:
        write_aside(folder / "passk.json", json.dumps(passk, indent=1) + "\n")
    return table(found, cfg.ks, cfg.resamples)


def read_runs(folder: Path) -> dict[str, dict[str, tuple[Samples, dict]]]:
    """The ended runs of a folder, <name>-<seed>/ each: name -> seed -> (samples, what training took). The base's
    samples are those of leafe-<seed>/. Raises UserError if they were not sampled on the same tasks."""
    runs: dict[str, dict[str, tuple[Samples, dict]]] = {"base": {}}
    for run in sorted(path.parent for path in folder.glob("*-*/passk.json")):
        (name, _, seed), own = run.name.rpartition("-"), load_config([str(run / "config.yaml")])
        took = spent(run)
        for start in [Path(own.init)] if own.init else []:                # what its start took counts too
            start = start if start.name == "warm_start" else start.parent
            took = {key: value + spent(start)[key] for key, value in took.items()}
        if own.trees and own.method == "leafe":                           # and so do trees that it reused
            took |= {key: took[key] + spent(Path(own.trees))[key] for key in ("steps", "sampled")}
        runs.setdefault(name, {})[seed] = read_samples(str(run)), took
        if name == "leafe" and own.evaluate_base:
            runs["base"][seed] = read_samples(f"{run}:base"), dict.fromkeys(took, 0)
    if not runs["base"]:
        raise UserError(f"{folder}: no leafe-<seed>/ that has ended; name a comparison's folder (train.py "
                        f"method=compare out=...), or two runs")
    expected = next(iter(runs["base"].values()))[0]
    for name, by_seed in runs.items():
        for seed, (samples, _) in by_seed.items():
            if (list(samples.by_task), samples.n) != (list(expected.by_task), expected.n):
                raise UserError(f"{folder}/{name}-{seed} was not sampled on the same tasks, as often; run train.py "
                                f"with its out= again (same split=, test_tasks=, samples=), or move it away")
    return runs


def over_seeds(policies: list[Samples], ks: list[int], figure: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A figure's mean over the policies of several seeds, as a function of task indices (R, tasks)."""
    known = [policy.estimates(ks)[figure] for policy in policies]
    return lambda index: torch.stack([estimate(index) for estimate in known]).mean(0)


def comparison(folder: Path) -> str:
    """The runs of a folder side by side. Figures are means over seeds, intervals are over tasks, differences are
    paired. new: tasks that the policy solves in any of its samples and the base of that seed in none; lost: the
    other way round."""
    runs = read_runs(folder)
    cfg, seeds = load_config([str(next(folder.glob("leafe-*/config.yaml")))]), list(runs["base"])
    base, leafe = ([runs[name][seed][0] for seed in seeds] for name in ("base", "leafe"))
    tasks, last = len(base[0].by_task), f"Pass@{cfg.ks[-1]}"
    figures = [f"Pass@{k}" for k in sorted({cfg.ks[0], cfg.ks[len(cfg.ks) // 2], cfg.ks[-1]})] + ["recovery"]

    gaps = [(f"{last} minus base", last), (f"leafe minus this, {figures[0]}", figures[0]),
            (f"leafe minus this, {last}", last)]
    first = [f"{'%':18}" + "".join(f"{name:>24}" for name in figures)]
    second = [f"{'':18}" + "".join(f"{title:>28}" for title, _ in gaps) + f"{'new':>6}{'lost':>6}"]
    third = [f"{'training took':18}" + "".join(
        f"{name:>16}" for name in ("env steps", "sampled tokens", "trained tokens", "minutes"))]
    for name, found in sorted(runs.items(), key=lambda item: (item[0] != "base", item[0])):
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
        third.append(f"{name:18}" + "".join(f"{took[key]:16.0f}" for key in ("steps", "sampled", "trained"))
                     + f"{took['seconds'] / 60 or float('nan'):16.1f}")
    return "\n".join([*first, *second, *third,
                      f"{tasks} tasks, {base[0].n} samples each, means over {len(base)} seeds"
                      "; env steps with replays; new, lost: tasks solved that the base never solves, and back"])


def open_policy(cfg: Config, adapter: str):
    model, tokenizer = load_model(cfg.model, cfg.load_in_4bit, cfg.context)
    if adapter:
        load_adapter(model, Path(adapter))
    return model, Chat(tokenizer, cfg.thinking)


def main(args: list[str]) -> None:
    if args[0] == "table" and len(args) == 2:
        cfg = load_config([str(Path(args[1]) / "config.yaml")])
        print(report(Path(args[1]), cfg, pick_tasks(cfg, "test")))
    elif args[0] == "compare" and len(args) == 2:
        print(comparison(Path(args[1])))
    elif args[0] == "compare" and len(args) == 3:
        cfg = load_config([str(Path(args[-1].partition(":")[0]) / "config.yaml")])
        print(table([read_samples(name) for name in args[1:]], cfg.ks, cfg.resamples))
    elif args[0] in ("table", "compare"):
        raise UserError(f"usage: python eval.py {args[0]} out/run{' out/other' if args[0] == 'compare' else ''}")
    else:
        ranks.join()
        cfg = load_config(args)
        refuse(cfg, init="is what train.py starts from; eval.py samples with adapter=",
               warm_start="is what train.py does first; eval.py samples with adapter=out/<run>/warm_start")
        tasks, folder = pick_tasks(cfg, "test"), RunFolder(cfg)
        model, chat = open_policy(cfg, cfg.adapter)
        store = folder.jsonl("samples.jsonl")
        sample(model, chat, cfg, store, policy_name(cfg), tasks)
        store.close()
        print(report(folder.path, cfg, tasks))
        print(f"results: {folder.path}/samples.jsonl, {folder.path}/passk.json")


if __name__ == "__main__":
    guarded(main, __doc__)
