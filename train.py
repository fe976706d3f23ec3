"""The whole loop: evaluate the base, train a policy by `method` (LEAFE: explore, distil), evaluate.

    python train.py config.yaml                       about three minutes on two CPU cores with the embedded model
    python train.py config.yaml preset=smoke          seconds; to see that all of it runs
    python train.py config.yaml method=grpo trees=out/quest out=out/grpo   a baseline, with that run's budget of steps
    python train.py config.yaml preset=qwen7b plan=true                    what it will take of a card, and nothing else
    python train.py config.yaml method=compare out=out/compare             all methods, on all cfg.seeds

Any key of config.yaml goes on the command line as key=value; each is explained there. A method is a file with
`train(run, round_)`, methods/grpo.py or your own; its keys: python train.py config.yaml method=grpo -h

Stage 2, experience distillation, is here: plain next-token SFT of

    L = L_cf + beta * L_reh
    L_cf  = 1/|D_cf|  sum over D_cf  of -log pi'(a'_t | h_t, q)   t = tau and on, h_t without e: the heart of it
    L_reh = 1/|D_reh| sum over D_reh of -log pi'(a_t | h_t, q)

where log pi'(a | h) is the sum over the action's tokens, so a token of a pair in D_cf weighs 1/|D_cf| and one in
D_reh beta/|D_reh|. A step sees one of the M batches of an epoch and takes M times its share of L: on average over an
epoch that is L.
"""
import math
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

from config import Config, UserError, guarded, load_config, method_file, read_text, refuse, visible    # before torch: Ctrl-C

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

import ranks
from eval import sample
from forward import ran_out
from leafe import Targets, Tree, explore, read_trees, targets
from lora import aside, files, finite
from packing import Batch, Packed, Weights, halves, packed_nll, training_rows
from run import Run, open_run, plans, provenance, read_jsonl, report_file, write_aside


# ------------------------------------------------------------------------------------------------- one round of LEAFE
def train(run: Run, round_: int) -> None:
    """Explore, distil. Ends with the policy trained; who called it saves it."""
    # Stage 1: a rollback tree for every task, or the trees of another run
    if run.cfg.trees:
        path = Path(run.cfg.trees) / "trees.jsonl"
        trees = read_trees(read_jsonl(path), round_, run.train_tasks)
    else:
        trees = explore(run, run.train_tasks, round_)
    # Stage 2: the experience that it holds goes into the weights
    learn(run, round_, trees)


def learn(run: Run, round_: int, trees: list[Tree]) -> None:
    """Find the targets, say what Stage 1 cost and gave, distil."""
    pairs = targets(trees, run.cfg, run.policy.chat.stop)
    if run.cfg.rehearse_reflections:                   # not the paper's
        trees = rehearsal().with_reflections(run, trees, pairs)
    figures, words = report_file().stage_1(trees, pairs, run.world())
    print(visible(words))
    run.say(round=round_, **figures)
    if not any(loss_weights(trees, pairs, run.cfg.beta, run.cfg.gamma)):
        raise UserError(report_file().nothing_found(trees, run.cfg, run.policy.chat.stop))
    distil(run, round_, trees, pairs)


def distil(run: Run, round_: int, trees: list[Tree], pairs: Targets) -> None:
    """Stage 2: SFT of L_cf + beta L_reh, the experience out of view. What it did to each correction is reported."""
    names = ("L_cf", "beta_L_reh", "gamma_L_ref")[:3 if pairs.D_ref else 2]
    rows = training_rows(trees, loss_weights(trees, pairs, run.cfg.beta, run.cfg.gamma), run.cfg.row_tokens)
    with report_file().distilled(run, round_, trees, pairs):
        fit(run, round_, names, rows)


def loss_weights(trees: list[Tree], pairs: Targets, beta: float, gamma: float = 1.0) -> list[Weights]:
    """For each tree: turn -> what each of its action's tokens weighs (in L_cf, in beta L_reh; with reflections rehearsed
    also in gamma L_ref). What would weigh 0 is left out."""
    alone = beta == float("inf")                       # L_reh alone
    weights: list[Weights] = [{} for _ in trees]
    for k, i in [] if alone else pairs.D_cf:
        weights[k][i] = (1 / len(pairs.D_cf), 0.0)
    for k, i in pairs.D_reh if beta else []:
        in_cf = weights[k].get(i, (0.0, 0.0))[0]
        weights[k][i] = (in_cf, (1 if alone else min(beta, 1e30)) / len(pairs.D_reh))
    if pairs.D_ref:
        weights = [{i: (*weight, 0.0) for i, weight in tree.items()} for tree in weights]
    for k, i in pairs.D_ref if gamma else []:
        weights[k][i] = (0.0, 0.0, gamma / len(pairs.D_ref))
    return weights


# --------------------------------------------------------------------------- the optimiser, for every method
@dataclass
class Objective:
    """What is minimised: the sum of its losses, each with a name and a column of a row's weights."""
    names: tuple[str, ...]
    loss: Callable[..., torch.Tensor]                  # (model, row) -> (C,), one a name, with gradient
    steps: int | None                                  # optimiser steps in all; None: not known beforehand


def fit(run: Run, round_: int, names: tuple[str, ...], rows: list[Packed], before: list[Packed] = []) -> None:
    """SFT (Stage 2, and the baselines that imitate): cfg.steps optimiser steps on `rows`, those of the first epoch
    on `before`. `names`: of the losses, one for each column of the rows' weights."""
    def loss(model, row: Packed) -> torch.Tensor:
        return packed_nll(model, [row])
    optimise(run, round_, Objective(names, loss, run.cfg.steps), partial(sft_batches, before, rows, run.cfg))


def optimise(run: Run, round_: int, objective: Objective, batches: Callable[[int], Iterator[Batch]]) -> None:
    """An AdamW step on the adapter for each batch of `batches(first)`. Goes on from the run's checkpoint.pt."""
    cfg, model, names = run.cfg, run.policy.model, objective.names
    parameters = run.policy.parameters()               # always trainable; sampling runs in inference mode
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
    state = load_checkpoint(run.folder.path, parameters, optimizer, round_)
    room = Room(cfg.gradient_checkpointing, cfg.row_tokens, 2.0**16 if half(model) else 1.0)
    bar = tqdm(total=objective.steps, initial=state["step"], desc=f"train, round {round_}", unit="step",
               disable=ranks.rank() > 0)
    began, before, pace = time.time(), state["tokens"], plans().hours.Pace(run, "training")
    for batch in batches(state["resume"]):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * batch.lr
        # gradients: whole trees, a row at a time, added up over the rows of the batch (and over ranks)
        *losses, norm = gradients(run, objective, batch, room)
        shown = dict(zip(names, losses))
        if not all(map(math.isfinite, [*losses, norm])):
            raise diverged(cfg, state["step"] + 1, shown, norm)
        # the step
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["tokens"] += sum(len(row.ids) for row in batch.rows)
        # say what it did, and keep where to go on from
        told = dict(round=round_, step=state["step"])
        if not any(told.items() <= record.items() for record in run.metrics.records):    # before a kill it may have been told
            run.metrics.append(dict(**told, **shown, gradient_norm=norm, lr=cfg.lr * batch.lr,
                                    tokens=state["tokens"], seconds=round(time.time() - began, 2)))
        pace.tell(state["tokens"] - before)
        bar.update()
        bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                            + f", {(state['tokens'] - before) / (time.time() - began):.0f} tokens/s")
        if batch.resume is not None:
            if not finite(model):
                raise diverged(cfg, state["step"], shown, norm)
            state["resume"] = batch.resume
            save_checkpoint(run.folder.path, parameters, optimizer, state)
    bar.close()


@dataclass
class Room:
    """What training has room for. Where memory runs out, or float16 overflows, it gets less for the rest of the run."""
    recompute: bool                                    # as gradient_checkpointing
    row_tokens: int                                    # longer rows are parted
    loss_scale: float                                  # of float16: a power of two keeps small gradients from vanishing

    def tighten(self, model, row: Packed) -> list[Packed]:
        """Memory ran out in this row; what to try in its place."""
        torch.cuda.empty_cache()
        if not self.recompute and recomputable(model):
            self.recompute = True
            print("out of memory: going on with gradient_checkpointing=true", file=sys.stderr)
            return [row]
        if len(row.targets) > 1:
            self.row_tokens = min(self.row_tokens, len(row.ids) - 1)
            print(f"out of memory: going on with training rows in halves, of {len(row.ids)} tokens and more", file=sys.stderr)
            return halves(row)
        raise UserError(f"row_tokens: out of memory in a training row of {len(row.ids)} tokens, which cannot be "
                        f"parted further; lower context=, or take a smaller model")


def half(model) -> bool:
    return model.get_input_embeddings().weight.dtype == torch.float16


def gradients(run: Run, objective: Objective, batch: Batch, room: Room) -> list[float]:
    """Sets the gradients of a batch's loss. Returns the losses, and behind them the gradients' norm before it was clipped:
    what an optimiser step waits for the device for, once."""
    parameters, names = run.policy.parameters(), objective.names
    while True:
        mine = (row_gradients(run, objective, row, batch.scale, room) for row in ranks.share(batch.rows))
        losses = ranks.add_gradients(parameters, mine, len(batch.rows), len(names))
        norm = torch.nn.utils.clip_grad_norm_(parameters, run.cfg.clip)
        figures = torch.cat([losses, norm[None]]).tolist()
        if room.loss_scale == 1 or all(map(math.isfinite, figures)):
            return figures
        room.loss_scale /= 2


def row_gradients(run: Run, objective: Objective, row: Packed, scale: float, room: Room) -> torch.Tensor:
    """The losses of a row and their gradient, one behind the other: (C + numbers of the adapter,). Where memory runs out,
    the sum over parts of the row, each with some of its targets."""
    todo = halves(row) if len(row.ids) > room.row_tokens else [row]
    total = None
    while todo:
        part = todo.pop(0)
        found = tried(run, objective, part, scale, room)
        if found is None:
            todo = room.tighten(run.policy.model, part) + todo
        else:
            total = found if total is None else total + found
    assert total is not None
    return total


def tried(run: Run, objective: Objective, row: Packed, scale: float, room: Room) -> torch.Tensor | None:
    """As row_gradients; None if memory ran out."""
    model, parameters = run.policy.model, run.policy.parameters()
    try:
        with torch.enable_grad(), recomputing(model, room.recompute):  # a world with a network of its own may switch it off
            losses = objective.loss(model, row) * scale                # (C,)
            found = torch.autograd.grad(losses.sum() * room.loss_scale, parameters, allow_unused=True)
        # a layer that none of the row's tokens came by has none
        each = [torch.zeros_like(p) if one is None else one / room.loss_scale for p, one in zip(parameters, found)]
        return torch.cat([losses.detach().float(), *(one.flatten() for one in each)])
    except RuntimeError as error:
        if not ran_out(error):
            raise
    return None


def diverged(cfg: Config, step: int, losses: dict[str, float], norm: float) -> UserError:
    """What was computed in optimiser step `step`, or the weights after it, is no finite number."""
    told = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
    return UserError(f"lr: training diverged in step {step} ({told}, gradient norm {norm:.3g}); lower lr={cfg.lr}, "
                     f"lora_alpha={cfg.lora_alpha} or a loss's weight, with another out=; what was before it stays")


def sft_batches(before: list[Packed], rows: list[Packed], cfg: Config, first: int) -> Iterator[Batch]:
    """Steps first..cfg.steps: an epoch of `before`, then `rows` for the rest."""
    ahead = len(epoch(before, cfg, 0))
    for step in range(first, cfg.steps if rows else 0):
        part, at = (before, step) if step < ahead else (rows, step - ahead)
        per_epoch = len(epoch(part, cfg, 0))
        warm = (step + 1) / (cfg.warmup + 1)
        decay = 1 - (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        keep = (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.steps
        batch = epoch(part, cfg, at // per_epoch)[at % per_epoch]
        yield Batch(batch, per_epoch, min(warm, decay, 1.0), step + 1 if keep else None)


def epoch(rows: list[Packed], cfg: Config, number: int) -> list[list[Packed]]:
    """The rows, shuffled anew each epoch, in batches of about cfg.batch_tokens tokens."""
    order = random.Random(f"epoch/{cfg.seed}/{number}").sample(range(len(rows)), len(rows))
    per = max(1, cfg.batch_tokens // cfg.row_tokens)
    return [[rows[i] for i in order[at:at + per]] for at in range(0, len(order), per)]


@contextmanager
def recomputing(model, on: bool) -> Iterator[None]:
    """Gradient checkpointing, while a step is taken: a layer keeps its input alone and runs again for the gradient. Not
    by transformers' own, which does it in training mode only: that switches dropout and noise of routers on."""
    layers = recomputable(model) if on else []
    if on and not layers:
        raise UserError(f"gradient_checkpointing: the layers of {type(model).__name__} do not take it; set it to false")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward                            # the class's is seen again


def recomputable(model) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def save_checkpoint(folder: Path, parameters, optimizer, state: dict[str, int]) -> None:
    """Adapter, optimiser, position; the order of the data follows from the seed, nothing else is random."""
    if ranks.rank():
        return
    with aside(folder / "checkpoint.pt") as file:
        torch.save(dict(state=state, parameters=[p.detach().cpu() for p in parameters],
                        optimizer=optimizer.state_dict()), file)


def load_checkpoint(folder: Path, parameters, optimizer, round_: int) -> dict[str, int]:
    """Where to go on: optimiser steps and tokens so far, and what the batches resume from. 0 without a checkpoint."""
    path, start = folder / "checkpoint.pt", dict(round=round_, step=0, tokens=0, resume=0)
    if not path.exists():
        return start
    with files().reading("", path, f"delete it: the training of round {round_} begins anew"), torch.no_grad():
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["state"]["round"] != round_:
            return start
        files().check_checkpoint(saved, parameters, start)
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        return saved["state"]


# ---------------------------------------------------------------------------------------------------- the whole loop
def warm_start():
    """The door of methods/warm_start.py."""
    from methods import warm_start as module
    return module


def rehearsal():
    """The door of methods/rehearse.py."""
    from methods import rehearse
    return rehearse


def whole_run(cfg: Config) -> None:
    """One run in its folder: the base's samples, training, the trained policy's samples, the table."""
    began, method = time.time(), method_file(cfg.method)
    refuse(cfg, adapter="is what eval.py samples with; train.py starts from init=",
           playbook="is what eval.py puts into the prompt; method=ace writes its own")
    if cfg.trees and not (Path(cfg.trees) / "trees.jsonl").is_file():
        raise UserError(f"trees: {cfg.trees} has no trees.jsonl")
    if hasattr(method, "check"):
        method.check(cfg)                              # before anything is written or sampled
    if cfg.warm_start:
        warm_start().tasks(cfg)
    run = open_run(cfg, cfg.init, training=True)
    with recomputing(run.policy.model, cfg.gradient_checkpointing):
        pass                                           # it can be: known before anything is sampled
    provenance().settle(run)                          # is what lies there, or in trees=, of this model and world?
    folder = run.folder.path
    if cfg.warm_start:
        warm_start().begin(run)
    if cfg.evaluate_base:
        sample(run, "warm_start" if cfg.warm_start or Path(cfg.init).name == "warm_start" else "base")
    for round_ in range(1, cfg.rounds + 1):
        done = folder / f"adapter_{round_}"
        # by adapter_<round>/ (without weights of its own, playbook.txt) a rerun knows that a round is done
        if (done / "adapter_config.json").exists():
            run.policy.load(done)
        elif not (folder / "playbook.txt").exists():
            with run.folder.metered():
                method.train(run, round_) if method else train(run, round_)
            run.policy.save(done)
        if cfg.evaluate_rounds and round_ < cfg.rounds:
            sample(run, f"{Path(cfg.method).stem}-{round_}", round_)
    if (folder / "playbook.txt").exists():
        run = replace(run, playbook=read_text(folder / "playbook.txt").strip())
    else:
        run.policy.save(folder / "adapter")
    sample(run, Path(cfg.method).stem, cfg.rounds)
    run.folder.close()
    print(visible(report_file().report(folder, cfg, run.test_tasks)))
    if ranks.rank() == 0:
        write_aside(folder / "report.html", report_file().page(folder))
    made = [name for name in ("report.html", "passk.json", "samples.jsonl", "trees.jsonl", "sft.jsonl",
                              "metrics.jsonl", "adapter", "playbook.txt") if (folder / name).exists()]
    print(visible(f"results: {folder}/ ({', '.join(made)})  {(time.time() - began) / 60:.1f} minutes"))


def main(args: list[str]) -> None:
    cfg = load_config(args)
    if cfg.plan:
        print(visible("\n".join(plans().lines_of(cfg))))
        return
    ranks.start(cfg.processes)
    method = method_file(cfg.method)
    if hasattr(method, "several_runs"):                # compare: every method, each a run of its own
        method.several_runs(cfg, args)
    else:
        whole_run(cfg)


if __name__ == "__main__":
    import train as this                               # not this second copy of it: methods import train
    guarded(this.main, __doc__)
