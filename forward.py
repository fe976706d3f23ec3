"""A model of transformers taken in two, its decoder and its head, as the engine and packed rows call them: each token sees
what it is to see, and logits are computed where they are wanted. No family is named here: masks are made of the layers' own
rules, and the head is the model's own forward.

    Seen, hidden    what each token of a forward sees; the decoder's states under it
    logits          what the model makes of them, with all that it does behind lm_head
"""
import inspect
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask


@dataclass(eq=False)
class Seen:
    """What each token of a forward sees. It goes over in place of an attention mask, and transformers has each kind of
    layer's own mask made of it (masks_of): so windows, wherever a family has them, are counted in these positions."""
    mask: torch.Tensor                  # (B, T, S) bool: token t sees key s
    positions: torch.Tensor             # (B, T) of the tokens
    keys: torch.Tensor                  # (B, S) positions of the keys
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
        # eager attention adds it to scores; so do we where none is kept: each layer would turn booleans into this anew
        if plain is sdpa_mask and torch.is_grad_enabled():
            return mask
        return torch.zeros(mask.shape, dtype=kwargs["dtype"], device=mask.device).masked_fill_(~mask, -torch.inf)
    return make


# for every model; of masks that are no Seen nothing changes
AttentionMaskInterface.register("sdpa", masks_of(sdpa_mask))
AttentionMaskInterface.register("eager", masks_of(eager_mask))


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
