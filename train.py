"""LEAFE, the whole loop: evaluate the base, explore, distil, evaluate.

    python train.py config.yaml                       about seven minutes on two CPU cores with the embedded model
    python train.py config.yaml preset=smoke          seconds; to see that all of it runs
    python train.py config.yaml seed=1 out=out/seed1  any key of config.yaml; the same command again resumes
    python train.py config.yaml beta=.inf trees=out/quest out=out/reh      L_reh alone, on the trees of another run

Stage 2, experience distillation, is here: plain next-token SFT of

    L = L_cf + beta * L_reh
    L_cf  = 1/|D_cf|  sum over D_cf  of -log pi'(a'_tau | h_tau, q)   h_tau without e: the heart of the method
    L_reh = 1/|D_reh| sum over D_reh of -log pi'(a_t | h_t, q)

where log pi'(a | h) is the sum over the action's tokens, so a token of a pair in D_cf weighs 1/|D_cf| and one in
D_reh beta/|D_reh|. A step sees one of the M batches of an epoch and takes M times its share of L: over an epoch
that is L.
"""
import random
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from envs import UserError, make_env
from eval import make_engine, open_policy, pick_tasks, report, sample
from leafe import Targets, Tree, explore, read_trees, reflection_figures, stage1_figures, targets
from model import Chat, Packed, Segment, add_lora, load_adapter, lora_parameters, pack, packed_nll, save_adapter
from run import Config, Jsonl, RunFolder, guarded, load_config, read_jsonl


def segments(tree: Tree, weights: dict[int, tuple[float, float]]) -> list[Segment]:
    """The tree, pruned to the ancestors of the turns that bear loss. weights: turn -> (in L_cf, in L_reh)."""
    kept = sorted({a for turn in weights for a in tree.ancestors(turn)})
    place = {turn: n for n, turn in enumerate(kept)}
    found = []
    for i in kept:
        turn = tree.turns[i]
        loss = [(0.0, 0.0)] * len(turn.obs_ids) + [weights.get(i, (0.0, 0.0))] * len(turn.action_ids)
        found.append(Segment(turn.ids, loss, place.get(turn.parent)))
    return found


def rows_of(trees: list[Tree], pairs: Targets, cfg: Config) -> list[list[list[Segment]]]:
    """Groups of pruned trees of at most cfg.row_tokens tokens each; a larger tree is split by its targets."""
    alone = cfg.beta == float("inf")                   # L_reh alone
    weights: list[dict[int, tuple[float, float]]] = [{} for _ in trees]
    for k, i in [] if alone else pairs.D_cf:
        weights[k][i] = (1 / len(pairs.D_cf), 0.0)
    for k, i in pairs.D_reh:
        weights[k][i] = (weights[k].get(i, (0.0, 0.0))[0], (1 if alone else min(cfg.beta, 1e30)) / len(pairs.D_reh))
    todo = [(tree, w) for tree, w in zip(trees, weights) if w]
    rows, room = [], 0
    while todo:
        tree, w = todo.pop(0)
        piece = segments(tree, w)
        size = sum(len(s.ids) for s in piece)
        if size > cfg.row_tokens and len(w) > 1:
            turns = sorted(w)
            halves = turns[:len(turns) // 2], turns[len(turns) // 2:]
            todo[:0] = [(tree, {i: w[i] for i in half}) for half in halves]
            continue
        if size > room:
            rows.append([])
            room = cfg.row_tokens
        rows[-1].append(piece)
        room -= size
    return rows


def epoch(rows: list[Packed], cfg: Config, number: int) -> list[list[Packed]]:
    """The rows, shuffled anew each epoch, in batches of about cfg.batch_tokens tokens."""
    order = random.Random(f"epoch/{cfg.seed}/{number}").sample(range(len(rows)), len(rows))
    per = max(1, cfg.batch_tokens // cfg.row_tokens)
    return [[rows[i] for i in order[at:at + per]] for at in range(0, len(order), per)]


def distil(model, trees: list[Tree], pairs: Targets, cfg: Config, folder: Path, metrics: Jsonl,
           round_: int) -> None:
    """Stage 2: cfg.steps optimiser steps on L = L_cf + beta L_reh. Goes on from folder/checkpoint.pt."""
    rows = [pack(group) for group in rows_of(trees, pairs, cfg)]
    parameters = lora_parameters(model)                # always trainable; sampling runs in inference mode
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
    step = load_checkpoint(folder, parameters, optimizer, round_)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.train()                                  # transformers checkpoints in training mode only
    per_epoch = len(epoch(rows, cfg, 0))
    bar = tqdm(total=cfg.steps, initial=step, desc=f"distil, round {round_}", unit="step")
    began, trained = time.time(), 0
    while step < cfg.steps:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / (cfg.warmup + 1),
                                       1 - max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        batch, sums = epoch(rows, cfg, step // per_epoch)[step % per_epoch], torch.zeros(2)
        for row in batch:
            losses = packed_nll(model, [row]) * per_epoch     # (2,): the batch's estimate of L_cf, beta L_reh
            losses.sum().backward()
            sums += losses.detach().cpu()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        step, trained = step + 1, trained + sum(len(row.ids) for row in batch)
        metrics.append(dict(round=round_, step=step, L_cf=float(sums[0]), beta_L_reh=float(sums[1]),
                            gradient_norm=float(norm), lr=optimizer.param_groups[0]["lr"], tokens=trained,
                            seconds=round(time.time() - began, 2)))
        bar.update()
        bar.set_postfix_str(f"L_cf {sums[0]:.3f}, beta L_reh {sums[1]:.3f}, "
                            f"{trained / (time.time() - began):.0f} tokens/s")
        if step % cfg.checkpoint_every == 0 or step == cfg.steps:
            save_checkpoint(folder, parameters, optimizer, round_, step)
    bar.close()
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.eval()


def save_checkpoint(folder: Path, parameters, optimizer, round_: int, step: int) -> None:
    """Adapter, optimiser, position; the order of the data follows from the seed, nothing else is random."""
    aside = folder / "checkpoint.pt.new"
    torch.save(dict(round=round_, step=step, parameters=[p.detach().cpu() for p in parameters],
                    optimizer=optimizer.state_dict()), aside)
    aside.replace(folder / "checkpoint.pt")


def load_checkpoint(folder: Path, parameters, optimizer, round_: int) -> int:
    """The step to go on from; 0 if there is no checkpoint of this round."""
    path = folder / "checkpoint.pt"
    saved = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
    if not saved or saved["round"] != round_:
        return 0
    with torch.no_grad():
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def run_round(model, chat: Chat, cfg: Config, folder: RunFolder, round_: int) -> None:
    """Explore with the policy as it is, then distil; by adapter_<round>/ a rerun knows that this is done."""
    make = partial(make_env, cfg.env, cfg.data)
    tasks = pick_tasks(cfg, "train", cfg.train_tasks)
    if cfg.trees:
        trees = read_trees(read_jsonl(Path(cfg.trees) / "trees.jsonl"), round_, tasks)
    else:
        store = folder.jsonl("trees.jsonl")
        trees = explore(make_engine(model, chat, cfg), chat, make, cfg, tasks, store, round_)
        store.close()
    pairs = targets(trees, cfg, chat.stop)
    print(stage1_figures(trees, pairs))
    print(reflection_figures(trees, make))
    if not pairs.D_reh and (cfg.beta == float("inf") or not pairs.D_cf):
        raise UserError("exploration found nothing to train on: no correction and no success; see trees.jsonl, and "
                        "try more attempts=, train_tasks=, or a stronger model=")
    metrics = folder.jsonl("metrics.jsonl")
    distil(model, trees, pairs, cfg, folder.path, metrics, round_)
    metrics.close()
    save_adapter(model, folder.path / f"adapter_{round_}", cfg.model)


def main(args: list[str]) -> None:
    cfg = load_config(args)
    if cfg.trees and not (Path(cfg.trees) / "trees.jsonl").is_file():
        raise UserError(f"trees: {cfg.trees} has no trees.jsonl")
    began, folder = time.time(), RunFolder(cfg, train=True)
    test = pick_tasks(cfg, cfg.split, cfg.test_tasks)
    model, chat = open_policy(cfg)
    if not cfg.adapter:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    samples = folder.jsonl("samples.jsonl")
    if cfg.evaluate_base:
        sample(model, chat, cfg, samples, "base", test)
    for round_ in range(1, cfg.rounds + 1):
        done = folder.path / f"adapter_{round_}"
        if (done / "adapter_config.json").exists():
            load_adapter(model, done)
        else:
            run_round(model, chat, cfg, folder, round_)
    save_adapter(model, folder.path / "adapter", cfg.model)
    sample(model, chat, cfg, samples, "leafe", test)
    samples.close()
    print(report(folder.path, cfg, test))
    print(f"results: {folder.path}/ (passk.json, samples.jsonl, trees.jsonl, metrics.jsonl, adapter/)  "
          f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    guarded(main, __doc__)
