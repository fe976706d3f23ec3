"""Is what a server samples from the policy that is trained here? One greedy answer to the first context of a run is looked
at before the others are asked for: its prompt and text (scale/dialects.py), its tokens under the model here, and three
hot answers with three seeds.

Rounding, 16 bits and 4 bits move log-probabilities by hundredths to tenths; another model, a forgotten adapter or a
penalty move some token by whole nats.
"""
from typing import Any

import torch

from config import UserError, visible
from scale.dialects import Answer, Refused
from scale.general import own_logits

LONGEST = 32                # tokens of the greedy answer
NEAR, FAR = 0.1, 2.0        # nats by which a token of it may lie behind the best one here: unsaid, said; beyond: an error
OFF = 0.02                  # nats a token by which its log-probabilities may differ from those here, unsaid
HOT = 5.0                   # a temperature at which no two draws are alike


def check(server: Any, context: list[int]) -> None:
    """Raises UserError where the server is certainly not the model; says in a line what may be so."""
    room = min(LONGEST, server.context - len(context))
    try:
        greedy = ask(server, context, room, 0.0, [0])[0]
    except Refused as error:
        raise UserError(f"engine: {server.url} refused a request: {error}") from None
    check_text(server, greedy)
    behind, off = compare(server.here.model, server.dialect.told(context), greedy, server.chat.stop)
    worst = max(behind)
    which = server.precision
    if worst > FAR:
        raise UserError(f"engine: {server.url} is not the model here: token {behind.index(worst) + 1} of its greedy answer lies "
                        f"{worst:.1f} nats behind the best one here; it must serve {server.cfg.model}"
                        + ", with the adapter that it was handed" * bool(server.adapter)
                        + ", without penalties of its own (docs/engines.md)")
    if worst > NEAR:
        print(visible(f"engine: a greedy answer of {server.url} is not the one here: its token {behind.index(worst) + 1} lies "
                      f"{worst:.2f} nats behind the best one in {which}; another precision? (docs/engines.md)"))
    if off > OFF or which == "nf4":
        figure = f"; log-probabilities differ by {off:.3f} a token" if off >= 0 else ""
        print(visible(f"engine: what is trained here in {which} is sampled by {server.url} in what precision it has{figure}; "
                      f"it should have the same (vLLM for nf4: --quantization bitsandbytes)"))
    if max(server.temperature, server.cfg.reflect_temperature) > 0 and copies(server, context, room):
        print(visible(f"engine: {server.url} gave the same answer to three seeds at temperature {HOT:g}: the samples of a task "
                      f"will be copies of one (docs/engines.md)"))


def ask(server: Any, context: list[int], room: int, temperature: float, seeds: list[int]) -> list[Answer]:
    more = dict(logprobs=0) if server.dialect.number == 0 else {}
    waiting = [server.ask(context, room, temperature, seed, **more) for seed in seeds]
    return [server.dialect.read(future.result(), future.prompt, room) for future in waiting]


def check_text(server: Any, answer: Answer) -> None:
    """Where a server gives ids and the text that they are to it, it is the text that they are here."""
    if answer.said:
        ended, decode = answer.ids[-1] in server.chat.stop, server.chat.tokenizer.decode
        whole = decode(answer.ids)                     # the end may be said, too
        ours = decode(answer.ids[:-1] if ended else answer.ids, skip_special_tokens=True)
        theirs, ours, whole = ("".join(text.replace("\ufffd", "").split()) for text in (answer.said, ours, whole))
        if theirs not in (ours, whole):
            raise UserError(f"engine: {server.url} says {theirs[:40]!r} where its ids are {ours[:40]!r} here: it has another "
                            f"tokenizer, so another model than {server.cfg.model}")


@torch.inference_mode()
def compare(model: Any, prompt: list[int], answer: Answer, stop: set[int]) -> tuple[list[float], float]:
    """How far each token of a greedy answer lies behind the best one here, in nats; and by how much the server's
    log-probabilities of them differ from those here, the mean of it (-1: it does not say them)."""
    if not answer.exact:                               # the encoding of a text: other tokens may have said it
        return [0.0], -1.0
    ids = torch.tensor(prompt + answer.ids)
    at = torch.arange(len(prompt) - 1, len(ids) - 1)
    logp = own_logits(model, ids, at).float().log_softmax(-1).cpu()                                     # (N, V)
    own = logp.gather(1, ids[at + 1, None])[:, 0]                                                       # (N,)
    told = torch.tensor(answer.logp[:len(own)])
    off = float((own[:len(told)] - told).abs().mean()) if len(told) else -1.0
    if answer.ids[-1] in stop:                         # one end is as good as another
        own[-1] = logp[-1, sorted(stop)].max()
    return (logp.max(-1).values - own).tolist(), off


def copies(server: Any, context: list[int], room: int) -> bool:
    try:
        hot = ask(server, context, room, HOT, [1, 2, 3])
    except Refused:                                    # some take no temperature above 2
        return False
    return len({tuple(answer.ids) for answer in hot}) == 1
