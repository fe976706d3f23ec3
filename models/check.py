"""Is what we compute what the model computes? Asked at every load, of every model, and never skipped. The judge is the
model's own forward of each conversation alone: a longer one, one that forks from it and a shorter one go through the engine,
alone and side by side, and as packed trees through the loss and its gradient.

    check      silent where all agrees; one line with the figure where the general way is taken (the model's attributes
               forks, packs, ...); UserError with the figure where nothing agrees

How far a model may differ from itself is measured with it, where it matters (16 bits): what every linear layer gives is
rounded anew. A wrong mask, scale, table or position in one layer of thirty shows above that, the order of sums does not.
"""
import functools
import random
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

import forward
import lora
import packing
import ranks
from config import UserError, installed, load_config, refuse, visible
from cache import common_prefix
from engine import Ask, Engine, Episode, Job
from models import template
from models import card
from models.plan import numbers_a_token
from packing import Segment
from run import Policy

SIZES = (24, 19, 7)                     # tokens: of the longer conversation, of one that forks from it, of a shorter one
REPLY = 6                               # tokens at the end of each: what a cached state loses shows after some
FLOOR = 1e-4                            # may differ in any format, in the mean, of a log-probability; of a gradient in parts
# what is measured on SmolLM2 and the embedded model in bf16 and nf4 lies half-way between honest and wrong
SAMPLED, PACKED = 1.25, 1.0             # times the median of what rounding anew does; honest: at most 0.5, 0.1
GRADIENT = 0.1                          # in parts, in 16 bits; honest: at most 0.03, a shifted position 0.2
SAMPLING: list[dict[str, bool]] = [     # ways, the fastest first; engine.py knows of ragged, scale/general.py of the rest
    dict(forks=True, ragged=True, pads=True, caches=True), dict(forks=True, ragged=False, pads=True, caches=True),
    dict(forks=False, pads=True, caches=True), dict(forks=False, pads=False, caches=True),
    dict(forks=False, pads=False, caches=False)]
TRAINING: list[dict[str, bool]] = [dict(packs=True), dict(packs=False)]
LAYERS = {"full_attention", "sliding_attention", "attention"}            # kinds that mix tokens by attention alone
Differences = dict[str, torch.Tensor]   # from the model's own forward: a figure's name -> its values


@dataclass
class Answers:
    """What the model says of the conversations by itself."""
    logp: list[torch.Tensor]            # (T, V) of each; row t is behind token t
    packed: torch.Tensor                # (N,) log-probabilities of the trees' tokens, in their order
    gradient: torch.Tensor              # (D,) of the mean of them, by a vector added to each token's embedding


@dataclass
class Judge:
    policy: Policy
    talks: list[list[int]]
    own: Answers

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """How far a figure may go."""
        with rounded_anew(self.policy.model):
            anew = own_answers(self.policy.model, self.talks)
        drifts = torch.cat([drift(*pair) for pair in zip(anew.logp, self.own.logp)])
        coarse = torch.finfo(self.policy.model.get_input_embeddings().weight.dtype).eps > 1e-4
        return {"log-probability": SAMPLED * float(drifts.median()),
                "packed log-probability": PACKED * float((anew.packed - self.own.packed).abs().median()),
                "gradient": GRADIENT if coarse else FLOOR}

    def agrees(self, found: Differences) -> bool:
        return all(mean(values) <= FLOOR or mean(values) <= self.limits[name] for name, values in found.items())


# --------------------------------------------------------------------------------------------------------- the check
def check(policy: Policy) -> None:
    """UserError where no way computes what the model computes; else the model's attributes say which way is taken."""
    model, name, failed = policy.model, policy.cfg.model, ""
    check_rows(policy)
    note_other_template(policy)
    taken, why = [len(SAMPLING), len(TRAINING)], ["", ""]
    try:
        judge = judge_of(policy)
        check_4bit(model)
        for n, (ways, test) in enumerate([(SAMPLING, sampling), (TRAINING, training)]):
            taken[n], why[n] = chosen(judge, ways, test)
    except UserError as error:
        failed = str(error)
    taken = agreed(taken)                                # every rank goes the slowest one's way
    uses = [use for use, way, ways in zip(("sampled", "trained"), taken, (SAMPLING, TRAINING)) if way == len(ways)]
    if failed or uses:
        raise UserError(failed or f"model: {name} cannot be {' or '.join(uses)} as it computes itself: "
                                  f"{'; '.join(filter(None, why)) or 'so another rank found'}; choose another model")
    for way in (SAMPLING[taken[0]], TRAINING[taken[1]]):
        vars(model).update(way)
    model.captured = policy.cfg.captured and model.forks and model.ragged and on_gpu(model)
    if model.captured:
        check_captured(judge)
    uses = [use for use, fast in (("sampled", model.forks), ("trained", model.packs)) if not fast]
    if uses and ranks.rank() == 0:
        print(visible(f"note: {name} is {' and '.join(uses)} another way than the fast one ({'; '.join(dict.fromkeys(filter(None, why))) or 'so another rank found'}): "
                      f"{lora.general().COST}"), file=sys.stderr)


def check_rows(policy: Policy) -> None:
    """What the template puts around texts must have rows in the embedding: added tokens may lack theirs. UserError."""
    chat, rows = policy.chat, policy.model.get_input_embeddings().weight.shape[0]
    said = [*chat.first("", ""), *chat.reply(""), *chat.next("", chat.cut(chat.reply("")))]
    if max(said) >= rows:
        raise UserError(f"model: the chat template of {policy.cfg.model} says token {max(said)} "
                        f"({chat.tokenizer.convert_ids_to_tokens(max(said))}), its weights have {rows} rows for tokens: its "
                        f"embedding was not resized (resize_token_embeddings)")
    chat.stop -= {i for i in chat.stop if i >= rows}


def note_other_template(policy: Policy) -> None:
    """TRL and others leave a chat template beside an adapter. The base's is used."""
    for folder in filter(None, (policy.cfg.init, policy.cfg.adapter)):
        beside = Path(folder) / "chat_template.jinja"
        own = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
        if not own and (config := Path(folder) / "tokenizer_config.json").is_file():
            own = lora.files().read_json("", config, "delete it").get("chat_template") or ""
        if own and isinstance(own, str) and own != template.source_of(policy.chat.tokenizer) and ranks.rank() == 0:
            print(visible(f"note: {folder} has a chat template of its own; {policy.cfg.model} is asked by its own, so if the "
                          f"adapter was trained with another, give a model= whose folder holds that"), file=sys.stderr)


def judge_of(policy: Policy, sizes: Sequence[int] = SIZES) -> Judge:
    """Raises UserError where the model itself does not work, or sees what comes later."""
    model, name = policy.model, policy.cfg.model
    talks = conversations(policy, sizes)
    try:
        finite = lora.finite(model)
        judge = Judge(policy, talks, own_answers(model, talks))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"model: {name} does not run by itself ({short(error)}); choose another model") from None
    if not finite:
        raise UserError(f"model: {name}: its weights, or what it answers, are not finite numbers; copy or download it again")
    tau = common_prefix(*talks[:2])
    apart = drift(judge.own.logp[0][:tau], judge.own.logp[1][:tau])
    if not judge.agrees({"log-probability": apart}):
        raise UserError(f"model: {name} is no causal language model: what it says behind a token depends on later ones "
                        f"(by {mean(apart):.2g} in log-probability); choose another model")
    return judge


def chosen(judge: Judge, ways: list[dict[str, bool]], test: Callable) -> tuple[int, str]:
    """(the first way that agrees, why it is not the fastest one)."""
    model, first = judge.policy.model, ""
    for n, way in enumerate(ways):
        vars(model).update(way, captured=False)
        try:
            found = test(judge)
            if judge.agrees(found):
                return n, first
            said = "it differs from the model's own forward by " + ", ".join(
                f"{mean(values):.2g} in {name}" for name, values in found.items())
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:                       # whatever a model does that is not known here
            said = short(error)
        first = first or said
    return len(ways), first


def short(error: Exception) -> str:
    said = " ".join(str(error).split())[:150]
    return said if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {said}"


def agreed(numbers: list[int]) -> list[int]:
    """The largest of all ranks."""
    found = torch.tensor(numbers)
    if ranks.world() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def on_gpu(model: Any) -> bool:
    return model.get_input_embeddings().weight.device.type == "cuda"


def check_captured(judge: Judge) -> None:
    """A GPU's decode steps stay captured (scale/captured.py) where these agree, too, on all ranks."""
    model, name = judge.policy.model, judge.policy.cfg.model
    found = sampling(judge)                              # a capture that fails says so itself
    if model.captured and not judge.agrees(found):
        model.captured = False
        print(visible(f"note: {name}: decode steps are not captured: captured they differ from the model's own forward by "
                      f"{mean(found['log-probability']):.2g} in log-probability"), file=sys.stderr)
    model.captured = not agreed([int(not model.captured)])[0]


@torch.no_grad()
def check_4bit(model: Any) -> None:
    """Each 4-bit layer against its weights taken back to 16 or 32 bits, one token and several; on a CPU one of each shape."""
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]
    if layers and layers[0][1].weight.device.type == "cpu":
        layers = list({(layer.in_features, layer.out_features): (name, layer) for name, layer in layers}.values())
    for name, layer in layers:
        weight = installed("bitsandbytes", "bitsandbytes").functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        x = torch.linspace(-1, 1, 3 * layer.in_features, device=weight.device, dtype=weight.dtype).view(3, -1).sin()
        own = nn.functional.linear(x, weight, layer.bias)
        off = max(float((layer(x) - own).norm() / own.norm()), float((layer(x[:1]) - own[:1]).norm() / own[:1].norm()))
        if not off <= max(FLOOR, 4 * torch.finfo(weight.dtype).eps):
            raise UserError(f"load_in_4bit: bitsandbytes computes {name} wrongly here (off by {off:.2g} of its length); "
                            f"set load_in_4bit=false")


# --------------------------------------------------------------------------------------------------------- the judge
def conversations(policy: Policy, sizes: Sequence[int]) -> list[list[int]]:
    """The same at each load; of words: nothing that ends a turn, or stands for a picture."""
    tokenizer, rng = policy.chat.tokenizer, random.Random(0)
    size = policy.model.get_input_embeddings().weight.shape[0]
    words = sorted(set(range(min(size, len(tokenizer)))) - set(tokenizer.added_tokens_decoder) - policy.chat.stop)
    lengths = [max(4, min(n, policy.cfg.context - 1)) for n in sizes]
    longer, fork, shorter = ([rng.choice(words or range(size)) for _ in range(n)] for n in lengths)
    half = len(fork) // 2
    return [longer, longer[:half] + fork[half:], shorter]


def trees_of(talks: list[list[int]]) -> packing.Packed:
    """The first two conversations as one tree, the third as another, in one row."""
    longer, fork, shorter = talks
    tau = common_prefix(longer, fork)
    one, other = [(longer[:tau], None), (longer[tau:], 0), (fork[tau:], 0)], [(shorter, None)]
    return packing.pack([[Segment(ids, [(1.0,)] * len(ids), parent) for ids, parent in tree] for tree in (one, other)])


def own_answers(model: Any, talks: list[list[int]]) -> Answers:
    table = model.get_input_embeddings().weight
    with added(model) as e, torch.enable_grad():
        logp = [model(input_ids=torch.tensor([ids], device=table.device), use_cache=False).logits[0].float().log_softmax(-1)
                for ids in talks]                                                               # (T, V) each
        told = [one[:-1].gather(1, torch.tensor(ids[1:], device=one.device)[:, None])[:, 0]
                for one, ids in zip(logp, talks)]
        packed = torch.cat([told[0], told[1][common_prefix(*talks[:2]) - 1:], told[2]])
        gradient, = torch.autograd.grad(packed.mean(), e)
    return Answers([one.detach() for one in logp], packed.detach(), gradient)


@contextmanager
def added(model: Any) -> Iterator[torch.Tensor]:
    """Inside, the yielded vector (D,), zeros, is added to each token's embedding."""
    table = model.get_input_embeddings()
    e = torch.zeros(table.weight.shape[1], device=table.weight.device, requires_grad=True)
    hook = table.register_forward_hook(lambda module, args, out: out + e.to(out.dtype))
    try:
        yield e
    finally:
        hook.remove()


@contextmanager
def rounded_anew(model: Any) -> Iterator[None]:
    """Inside, what each linear layer gives is off by up to one unit of its format."""
    rng = torch.Generator(model.get_input_embeddings().weight.device).manual_seed(0)

    def off(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        unit = torch.rand(out.shape, generator=rng, device=out.device).to(out.dtype) * 2 - 1
        return out * (1 + unit * torch.finfo(out.dtype).eps)
    hooks = [module.register_forward_hook(off) for module in model.modules() if type(module).__name__ in lora.LINEAR]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------------ the two ways
def sampled(policy: Policy, talks: list[list[int]]) -> list[tuple[int, int, torch.Tensor]]:
    """(conversation, position, log-probabilities (V,) behind it) of what the engine samples: half of the longer conversation
    alone; then the whole of it side by side with the one that forks from it and the shorter one."""
    kind: Any = Engine if policy.model.forks else lora.general().General
    # a captured step of three rows has one that is no conversation's
    engine = kind(policy.model, set(), policy.cfg.but(slots=len(talks) + 1, context=max(map(len, talks)), snapshot_mb=1024))
    found, of = [], {}

    def told(logits: torch.Tensor, jobs: list[Job], _) -> list[int]:
        """In place of a draw: what the conversation says next."""
        for job, row in zip(jobs, logits.float().log_softmax(-1)):
            found.append((of[id(job.episode)], len(job.ids) - 1, row))
        return [talks[of[id(job.episode)]][len(job.ids)] for job in jobs]

    def job(n: int, end: int, size: int) -> Job:
        episode = one_reply(talks[n][:end], size)
        of[id(episode)] = n
        return Job(episode, random.Random(0), "shorter" if n == 2 else "longer", snapshot=True)
    engine._sample = told
    alone = job(0, len(talks[0]) // 2, 1)
    queue = deque([alone])
    for ended in engine.run(queue):
        if ended is alone:
            queue.extend(job(n, max(1, len(ids) - REPLY), min(REPLY, len(ids) - 1)) for n, ids in enumerate(talks))
    return found


def one_reply(context: list[int], size: int) -> Episode:
    yield Ask(context, size)


def check_layers(model: Any) -> None:
    """NotImplementedError where tokens are mixed in a way, or places are counted from something, that is no Seen's."""
    decoder, layers = model.get_decoder(), kinds_of(model)
    why = (f"has {', '.join(sorted(layers - LAYERS))} layers" if layers - LAYERS else
           "counts positions itself" if "position_ids" not in forward.takes(decoder) else
           "keeps masks of its own" if any(buffer.ndim == 4 for buffer in decoder.buffers()) else "")
    if why:
        raise NotImplementedError(f"{type(model).__name__} {why}")


def kinds_of(model: Any) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ["recurrent"] * model._is_stateful)


def sampling(judge: Judge) -> Differences:
    model = judge.policy.model
    if model.forks:
        check_layers(model)
    elif model.pads and "chunked_attention" in kinds_of(model):      # in thousands of tokens: more than are tried here
        raise NotImplementedError(f"{type(model).__name__} counts its chunks from the padding on")
    return {"log-probability": torch.stack([drift(logp, judge.own.logp[n][at].to(logp))
                                            for n, at, logp in sampled(judge.policy, judge.talks)])}


def training(judge: Judge) -> Differences:
    model = judge.policy.model
    if model.packs:
        check_layers(model)
    with added(model) as e, torch.enable_grad():
        packed = packing.token_logp(model, [trees_of(judge.talks)])
        gradient, = torch.autograd.grad(packed.mean(), e)
    own = judge.own.gradient
    return {"packed log-probability": (packed.detach() - judge.own.packed.to(packed.device)).abs(),
            "gradient": (gradient - own).norm() / own.norm().clamp_min(1e-30)}


def drift(ours: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(..., V) each -> (...), the mean difference in log-probability of what the model itself would say."""
    return (own.exp() * torch.where(ours == own, 0.0, (ours - own).abs())).sum(-1)            # both may be -inf


def mean(values: torch.Tensor) -> float:
    return float(values.mean().nan_to_num(torch.inf))


# ------------------------------------------------------------------------------------------------------- the command
def main(args: list[str]) -> None:
    if args[:1] != ["check"] or not args[1:]:
        raise UserError("usage: python lora.py check MODEL [key=value ...]")
    cfg = load_config([f"model={args[1]}", *args[2:]])
    if cfg.init:
        refuse(cfg, adapter="init= is given, too; one of the two is checked")
    policy = Policy.open(cfg, cfg.init or cfg.adapter, "init" if cfg.init else "adapter")
    judge = judge_of(policy)
    found = sampling(judge) | training(judge)
    print(visible("\n".join(card.lines_of(policy, found, token_of(judge)))))


def token_of(judge: Judge) -> float:
    """Numbers that a token has in the cache."""
    model = judge.policy.model
    ids = torch.tensor([judge.talks[0]], device=model.get_input_embeddings().weight.device)
    return numbers_a_token(model, ids, judge.policy.cfg.context)
