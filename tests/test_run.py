import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import programs
from config import UserError, load_config
from conftest import ROOT, run_of
from engine import Chat
from envs import Quest
from leafe import Branch, explore
from lora import load_model
from run import PLAYBOOK, REACT, Jsonl, RunFolder, absorb, read_jsonl, write_aside
from tools import provenance


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
    done = programs.run(["train.py", "config.yaml", "preset=smoke", f"out={tmp_path}/file/run"])
    assert done.returncode == 1 and done.stderr.strip().split("\n")[-1].startswith(
        f"error: out: cannot write to {tmp_path}/file/run")
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line():
    code = ("import config\ndef main(args):\n    with open('/dev/full', 'w') as f: f.write('x' * 10)\n"
            "config.guarded(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 1 and "No space left on device" in done.stderr
            and "Traceback" not in done.stderr)


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


# what lies in its files

TURN = dict(obs="a hall", obs_ids=[3, 4], action="go", action_ids=[5, 2], parent=None, experience="", score=0.0,
            success=False, valid=True)
TREE = Branch("t", "0", 1, "", [], "", [], "failure", 1, 0, 2, number=0).record(1) | dict(turns=[TURN])
SAMPLE = dict(policy="base", weights="base", task="t", sample=0, difficulty="all", success=False, score=0.0, turns=1,
              refused=0, tokens=2)
GOOD = {"trees.jsonl": TREE, "samples.jsonl": SAMPLE, "metrics.jsonl": dict(round=1, step=1, tokens=3)}


def turn(**changes):
    return TREE | dict(turns=[TURN | changes])


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize("name, record, fault", [
    *((name, odd, "which is no record") for name in GOOD for odd in (["a"], 3, "a", None, float("nan"), True)),
    *(("samples.jsonl", without(SAMPLE, key), f"{key} is missing") for key in SAMPLE),
    *(("samples.jsonl", SAMPLE | {key: odd}, f"{key} is ") for key in SAMPLE for odd in ([1], None)),
    *(("samples.jsonl", SAMPLE | {key: -1}, f"{key} is -1, not a whole number of 0 or more")
      for key in ("sample", "turns", "refused", "tokens")),
    *(("trees.jsonl", without(TREE, key), f"{key} is missing") for key in TREE if key not in (
        "number", "parent", "clipped")),
    *(("trees.jsonl", TREE | {key: {}}, f"{key} is |{key} holds") for key in TREE),
    ("trees.jsonl", TREE | dict(name="a.b"), "name is 'a.b', not like 0.2.1"),
    ("trees.jsonl", TREE | dict(number=-2), "number is -2"), ("trees.jsonl", TREE | dict(steps=10**30), "steps is 1000"),
    ("trees.jsonl", TREE | dict(other=1), "it holds 'other', which is no field here"),
    ("trees.jsonl", turn(obs=None), r"turns\[0\].obs is None, not text"),
    ("trees.jsonl", turn(success="yes"), r"turns\[0\].success is 'yes', not true or false"),
    *(("trees.jsonl", turn(obs_ids=ids), r"turns\[0\].obs_ids (holds|is)")
      for ids in ([-1], ["a"], [1.5], [True], [[1]], [10**20], "ab", None)),
    *(("trees.jsonl", TREE | dict(reflections=[odd]), r"reflections\[0\]") for odd in (3, {}, {"t": 1})),
    ("metrics.jsonl", dict(step="x"), "step is 'x'"), ("metrics.jsonl", dict(tokens=None), "tokens is None")])
def test_a_line_that_is_no_record_of_its_file_is_told_with_file_line_and_field(name, record, fault, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps(GOOD[name]) + "\n" + json.dumps(record) + "\n")
    for read in (lambda: list(read_jsonl(path)), lambda: Jsonl(path)):
        with pytest.raises(UserError, match=fault) as error:
            read()
        assert str(error.value).startswith(f"{path}: line 2: ") and "restore the file, or delete the line" in str(error.value)
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("line", [b'{"a"\n', b"\n", b"\xff\xfe\n", b"[" * 5000 + b"\n", b'{"a": ' + b"9" * 5000 + b"}\n"])
def test_a_line_that_is_no_json_is_told_or_dropped_at_the_end(line, tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    good = json.dumps(SAMPLE).encode() + b"\n"
    path.write_bytes(line + good)
    with pytest.raises(UserError, match="samples.jsonl: line 1 is damaged, and is not the last"):
        Jsonl(path)
    path.write_bytes(good + line)
    assert Jsonl(path).records == [SAMPLE] and path.read_bytes() == good
    assert "the last line was cut short" in capsys.readouterr().err


def test_a_score_may_be_true_and_an_old_record_may_lack_what_came_later(tmp_path):
    old = without(without(without(turn(score=True), "number"), "parent"), "clipped")
    (tmp_path / "trees.jsonl").write_text(json.dumps(old) + "\n")
    assert list(read_jsonl(tmp_path / "trees.jsonl")) == [old]


def test_a_record_that_stands_there_twice_is_taken_once_and_two_that_differ_are_one_line(tmp_path, capsys):
    for name, other in (("samples.jsonl", dict(success=True)), ("trees.jsonl", dict(steps=9))):
        path, line = tmp_path / name, json.dumps(GOOD[name])
        path.write_text(f"{line}\n{line}\n")
        assert Jsonl(path).records == list(read_jsonl(path)) == list(read_jsonl(str(path))) == [GOOD[name]]
        assert capsys.readouterr().err == f"note: {path}: line 2 repeats line 1, and is left out\n"         # once
        path.write_text(f"{line}\n{json.dumps(GOOD[name] | other)}\n")
        with pytest.raises(UserError, match=f"{name}: lines 1 and 2 are both .*task 't'.*and differ; delete the wrong"):
            Jsonl(path)
    (tmp_path / "metrics.jsonl").write_text('{"a":1}\n{"a":1}\n')         # have no names
    assert len(Jsonl(tmp_path / "metrics.jsonl").records) == 2


@pytest.mark.parametrize("name, read", [("seconds.json", "seconds"), ("run.json", "tell")])
@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", "NaN", "[" * 5000, "\udcff", '{"continued": 3}'])
def test_a_damaged_file_of_one_value_is_one_line_that_says_to_delete_it(name, read, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"{name}: .*(restore it, or delete it|not UTF-8)") as error:
        getattr(provenance, read)(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / name).unlink()
    getattr(provenance, read)(tmp_path)


def test_damaged_seconds_are_told_before_the_work_they_would_measure(settings):
    folder, done = RunFolder(settings()), []
    (folder.path / "seconds.json").write_text("{")
    with pytest.raises(UserError, match="seconds.json: it is damaged"):
        with folder.metered():
            done.append("work")
    assert not done


@pytest.mark.parametrize("text", ["steps: [", "\xff", "", "just words", "stps: 3\n", "steps: x\n", "steps: 3\nsteps: 4\n"])
def test_a_damaged_config_of_a_run_is_one_line_that_names_it(text, settings):
    cfg = settings()
    RunFolder(cfg).lock.close()
    path = Path(cfg.out) / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{path}"):
        RunFolder(cfg)


# who reads what it says, and who stops it

SAYS = "import config, sys, time\ndef main(args):\n    for i in range(3000): print('a line', i); print(i, file=sys.stderr)\n" \
       "    open(args[0], 'w').write('whole')\nconfig.guarded(main)"


@pytest.mark.parametrize("way, ends", [("| head -1", 141), (">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("2>&1 | head -1", 141),
                                       ("2>&1 | true", 141), ("> /dev/full", 141), ("<&- >&- 2>&-", 0)])
def test_a_run_goes_on_whoever_reads_what_it_says(way, ends, tmp_path):
    line = f"set -o pipefail; {sys.executable} -c \"$CODE\" {tmp_path}/x {way}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CODE": SAYS})
    assert (tmp_path / "x").read_text() == "whole" and done.returncode == ends
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "eval.py", "leafe.py", "-m tools.page", "-m methods.stage1"])
def test_ctrl_c_during_the_imports_is_one_line(script):
    code = ("import builtins, os, runpy, signal, sys\nreal = builtins.__import__\n"
            "def slow(name, *rest, **more):\n"
            "    if name in ('torch', 'tqdm'): os.kill(os.getpid(), signal.SIGINT)\n"
            "    return real(name, *rest, **more)\nbuiltins.__import__ = slow\n"
            "sys.argv = [os.path.abspath(sys.argv[1])]\nsys.path.insert(0, os.getcwd())\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    file = script.removeprefix("-m ").replace(".", "/").removesuffix("/py") + ".py"
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "\nstopped; nothing is lost: the same command goes on from here\n"


@pytest.mark.parametrize("raises, says", [
    ("MemoryError()", "error: out of memory; lower slots="),
    ("RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')", "error: out of memory; lower slots="),
    ("OSError(36, 'File name too long', 'aaa')", "error: aaa: File name too long"),
    ("OSError(27, 'File too large')", "error: out: File too large; nothing is lost"),
    ("OSError(28, 'No space left on device')", "error: out: No space left on device; nothing is lost")])
def test_what_a_machine_refuses_is_one_line(raises, says):
    code = f"import config\ndef main(args):\n    raise {raises}\nconfig.guarded(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(says) and done.stderr.count("\n") == 1


def test_an_error_stands_on_a_line_of_its_own_behind_a_progress_bar():
    code = ("import config\nfrom tqdm import tqdm\ndef main(args):\n    bar = tqdm(total=3)\n    bar.update()\n"
            "    raise config.UserError('no')\nconfig.guarded(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("\nerror: no\n")              # nor does it go on behind it


# who made them

@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A folder with the trees of two tasks, as train.py leaves them."""
    cfg = load_config([str(ROOT / "config.yaml"), "preset=smoke", "attempts=2", f"out={tmp_path_factory.mktemp('made')}/run"])
    run = run_of(cfg, tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    provenance.settle(run)
    explore(run, TASKS)
    run.folder.close()
    run.folder.lock.close()
    return run.folder.path


TASKS = Quest().tasks("train")[:2]


def other_tiny(path, what):
    """A copy of the embedded model with one thing changed; loaded."""
    shutil.copytree(ROOT / "models/tiny", path)
    if what == "weights":
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name in [file.name for file in path.glob("*") if file.suffix in (".json", ".jinja")]:
        text = (path / name).read_text()
        if what == "template" and name == "chat_template.jinja":
            text += "{# another #}"
        if what == "tokenizer" and name == "tokenizer.json":
            told = json.loads(text)
            vocab = told["model"]["vocab"]
            a, b = sorted(vocab, key=vocab.get)[20:22]
            vocab[a], vocab[b] = vocab[b], vocab[a]
            text = json.dumps(told)
        (path / name).write_text(text)
    model, tokenizer = load_model(str(path), None, 768)
    return model, Chat(tokenizer)


@pytest.mark.parametrize("what, fault", [
    ("nothing", None), ("weights", r"other weights \(model=\)"), ("tokenizer", r"another tokenizer \(model=\)"),
    ("template", r"another chat template \(model=, thinking=\)"), ("rules", r"other rules \(env=, data=, react=\)")])
def test_trees_of_another_model_template_or_world_are_refused_before_anything_is_sampled(what, fault, made, settings, tmp_path):
    pair = other_tiny(tmp_path / "model", what)
    args = [f"model={tmp_path}/model", *(["react=true", "action_tokens=60"] if what == "rules" else [])]
    for number, more in enumerate(([f"trees={made}"], [])):            # another run's trees, and a run gone on with
        cfg = settings(*args, *more, f"out={tmp_path}/{number}")
        run = run_of(cfg, pair, folder=True, train_tasks=TASKS, test_tasks=TASKS)
        if not more:
            shutil.copy(made / "trees.jsonl", run.folder.path)
        if fault:
            with pytest.raises(UserError, match=f"trees: .*trees.jsonl was made with {fault}"):
                provenance.settle(run)
        else:
            provenance.settle(run)
            assert json.loads((run.folder.path / "run.json").read_text())["made_by"].startswith("model ")


@pytest.mark.parametrize("changed, refused", [
    ("def tasks(self, split): return super().tasks(split)[::-1]", True),               # a set's order, of each process its own
    ("def tasks(self, split): return [*super().tasks(split), f'{split}-new']", False)])
def test_trees_of_a_world_whose_tasks_come_otherwise_are_refused(changed, refused, made, tiny, settings, tmp_path):
    (tmp_path / "again.py").write_text(f"from envs import Quest\n\n\nclass Again(Quest):\n    {changed}\n")
    run = run_of(settings(f"trees={made}", f"env={tmp_path}/again.py:Again", f"out={tmp_path}/run"), tiny, folder=True,
                 train_tasks=TASKS, test_tasks=TASKS)
    with pytest.raises(UserError, match="trees: .* was made with other first training tasks") if refused else nullcontext():
        provenance.settle(run)


@pytest.mark.parametrize("world, told", [
    ("", False), ("    def tasks(self, split):\n        return super().tasks(split)[::-1 if split == 'test' else 1]\n", "other first tasks to test on"),
    ("    def reset(self, task):\n        return super().reset(task) + ' it rains.'\n", True)])       # of hash(task), or edited
def test_a_run_goes_on_where_tasks_begin_otherwise_with_a_note_and_not_with_other_tasks(world, told, made, tiny, settings, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path / "run")
    (tmp_path / "again.py").write_text(f"from envs import Quest\n\n\nclass Again(Quest):\n    pass\n{world}")
    run = run_of(settings(f"out={folder}", "attempts=2"), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    run.cfg.env = f"{tmp_path}/again.py:Again"
    with pytest.raises(UserError, match=told) if isinstance(told, str) else nullcontext():
        provenance.settle(run)
    assert ("the first tasks begin otherwise" in capsys.readouterr().err) == (told is True)


def test_trees_are_of_their_own_tasks_whatever_there_is_to_test_on(made, tiny, settings, tmp_path):
    (tmp_path / "again.py").write_text("from envs import Quest\n\n\nclass Again(Quest):\n    def tasks(self, split):\n"
                                       "        return super().tasks(split)[::-1 if split == 'test' else 1]\n")
    run = run_of(settings(f"trees={made}", f"env={tmp_path}/again.py:Again", f"out={tmp_path}/run"), tiny, folder=True,
                 train_tasks=TASKS, test_tasks=TASKS)
    provenance.settle(run)


@pytest.mark.parametrize("other, said", [
    ("keep_experience=false", "keep_experience=True, not False; say so here too"),
    ("observation_tokens=32", "observation_tokens=256, not 32; say so here too"), ("env=quest", "")])
def test_trees_are_read_by_the_settings_of_what_the_policy_saw_alone(other, said, made, tiny, settings, tmp_path):
    run = run_of(settings(f"trees={made}", other, f"out={tmp_path}"), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    with pytest.raises(UserError, match=f"trees: .* was explored with {said}") if said else nullcontext():
        provenance.settle(run)


def test_trees_of_a_world_by_another_name_are_taken_with_a_note(made, tiny, settings, tmp_path, capsys):
    (tmp_path / "again.py").write_text("from envs import Quest\n\n\nclass Again(Quest):\n    pass\n")
    args = f"trees={made}", f"env={tmp_path}/again.py:Again", f"out={tmp_path}/run"
    run = run_of(settings(*args), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    provenance.settle(run)
    assert "was explored with env='quest', not" in capsys.readouterr().err


def test_a_file_is_written_aside_and_renamed(tmp_path, monkeypatch):
    path = tmp_path / "passk.json"
    path.write_text("old")
    real = type(path).write_text

    def half(self, text, **more):
        real(self, text[:2], **more)
        raise KeyboardInterrupt
    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_aside(path, "new text")
    assert path.read_text() == "old"


def test_a_run_that_goes_on_has_not_ended(made, tiny, settings, tmp_path):
    run = run_of(settings(f"trees={made}", f"out={tmp_path}/run"), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    (tmp_path / "run/passk.json").write_text("{}")     # of a sampling by eval.py before, or of fewer samples
    provenance.settle(run)
    assert not (tmp_path / "run/passk.json").exists()


def test_a_run_is_not_gone_on_with_by_another_model_of_the_same_name(made, settings, tmp_path):
    cfg = load_config([f"{made}/config.yaml"])
    with pytest.raises(UserError, match=rf"out: {made} holds a run with other weights \(model=\); choose another out="):
        provenance.settle(run_of(cfg, other_tiny(tmp_path / "model", "weights"), folder=True, test_tasks=TASKS).but(
            model=str(tmp_path / "model")))


def test_trees_from_before_they_said_who_made_them_are_taken_with_a_note(made, tiny, settings, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    records = [without(record, "made_by") for record in read_jsonl(made / "trees.jsonl")]
    (tmp_path / "old/trees.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = run_of(settings(f"trees={tmp_path}/old"), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    provenance.settle(run)
    assert f"note: {tmp_path}/old/trees.jsonl is of before its records said who made them" in capsys.readouterr().err


@pytest.mark.parametrize("spoil, fault", [
    (lambda records: records[1:], "is not whole"), (lambda records: [], "has no tree for some of the 2 tasks in round 1"),
    (lambda records: [record | dict(round=2) for record in records], "has no tree for some"),
    (lambda records: [records[0] | dict(experience="look")] + records[1:], "which there is not"),
    (lambda records: [record | dict(tau=99) if record["parent"] is not None else record for record in records],
     "replaces turn 99 of attempt number 0, which there is not"),
    (lambda records: [records[0] | dict(turns=[TURN | dict(obs_ids=[468])])] + records[1:], "beyond the model's 468 tokens"),
    (lambda records: [records[0] | dict(turns=[TURN | dict(action_ids=[])])] + records[1:], "holds no ids")])
def test_trees_that_are_not_whole_are_told_before_anything_is_sampled(spoil, fault, made, tiny, settings, tmp_path):
    (tmp_path / "bad").mkdir()
    records = spoil(list(read_jsonl(made / "trees.jsonl")))
    (tmp_path / "bad/trees.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = run_of(settings(f"trees={tmp_path}/bad"), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    with pytest.raises(UserError, match=f"^trees: {tmp_path}/bad.*{fault}"):
        provenance.settle(run)


# is there room?

@pytest.mark.parametrize("args, fault", [
    (["context=60"], r"context: 60 tokens are too few: the rules with the first observation of .* take \d+, an action"),
    (["action_tokens=760"], "context: 768 tokens are too few"),
    (["action_tokens=1"], "action_tokens: 1 are too few: '.*', the shortest action of .*, takes 3 with its end"),
    (["react=true"], "action_tokens: 16 are too few"), (["reflect_tokens=2"], "reflect_tokens: 2 are too few"),
    (["reflect_tokens=700"], "context: 768 tokens leave no room to reflect")])
def test_settings_that_leave_no_room_are_told_before_anything_is_sampled(args, fault, tiny, settings):
    run = run_of(settings(*args), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    with pytest.raises(UserError, match=f"^{fault}"):
        provenance.settle(run)


def test_a_group_that_a_world_cannot_name_is_told_before_anything_is_sampled(tiny, settings, monkeypatch):
    monkeypatch.setattr(Quest, "difficulty", lambda world, task: {TASKS[0]: "easy"}.get(task))
    run = run_of(settings(), tiny, folder=True, train_tasks=TASKS, test_tasks=TASKS)
    with pytest.raises(UserError, match="difficulty.* must return the name of a group, which is text, not NoneType"):
        provenance.settle(run)


@pytest.mark.parametrize("text", ["# mine\npreset: smoke\nseed: 3   # why\n", "preset: smoke\nseed: 3\n", "seed: 3\nlr: 0.1\n"])
def test_a_config_yaml_of_the_user_s_own_is_not_written_over(text, settings, tmp_path):
    own = tmp_path / "config.yaml"
    own.write_text(text)
    with pytest.raises(UserError, match=f"out: {tmp_path} holds a config.yaml that no run wrote; choose another out="):
        RunFolder(settings(f"out={tmp_path}"))
    assert own.read_text() == text


def test_a_run_without_its_config_yaml_is_no_new_run(settings, tmp_path):
    RunFolder(settings(f"out={tmp_path}")).lock.close()
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=f"out: {tmp_path} holds a run without its config.yaml; restore that, or choose"):
        RunFolder(settings(f"out={tmp_path}", "seed=5"))


def test_a_run_killed_before_its_run_json_goes_on(settings, tmp_path):
    cfg = settings(f"out={tmp_path}", "data='a #b'", "ks=[1,2]", "slots=null")
    RunFolder(cfg).lock.close()
    (tmp_path / "run.json").unlink()
    RunFolder(cfg)
