"""Chat pieces on the chat templates of real models, as the packages trl and axolotl ship them."""
import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import needs_package
from engine import Chat

TRL, AXOLOTL = "trl/chat_templates/", "axolotl/utils/chat_templates/templates/"
MODELS = {                                             # template -> (the end of a turn, has a system role)
    TRL + "qwen2_5": ("<|im_end|>", True),
    TRL + "qwen3": ("<|im_end|>", True),
    TRL + "qwen3_instruct_2507": ("<|im_end|>", True),
    TRL + "llama3": ("<|eot_id|>", True),
    TRL + "llama3_1": ("<|eot_id|>", True),
    TRL + "gemma": ("<end_of_turn>", False),
    TRL + "gemma3": ("<end_of_turn>", True),
    TRL + "phi3": ("<|end|>", True),
    AXOLOTL + "mistral_v1": ("</s>", True),
    AXOLOTL + "mistral_v2v3": ("</s>", False),
    AXOLOTL + "mistral_v7_tekken": ("</s>", True)}
RULES, ONE, TWO = "You are in a house.", "step 1: find the crown.", "step 2: the attic is dark."


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("thinking", [False, True])
def test_pieces_rebuild_what_a_real_model_s_template_renders(name, thinking, tiny):
    needs_package(name.split("/")[0])
    root, _, rest = name.partition("/")
    source = (Path(find_spec(root).submodule_search_locations[0]) / f"{rest}.jinja").read_text(encoding="utf-8")
    end, system = MODELS[name]
    tokenizer = copy.deepcopy(tiny[1].tokenizer)
    tokenizer._tokenizer.normalizer = None             # tiny's own writes all in lower case
    tokenizer.add_special_tokens(dict(bos_token="<s>", eos_token=end, additional_special_tokens=sorted(
        set(re.findall(r"<\|\w+\|>|<\w+_of_turn>|</?s>|\[/?[A-Z_]+\]|</?think>", source)) - {"<s>", end})))
    tokenizer.chat_template = source
    chat = Chat(tokenizer, thinking)
    assert (chat.system_role, tokenizer.decode([chat.end])) == (system, end)
    head = [dict(role="system", content=RULES), dict(role="user", content=ONE)] if system else [
        dict(role="user", content=f"{RULES}\n\n{ONE}")]
    rendered = tokenizer.apply_chat_template(
        [*head, dict(role="assistant", content="go attic"), dict(role="user", content=TWO)], tokenize=False,
        add_generation_prompt=True, enable_thinking=thinking)
    opened = chat.user_to_reply.rpartition("assistant\n")[2] if "<think>" in chat.user_to_reply else ""
    said = chat.head + RULES + chat.system_to_user + ONE + chat.user_to_reply + "go attic" + chat.reply_to_user + TWO
    rendered = rendered.replace("[/INST] go", "[/INST]go")               # a blank, which a reply brings along
    assert (said + chat.user_to_reply).replace(opened + "go attic", "go attic") == rendered
    assert bool(opened) == (name == TRL + "qwen3" and not thinking)      # its empty thought: kept where it was said
    assert chat.first(RULES, ONE).count(tokenizer.bos_token_id) == ("bos_token" in source)
    assert chat.next(TWO, cut=True) == [chat.end] + chat.next(TWO)
