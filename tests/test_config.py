import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import train
import programs
from config import (ROOT, SHIPPED, UserError, kept_config, keys_of, load_config, method_file, method_names, owners_of,
                    shipped)
from run import RunFolder

METHODS = ["leafe", *method_names()]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def config_text(**changes):
    return yaml.safe_dump({**yaml.safe_load(SHIPPED.read_text()), **changes})


def load(*args):
    return load_config([str(SHIPPED), *args])


def write(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def brought(method):
    return yaml.safe_load(keys_of(method)) or {}


# mistakes

@pytest.mark.parametrize("args, message", [
    (["stepz=3"], "the command line: there is no key 'stepz'; did you mean 'steps'?"),
    (["qqqqqq=3"], "the command line: there is no key 'qqqqqq'"),
    (["steps=many"], "steps is 'many', but must be a whole number"),
    (["steps=1.5"], "steps is 1.5, but must be a whole number"),
    (["steps=true"], "steps is True, but must be a whole number"),
    (["lr=fast"], "lr is 'fast', but must be a number"),
    (["keep_experience=3"], "keep_experience is 3, but must be true or false"),
    (["load_in_4bit=3"], "load_in_4bit is 3, but must be true, false or null"),
    (["workers=all"], "workers is 'all', but must be a whole number or null"),
    (["ks=3"], "ks is 3, but must be"),
    (["ks=[1,256]"], "the command line: ks is [1, 256], but samples is 128: k can be at most the number of samples"),
    (["samples=4"], "config.yaml: ks is [1, 2, 4, 8, 16, 32, 64, 128], but samples is 4"),
    (["ks=[]"], "ks is [], but must be a list of numbers of 1 or more, like [1, 8]"),
    (["horizon=0"], "horizon is 0, but must be 1 or more, or null"),
    (["train_tasks=0"], "train_tasks is 0, but must be 1 or more"),
    (["test_tasks=0"], "test_tasks is 0, but must be 1 or more"),
    (["temperature=-1"], "temperature is -1, but must be 0 or more"),
    (["observation_tokens=7"], "observation_tokens is 7, but must be 8 or more"),
    (["rehearsal_share=2"], "rehearsal_share is 2, but must lie in 0..1"),
    (["corrections=best"], "corrections is 'best', but must be all, improved or successful"),
    (["correct=last"], "correct is 'last', but must be branch or first"),
    (["split=tests"], "split is 'tests', but must be train, valid or test, or a part of one"),
    (["train_split=valid"], "train_split is 'valid', but must be train, or a part of it"),
    (["engine=localhost:8000"], "engine is 'localhost:8000', but must be a server's address"),
    (["out= "], "out is ' ', but must name a folder"),
    (["row_tokens=100"], "row_tokens is 100, but must be at least context (768)"),
    (["lr=0"], "lr is 0, but must be above 0"), (["lr=nan"], "lr is 'nan'"), (["lr=.nan"], "lr is nan"),
    (["lr=1e39"], "lr is 1e+39, but must be above 0, and below 1e38"),
    (["lora_alpha=1e300"], "lora_alpha is 1e+300, but must be above 0, and below 1e38"),
    (["warm_start=4", "react=true"], "warm_start is 4, but goes with neither init= nor react=true"),
    (["steps=["], "cannot be read as a value"),
    (["preset=smok"], f"there are {', '.join(PRESETS)}; did you mean 'smoke'?"),
    (["method=grpa"], f"method: there is no 'grpa'; there are {', '.join(METHODS)}, and path/to/file.py; "
                      f"did you mean 'grpo'?"),
    (["method=[grpo]"], "method: there is no '[grpo]'; there are leafe, ace"),
    (["method=nowhere/my.py"], "method: there is no file nowhere/my.py"),
    (["other.yaml", "x"], "x: not understood; write options as key=value"),
    (["nowhere.yaml"], "nowhere.yaml: there is no such file"),
    # a method's keys, and what it asks of the loop's
    (["env_steps=9"], "there is no key 'env_steps'; it is a key of method=ace, compare, early_experience, grpo, rft"),
    (["grpo_kl=1"], "the command line: there is no key 'grpo_kl'; it is a key of method=compare, grpo"),
    (["experiences=a", "trees=b"], "there is no key 'experiences'; it is a key of method=other_lessons"),
    (["method=rft", "grpo_kl=1"], "there is no key 'grpo_kl'; it is a key of method=compare, grpo"),
    (["method=grpo", "grpo_kk=1"], "the command line: there is no key 'grpo_kk'; did you mean 'grpo_kl'?"),
    (["method=grpo", "grpo_group=1"], "grpo_group is 1, but must be 2 or more: a rollout is judged against its"),
    (["method=grpo", "grpo_group=two"], "grpo_group is 'two', but must be a whole number"),
    (["method=grpo", "grpo_statistics=all"], "grpo_statistics is 'all', but must be episodes or steps"),
    (["method=rft", "rounds=2"], "rounds is 2, but a baseline has one; rounds are for leafe"),
    (["method=rft", "env_steps=0"], "env_steps is 0, but must be 1 or more, or null for what trees= took"),
    (["method=early_experience", "early_experience=reflection"], "raise action_tokens above reflect_tokens (110)"),
    (["method=other_lessons", "trees=b"], "trees is 'b', but this control explores anew"),
    (["method=ace", "warm_start=4"], "warm_start is 4, but does not go with method=ace"),
    (["method=compare", "warm_start=4", "react=true"], "warm_start is 4, but goes with neither init= nor react=true"),
    (["method=compare", "seeds=[]"], "seeds is [], but must be a list of numbers of 0 or more, like [0, 1]")])
def test_a_mistake_in_the_configuration_is_one_line_with_the_key_and_the_fix(args, message):
    with pytest.raises(UserError) as error:
        load_config(args if args[0].endswith(".yaml") else [str(SHIPPED), *args])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("args, message", [
    (["seed=3"], "seed: method=compare sets it for each of its runs; use seeds="),
    (["init=a"], "init: method=compare sets it"), (["trees=a"], "trees: method=compare sets it"),
    (["evaluate_base=false"], "evaluate_base: method=compare sets it")])
def test_what_a_comparison_sets_for_each_of_its_runs_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        train.main([str(SHIPPED), "method=compare", "processes=1", *args])


@pytest.mark.parametrize("text, message", [
    ("a: [", "not YAML"), ("just words", "expected lines"), ("", "expected lines"),
    (config_text(stepz=3), "mine.yaml: there is no key 'stepz'"),
    ("steps: many", "mine.yaml: steps is 'many'"),
    ("methods: {leafe: {stps: 1}}", "mine.yaml, method leafe: there is no key 'stps'; did you mean 'steps'?"),
    ("preset: smok", "preset=smok: there is no such file in configs/.*did you mean 'smoke'")])
def test_a_mistake_in_the_file_names_the_file(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="mine.yaml" if "preset" not in text else "preset"):
        load_config([str(path)])
    with pytest.raises(UserError, match=message):
        load_config([str(path)])


def test_a_mistake_in_a_preset_names_its_file(tmp_path):
    path = write(tmp_path / "mine.yaml", stps=1)
    with pytest.raises(UserError, match=f"{path}: there is no key 'stps'; did you mean 'steps'?"):
        load(f"preset={path}")
    write(tmp_path / "mine.yaml", methods=dict(rft=dict(stps=7)))
    with pytest.raises(UserError, match=f"{path}, method rft: there is no key 'stps'"):
        load(f"preset={path}", "method=rft")
    with pytest.raises(UserError, match="preset=nowhere.yaml: there is no such file"):
        load("preset=nowhere.yaml")


# what goes over what

def test_what_a_file_leaves_out_is_as_in_the_project_s(tmp_path):
    usual = load()
    assert load_config([write(tmp_path / "mine.yaml", steps=3)]) == usual.but(steps=3)
    old = {key: value for key, value in vars(usual).items() if key != "beta"}       # a run from before it
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/config.yaml", **old)
    with pytest.raises(UserError, match="holds a run with beta=1.0, not 2.0"):
        RunFolder(usual.but(out=str(tmp_path / "run"), beta=2.0))
    RunFolder(usual.but(out=str(tmp_path / "run")))
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["beta"] == 1.0


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_file():
    assert load().samples == 128 and load("preset=smoke").samples == 8
    cfg = load("samples=16", "preset=smoke", "lr=1e-4", "beta=.inf", "horizon=null", "model=0")
    assert (cfg.samples, cfg.lr, cfg.beta, cfg.horizon, cfg.model) == (16, 1e-4, float("inf"), None, "0")


def test_a_method_brings_its_own_keys_and_the_others_have_none_of_them():
    assert load("method=grpo").grpo_group == brought("grpo")["grpo_group"]
    assert not any(hasattr(load("method=rft"), key) for key in ("grpo_group", "alternatives", "playbook_tokens"))
    for method in METHODS:
        assert set(vars(load(f"method={method}"))) == {*shipped(), *brought(method)}
    assert owners_of("grpo_clip") == ["compare", "grpo"] and owners_of("lr_") == []


def test_each_layer_goes_over_the_one_before(tmp_path):
    """The project's, the method's, a file, its part for the method, a preset, its part for the method, the command
    line."""
    tuned = brought("rft")                              # env_steps, its own; lr and steps, of the loop's keys
    mine, preset = tmp_path / "mine.yaml", tmp_path / "preset.yaml"
    plain = [write(mine, clip=0.25), "method=rft"]
    cfg = load_config(plain)
    assert (cfg.env_steps, cfg.lr, cfg.steps, cfg.clip) == (tuned["env_steps"], tuned["lr"], tuned["steps"], 0.25)
    assert load_config(plain[:1]).lr == shipped()["lr"] != tuned["lr"]              # it sets them for itself alone
    write(mine, lr=0.5, warmup=3, env_steps=7)
    cfg = load_config(plain)
    assert (cfg.env_steps, cfg.lr, cfg.steps, cfg.warmup) == (7, 0.5, tuned["steps"], 3)
    write(mine, lr=0.5, warmup=3, methods=dict(rft=dict(lr=0.25, warmup=1), grpo=dict(lr=0.75)))
    assert (load_config(plain).lr, load_config(plain).warmup) == (0.25, 1)
    assert (load_config(plain[:1]).lr, load_config(plain[:1]).warmup) == (0.5, 3)
    plain.append(f"preset={write(preset, lr=0.125, steps=8)}")
    cfg = load_config(plain)
    assert (cfg.lr, cfg.steps, cfg.warmup) == (0.125, 8, 1)
    write(preset, lr=0.125, steps=8, methods=dict(rft=dict(steps=9), grpo=dict(steps=10)))
    assert (load_config(plain).lr, load_config(plain).steps) == (0.125, 9)
    assert load_config([*plain, "steps=11", "clip=0.75"]) == load_config(plain).but(steps=11, clip=0.75)


def test_a_copy_of_the_project_s_file_leaves_a_method_what_it_sets(tmp_path):
    """A line that stands there as it was shipped is not meant for the method; one that was changed is."""
    path = tmp_path / "mine.yaml"
    path.write_text(config_text(clip=0.5))
    assert load_config([str(path), "method=rft"]) == load("method=rft", "clip=0.5")
    path.write_text(config_text(lr=0.5))
    assert load_config([str(path), "method=rft"]) == load("method=rft", "lr=0.5")
    path = write(tmp_path / "mine.yaml", preset="smoke", samples=shipped()["samples"])       # it is meant
    assert load_config([path, "method=grpo"]).samples == load_config([path]).samples == shipped()["samples"]


def test_the_method_may_be_named_by_any_layer(tmp_path):
    mine, preset = write(tmp_path / "mine.yaml", method="grpo", grpo_kl=0.5), write(tmp_path / "p.yaml", method="rft")
    assert load_config([mine]).grpo_kl == 0.5
    assert load_config([mine, f"preset={preset}"]).method == "rft"                  # what serves another is left out
    assert load_config([mine, f"preset={preset}", "method=ace"]).playbook_tokens == brought("ace")["playbook_tokens"]
    assert load_config([write(tmp_path / "on.yaml", preset=preset)]).method == "rft"


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_that_a_run_kept_is_taken_as_it_is(method, tmp_path):
    cfg = load(f"method={method}", "lr=0.01", "steps=7", f"out={tmp_path}/run")
    RunFolder(cfg).lock.close()
    kept = f"{tmp_path}/run/config.yaml"
    assert load_config([kept]) == cfg                   # whatever the method would set for lr and steps
    assert load_config([kept, "lr=0.5"]) == cfg.but(lr=0.5)
    RunFolder(load_config([kept])).lock.close()


def test_a_file_that_names_some_of_a_method_s_keys_is_no_run_s(tmp_path):
    """A file with a budget alone: the method's values for lr and steps hold."""
    cfg = load_config([write(tmp_path / "mine.yaml", method="rft", env_steps=400)])
    assert (cfg.env_steps, cfg.lr, cfg.steps) == (400, brought("rft")["lr"], brought("rft")["steps"])


WITH_HEADS = '''KEYS = """
heads: 3    # of a hydra
lr: 0.125
"""
CHECKS = [("heads", lambda v, s: v > 1, "must be 2 or more")]


def train(run, round_):
    pass
'''


def test_a_method_of_one_s_own_brings_its_keys_and_its_checks(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(WITH_HEADS)
    cfg = load(f"method={path}", "heads=4")
    assert (cfg.heads, cfg.lr, cfg.method) == (4, 0.125, str(path))
    plain = tmp_path / "plain.py"
    plain.write_text("KEYS = 'lr: 0.125'\n\n\ndef train(run, round_):\n    pass\n")
    assert load(f"method={plain}").lr == 0.125          # none of its own
    with pytest.raises(UserError, match="the command line: heads is 1, but must be 2 or more"):
        load(f"method={path}", "heads=1")
    with pytest.raises(UserError, match="there is no key 'headz'; did you mean 'heads'?"):
        load(f"method={path}", "headz=1")


# presets

def test_a_preset_may_build_on_another_and_only_says_what_differs():
    base, built = load("preset=qwen7b"), load("preset=llama8b")
    own = yaml.safe_load((ROOT / "configs/llama8b.yaml").read_text())
    assert own.pop("preset") == "qwen7b" and built == base.but(**own)


def test_a_preset_may_be_a_file_of_one_s_own_that_builds_on_a_shipped_one(tmp_path):
    path = write(tmp_path / "mine.yaml", preset="smoke", steps=3)
    assert load(f"preset={path}") == load("preset=smoke", "steps=3")


def test_a_file_may_build_on_a_preset_and_goes_over_it(tmp_path):
    path = write(tmp_path / "mine.yaml", preset="smoke", steps=3)
    assert load_config([path]) == load("preset=smoke", "steps=3")
    cfg = load_config([path, "preset=class"])           # and one that is asked for goes over both
    assert (cfg.samples, cfg.steps) == (load("preset=class").samples, 3)


def test_of_several_presets_the_later_goes_over_the_earlier():
    smoke, lesson = (yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in ("smoke", "class"))
    cfg = load("preset=smoke", "preset=class")
    assert (cfg.steps, cfg.samples, cfg.out) == (smoke["steps"], lesson["samples"], lesson["out"])


def test_what_a_preset_says_for_a_method_holds_wherever_the_preset_is_named(tmp_path):
    said = yaml.safe_load((ROOT / "configs/sokoban.yaml").read_text())["methods"]["early_experience"]["lr"]
    path = write(tmp_path / "mine.yaml", preset="sokoban")
    assert load("preset=sokoban", "method=early_experience").lr == said != brought("early_experience")["lr"]
    assert load_config([path, "method=early_experience"]).lr == said


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_with_every_method(preset):
    for method in METHODS:
        load(f"preset={preset}", f"method={method}", *["rounds=1"] * (method != "leafe"))     # a baseline has one
    text = (ROOT / f"configs/{preset}.yaml").read_text()
    assert set(yaml.safe_load(text).get("methods", {})) <= set(METHODS) and text.startswith("# ")


@pytest.mark.parametrize("preset", ["qwen7b", "llama8b", "qwen3"])
def test_a_language_model_s_preset_goes_with_any_world_and_fits_its_own_numbers(preset):
    cfg = load(f"preset={preset}", "env=alfworld", "data=x")
    assert cfg.react and cfg.load_in_4bit and cfg.env == "alfworld" and cfg.out == f"out/{preset}"
    assert cfg.action_tokens + cfg.reflect_tokens < cfg.context <= cfg.row_tokens
    assert cfg.observation_tokens + cfg.action_tokens < cfg.context


# keys

def test_every_key_is_explained_where_it_stands():
    lines = [line for line in SHIPPED.read_text().splitlines() if line and not line.startswith("#")]
    assert [line.partition(":")[0] for line in lines] == list(shipped())
    assert all(" # " in line for line in lines) and len(SHIPPED.read_text().splitlines()) <= 115
    for method in METHODS:                              # those that it sets for the loop are explained there
        own = [line for line in keys_of(method).splitlines() if line and line.partition(":")[0] not in shipped()]
        assert {line.partition(":")[0] for line in own} == set(brought(method)) - set(shipped())
        assert all(" # " in line for line in own), method


def test_a_key_that_nothing_reads_is_found():
    """No option is parsed and ignored: every key is used outside config.py."""
    keys, read = {*shipped(), *(key for method in METHODS for key in brought(method))}, set()
    for path in {*ROOT.glob("*.py"), *ROOT.glob("*/*.py")} - {ROOT / "config.py", *ROOT.glob("tests/*.py")}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in ("cfg", "config"):
                read.add(node.attr)
    assert keys - read == set()


def test_a_method_s_help_shows_its_keys_with_what_they_mean():
    done = programs.run(["train.py", "config.yaml", "method=grpo", "-h"])
    assert done.returncode == 0 and done.stderr == "" and keys_of("grpo").strip() in done.stdout
    assert done.stdout.startswith("GRPO: groups of rollouts") and "method=grpo trees=out/quest" in done.stdout
    done = programs.run(["train.py", "method=grpa", "-h"])
    assert done.returncode == 1 and done.stderr.startswith("error: method: there is no 'grpa'")


def method(path, **parts):
    """A method's file with these parts of its text."""
    path.write_text("\n".join(f"{name} = {value}" for name, value in parts.items())
                    + "\ndef train(run, round_): pass\n")
    return f"method={path}"


def test_a_method_s_keys_may_be_numbers_as_people_write_them_and_lists_of_any_one_kind(tmp_path):
    mine = method(tmp_path / "mine.py", KEYS=repr("eps: 1e-3\nsigmas: [0.1, 2.0]\nnames: [a, b]\nlayers: [1, 2]"))
    cfg = load(mine, "eps=2e-4", "sigmas=[0.5]", "names=[c]")
    assert (cfg.eps, cfg.sigmas, cfg.names, cfg.layers) == (2e-4, [0.5], ["c"], [1, 2])
    for wrong, says in (("sigmas=[a]", "a list of numbers"), ("names=[1]", "a list of texts"),
                        ("layers=[0.5]", "a list of whole numbers"), ("eps=fast", "a number")):
        with pytest.raises(UserError, match=f"must be {says}"):
            load(mine, wrong)


@pytest.mark.parametrize("keys", ["'a: ['", "'just words'", "'- a'", "[1]", "dict(a=1)"])
def test_keys_that_are_no_lines_of_keys_are_one_line(tmp_path, keys):
    with pytest.raises(UserError, match=r"method: KEYS of .*mine\.py must be text, a line `key: value` each"):
        load(method(tmp_path / "mine.py", KEYS=keys))


def test_a_check_may_speak_of_braces_and_of_other_keys(tmp_path):
    mine = method(tmp_path / "mine.py", KEYS="'form: x'",
                  CHECKS="""[("form", lambda v, s: False, 'must be like {"a": 1}, below {context}')]""")
    with pytest.raises(UserError, match="form is 'x', but must be like {\"a\": 1}, below 768"):
        load(mine)


@pytest.mark.parametrize("name", ["base", "warm_start"])
def test_a_method_may_not_be_called_what_the_samples_of_a_start_are_called(tmp_path, name):
    with pytest.raises(UserError, match=f"rename .*{name}.py; {name} is what the samples of a run's start are called"):
        load(method(tmp_path / f"{name}.py"))


def test_a_run_of_the_control_from_before_it_was_a_method_is_read_as_one(tmp_path):
    old = {**vars(load()), "experiences": "out/other", "out": str(tmp_path)}
    write(tmp_path / "config.yaml", **old)
    cfg = load_config([f"{tmp_path}/config.yaml"])
    assert (cfg.method, cfg.experiences) == ("other_lessons", "out/other")
    with pytest.raises(UserError, match="holds a run with method='other_lessons', not 'leafe'"):
        RunFolder(load(f"out={tmp_path}"))
    RunFolder(cfg)


def test_a_comparison_hands_on_what_a_file_sets_for_all_its_runs(tmp_path):
    from methods.compare import arguments
    write(tmp_path / "mine.yaml", method="compare", methods=dict(compare=dict(grpo_group=7)), out=str(tmp_path / "out"))
    args = [f"{tmp_path}/mine.yaml"]
    cfg = load_config(args)
    assert load_config(arguments(cfg, args, "grpo", 0)).grpo_group == 7
    assert load_config(arguments(cfg, args, "rft", 0)).method == "rft"
    smoke = load("preset=smoke", "method=compare")
    assert load_config(arguments(smoke, [str(SHIPPED), "preset=smoke", "method=compare"], "grpo", 0)).grpo_group == 4
    write(tmp_path / "mine.yaml", method="compare", trees="out/other")
    with pytest.raises(UserError, match="trees: method=compare sets it"):
        train.main([*args, "processes=1"])


# whatever lies in a file

BROKEN = {
    "latin-1": ("out: caf\xe9\n".encode("latin-1"), "line 1 is not UTF-8 text"),
    "latin-1 in line 3": ("steps: 3\nlr: 1\nout: \xe9\n".encode("latin-1"), "line 3 is not UTF-8 text"),
    "UTF-16": ("steps: 3\n".encode("utf-16"), "line 1 is not UTF-8 text"),
    "UTF-16 without a mark": ("steps: 3\n".encode("utf-16-le"), "not YAML: unacceptable character"),
    "binary": (bytes(range(256)), "line 2 is not UTF-8 text"),
    "zeros": (bytes(64), "unacceptable character"),
    "empty": (b"", "expected lines of `key: value`"), "comments alone": (b"# a\n", "expected lines"),
    "a list": (b"- a\n", "expected lines"), "a number": (b"42\n", "expected lines"),
    "a number as key": (b"3: 4\n", "expected lines"), "null as key": (b"~: 4\n", "expected lines"),
    "true as key": (b"yes: 4\n", "expected lines"), "a list as key": (b"? [a]\n: 4\n", "unhashable key"),
    "a number as a method's key": (b"methods: {leafe: {3: 4}}\n", "methods must hold"),
    "a number as a method": (b"methods: {3: {lr: 1}}\n", "methods must hold"),
    "a list of methods": (b"methods: [grpo]\n", "methods must hold"),
    "a method without keys": (b"methods:\n  grpo:\n", "methods must hold"),
    "a misspelt method": (b"methods: {grpoo: {lr: 1}}\n", "methods: there is no method 'grpoo'; did you mean 'grpo'"),
    "presets": (b"preset: [smoke]\n", "preset must be the name"), "a preset's number": (b"preset: 3\n", "preset must be"),
    "a preset that is no file": (b"preset: no.yaml\n", "preset=no.yaml: there is no such file in"),
    "a preset that is itself": (b"preset: ./mine.yaml\n", "builds on this file itself"),
    "a key twice": (b"steps: 3\nlr: 1\nsteps: 4\n", "steps stands in line 1 and again in line 3; keep one"),
    "a method's key twice": (b"methods:\n  rft:\n    lr: 1\n    lr: 2\n", "lr stands in line 3 and again in line 4"),
    "octal": (b"steps: 010\n", "steps is '010', but must be a whole number"),
    "base 60": (b"steps: 1:30\n", "steps is '1:30', but must be"), "hexadecimal": (b"steps: 0x1F\n", "steps is '0x1F'"),
    "a day": (b"steps: 2026-01-01\n", "steps is '2026-01-01'"), "no day": (b"steps: 2026-99-99\n", "steps is '2026-99-99'"),
    "a tag": (b"steps: !!int many\n", "not YAML"), "a tag that runs": (b"x: !!python/object/apply:os.getpid []\n", "not YAML"),
    "a deep nest": (b"[" * 5000, "not YAML"), "an unknown alias": (b"ks: *a\n", "undefined alias"),
    "an endless list": (b"ks: &a [1, *a]\n", "ks is .*but must be a list of whole numbers"),
    "a billion laughs": (b"a: &a [1,1,1,1,1,1,1,1]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 8)) for c in range(98, 110)), "no key 'a'"),
    "two documents": (b"steps: 3\n---\nlr: 1\n", "not YAML"), "cut off": (b'steps: 3\nout: "x', "not YAML"),
    "too many digits": (b"seed: " + b"9" * 5000 + b"\n", "seed is '9+\\.\\.\\.9+', but must be a whole number, of at"),
    "a number for a text": (b"out: 100\n", "out is 100, but must be text .*in quotes"),
    "no for a text": (b"out: no\n", "out is False, but must be text"), "nothing for a text": (b"out:\n", "out is None"),
    "half a letter": (b'out: "a\\ud800"\n', "out is .*but must be text"), "a zero": (b'out: "a\\0b"\n', "out is .*must be text"),
    "an escape": (b'out: "a\\x1b[31m"\n', "out is .*must be text"), "a method's list": (b"method: [rft]\n", "there is no"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("way", ["file", "preset"])
def test_whatever_lies_in_a_file_of_settings_is_one_line_with_file_and_place(kind, way, tmp_path):
    data, message = BROKEN[kind]
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        load_config([str(path)] if way == "file" else [str(SHIPPED), f"preset={path}"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert "mine.yaml" in str(error.value) or kind == "a method's list"


def test_a_folder_or_a_name_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: Is a directory"):
        load_config([str(tmp_path)])
    done = programs.run(["train.py", "a" * 300])
    assert done.returncode == 1 and done.stderr == f"error: {'a' * 300}: File name too long\n"


VALUES = ["-1", "0", "1e5", "1e20", "1" + "0" * 20, "9" * 5000, ".nan", ".inf", "-.inf", "1e400", "true", "null", "", "[]",
          "[1]", "{}", "text", "[", "010", "1:30", "'", "*a", "!!int x", "\x1b[31m"]
ANY_TEXT = {"model", "init", "adapter", "playbook", "env", "data", "out", "trees", "experiences"}
HUGE_IS_FINE = {"lora_alpha", "lr", "clip", "beta", "gamma", "grpo_clip", "grpo_dual"}     # what diverges is told as such


@pytest.mark.parametrize("method", METHODS)
def test_a_key_takes_what_makes_sense_and_says_in_one_line_what_does_not(method, tmp_path):
    path, empty = tmp_path / "mine.yaml", write(tmp_path / "empty.yaml")
    for key in brought(method) if method != "leafe" else shipped():
        for value in VALUES:
            path.write_text(f"method: {method}\n{key}: {value}\n" if key != "method" else f"method: {value}\n")
            for args in ([empty, f"method={method}", f"{key}={value}"], [str(path)]):
                try:
                    load_config(args)
                    took = True
                except UserError as error:
                    took = False
                    assert "\n" not in str(error) and len(str(error)) < 700, error
                    assert key in str(error) or "mine.yaml: not YAML" in str(error), error
                if key not in ANY_TEXT and value in (".nan", "-.inf", "9" * 5000, "[", "*a", "!!int x", "text"):
                    assert not took, (key, value)
                if key not in ANY_TEXT and value in ("1e20", "1" + "0" * 20):
                    assert took == (key in HUGE_IS_FINE), (key, value)
                if key not in ANY_TEXT and value in (".inf", "1e400"):
                    assert took == (key == "beta"), (key, value)


@pytest.mark.parametrize("text", ["1e5", "010", "1:30", "null", "no", "100", "2026-01-01", "a=b", "a:b", "lr=1"])
def test_a_text_is_taken_as_it_stands_on_the_command_line_and_kept(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(f"out={text}", f"init={text}")
    assert (cfg.out, cfg.init) == (text, text)
    RunFolder(cfg).lock.close()
    assert kept_config(Path(text)) == cfg == load_config([f"./{text}/config.yaml"])
    RunFolder(cfg).lock.close()                        # the same run


def test_a_preset_named_in_a_file_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep/below.yaml", steps=7)
    write(tmp_path / "below.yaml", steps=8)
    monkeypatch.chdir(tmp_path)
    assert load_config([write(tmp_path / "deep/mine.yaml", preset="below.yaml")]).steps == 7
    assert load("preset=below.yaml").steps == 8         # on the command line: from here


def test_more_resamples_than_a_memory_holds_are_refused_at_the_start():
    with pytest.raises(UserError, match="resamples is 100000000000, but must be at most 1,000,000"):
        load("resamples=100000000000")
    with pytest.raises(UserError, match="resamples is 1000000, but with test_tasks=512 no memory holds them"):
        load("resamples=1000000", "test_tasks=512")


@pytest.mark.parametrize("checks, says", [
    ("[('heads', lambda v, s: 1 / 0, 'x')]", r"mine.py, line 2, in <lambda>: ZeroDivisionError"),
    ("[('headz', lambda v, s: True, 'x')]", r"KeyError: 'headz'"), ("[3]", "TypeError"), ("3", "TypeError")])
def test_checks_that_fail_are_told_with_the_method_s_file(checks, says, tmp_path):
    with pytest.raises(UserError, match=rf"^method: the CHECKS of .*mine.py, .* each, failed\n  .*{says}"):
        load(method(tmp_path / "mine.py", KEYS="'heads: 3'", CHECKS=checks))


def test_a_method_that_raises_is_told_with_its_file_and_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def check(cfg):\n    cfg.nothing\n\n\ndef train(run, round_):\n    return [][round_]\n")
    own = method_file(str(path))
    with pytest.raises(UserError, match=r"^method: train of .*mine.py failed\n  .*mine.py, line 6, in train: IndexError"):
        own.train(None, 1)
    with pytest.raises(UserError, match=r"^method: check of .*mine.py failed\n  .*mine.py, line 2, in check: Attribute"):
        own.check(load())
    path = tmp_path / "full.py"
    path.write_text("def train(run, round_):\n    raise OSError(28, 'No space left on device')\n")
    with pytest.raises(OSError, match="No space left"):                   # not its fault: guarded says how to go on
        method_file(str(path)).train(None, 1)
    path = tmp_path / "denied.py"
    path.write_text("def train(run, round_):\n    raise PermissionError(13, 'Permission denied')\n")
    with pytest.raises(UserError, match=r"denied.py, line 2, in train: PermissionError: .*Permission denied"):     # of no folder of ours
        method_file(str(path)).train(None, 1)


def script_with(tmp_path, files):
    """train.py as it starts where these files come before the packages."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return subprocess.run([sys.executable, ROOT / "train.py", "config.yaml"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)


@pytest.mark.parametrize("package, found", [("transformers", "5.3.0"), ("transformers", "6.0.0.dev0"),
                                            ("torch", "2.5.1+cu121"), ("bitsandbytes", "0.48.2")])
def test_a_package_outside_the_tested_range_is_one_line_before_torch_is_imported(tmp_path, package, found):
    needed = next(line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith(package))
    done = script_with(tmp_path, {f"{package}-{found}.dist-info/METADATA": f"Name: {package}\nVersion: {found}\n",
                                  "torch.py": "raise SystemExit('too late')"})
    assert done.stderr == f"error: {package} {found} is installed, {needed} is needed; pip install '{needed}'\n"
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("text, told", [
    ("import no_such_package", "No module named 'no_such_package'"),
    ("raise ImportError('tokenizers>=0.22 is required,\\nbut found 0.1')", "tokenizers>=0.22 is required, but found 0.1")])
def test_a_package_that_does_not_find_what_it_needs_is_one_line(tmp_path, text, told):
    done = script_with(tmp_path, {"torch.py": text})
    assert (done.returncode, done.stderr) == (1, f"error: {told}; pip install -r requirements.txt\n")


def test_what_one_s_own_files_do_not_find_keeps_its_traceback(tmp_path):
    done = script_with(tmp_path, {"torch.py": "from models import no_such_name"})
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "no_such_name" in done.stderr
