"""A model of transformers taken in two, its decoder and its head, as the engine and packed rows call them: each token sees
what it is to see, and logits are computed where they are wanted. No family is named here: masks are made of the layers' own
rules, and the head is the model's own forward.

    Seen, hidden    what each token of a forward sees; the decoder's states under it
    _attend         attention without the keys that none of these tokens sees
    logits          what the model makes of the states, with all that it does behind lm_head
    limits          how much one forward takes on
    ran_out         whether an error says that memory did
"""
import inspect
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask


class Part(NamedTuple):
    """Tokens of a forward that see nothing beyond some keys of one row."""
    tokens: slice
    row: int
    keys: slice


@dataclass(eq=False)
class Seen:
    """What each token of a forward sees. It goes over in place of an attention mask, and transformers has each kind of
    layer's own mask made of it (masks_of): so windows, wherever a family has them, are counted in these positions."""
    mask: torch.Tensor                  # (B, T, S) bool: token t sees key s
    positions: torch.Tensor             # (B, T) of the tokens
    keys: torch.Tensor                  # (B, S) positions of the keys
    parts: list[Part] = field(default_factory=list)      # with B = 1: all of its tokens; empty: nothing is known of them
    places: "Places | None" = None                       # of these tokens in a padded batch, for a GPU
    ndim = 4                            # transformers asks: two dimensions would be padding
    shape = property(lambda self: self.mask.shape)


def masks_of(plain: Callable) -> Callable:
    """Transformers' function `plain`, which makes the mask of a kind of layer out of its rule, taught to take a Seen."""
    def make(*args, mask_function, attention_mask=None, **kwargs):
        seen = attention_mask
        if not isinstance(seen, Seen):
            return plain(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        mask = seen.mask[:, None]                                                                 # (B, 1, T, S)
        if mask_function is not causal_mask_function:
            row = torch.arange(len(mask), device=mask.device)[:, None, None, None]
            mask = mask & mask_function(row, 0, seen.positions[:, None, :, None], seen.keys[:, None, None])
        # eager attention adds it to the scores; so do we where nothing is learned, or each layer would make this of booleans
        if plain is not sdpa_mask or not torch.is_grad_enabled():
            mask = torch.zeros(mask.shape, dtype=kwargs["dtype"], device=mask.device).masked_fill_(~mask, -torch.inf)
        # it reaches _attend as it is
        mask.parts, mask.places, mask.whole = seen.parts, seen.places, mask_function is causal_mask_function
        return mask
    return make


def _attend(plain: Callable | None, module, query, key, value, attention_mask, **kwargs):
    """Transformers' attention `plain` (None: its module's own, eager) of (B, H, T, D), and of (1, H, T, D) part by part,
    where the mask has some: over the keys that it sees alone, of those that the cache keeps (cache.SlotCache), or of
    these. Returns (B, T, H, D)."""
    plain = plain or sys.modules[type(module).__module__].eager_attention_forward
    parts = getattr(attention_mask, "parts", [])
    if not parts:
        return plain(module, query, key, value, attention_mask, **kwargs)
    kept = getattr(key, "kept", None)
    if kept and plain is sdpa_attention_forward and "position_bias" not in kwargs:
        return (side_by_side if attention_mask.places else one_by_one)(query, kept, attention_mask, kwargs.get("scaling")), None
    k, v = kept or (key, value)
    return torch.cat([plain(module, query[:, :, tokens], k[row:row + 1, :, keys], v[row:row + 1, :, keys],
                            attention_mask[..., tokens, keys], **kwargs)[0] for tokens, row, keys in parts], 1), None


def grouped(query, key, value, mask, scale) -> torch.Tensor:
    """Attention (B, H, T, D) where heads share keys (B, H / G, S, D): those of a group are asked as one, T G queries."""
    (B, H, T, D), shared = query.shape, key.shape[1]
    if H == shared:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is not None:
        mask = mask.repeat(1, 1, H // shared, 1)
    query = query.reshape(B, shared, H // shared * T, D)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).reshape(B, H, T, -1)


def one_by_one(query, kept, mask, scale) -> torch.Tensor:
    """Each part alone, over as many keys as it has: what a CPU does best."""
    keys, values = (x.split(1) for x in kept)                                  # views, one a row
    queries = query.split([part.tokens.stop - part.tokens.start for part in mask.parts], 2)
    found = []
    for q, (tokens, row, seen) in zip(queries, mask.parts):
        all_of_them = mask.whole and q.shape[2] == 1                           # it sees: no mask
        found.append(grouped(q, keys[row].narrow(2, 0, seen.stop), values[row].narrow(2, 0, seen.stop),
                             None if all_of_them else mask[..., tokens, seen], scale))
    return torch.cat(found, 2).transpose(1, 2)


@dataclass
class Places:
    """Where the tokens of parts lie in a batch of cache rows, padded to the longest part. The rows are the first ones, a
    view, where most of them have a part, or else copies."""
    shape: tuple[int, int]              # rows, and tokens of the longest
    numbers: list[list[int]]            # of each token its row among these and its place in it; of copies the rows
    rows: Any = None                    # slice, or (B,)
    row: torch.Tensor | None = None     # (T,)
    at: torch.Tensor | None = None      # (T,)

    def on(self, tensors: Sequence[torch.Tensor]) -> "Places":
        """With `numbers` as they lie on a device."""
        return replace(self, row=tensors[0], at=tensors[1], rows=tensors[2] if len(tensors) > 2 else slice(0, self.shape[0]))


def places(parts: list[Part]) -> Places:
    sizes = {part.row: part.tokens.stop - part.tokens.start for part in parts}
    most = max(sizes) + 1
    view = len(sizes) >= 0.75 * most
    names = list(sizes) if view else list(range(len(sizes)))
    row = [name for name, size in zip(names, sizes.values()) for _ in range(size)]
    at = [n for size in sizes.values() for n in range(size)]
    return Places((most if view else len(sizes), max(sizes.values())), [row, at] if view else [row, at, list(sizes)])


def side_by_side(query, kept, mask, scale) -> torch.Tensor:
    """All parts at once, padded to the longest: what a GPU does best."""
    (count, longest), row, at = mask.places.shape, mask.places.row, mask.places.at
    k, v = (x[mask.places.rows, :, :mask.shape[-1]] for x in kept)
    if (count, longest) == (query.shape[2], 1):                                # a token each: there is nothing to pad
        return grouped(query[0].transpose(0, 1)[:, :, None], k, v, mask[0].transpose(0, 1)[:, None], scale)[None, :, :, 0]
    if not hasattr(mask, "padded"):                                            # for all layers that share it
        mask.padded = mask.new_zeros(count, 1, longest, mask.shape[-1])        # padding sees all: no row is empty
        mask.padded[row, :, at] = mask[0].transpose(0, 1)
    queries = query.new_zeros(count, longest, query.shape[1], query.shape[3])
    queries[row, at] = query[0].transpose(0, 1)
    return grouped(queries.transpose(1, 2), k, v, mask.padded, scale).transpose(1, 2)[row, at][None]


# for every model; of masks that are no Seen nothing changes
AttentionMaskInterface.register("sdpa", masks_of(sdpa_mask))
AttentionMaskInterface.register("eager", masks_of(eager_mask))
AttentionInterface.register("sdpa", partial(_attend, sdpa_attention_forward))
AttentionInterface.register("eager", partial(_attend, None))


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, its libraries' own (which raise a plain RuntimeError), or the host's."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in (
        "out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory"))


def limits(text: Any, vocab: int, itemsize: int) -> tuple[int, int]:
    """The most tokens of one forward, and the most rows whose next tokens it may draw: what it needs beside weights and cache
    stays below about a GiB. `text`: the model's text config."""
    token = itemsize * (8 * text.hidden_size + 3 * middle(text))
    row = 32 * vocab                                     # logits, softmax, sums
    return max(64, min(16384, 2**30 // token)), max(1, 2**30 // row)


def middle(text: Any) -> int:
    """The width of an MLP's middle, in the layer where it is widest. Some configs say it of each layer, in a list or only
    there (which they answer with a RuntimeError), some not at all."""
    try:
        found = getattr(text, "intermediate_size", None)
    except RuntimeError:
        found = None
    return max(found) if isinstance(found, (list, tuple)) else found or 4 * text.hidden_size


def takes(module: nn.Module) -> set[str]:
    """The names of what its forward takes."""
    return set(inspect.signature(type(module).forward).parameters)


def hidden(model: Any, ids: torch.Tensor, seen: Seen, **more) -> torch.Tensor:
    """The decoder's states (B, T, D) of tokens (B, T), none of which depends on more than it sees."""
    return model.get_decoder()(input_ids=ids, position_ids=seen.positions, attention_mask=seen,
                               **more).last_hidden_state


class Decoded(dict):
    """What a decoder returns: its last_hidden_state, and nothing of all else that may be asked for."""
    def __missing__(self, _):                            # [0]
        return self["last_hidden_state"]
    __getattr__ = dict.get


def logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The decoder's hidden states (N, D) -> (N, V). Heads scale, cap or transform on the way, each family in its own
    manner: so this is the model's own forward, in which the decoder's part is done already."""
    decoder = model.get_decoder()
    decoder.forward = lambda *_, **__: Decoded(last_hidden_state=hidden[None])
    try:
        return model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device),
                     use_cache=False).logits[0]
    finally:
        del decoder.forward
