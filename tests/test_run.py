import json
import subprocess
import sys

import pytest

from config import UserError
from conftest import ROOT, run_of
from envs import Quest
from run import PLAYBOOK, REACT, Jsonl, RunFolder, absorb, read_jsonl


# the folder

def test_a_damaged_last_line_is_cut_off_and_the_file_goes_on(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    for tail in ('{"a": 3', '{"a": 3}', '\x00\x00', '{"a": 3}x\n', "\n"):
        path.write_text('{"a": 1}\n{"a": 2}\n' + tail)
        store = Jsonl(path)
        assert [r["a"] for r in store.records] == [1, 2]
        store.append({"a": 4})
        store.close()
        assert [r["a"] for r in read_jsonl(path)] == [1, 2, 4]
    assert "the last line was cut short" in capsys.readouterr().err


def test_parts_of_other_ranks_are_taken_over_once_even_if_that_was_killed_half_way(tmp_path, capsys):
    path = tmp_path / "trees.jsonl"
    path.write_text('{"a":1}\n{"a":2}\n')
    (tmp_path / "trees.jsonl.1.part").write_text('{"a":2}\n{"a":3}\n')        # its first had been taken over
    (tmp_path / "trees.jsonl.2.part").write_text('{"a":4}\n{"a":')
    absorb(path)
    assert path.read_text() == '{"a":1}\n{"a":2}\n{"a":3}\n{"a":4}\n' and not list(tmp_path.glob("*.part"))
    assert "trees.jsonl.2.part: the last line was cut short" in capsys.readouterr().err
    absorb(path)
    assert path.read_text().count("\n") == 4


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        Jsonl(path)
    assert path.read_text().count("\n") == 3


def test_a_folder_is_held_by_one_process_and_by_one_configuration(settings):
    cfg = settings()
    held = RunFolder(cfg)
    with pytest.raises(UserError, match="another process is running"):
        RunFolder(cfg)
    held.lock.close()
    RunFolder(settings("slots=3")).lock.close()                            # speed only: the same run
    with pytest.raises(UserError, match="holds a run with seed=0, not 1"):
        RunFolder(settings("seed=1"))


def test_training_goes_on_from_the_adapter_it_began_with_whatever_is_sampled_meanwhile(settings):
    RunFolder(settings()).lock.close()
    RunFolder(settings("adapter=out/other")).lock.close()                  # eval.py in the same folder
    with pytest.raises(UserError, match="holds a run with init='', not 'out/other'"):
        RunFolder(settings("init=out/other"))


def test_an_out_folder_that_cannot_be_written_is_one_line(tmp_path, settings):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, "train.py", "config.yaml", "preset=smoke",
                           f"out={tmp_path}/file/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().split("\n")[-1].startswith(
        f"error: out: cannot write to {tmp_path}/file/run")
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line():
    code = ("import config\ndef main(args):\n    with open('/dev/full', 'w') as f: f.write('x' * 10)\n"
            "config.guarded(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 1 and "No space left on device" in done.stderr
            and "Traceback" not in done.stderr)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "envs.py", "leafe.py", "-m tools.tiny",
                                    "-m methods.stage1"])
def test_help_says_how_to_run_it(script):
    done = subprocess.run([sys.executable, *script.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python {script}" in done.stdout, done.stderr


def test_records_are_one_line_each(tmp_path):
    store = Jsonl(tmp_path / "x.jsonl")
    store.append({"text": "two\nlines \u2028 and ünicode"})
    store.close()
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 1
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"text": "two\nlines \u2028 and ünicode"}


# the run

def test_what_a_run_says_again_is_written_once(settings, tiny):
    for times in (2, 1):                               # the second: gone on with
        run = run_of(settings(), tiny, folder=True)
        for _ in range(times):
            run.say(round=1, D_cf=7)
        run.say(round=2, D_cf=7)
        run.folder.close()
        run.folder.lock.close()
    assert list(read_jsonl(run.folder.path / "metrics.jsonl")) == [dict(round=1, D_cf=7), dict(round=2, D_cf=7)]
    assert run.store("trees.jsonl") is run.but(steps=1).store("trees.jsonl")


def test_behind_a_world_s_rules_stand_how_to_answer_and_the_playbook(settings, tiny):
    rules = Quest.rules
    assert run_of(settings(), tiny).world().rules == rules
    assert run_of(settings("react=true"), tiny).world().rules == rules + REACT
    run = run_of(settings(), tiny, playbook="look twice.\nleap once.")
    assert run.world().rules == run.but(horizon=3).world().rules == rules + PLAYBOOK + "look twice.\nleap once."
    assert Quest.rules == rules and run.cfg.horizon is None          # nobody else's
