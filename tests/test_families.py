"""Every family of causal LMs that transformers lists: exact, general or refused in one line; the table of docs/models.md."""
import re

import pytest
import transformers

from config import UserError
from tools.families import DOCS, EXACT, FAMILIES, MARKS, Row, main, measured, reason, tiny_config

TABLE = DOCS.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
DOCUMENTED = {cells[1].strip(): [cell.strip() for cell in cells[2:4]]
              for cells in (line.split("|") for line in TABLE.splitlines()) if len(cells) > 5}


def outcome(row: Row) -> list[str]:
    return ["refused", ""] if row.refused else [row.sampled, row.trained]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exact_or_general_or_refused_in_one_line_as_the_table_says(name):
    row = measured(name, four=False)                              # whatever is not UserError would be raised
    assert row.apart < EXACT and "\n" not in row.refused and len(row.refused) < 400
    if f"transformers {transformers.__version__}" in TABLE:
        said, trained = DOCUMENTED[name]
        assert [said.partition(":")[0] if row.refused else said, trained] == outcome(row)


@pytest.mark.parametrize("name, said", [("gemma3_text", ["forking", "packed"]), ("lfm2", ["general", "general"]),
                                        ("bert", ["refused", ""])])
def test_a_family_of_each_outcome(name, said):
    row = measured(name, four=False)
    assert outcome(row) == said and row.apart < EXACT and ("causal" in row.refused) == (name == "bert")


def test_a_small_config_keeps_a_layer_of_each_kind_and_what_scales_shows():
    gemma, dense = tiny_config("gemma3_text"), tiny_config("deepseek_v3")
    assert gemma.layer_types == ["sliding_attention", "full_attention"] and gemma.sliding_window == 8
    assert gemma.final_logit_softcapping == 6.0 and tiny_config("granite").logits_scaling == 2.5
    assert dense.first_k_dense_replace == 1 and dense.num_key_value_heads == dense.num_attention_heads == 4


def test_the_table_names_every_family_of_its_transformers_once():
    names = re.findall(r"(?m)^\| (.+?) \|", TABLE)
    assert len(names) == len(set(names)) and "llama" in names and DOCUMENTED["llama"] == ["forking", "packed"]
    if f"transformers {transformers.__version__}" in TABLE:
        assert sorted(set(names) - {"family"}) == FAMILIES


def test_a_family_that_transformers_does_not_list_is_one_line():
    with pytest.raises(UserError, match="gpt5: no family of causal language models that transformers .* lists"):
        main(["gpt5"])


def test_a_refusal_is_told_without_the_folder_and_the_fix():
    assert reason("model: /tmp/x/model is no causal language model: it is not; choose another model", "/tmp/x/model") == (
        "is no causal language model: it is not")
