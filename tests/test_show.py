"""python leafe.py: one task, watched."""
import os
import pty
import re
import time

import pytest

import programs
from config import UserError
from conftest import run_of
from leafe import explore
from tools import show

ARGS = ["config.yaml", "task=train-1-0000", "attempts=3"]


def test_the_tree_that_is_watched_is_the_one_that_exploration_grows(tiny, settings):
    done = programs.run(["leafe.py", *ARGS])
    assert done.returncode == 0 and "\033" not in done.stdout, done.stderr
    cfg = settings("attempts=3")
    tree, = explore(run_of(cfg, tiny, folder=True), ["train-1-0000"])
    assert len(tree.branches) > 1
    for branch in tree.branches:
        told = done.stdout.split(f"attempt {branch.name}: ")[1]
        own = [line for line in re.findall(r"   > (.*)", told) if not line.endswith("(again)")]
        assert [line.replace("   (refused)", "") for line in own] == [turn.action for turn in branch.turns]
        assert told.count("(again)") == branch.replayed
        assert not branch.experience or f"back to step {branch.tau}, with the experience: {branch.experience}" in told
        assert f"attempt {branch.name}: {branch.end}" in done.stdout
    for reflection in (r for branch in tree.branches for r in branch.reflections):
        assert f"looks back: {reflection.text}" in done.stdout


def in_a_terminal(env=(), more=(), enter=False):
    """What leafe.py writes to a terminal; `enter`: that is pressed after each action, and only then."""
    ours, theirs = pty.openpty()
    process = programs.start(["leafe.py", *ARGS, *more], env={**os.environ, **dict(env)}, terminal=theirs)
    os.close(theirs)
    said, actions = b"", 0
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:                                  # the other end is closed
            break
        if not part:
            break
        said += part
        if enter and said.count(b"   > ") - said.count(b"(again)") > actions:
            actions += 1
            time.sleep(0.3)                              # it waits: nothing more may come before Enter
            assert said.count(b"   > ") - said.count(b"(again)") == actions
            os.write(ours, b"\n")
    assert process.wait() == 0
    return said.decode()


@pytest.mark.slow
def test_a_terminal_has_colour_and_no_color_takes_it_away():
    assert "\033[35m" in in_a_terminal() and "\033" not in in_a_terminal(env=[("NO_COLOR", "1")])


@pytest.mark.slow
def test_pause_waits_for_enter_at_each_turn():
    assert "attempts," in in_a_terminal(more=["pause=true"], enter=True)


def test_text_cannot_steer_the_terminal(capsys):
    show.say("before\033[2J\x07\u202eafter\nnext")
    assert capsys.readouterr().out == "before\\x1b[2J\\x07\\u202eafter\nnext\n"


@pytest.mark.parametrize("args, said", [
    (["task=nowhere"], "quest has no task 'nowhere'"), (["pause=maybe"], "must be true or false"),
    (["attemps=3"], "did you mean 'attempts'"), (["adapter=out/a"], "adapter: is what eval.py samples with"),
    (["warm_start=4"], "warm_start: is what train.py does first"), (["trees=out/a"], "trees: the film grows its own"),
    (["plan=true"], "plan: is what train.py prints"), (["playbook=a.txt"], "playbook: is what eval.py puts")])
def test_bad_input_is_one_line(args, said):
    with pytest.raises(UserError, match=said):
        show.main(["config.yaml", *args])
