import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from conftest import ROOT
from envs import UserError
from run import METHODS, Config, Jsonl, RunFolder, absorb, load_config, read_jsonl


def config_text(**changes):
    settings = yaml.safe_load((ROOT / "config.yaml").read_text())
    return yaml.safe_dump({**settings, **changes})


@pytest.mark.parametrize("args, message", [
    (["stepz=3"], "the command line: there is no key 'stepz'; did you mean 'steps'?"),
    (["qqqqqq=3"], "the command line: there is no key 'qqqqqq'"),
    (["steps=many"], "steps is 'many', but must be a whole number"),
    (["steps=1.5"], "steps is 1.5, but must be a whole number"),
    (["steps=true"], "steps is True, but must be a whole number"),
    (["lr=fast"], "lr is 'fast', but must be a number"),
    (["keep_experience=3"], "keep_experience is 3, but must be true or false"),
    (["ks=3"], "ks is 3, but must be"),
    (["ks=[1,256]"], "ks asks for Pass@256, but samples is 128"),
    (["samples=4"], "ks asks for Pass@128, but samples is 4"),
    (["horizon=0"], "horizon must be 1 or more"),
    (["train_tasks=0"], "train_tasks must be 1 or more"),
    (["test_tasks=0"], "test_tasks must be 1 or more"),
    (["temperature=-1"], "temperature must be 0 or more"),
    (["rehearsal_share=2"], "rehearsal_share must lie in 0..1"),
    (["corrections=best"], "corrections must be all, improved or successful, not 'best'"),
    (["split=tests"], "split must be train, valid or test, or a part"),
    (["row_tokens=100"], "row_tokens is 100, but must be at least context"),
    (["lr=0"], "lr must be above 0"), (["lr=nan"], "lr is 'nan'"), (["lr=.nan"], "lr is nan"),
    (["steps=["], "cannot be read as a value"),
    (["preset=smok"], "has smoke, class, sokoban, smollm2, smollm2-mbpp, qwen7b, llama8b, qwen3; did you mean 'smoke'?"),
    (["env_steps=9"], "env_steps=9 is a baseline's budget"), (["method=rft", "rounds=2"], "rounds=2 is for leafe"),
    (["experiences=a", "trees=b"], "experiences=a is for leafe when it explores"),
    (["method=grpo", "grpo_group=1"], "grpo_group=1 must be 2 or more"),
    (["method=early_experience", "early_experience=reflection"], "raise action_tokens above reflect_tokens"),
    (["method=compare", "seed=3"], "seed: method=compare sets it for each of its runs; use seeds="),
    (["method=compare", "init=a"], "init: method=compare sets it"), (["method=[grpo]"], "method must be one of leafe, rft"),
    (["other.yaml", "x"], "x: not understood; write options as key=value"),
    (["nowhere.yaml"], "nowhere.yaml: there is no such file")])
def test_a_mistake_in_the_configuration_is_one_line_with_the_key_and_the_fix(args, message):
    with pytest.raises(UserError) as error:
        load_config(args if args[0].endswith(".yaml") else [str(ROOT / "config.yaml"), *args])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("a: [", "not YAML"), ("just words", "expected lines"), ("", "expected lines"),
    (config_text(stepz=3), "mine.yaml: there is no key 'stepz'"),
    ("steps: many", "mine.yaml: steps is 'many'"), (config_text(presets={"p": {"stps": 1}}), "")])
def test_a_mistake_in_the_file_names_the_file(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    if message:
        with pytest.raises(UserError, match="mine.yaml"):
            load_config([str(path)])
        with pytest.raises(UserError, match=message):
            load_config([str(path)])
    else:
        with pytest.raises(UserError,
                           match="mine.yaml, preset p: there is no key 'stps'; did you mean 'steps'?"):
            load_config([str(path), "preset=p"])


def test_what_a_file_leaves_out_is_as_in_the_project_s(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 3")
    usual = load_config([str(ROOT / "config.yaml")])
    assert load_config([str(tmp_path / "mine.yaml")]) == replace(usual, steps=3)
    old = {key: value for key, value in vars(usual).items() if key != "beta"}           # a run from before there was beta
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(UserError, match="holds a run with beta=1.0, not 2.0"):
        RunFolder(replace(usual, out=str(tmp_path / "run"), beta=2.0))
    RunFolder(replace(usual, out=str(tmp_path / "run")))
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["beta"] == 1.0


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_file():
    path = str(ROOT / "config.yaml")
    assert load_config([path]).samples == 128 and load_config([path, "preset=smoke"]).samples == 8
    cfg = load_config([path, "samples=16", "preset=smoke", "lr=1e-4", "beta=.inf", "horizon=null", "model=0"])
    assert (cfg.samples, cfg.lr, cfg.beta, cfg.horizon, cfg.model) == (16, 1e-4, float("inf"), None, "0")


def test_every_key_is_explained_where_it_stands():
    lines = (ROOT / "config.yaml").read_text().split("methods:")[0].splitlines()
    keys = [line.split(":")[0] for line in lines if line and not line.startswith("#")]
    assert sorted(keys) == sorted(Config.__dataclass_fields__)
    assert all(" # " in line for line in lines if line and not line.startswith("#"))


def test_every_preset_is_valid():
    presets = yaml.safe_load((ROOT / "config.yaml").read_text())["presets"]
    for name in presets:
        for method in METHODS:
            load_config([str(ROOT / "config.yaml"), f"preset={name}", f"method={method}"])
        assert set(presets[name].get("methods", {})) <= set(METHODS)


def test_a_methods_own_settings_go_below_a_preset_and_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    preset = dict(steps=8, methods=dict(rft=dict(warmup=2), grpo=dict(warmup=9)))          # it may have its own, too
    path.write_text(config_text(methods=dict(rft=dict(lr=0.5, steps=7, clip=0.25, warmup=1)), presets=dict(p=preset)))
    cfg = load_config([str(path), "method=rft", "preset=p", "clip=0.75"])
    assert (cfg.lr, cfg.steps, cfg.clip, cfg.warmup) == (0.5, 8, 0.75, 2)
    assert load_config([str(path)]).lr == yaml.safe_load((ROOT / "config.yaml").read_text())["lr"]
    path.write_text(config_text(methods=dict(rft=dict(stps=7))))
    with pytest.raises(UserError, match="method rft: there is no key 'stps'"):
        load_config([str(path), "method=rft"])


def test_a_key_that_nothing_reads_is_found():
    """No option is parsed and ignored: every field of Config is used outside run.py."""
    source = "".join(path.read_text() for path in ROOT.glob("*.py") if path.name != "run.py")
    unused = [key for key in Config.__dataclass_fields__ if f"cfg.{key}" not in source and key != "out"]
    assert unused == []


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
    code = ("import run\ndef main(args):\n    with open('/dev/full', 'w') as f: f.write('x' * 10)\n"
            "run.guarded(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 1 and "No space left on device" in done.stderr
            and "Traceback" not in done.stderr)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "envs.py", "tiny.py", "baselines.py"])
def test_help_says_how_to_run_it(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python {script}" in done.stdout, done.stderr


def test_records_are_one_line_each(tmp_path):
    store = Jsonl(tmp_path / "x.jsonl")
    store.append({"text": "two\nlines \u2028 and ünicode"})
    store.close()
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 1
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"text": "two\nlines \u2028 and ünicode"}


@pytest.mark.parametrize("preset", ["qwen7b", "llama8b", "qwen3"])
def test_a_language_model_s_preset_goes_with_any_world_and_fits_its_own_numbers(preset):
    cfg = load_config([str(ROOT / "config.yaml"), f"preset={preset}", "env=alfworld", "data=x"])
    assert cfg.react and cfg.load_in_4bit and cfg.env == "alfworld" and cfg.out == f"out/{preset}"
    assert cfg.action_tokens + cfg.reflect_tokens < cfg.context <= cfg.row_tokens
