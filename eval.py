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
import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Callable

from config import UserError, guarded, kept_config, load_config, refuse, visible    # before torch: Ctrl-C

import torch
from tqdm import tqdm

import ranks
from engine import Job
from envs import ask, closing
from leafe import Attempt, episode
from run import Run, open_run, pick_tasks, plans, provenance, report_file

STARTS = ("base", "warm_start")                    # policies that a run starts from


def sample(run: Run, policy: str, round_: int = 0) -> None:
    """Draw what is missing of cfg.samples episodes a test task; `policy`: base (adapter off), warm_start, the method."""
    run = replace(run, playbook="") if policy in STARTS else run
    cfg, store = run.cfg, run.store("samples.jsonl")
    with closing(run.world()) as world:
        weights = "base" if policy == "base" else run.policy.fingerprint(world.rules if run.playbook else "")
        difficulties = {task: ask(world, "difficulty", task) for task in run.test_tasks}
    held = [record for record in store.records if record["policy"] == policy]
    if others := {record["weights"] for record in held} - {weights}:
        raise UserError(f"{store.path} holds {policy} samples of another policy "
                        f"({others.pop()}, not {weights}); choose another out=")
    done = {(record["task"], record["sample"]) for record in held}

    def plain(task: str, i: int):
        branch = yield from episode(run, run.world(), Attempt(task, str(i)), reflect=False)
        return dict(policy=policy, weights=weights, task=task, sample=i, difficulty=difficulties[task],
                    success=branch.success, score=branch.turns[-1].score if branch.turns else 0.0,
                    turns=branch.steps, refused=sum(not turn.valid for turn in branch.turns),
                    tokens=branch.tokens, end=branch.end, **(dict(clipped=branch.clipped) if branch.clipped else {}))

    missing = [(task, i) for task in run.test_tasks for i in range(cfg.samples) if (task, i) not in done]
    queue = deque(Job(plain(task, i), random.Random(f"{cfg.seed}/sample/{task}/{i}"), task)
                  for task, i in ranks.lot(missing))
    successes = 0
    with run.policy.off(policy == "base"):
        engine, pace = run.policy.engine(), plans().hours.Pace(run, "sampling")
        bar = tqdm(total=len(queue), desc=visible(f"sample {policy}", ""), unit="episode",
                   disable=not queue or ranks.rank() > 0)
        for n, job in enumerate(engine.run(queue), 1):
            store.append(job.result)
            pace.tell(engine.sampled)
            successes += job.result["success"]
            bar.update()
            bar.set_postfix_str(f"success {successes / n:.1%}, {engine.pace(bar.format_dict['elapsed'])}", refresh=False)
    bar.close()
    store.gather()
    found = Samples([r for r in store.records if r["policy"] == policy and r["task"] in difficulties], policy)
    run.say(round=round_, policy=policy, **report_file().policy_figures(found, cfg.ks))


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


def main(args: list[str]) -> None:
    if args[0] == "table" and len(args) == 2:
        folder, cfg = Path(args[1]), kept_config(Path(args[1]))
        print(visible(report_file().report(folder, cfg, pick_tasks(cfg, "test"), (folder / "passk.json").exists())))
    elif args[0] == "compare" and len(args) == 2:
        from tools.compare import show                 # the door of the tables of several runs
        show(Path(args[1]))
    elif args[0] == "compare" and len(args) == 3:
        report = report_file()
        cfg = kept_config(report.parted(args[-1])[0])
        print(visible(report.table([report.read_samples(name) for name in args[1:]], cfg.ks, cfg.resamples)))
    elif args[0] in ("table", "compare"):
        raise UserError(f"usage: python eval.py {args[0]} out/run{' out/other' if args[0] == 'compare' else ''}")
    else:
        cfg = load_config(args)
        refuse(cfg, plan="is what train.py prints, for sampling too",
               init="is what train.py starts from; eval.py samples with adapter=",
               warm_start="is what train.py does first; eval.py samples with adapter=out/<run>/warm_start")
        ranks.start(cfg.processes)
        run = open_run(cfg, cfg.adapter, training=False)
        provenance().settle(run)
        sample(run, report_file().policy_name(cfg))
        run.folder.close()
        print(visible(report_file().report(run.folder.path, cfg, run.test_tasks)))
        print(visible(f"results: {run.folder.path}/samples.jsonl, {run.folder.path}/passk.json"))


if __name__ == "__main__":
    import eval                                        # not this second copy of it
    guarded(eval.main, __doc__)
