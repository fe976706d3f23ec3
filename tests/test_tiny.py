import pytest

from conftest import ROOT
from tiny import Corpus, Reader, follow, hindsight, make_tokenizer

FIRST = ("find the harp. the harp is in the attic. your candle lasts 8 turns. you are in the hall. "
         "doors: attic, cellar.")
DARK = "it is dark. the attic needs the torch from the cellar."


NEED, HARP = " the attic needs the torch from the cellar.", "the harp is in the attic."


@pytest.mark.parametrize("turns, thought, tau, e", [
    ([("go attic", DARK), ("go attic", DARK)], NEED + " 2 go cellar", "2", NEED[1:]),
    ([("go cellar", "you are in the cellar. you see the torch.")], " 1 go attic", "1", HARP),
    ([("go attic", DARK), ("go cellar", "you are in the cellar. you see the torch and the hat."),
      ("take hat", "you take the hat.")], NEED + " 2 go cellar 3 take torch", "3", NEED[1:]),
    ([("go attic", DARK), ("go cellar", "you are in the cellar. you see the torch.")], NEED + " 2 go cellar",
     "none", "none"),
    ([("go cellar", "you are in the cellar. you see nothing."), ("go attic", DARK)], " 1 go attic", "1", HARP)])
def test_hindsight_points_at_the_first_turn_that_went_against_what_was_known(turns, thought, tau, e):
    assert hindsight(FIRST, turns) == (thought, tau, e)


def test_hindsight_goes_back_to_the_last_turn_in_a_room_that_is_cut_off():
    turns = [("go island", "you cross a bridge. it holds once. you are in the island. you see the torch."),
             ("go cellar", "the bridge falls behind you. you are in the cellar. you see nothing."),
             ("go attic", DARK.replace("cellar", "island")), ("go attic", DARK.replace("cellar", "island"))]
    assert hindsight(FIRST, turns)[1:] == ("2", "the attic needs the torch from the island.")


def test_an_experience_is_followed_step_by_step():
    reader, e = Reader().start(FIRST), "the attic needs the torch from the cellar."
    for action, obs in [("go cellar", "you are in the cellar. you see the torch."),
                        ("take torch", "you take the torch."),
                        ("go attic", "you are in the attic. you see the harp.")]:
        assert follow(reader, e) == action
        reader.read(action, obs)


def test_the_tokenizer_knows_every_word_of_the_corpus_and_gives_it_back():
    tokenizer = make_tokenizer()
    assert (ROOT / "tiny/tokenizer.json").read_text().count("\n") > 0
    corpus = Corpus(tokenizer, 5)
    for _ in range(60):
        for segment in corpus.tree():
            text = tokenizer.decode(segment.ids)
            assert "<|unk|>" not in text and tokenizer.encode(text, add_special_tokens=False) == segment.ids


def test_the_shipped_model_is_small_and_has_the_tokenizer_that_tiny_py_makes():
    assert sum(path.stat().st_size for path in (ROOT / "tiny").iterdir()) < 4 * 2**20
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(ROOT / "tiny").get_vocab() == make_tokenizer().get_vocab()
