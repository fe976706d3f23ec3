"""A world played by hand, and the list of worlds: `python envs.py`."""

import programs
from envs import Quest


def play(*args, typed):
    return programs.run(["envs.py", *args], typed=typed, timeout=60)


def test_a_person_plays_undoes_and_wins():
    env, moves = Quest(), []
    env.reset("test-1-0000")
    while action := env.next_best():
        moves.append(action)
        env.step(action)
    out = play("quest", "test-1-0000", typed="\n".join(["hint", "go nowhere", "undo", *moves]) + "\n")
    assert out.returncode == 0 and "(refused) you cannot do that." in out.stdout
    assert f"{len(moves)}> {moves[-1]}\n" in out.stdout  # piped in, actions are shown: a transcript
    assert f"success after {len(moves)} turns" in out.stdout, out.stdout  # undone, the refusal cost nothing


def test_playing_ends_with_the_input_and_names_mistakes():
    assert play("sokoban", typed="up\nhint\nundo\n").returncode == 0
    assert play("chess", typed="").stderr == (
        "error: env: there is no 'chess'; there are quest, alfworld, code, scienceworld, sokoban, sokoban-words, "
        "webshop, and path/to/file.py:Class\n")
    assert "has no task 'x'" in play("quest", "x", typed="").stderr
    assert "python envs.py quest" in play(typed="").stdout


def test_a_world_in_a_folder_with_a_sign_of_equality_is_played_and_a_hint_of_another_shape_is_one_line(tmp_path):
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b/own.py").write_text(
        "from envs import Quest\n\n\nclass Own(Quest):\n    said = 0\n\n    def actions(self):\n        self.said += 1\n"
        "        return ['look'] if self.said < 8 else None\n")
    out = play(f"{tmp_path}/a=b/own.py:Own", typed="hint\n" * 9)
    assert out.stdout.count("> hint\nlook") >= 1 and out.returncode == 1
    assert out.stderr.endswith("class Own: actions() must return a list of texts, not NoneType None\n")
