"""docs/leafe.ipynb: it runs, it shows what it says, and what is stored in it came of the cells that stand there."""
import re
from xml.etree import ElementTree

import nbformat
import pytest

import lesson
from lesson import NOTEBOOK, drawn, said


def gain(text):
    """Pass@1 after LEAFE minus before, in points, and its interval, as a run's table has them."""
    return [float(figure) for figure in re.search(r"Pass@1 .* ([+-][\d.]+) \[ *([+-][\d.]+), *([+-][\d.]+)\]", text).groups()]


def shows(notebook):
    """A film, a gain that is no chance, a tree, four curves."""
    texts = said(notebook)
    film, trained = [text for text in texts if "python leafe.py" in text]
    assert "looks back: " in film and "(again)" in film and "attempt 0.0: success" in film
    assert "attempt 0: " in trained and "looks back: " not in trained and "(refused)" in trained
    quest, K, sokoban = [text for text in texts if "python train.py" in text]
    assert gain(quest)[1] > 20 and len(gain(sokoban)) == 3
    assert re.search(r"stage 1: \d+ of 48 tasks solved", K) and "reflect_every=4" in K
    assert re.search(r"^ +\d+ .* <- tau\n", "".join(texts), re.M) and re.search(r"%  *-> +\d+\.\d+%", "".join(texts))

    tree, before_after, with_K, worlds = [ElementTree.fromstring(picture) for picture in drawn(notebook)]
    words = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "success" in words and any(word.startswith("turn ") and " again: " in word for word in words)
    lines = [len(list(one.iter("{http://www.w3.org/2000/svg}polyline"))) for one in (before_after, with_K, worlds)]
    assert lines == [2, 3, 4]


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(tmp_path):
    notebook = lesson.ran(tmp_path)                        # a cell that fails is raised, with its error
    shows(notebook)
    assert lesson.kinds(lesson.stored(notebook)) == lesson.kinds(nbformat.read(NOTEBOOK, as_version=4))


def test_what_is_stored_came_of_these_cells_and_of_no_machine():
    text, notebook = NOTEBOOK.read_text(encoding="utf-8"), nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.ran == lesson.digest(notebook), "a cell was changed: python tests/lesson.py runs it anew"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    shows(notebook)
    assert len(text.encode()) < 300_000
    assert not re.search(r"[\s\"'=](/[\w.-]+){2,}|minutes\\n", "".join(said(notebook)) + str(notebook.metadata))


def test_a_question_follows_each_part_and_has_its_answer():
    texts = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown"]
    asked = re.findall(r"\*\*Question (\d)\.\*\*", "\n".join(texts))
    answered = re.findall(r"(?m)^(\d)\. ", texts[-1])
    assert asked == answered == [str(n) for n in range(1, 7)]
    for link in re.findall(r"\]\((?!http)([^)#]+)", "\n".join(texts)):
        assert (NOTEBOOK.parent / link).is_file(), link
