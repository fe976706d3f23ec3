"""The whole loop: evaluate the base, train a policy by `method` (LEAFE: explore, distil), evaluate.

    python train.py config.yaml                       about seven minutes on two CPU cores with the embedded model
    python train.py config.yaml preset=smoke          seconds; to see that all of it runs
    python train.py config.yaml method=grpo trees=out/quest out=out/grpo   a baseline, with that run's budget of steps
    python train.py config.yaml method=compare out=out/compare             all methods, on all cfg.seeds

Any key of config.yaml goes on the command line as key=value; each is explained there, and so are the presets.

Stage 2, experience distillation, is here: plain next-token SFT of

    L = L_cf + beta * L_reh
    L_cf  = 1/|D_cf|  sum over D_cf  of -log pi'(a'_t | h_t, q)   t = tau and on, h_t without e: the heart of it
    L_reh = 1/|D_reh| sum over D_reh of -log pi'(a_t | h_t, q)

where log pi'(a | h) is the sum over the action's tokens, so a token of a pair in D_cf weighs 1/|D_cf| and one in
D_reh beta/|D_reh|. A step sees one of the M batches of an epoch and takes M times its share of L: over an epoch
that is L.
"""
import gc
import json
import random
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
from tqdm import tqdm

import baselines
import ranks
import warm_start
from envs import UserError
from eval import comparison, make_engine, make_worlds, open_policy, pick_tasks, report, sample
from leafe import (Targets, Tree, chat_pairs, explore, read_trees, reflection_figures, rows_of, stage1_figures,
                   targets)
from model import Chat
from packing import Batch, Packed, pack, packed_nll, token_logp
from report import comparison_page, page
from run import Config, Jsonl, RunFolder, guarded, load_config, read_jsonl, refuse, write_aside
from weights import add_lora, load_adapter, lora_parameters, save_adapter
COMPARED = ("leafe", "rft", "early_experience", "grpo", "grpo+leafe", "ace")


def loss_weights(trees: list[Tree], pairs: Targets, beta: float) -> list[dict[int, tuple[float, float]]]:
    """For each tree: turn -> what each of its action's tokens weighs (in L_cf, in beta L_reh)."""
    alone = beta == float("inf")                       # L_reh alone
    weights: list[dict[int, tuple[float, float]]] = [{} for _ in trees]
    for k, i in [] if alone else pairs.D_cf:
        weights[k][i] = (1 / len(pairs.D_cf), 0.0)
    for k, i in pairs.D_reh:
        weights[k][i] = (weights[k].get(i, (0.0, 0.0))[0], (1 if alone else min(beta, 1e30)) / len(pairs.D_reh))
    return weights


def epoch(rows: list[Packed], cfg: Config, number: int) -> list[list[Packed]]:
    """The rows, shuffled anew each epoch, in batches of about cfg.batch_tokens tokens."""
    order = random.Random(f"epoch/{cfg.seed}/{number}").sample(range(len(rows)), len(rows))
    per = max(1, cfg.batch_tokens // cfg.row_tokens)
    return [[rows[i] for i in order[at:at + per]] for at in range(0, len(order), per)]


def sft_batches(before: list[Packed], rows: list[Packed], cfg: Config, first: int) -> Iterator[Batch]:
    """Steps first..cfg.steps: an epoch of `before`, then `rows` for the rest."""
    ahead = len(epoch(before, cfg, 0))
    for step in range(first, cfg.steps if rows else 0):
        part, at = (before, step) if step < ahead else (rows, step - ahead)
        per_epoch = len(epoch(part, cfg, 0))
        warm, decay = (step + 1) / (cfg.warmup + 1), 1 - (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        keep = (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.steps
        yield Batch(epoch(part, cfg, at // per_epoch)[at % per_epoch], per_epoch, min(warm, decay, 1.0),
                    step + 1 if keep else None)


@contextmanager
def recomputing(model, on: bool) -> Iterator[None]:
    """Gradient checkpointing, while a step is taken; transformers does it in training mode only."""
    if on:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.train()
    yield
    if on:
        model.gradient_checkpointing_disable()
        model.eval()


def optimise(model, batches: Callable[[int], Iterator[Batch]], loss: Callable, names: tuple[str, str], cfg: Config,
             folder: Path, metrics: Jsonl, round_: int, total: int | None) -> None:
    """An AdamW step on the adapter for each batch of `batches(first)`. Goes on from folder/checkpoint.pt."""
    parameters = lora_parameters(model)                # always trainable; sampling runs in inference mode
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
    state = load_checkpoint(folder, parameters, optimizer, round_)
    bar = tqdm(total=total, initial=state["step"], desc=f"train, round {round_}", unit="step",
               disable=ranks.rank() > 0)
    began, before = time.time(), state["tokens"]
    for batch in batches(state["resume"]):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * batch.lr
        sums, mine = torch.zeros(2), []
        with recomputing(model, cfg.gradient_checkpointing):
            for row in ranks.share(batch.rows):
                try:
                    losses = loss(model, row) * batch.scale            # (2,)
                    losses.sum().backward()
                except torch.OutOfMemoryError:
                    raise UserError(f"row_tokens: out of memory in a training row of {len(row.ids)} tokens; lower "
                                    f"row_tokens= (and context=), or set gradient_checkpointing=true") from None
                sums += losses.detach().cpu()
                if ranks.world() > 1:
                    mine.append(ranks.take_gradients(parameters, losses))
        if ranks.world() > 1:
            sums = ranks.give_gradients(parameters, mine, len(batch.rows))
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["tokens"] += sum(len(row.ids) for row in batch.rows)
        shown = dict(zip(names, sums.tolist()))
        metrics.append(dict(round=round_, step=state["step"], **shown, gradient_norm=float(norm),
                            lr=cfg.lr * batch.lr, tokens=state["tokens"], seconds=round(time.time() - began, 2)))
        bar.update()
        bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                            + f", {(state['tokens'] - before) / (time.time() - began):.0f} tokens/s")
        if batch.resume is not None:
            state["resume"] = batch.resume
            save_checkpoint(folder, parameters, optimizer, state)
    bar.close()


def save_checkpoint(folder: Path, parameters, optimizer, state: dict[str, int]) -> None:
    """Adapter, optimiser, position; the order of the data follows from the seed, nothing else is random."""
    if ranks.rank():
        return
    aside = folder / "checkpoint.pt.new"
    torch.save(dict(state=state, parameters=[p.detach().cpu() for p in parameters],
                    optimizer=optimizer.state_dict()), aside)
    aside.replace(folder / "checkpoint.pt")


def load_checkpoint(folder: Path, parameters, optimizer, round_: int) -> dict[str, int]:
    """Where to go on: optimiser steps and tokens so far, and what the batches resume from. 0 without a checkpoint."""
    path = folder / "checkpoint.pt"
    saved = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
    if not saved or saved["state"]["round"] != round_:
        return dict(round=round_, step=0, tokens=0, resume=0)
    with torch.no_grad():
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]


def stage_1(model, chat: Chat, cfg: Config, make: Callable, tasks: list[str], store: Jsonl,
            round_: int) -> tuple[list[Tree], Targets]:
    """Explore with the policy as it is, or take the trees of another run; say what that gave."""
    if cfg.trees:
        trees = read_trees(read_jsonl(Path(cfg.trees) / "trees.jsonl"), round_, tasks)
    else:
        lessons = baselines.read_lessons(cfg.experiences) if cfg.experiences else {}
        trees = explore(make_engine(model, chat, cfg), chat, make, cfg, tasks, store, round_, lessons=lessons)
    pairs = targets(trees, cfg, chat.stop)
    print(stage1_figures(trees, pairs))
    print(reflection_figures(trees, make))
    if not pairs.D_reh and (cfg.beta == float("inf") or not pairs.D_cf):
        raise UserError("exploration found nothing to train on: no correction and no success; see trees.jsonl, and "
                        "try more attempts=, train_tasks=, or a stronger model=")
    return trees, pairs


def without_e(model, trees: list[Tree], pairs: list[tuple[int, int]], row_tokens: int) -> list[float]:
    """log pi'(a'_t | h_t, q) of each pair of D_cf, the experience out of view: what L_cf raises."""
    numbers: list[dict[int, tuple]] = [{} for _ in trees]
    for n, (k, i) in enumerate(pairs):
        numbers[k][i] = (n + 1.0,)                     # in place of weights: whose token it is
    found = torch.zeros(len(pairs), dtype=torch.float64)
    with torch.no_grad():
        for row in (pack(group) for group in rows_of(trees, numbers, row_tokens)):
            found.index_add_(0, row.weights[:, 0].long() - 1, token_logp(model, [row]).double().cpu())
    return found.tolist()


def fit(model, before: list[Packed], rows: list[Packed], names: tuple[str, str], cfg: Config, folder: Path,
        metrics: Jsonl, round_: int) -> None:
    """SFT (Stage 2, and the baselines that imitate): cfg.steps optimiser steps; `before` is for sft_batches."""
    optimise(model, partial(sft_batches, before, rows, cfg), lambda model, row: packed_nll(model, [row]), names, cfg,
             folder, metrics, round_, cfg.steps)


def train(model, chat: Chat, cfg: Config, folder: RunFolder, round_: int) -> None:
    """One round of cfg.method; by adapter_<round>/ (ace: playbook.txt) a rerun knows that it is done."""
    make, tasks = make_worlds(cfg), pick_tasks(cfg, "train")
    store, metrics = folder.jsonl("trees.jsonl"), folder.jsonl("metrics.jsonl", alone=True)
    if cfg.method == "leafe":
        trees, pairs = stage_1(model, chat, cfg, make, tasks, store, round_)
        if ranks.rank() == 0:
            write_aside(folder.path / "sft.jsonl", "".join(
                json.dumps(pair) + "\n" for pair in chat_pairs(trees, pairs, chat, make().rules)))
        rows, early = baselines.packed_rows(trees, loss_weights(trees, pairs, cfg.beta), cfg), []
        if ranks.rank() == 0:
            early = without_e(model, trees, pairs.D_cf, cfg.row_tokens)
        fit(model, [], rows, ("L_cf", "beta_L_reh"), cfg, folder.path, metrics, round_)
        if ranks.rank() == 0:
            late = without_e(model, trees, pairs.D_cf, cfg.row_tokens)
            write_aside(folder.path / "distilled.json", json.dumps(dict(round=round_, pairs=[
                (trees[k].task, i, *both) for (k, i), *both in zip(pairs.D_cf, early, late)])))
    elif cfg.method == "ace":
        lessons = baselines.ace(model, chat, cfg, make, tasks, store)
        if ranks.rank() == 0:
            write_aside(folder.path / "playbook.txt", lessons)
        ranks.wait_for_all()
    elif cfg.method == "grpo":
        batches = partial(baselines.grpo, model, chat, cfg, make, tasks, store, metrics)
        optimise(model, batches, partial(baselines.grpo_loss, cfg), ("L_clip", "beta_KL"), cfg, folder.path, metrics,
                 round_, None)
    else:
        before, rows = (baselines.rft if cfg.method == "rft" else baselines.early_experience)(
            model, chat, cfg, make, tasks, store, folder)
        fit(model, before, rows, ("L_extra", "L_demonstrations"), cfg, folder.path, metrics, round_)
    store.close()
    metrics.close()
    if cfg.method != "ace":
        save_adapter(model, folder.path / f"adapter_{round_}", cfg.model)


def begin(model, chat: Chat, cfg: Config, folder: RunFolder) -> None:
    """The warm start, in warm_start/; there from then on."""
    done = folder.path / "warm_start"
    if (done / "adapter_config.json").exists():
        load_adapter(model, done)
        return
    with folder.metered():
        metrics = folder.jsonl("metrics.jsonl", alone=True)
        rows, own = warm_start.rows(chat, cfg), replace(cfg, steps=cfg.warm_steps)
        fit(model, [], rows, ("L_actions", "L_reflections"), own, folder.path, metrics, 0)
        metrics.close()
        save_adapter(model, done, cfg.model)


def run(cfg: Config) -> None:
    """One run in its folder: the base's samples, training, the trained policy's samples, the table."""
    refuse(cfg, adapter="is what eval.py samples with; train.py starts from init=",
           playbook="is what eval.py puts into the prompt; method=ace writes its own")
    if cfg.method != "leafe":
        baselines.budget(cfg)                          # before anything is written or sampled
    for key in ("trees", "experiences"):
        if (other := getattr(cfg, key)) and not (Path(other) / "trees.jsonl").is_file():
            raise UserError(f"{key}: {other} has no trees.jsonl")
    test, _ = pick_tasks(cfg, "test"), pick_tasks(cfg, "train")
    if cfg.warm_start:
        warm_start.tasks(cfg)
    began, folder = time.time(), RunFolder(cfg)
    model, chat = open_policy(cfg, cfg.init)
    if not cfg.init and cfg.method != "ace":
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    samples = folder.jsonl("samples.jsonl")
    if cfg.warm_start:
        begin(model, chat, cfg, folder)
    if cfg.evaluate_base:
        sample(model, chat, cfg, samples, "warm_start" if cfg.warm_start else "base", test)
    for round_ in range(1, cfg.rounds + 1):
        done = folder.path / f"adapter_{round_}"
        if (done / "adapter_config.json").exists():
            load_adapter(model, done)
        elif not (folder.path / "playbook.txt").exists():
            with folder.metered():
                train(model, chat, cfg, folder, round_)
    if cfg.method == "ace":
        cfg = replace(cfg, playbook=str(folder.path / "playbook.txt"))
    else:
        save_adapter(model, folder.path / "adapter", cfg.model)
    sample(model, chat, cfg, samples, cfg.method, test)
    samples.close()
    print(report(folder.path, cfg, test))
    if ranks.rank() == 0:
        write_aside(folder.path / "report.html", page(folder.path))
    made = [name for name in ("report.html", "passk.json", "samples.jsonl", "trees.jsonl", "sft.jsonl",
                              "metrics.jsonl", "adapter", "playbook.txt") if (folder.path / name).exists()]
    print(f"results: {folder.path}/ ({', '.join(made)})  {(time.time() - began) / 60:.1f} minutes")


def compare(args: list[str], cfg: Config) -> None:
    """Every method on every seed, each a run of its own in cfg.out/<method>-<seed>/, with the tasks and the number
    of environment steps of LEAFE's Stage 1. grpo+leafe starts LEAFE from GRPO's adapter, as the paper does."""
    for seed in cfg.seeds:
        for name in COMPARED:
            folder = {other: Path(cfg.out) / f"{other}-{seed}" for other in COMPARED}
            own = dict(method=name.rpartition("+")[2], seed=seed, out=folder[name], evaluate_base=name == "leafe",
                       trees="" if name.endswith("leafe") else folder["leafe"],
                       env_steps=None if name.endswith("leafe") else cfg.env_steps,
                       init=folder["grpo"] / "adapter" if name == "grpo+leafe" else "",
                       rounds=cfg.rounds if name.endswith("leafe") else 1)
            print(f"\n{name}, seed {seed}")
            run(load_config([*args, *(f"{key}={'null' if value is None else value}" for key, value in own.items())]))
            gc.collect()                               # a model may be large: it goes before the next one comes
    print(comparison(Path(cfg.out)))
    if ranks.rank() == 0:
        write_aside(Path(cfg.out) / "report.html", comparison_page(Path(cfg.out)))
    print(f"results: {cfg.out}/report.html")


def main(args: list[str]) -> None:
    ranks.join()
    cfg = load_config(args)
    compare(args, cfg) if cfg.method == "compare" else run(cfg)


if __name__ == "__main__":
    guarded(main, __doc__)
