"""What a run's files are of: its command, commit and machine (run.json), the model, template and world whose ids they
hold; and whether each record is one.
"""
import json
import math
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import MISSING, fields, is_dataclass, replace
from datetime import date, datetime
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Iterator, get_type_hints

from config import Config, ROOT, UserError, fits, kept_config, read_text, read_yaml, short, visible

import torch
from transformers.utils import cached_file

import ranks
from envs import ask, closing, wait_for
from leafe import REFLECT, REFLECTION, TURN, Branch, read_trees
from lora import find_model
from run import Run, read_jsonl, write_aside

# ------------------------------------------------------------------------------------------------- what a run is

CODE = (".", ":!docs", ":!*.md", ":!*.log")        # pages, records and logs change while runs are made, and make none


def said(argv: list[str]) -> list[str]:
    """As it was typed: of `python -m tools.results` Python itself makes a file's path on this machine."""
    script = Path(argv[0])
    if not (script.is_absolute() and script.is_relative_to(ROOT)):
        return argv
    return ["-m", ".".join(script.relative_to(ROOT).with_suffix("").parts), *argv[1:]]


def about() -> dict[str, Any]:
    """What this process is: its command, the project's state, versions, the machine."""
    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        except OSError:                                # there is no git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None
    commit = git("rev-parse", "HEAD") if git("rev-parse", "--show-toplevel") == str(ROOT) else ""
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in names.splitlines() if line.startswith("model name")]
    return dict(command=shlex.join(["python", *said(sys.argv)]), date=time.strftime("%Y-%m-%d %H:%M:%S %z"),
                commit=commit or None, changed=bool(git("status", "--porcelain", "--", *CODE)) if commit else None,
                python=platform.python_version(),
                **{package: installed(package) for package in ("torch", "transformers", "bitsandbytes")},
                processor=models[0] if models else platform.machine(), cores=ranks.cores(),
                threads=torch.get_num_threads(), processes=ranks.world(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def tell(folder: Path, day: datetime | None = None) -> None:
    """run.json: how this run was begun; the starts that went on with it are listed behind, where they differ."""
    path, now = folder / "run.json", about()
    told = read_json(path, MADE, now | {"today": (day.isoformat() if day else now["date"])[:10], "continued": []})
    if path.exists():
        told["continued"].append({key: value for key, value in now.items() if key == "date" or value != told.get(key)})
    write_aside(path, json.dumps(told, indent=1) + "\n")


def today(cfg: Config) -> datetime:
    """The date that a chat template is told if it asks: when this run was begun, or the one that it goes on from, so
    that a conversation reads the same after midnight."""
    built_on = [Path(cfg.trees)] * bool(cfg.trees) + [Path(adapter).parent for adapter in (cfg.init, cfg.adapter) if adapter]
    for folder in [Path(cfg.out), *built_on]:
        told = read_json(folder / "run.json", MADE, {})
        day = told.get("today") or told.get("date", "")[:10]
        if day:
            try:
                return datetime.fromisoformat(day)
            except ValueError:
                raise UserError(f"{folder / 'run.json'}: its date is {short(day)}, not like 2026-11-28; restore it, or "
                                f"delete it") from None
    return datetime.combine(date.today(), datetime.min.time())


# ------------------------------------------------------------------------------------------ what a run's files hold

MADE = {"command": str, "date": str, "today?": str, "continued": list, "made_by?": str}          # run.json
RECORDS: dict[str, tuple[Any, ...]] = {              # file: what a line holds (a "?": may lack), and what names it
    "trees.jsonl": (Branch, "round", "task", "name"),
    "samples.jsonl": ({"policy": str, "weights": str, "task": str, "sample": int, "difficulty": str, "success": bool,
                       "score": float, "turns": int, "refused": int, "tokens": int, "drawn_by?": str}, "policy", "task", "sample"),
    "alternatives.jsonl": (dict(task=str, turn=int, tried=dict, why=list[int], steps=int, replayed=int, tokens=int),
                           "task", "turn"),
    "stage1.jsonl": (dict(method=str, task=str, solved=bool, wins=int, attempts=int, steps=int, tokens=int),
                     "method", "task"),
    "metrics.jsonl": ({"round?": int, "step?": int, "tokens?": int, "wave?": int},)}


def odd(value: Any, kind: Any, at: str = "") -> str:
    """What of a record is not of its kind, in words; "" if nothing is. A kind: a type, list[kind], kind | None, a
    dataclass, {field: kind}."""
    if is_dataclass(kind):
        hints, optional = get_type_hints(kind), {own.name for own in fields(kind) if own.default is not MISSING
                                                 or own.default_factory is not MISSING}
        kind = {name + "?" * (name in optional): hint for name, hint in hints.items()}
        kind |= {"round": int, "made_by?": str, "drawn_by?": str} if at == "" else {}
        others = [name for name in value if not {name, f"{name}?"} & set(kind)] if isinstance(value, dict) else []
        if others:
            return f"{at or 'it'} holds {short(others[0])}, which is no field here"
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return f"{at or 'it'} is {short(value)}, which is no record"
        at = f"{at}." if at else ""
        missing = [f"{at}{name} is missing" for name in kind if name[-1] != "?" and name not in value]
        found = ((name.rstrip("?"), own) for name, own in kind.items() if name.rstrip("?") in value)
        return next(filter(None, [*missing, *(odd(value[name], own, at + name) for name, own in found)]), "")
    if kind == list[int] and isinstance(value, list):                      # there are millions of ids
        good = {*map(type, value)} <= {int} and (not value or 0 <= min(value) and max(value) < 10**18)
        return "" if good else f"{at} holds what is no token's id"
    if hasattr(kind, "__origin__") and isinstance(value, list):
        return next(filter(None, (odd(one, kind.__args__[0], f"{at}[{n}]") for n, one in enumerate(value))), "")
    below = kind in (int, int | None) and type(value) is int and value < (-1 if at == "number" else 0)
    good = fits(value, kind) or kind is float and isinstance(value, bool)
    return "" if good and not below else f"{at or 'it'} is {short(value)}, not {SAYS.get(kind, 'what stands there')}"


SAYS = {int: "a whole number of 0 or more", float: "a number", str: "text", bool: "true or false", list: "a list",
        int | None: "a whole number of 0 or more, or null"}


def inspector(path: Path) -> Callable[[int, bytes, Any], bool]:
    """What a file's lines pass through: (number, line, record) -> is it new? Raises UserError for what is no record of
    this file, and for two that have one name and differ. One that stands there twice is left out, with a note."""
    path = Path(path)
    kind, *names = RECORDS.get(path.name, ({},))
    seen: dict[tuple, tuple[int, int]] = {}

    def fresh(number: int, line: bytes, record: Any) -> bool:
        fault = odd(record, kind)
        if not fault and path.name == "trees.jsonl" and not re.fullmatch(r"\d+(\.\d+)*", record["name"]):
            fault = f"name is {short(record['name'])}, not like 0.2.1"
        if fault:
            raise UserError(f"{path}: line {number}: {fault}; restore the file, or delete the line and what it holds "
                            f"is made anew")
        first, twin = seen.setdefault(tuple(record[name] for name in names), (number, hash(line))) if names else (0, 0)
        if first in (0, number):
            return True
        if twin != hash(line):
            said = ", ".join(f"{name} {short(record[name])}" for name in names)
            raise UserError(f"{path}: lines {first} and {number} are both {said}, and differ; delete the wrong one")
        once(f"note: {path}: line {number} repeats line {first}, and is left out")
        return False
    return fresh


@lru_cache
def once(note: str) -> None:
    if ranks.rank() == 0:
        print(visible(note), file=sys.stderr)


def read_json(path: Path, kind: Any, otherwise: Any) -> Any:
    """A file of one value, of this kind (see `odd`); `otherwise` where there is none."""
    if not path.exists():
        return otherwise
    try:
        value = json.loads(read_text(path))
        fault = odd(value, kind)
    except (ValueError, RecursionError):
        fault = "it is damaged"
    if fault:
        but = " but a date in the chat template" if path.name == "run.json" else ""
        raise UserError(f"{path}: {fault}; restore it, or delete it: no result depends on it{but}")
    return value


def seconds(folder: Path) -> float:
    """What training took so far, of a run; and is the file that says so whole?"""
    return read_json(folder / "seconds.json", float, 0.0)


def written_by_hand(kept: Path) -> bool:
    """A run writes all keys, and no comment."""
    lacks = {"model", "env", "out"} - read_yaml(kept).keys()
    return bool(lacks) or re.search(r"^(#|[^'\"\n]*\s#|preset:)", read_text(kept), re.M) is not None


def check_folder(folder: Path) -> None:
    """Is it one of a run, or one that holds nothing of a run yet? A config.yaml of the user's own would be written over."""
    kept = folder / "config.yaml"
    if kept.exists() and not (folder / "run.json").exists() and written_by_hand(kept):
        raise UserError(f"out: {folder} holds a config.yaml that no run wrote; choose another out=")
    if (folder / "run.json").exists() and not kept.exists():
        raise UserError(f"out: {folder} holds a run without its config.yaml; restore that, or choose another out=")


# ------------------------------------------------------------------------------------------------ who made them

MAKERS = dict(model="other weights (model=)", tokenizer="another tokenizer (model=)",
              template="another chat template (model=, thinking=)", rules="other rules (env=, data=, react=)",
              tasks="other first training tasks (env=, data=; or the world lists them anew at every start)",
              tests="other first tasks to test on (env=, data=; or the world lists them anew at every start)")
OF_TREES = ("model", "tokenizer", "template", "rules", "tasks")
FIRST = 2                                                  # tasks of a split that are compared


def makers(run: Run) -> dict[str, str]:
    """What gives the ids in a run's files their meaning, each as a digest."""
    def digest(*parts: Any) -> str:
        return sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).hexdigest()[:8]
    tokenizer = run.policy.chat.tokenizer
    with closing(replace(run, playbook="").world()) as env:
        rules, tasks, tests = env.rules, *(wait_for(env, "tasks", split)[:FIRST] for split in ("train", "test"))
        begins = [wait_for(env, "reset", task) for task in (*tasks, *tests)]
    return dict(model=digest(*weights(find_model(run.cfg.model))),
                tokenizer=digest(sorted(tokenizer.get_vocab().items())),
                template=digest(tokenizer.chat_template, run.cfg.thinking), rules=digest(rules), tasks=digest(*tasks),
                tests=digest(*tests), begins=digest(*begins))


def in_line(parts: dict[str, str]) -> str:
    """`makers`, or some of them, as the files keep them."""
    return ", ".join(f"{part} {digest}" for part, digest in parts.items())


def of_trees(parts: dict[str, str]) -> str:
    """What trees are of: of the tasks, those that are trained on."""
    return in_line({part: parts[part] for part in OF_TREES})


def weights(model: str) -> Iterator[str]:
    """Digests of a model's weights as they lie on the disk, so whatever they are loaded to: of a large file, a piece
    of 4 kB here and there, 16,384 of them."""
    folder = Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size, found = path.stat().st_size, sha256()
        with open(path, "rb") as file:
            for at in range(0, size, max(4096, size // 16384)):
                file.seek(at)
                found.update(file.read(4096))
        yield f"{size} {found.hexdigest()}"


def settle(run: Run) -> None:
    """Before anything is sampled: are the files that the run goes on with, or starts from, of its own model and world,
    and is there room in its settings? Names the makers in run.json and in the records of trees.jsonl, and has these and
    those of samples.jsonl say what drew them. passk.json, by which others see that a run has ended, goes until it has."""
    own, path = makers(run), run.folder.path / "run.json"
    said = of_trees(own)
    if ranks.rank() == 0:
        told = read_json(path, MADE, {})
        if other := other_maker(told.get("made_by", ""), in_line(own)):
            raise UserError(f"out: {run.folder.path} holds a run with {other}; choose another out=, or delete that "
                            f"folder")
        write_aside(path, json.dumps(told | dict(made_by=in_line(own)), indent=1) + "\n")
    store = run.store("trees.jsonl")
    check_trees(run, store.path, store.records, said)
    store.stamp = dict(made_by=said)
    for store in (store, run.store("samples.jsonl")):
        check_drawn(run, store.path, store.records)
        store.drawn = run.policy.drawn
    if run.train_tasks and run.cfg.trees and run.cfg.method == "leafe":
        path = Path(run.cfg.trees) / "trees.jsonl"
        records = list(read_jsonl(path))
        check_trees(run, path, records, said)
        try:
            for round_ in range(1, run.cfg.rounds + 1):
                read_trees(records, round_, run.train_tasks)
        except UserError as error:
            raise UserError(f"trees: {run.cfg.trees}: {error}") from None
        check_explored(run.cfg)
    check_room(run)
    if ranks.rank() == 0:
        (run.folder.path / "passk.json").unlink(missing_ok=True)


def other_maker(theirs: str, ours: str) -> str:
    """What differs, in words; "" if nothing does, or it is not known. How tasks begin may be left to chance."""
    differ = [part.split()[0] for part in theirs.split(", ") if part and part not in ours]
    if differ == ["begins"]:
        once("note: the first tasks begin otherwise than when the files here were made: if the world or its data= was "
             "changed, choose another out=")
        return ""
    return MAKERS.get(differ[0], "others") if differ else ""


def check_trees(run: Run, path: Path, records: list[dict], said: str) -> None:
    """Were they made by who would make them here, of tokens that the model has?"""
    if records and not any("made_by" in record for record in records):
        once(f"note: {path} is of before its records said who made them: mind that model=, env= and react= are its own")
    most = run.policy.model.get_input_embeddings().weight.shape[0]
    for record in records:
        if other := other_maker(str(record.get("made_by", "")), said):
            raise UserError(f"trees: {path} was made with {other}; take a run's of the same, or explore anew "
                            f"(trees= empty)")
        for ids in [turn[of] for turn in record["turns"] for of in ("obs_ids", "action_ids")]:
            if not ids or max(ids) >= most:
                raise UserError(f"trees: {path}: attempt {record['name']} of {record['task']} holds no ids, or some "
                                f"beyond the model's {most} tokens; restore the file, or explore anew")


def check_explored(cfg: Config) -> None:
    """What the policy saw when another run's trees were made is not in them, and decides what is learned from them."""
    path = Path(cfg.trees) / "config.yaml"
    theirs = vars(kept_config(path.parent)) if path.exists() else {}
    differ = [key for key in ("keep_experience", "observation_tokens", "env", "data") if theirs.get(key, getattr(cfg, key)) !=
              getattr(cfg, key)]
    for key in differ:
        told = f"{cfg.trees} was explored with {key}={theirs[key]!r}, not {getattr(cfg, key)!r}"
        if key not in ("env", "data"):
            raise UserError(f"trees: {told}; say so here too, or explore anew (trees= empty)")
        once(f"note: trees: {told}: mind that it is the same world")


def precision(model: Any) -> str:
    """In what a model's linear layers compute here: nf4, or the dtype of its weights."""
    if any(type(layer).__name__ == "Linear4bit" for layer in model.modules()):
        return "nf4"
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return dict(float32="fp32", bfloat16="bf16", float16="fp16").get(dtype, dtype)


def check_drawn(run: Run, path: Path, records: list[dict]) -> None:
    """A run that goes on with another engine, or in another precision, says so; each record says by what it was drawn."""
    own = precision(run.policy.model)
    now = f" at {run.cfg.engine}, trained in {own}" if run.cfg.engine else own
    before = Counter(record["drawn_by"] for record in records if "drawn_by" in record)
    for other, count in before.items():
        if other != now and not (run.cfg.engine and other.endswith(now)):
            once(f"note: {path}: {count} records were drawn by {other}; what is still missing will be by"
                 f"{now if run.cfg.engine else ' ' + now}, and each record says by which (drawn_by)")


def check_room(run: Run) -> None:
    """Raises UserError where not even a first turn, or a reflection on it, would fit into what the settings allow."""
    cfg, chat, task = run.cfg, run.policy.chat, (run.train_tasks or run.test_tasks)[0]
    with closing(run.world()) as env:
        for one in run.test_tasks:
            ask(env, "difficulty", one)                # the tables need it of each
        obs = ask(env, "reset", task)
        obs = obs.result() if isinstance(obs, Future) else obs
        known = [action for action in ask(env, "actions") if "..." not in action]
    used = len(chat.first(env.rules, TURN.format(t=1, obs=chat.glimpse(obs, cfg.observation_tokens))))
    form = "<think>\n</think>\n<action>{}</action>" if cfg.react else "{}"
    action, shortest = min(((a, len(chat.reply(form.format(a)))) for a in known), key=lambda a: a[1], default=("", 1))
    if shortest > cfg.action_tokens:
        raise UserError(f"action_tokens: {cfg.action_tokens} are too few: {action!r}, the shortest action of {task}, "
                        f"takes {shortest} with its end")
    if used + cfg.action_tokens > cfg.context:
        raise UserError(f"context: {cfg.context} tokens are too few: the rules with the first observation of {task} "
                        f"take {used}, an action up to {cfg.action_tokens} (action_tokens)")
    branches = cfg.attempts > cfg.roots and cfg.max_depth and cfg.beta < math.inf
    if run.train_tasks and cfg.method == "leafe" and not cfg.trees and branches:
        least = len(chat.reply(REFLECTION.format(tau=1, e="x")))
        looks = len(chat.next(TURN.format(t=2, obs="") + REFLECT))
        if least > cfg.reflect_tokens:
            raise UserError(f"reflect_tokens: {cfg.reflect_tokens} are too few: the shortest reflection takes {least}")
        if used + shortest + looks + cfg.reflect_tokens > cfg.context:
            raise UserError(f"context: {cfg.context} tokens leave no room to reflect: a first turn takes "
                            f"{used + shortest}, the question {looks}, the answer up to {cfg.reflect_tokens} "
                            f"(reflect_tokens)")
