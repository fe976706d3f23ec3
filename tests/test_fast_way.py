"""The forking engine and packed rows on families whose heads, windows, caches or positions are not Llama's: each token's
log-probability is what the model itself says of that conversation alone."""
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lora

SMALL = dict(vocab_size=120, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=64, head_dim=8, initializer_range=0.3, sliding_window=8,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)


def small(kind, **more):
    """A model of this family, weights at random."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind, more", [
    ("granite", dict(logits_scaling=8.0)), ("hyperclovax", dict(logits_scaling=8.0)), ("cohere", dict(logit_scale=0.1)),
    ("gemma2", dict(final_logit_softcapping=2.0)), ("nanochat", {}), ("biogpt", {}), ("gpt2", dict(n_embd=32, n_head=4))])
def test_logits_are_those_of_the_model_whatever_its_head_does(kind, more):
    model, ids = small(kind, **more), torch.arange(3, 15).view(2, 6)
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    right = model(input_ids=ids).logits
    assert torch.equal(lora.logits(model, hidden.flatten(0, 1)), right.flatten(0, 1))
    plain = model.get_output_embeddings()(hidden)
    assert torch.allclose(plain, right) == (kind in ("biogpt", "gpt2"))
