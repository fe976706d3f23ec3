import random

import pytest

from conftest import ROOT
from tools import tiny_sokoban
from tools.tiny import Corpus, Reader, follow, hindsight, make_tokenizer
from worlds.sokoban import MOVES, push
from worlds.sokoban_words import InWords

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


@pytest.mark.parametrize("teacher", (None, tiny_sokoban))
def test_the_tokenizer_knows_every_word_of_the_corpus_and_gives_it_back(teacher):
    tokenizer = make_tokenizer(teacher)
    corpus = Corpus(tokenizer, 5, teacher)
    for _ in range(60):
        for segment in corpus.tree():
            text = tokenizer.decode(segment.ids)
            assert "<|unk|>" not in text and tokenizer.encode(text, add_special_tokens=False) == segment.ids


@pytest.mark.parametrize("name, teacher", (("tiny", None), ("tiny-sokoban", tiny_sokoban)))
def test_a_shipped_model_is_small_and_has_the_tokenizer_that_tiny_py_makes(name, teacher):
    assert sum(path.stat().st_size for path in (ROOT / "models" / name).iterdir()) < 4 * 2**20
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(ROOT / "models" / name).get_vocab() == make_tokenizer(teacher).get_vocab()


# Sokoban

ROOM = "push every box onto a goal within 20 moves. walls: c4. goal: d2.\nbox: c3. you: b3."
PUSHED = "you push a box right.\nbox: d3. you: c3."


def pushes_needed(env):
    """Slow twin of tiny_sokoban.pushes: a search forwards from one state, pushes counted level by level."""
    level, count = {(env.man, env.boxes)}, 0
    seen = set(level)
    while level:
        walks = list(level)
        for man, boxes in walks:                       # all that walking reaches
            for dr, dc in MOVES.values():
                state = ((man[0] + dr, man[1] + dc), boxes)
                if state[0] not in env.level.walls | boxes and state not in seen:
                    seen.add(state), walks.append(state)
        if any(boxes == env.level.goals for _, boxes in walks):
            return count
        level, count = set(), count + 1
        for man, boxes in walks:
            for dr, dc in MOVES.values():
                box, to = (man[0] + dr, man[1] + dc), (man[0] + 2 * dr, man[1] + 2 * dc)
                state = (box, boxes - {box} | {to})
                if box in boxes and to not in env.level.walls and state not in seen:
                    seen.add(state), level.add(state)
    return None


def test_the_search_for_pushes_equals_a_forward_search():
    rng, env = random.Random(0), InWords()
    for task in env.tasks("train-one")[:20]:
        reader = tiny_sokoban.Reader().start(env.reset(task))
        for _ in range(8):
            assert reader.left.get((reader.man, reader.box)) == pushes_needed(env)
            action = rng.choice(list(MOVES))
            reader.read(action, env.step(action).obs)


def test_following_the_plan_solves_every_room_within_its_moves():
    for task in InWords().tasks("train-one")[:100]:
        env = InWords()
        reader = tiny_sokoban.Reader().start(env.reset(task))
        while not reader.won:
            action = tiny_sokoban.follow(reader, tiny_sokoban.experience(reader, *reader.plan()))
            reader.read(action, env.step(action).obs)
            assert env.left > 0 or reader.won


@pytest.mark.parametrize("turns, thought, tau, e", [
    ([("right", PUSHED), ("right", "you push a box right.\nbox: e3. you: d3.")],
     " 1 c3 right 2 d3 up", "2", "the box at d3 must go up to d2."),                   # the second push is wrong
    ([("right", PUSHED), ("up", "you go up.\nbox: d3. you: c2.")], " 1 c3 right", "2",
     "the box at d3 must go up to d2."),                                             # none is wrong: what comes next
    ([("up", "you go up.\nbox: c3. you: b2."), ("right", "you go right.\nbox: c3. you: c2."),
      ("down", "you cannot go down: the box does not move.\nbox: c3. you: c2.")],
     "", "1", "the box at c3 must go right to d3.")])
def test_hindsight_on_sokoban_stops_at_the_first_push_that_brings_no_gain(turns, thought, tau, e):
    assert tiny_sokoban.hindsight(ROOM, turns) == (thought, tau, e)


def test_an_experience_on_sokoban_is_followed_around_the_box():
    reader, e = tiny_sokoban.Reader().start(ROOM.replace("you: b3", "you: e3")), "the box at c3 must go right to d3."
    actions = []
    while not tiny_sokoban.spent(reader, e):
        actions.append(tiny_sokoban.follow(reader, e))
        state = push(reader.walls, reader.man, frozenset([reader.box]), actions[-1])
        reader.man, reader.box = state[0], min(state[1])
    assert actions[-1] == "right" and len(actions) == 6 and reader.box == tiny_sokoban.cell("d3")
