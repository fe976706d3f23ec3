"""What every script shares: the configuration, the run's folder, and JSONL that survives a kill -9.

A run is a folder, out/<name>/: config.yaml (resolved), {trees,samples,metrics}.jsonl, adapter/, passk.json.
JSONL files are append-only, one key a line: whatever stopped a run, the same command goes on where it was.
"""
import errno
import fcntl
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, TextIO

import yaml

import ranks
from envs import UserError

# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """config.yaml, resolved; what each key means stands there. No value has a default here."""
    model: str
    engine: str
    engine_patience: float
    engine_timeout: float
    load_in_4bit: bool | None
    adapter: str
    lora_rank: int
    lora_alpha: float
    context: int
    slots: int
    workers: int | None
    snapshot_mb: int
    temperature: float
    env: str
    data: str
    train_tasks: int
    test_tasks: int
    train_split: str
    split: str
    horizon: int | None
    seed: int
    out: str
    rounds: int
    trees: str
    env_steps: int | None
    method: str
    init: str
    warm_start: int
    warm_steps: int
    seeds: list[int]
    playbook: str
    playbook_tokens: int
    experiences: str
    roots: int
    reflect_every: int
    max_depth: int
    attempts: int
    keep_experience: bool
    react: bool
    thinking: bool
    action_tokens: int
    reflect_tokens: int
    reflect_temperature: float
    corrections: str
    correct: str
    corrections_per_task: int
    rehearsal_share: float
    beta: float
    steps: int
    batch_tokens: int
    row_tokens: int
    lr: float
    grpo_group: int
    grpo_tasks: int
    grpo_updates: int
    grpo_clip: float
    grpo_dual: float
    grpo_kl: float
    grpo_refusal: float
    grpo_statistics: str
    alternatives: int
    alternatives_share: float
    early_experience: str
    warmup: int
    clip: float
    gradient_checkpointing: bool
    checkpoint_every: int
    samples: int
    ks: list[int]
    resamples: int
    evaluate_base: bool


STARTS = ("base", "warm_start")                    # policies that a run starts from
SHIPPED = Path(__file__).with_name("config.yaml")
METHODS = ("leafe", "rft", "early_experience", "grpo", "ace", "compare")
RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    *[(key, lambda v: v >= 1, "must be 1 or more") for key in
      ("lora_rank", "context", "slots", "train_tasks", "test_tasks", "rounds", "roots", "reflect_every",
       "attempts", "action_tokens", "reflect_tokens", "corrections_per_task", "steps", "batch_tokens",
       "row_tokens", "checkpoint_every", "samples", "resamples", "grpo_group", "grpo_tasks", "grpo_updates",
       "alternatives", "warm_steps")],
    *[(key, lambda v: v >= 0, "must be 0 or more") for key in
      ("snapshot_mb", "temperature", "reflect_temperature", "max_depth", "beta", "warmup", "seed",
       "grpo_kl", "grpo_refusal", "playbook_tokens", "warm_start", "engine_patience")],
    ("engine", lambda v: not v or bool(re.match("https?://", v)),
     "must be a server's address, like http://localhost:8000/v1"),
    *[(key, lambda v: 0 < v < float("inf"), "must be above 0") for key in
      ("lora_alpha", "lr", "clip", "grpo_clip", "engine_timeout")],
    ("workers", lambda v: v is None or v >= 1, "must be 1 or more, or null for as many as there are processors"),
    ("horizon", lambda v: v is None or v >= 1, "must be 1 or more, or null for the world's own"),
    *[(key, lambda v: 0 <= v <= 1, "must lie in 0..1") for key in ("rehearsal_share", "alternatives_share")],
    ("env_steps", lambda v: v is None or v >= 1, "must be 1 or more, or null for what trees= took"),
    ("grpo_dual", lambda v: v > 1, "must be above 1"),
    ("grpo_statistics", lambda v: v in ("episodes", "steps"), "must be episodes or steps"),
    ("early_experience", lambda v: v in ("world", "reflection"), "must be world or reflection"),
    ("method", lambda v: v in METHODS, f"must be one of {', '.join(METHODS)}"),
    ("seeds", lambda v: v and all(seed >= 0 for seed in v), "must be a list of numbers of 0 or more, like [0, 1]"),
    ("corrections", lambda v: v in ("all", "improved", "successful"), "must be all, improved or successful"),
    ("correct", lambda v: v in ("branch", "first"), "must be branch or first"),
    ("train_split", lambda v: bool(re.fullmatch("train(-[a-z]+)?", v)),
     "must be train, or a part of it, like train-shallow"),
    ("split", lambda v: bool(re.fullmatch("(train|valid|test)(-[a-z]+)?", v)),
     "must be train, valid or test, or a part of one, like test-deep"),
    ("ks", lambda v: v and all(k >= 1 for k in v), "must be a list of numbers of 1 or more, like [1, 8]"),
    ("out", lambda v: bool(v.strip()), "must name a folder"),
]
TOGETHER: list[tuple[str, Callable[[dict], bool], str]] = [
    ("env_steps", lambda s: s["method"] != "leafe", "is a baseline's budget; leafe's is attempts= a task"),
    ("rounds", lambda s: s["rounds"] == 1 or s["method"] in ("leafe", "compare"), "is for leafe; a baseline has one"),
    ("experiences", lambda s: s["method"] == "leafe" and not s["trees"], "is for leafe when it explores (no trees=)"),
    ("early_experience", lambda s: s["early_experience"] == "world" or s["method"] != "early_experience"
     or s["action_tokens"] > s["reflect_tokens"],
     "learns a reason before each action: raise action_tokens above reflect_tokens"),
    ("warm_start", lambda s: not s["init"] and not s["react"] and s["method"] not in ("ace", "compare"),
     "goes with neither init=, nor react=true, nor method=ace or compare"),
    ("grpo_group", lambda s: s["grpo_group"] > 1, "must be 2 or more: a rollout is judged against its group"),
]
NOT_PART_OF_RESULTS = {"out", "engine", "engine_patience", "engine_timeout", "slots", "workers", "snapshot_mb",
                       "checkpoint_every", "ks", "resamples", "evaluate_base", "test_tasks", "samples", "split",
                       "adapter", "playbook", "seeds"}


def fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    if kind is float:
        return isinstance(value, (int, float)) and value == value
    if kind == list[int]:
        return isinstance(value, list) and all(fits(v, int) for v in value)
    return isinstance(value, kind)


def says(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        kind, str(kind).replace("int", "whole number").replace("bool", "true, false")
        .replace("None", "null").replace("|", "or"))


@lru_cache
def shipped() -> dict[str, Any]:
    """The values of the config.yaml that comes with the project: what another file leaves out, or is older than."""
    settings = yaml.safe_load(SHIPPED.read_text())
    return {key: value for key, value in settings.items() if key not in ("presets", "methods")}


def load_config(args: list[str]) -> Config:
    """`config.yaml [preset=NAME] [key=value ...]`. Raises UserError: one line with key, file and fix."""
    path = next((arg for arg in args if "=" not in arg), "config.yaml")
    extra = [arg for arg in args if "=" not in arg and arg != path]
    if extra:
        raise UserError(f"{extra[0]}: not understood; write options as key=value")
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        fix = ("config.yaml comes with the project" if Path(path).parent.is_dir() else
               f"there is no run {Path(path).parent}; its folder is what out= named")
        raise UserError(f"{path}: there is no such file; {fix}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected lines of `key: value`")
    presets, methods = settings.pop("presets", None) or {}, settings.pop("methods", None) or {}
    kinds = {field.name: field.type for field in fields(Config)}
    sources = {**dict.fromkeys(shipped(), str(SHIPPED)), **dict.fromkeys(settings, path)}
    settings = {**shipped(), **settings}
    options = [arg.split("=", 1) for arg in args if "=" in arg]
    method = str(dict(options).get("method", settings.get("method")))
    settings.update(methods.get(method) or {})
    sources.update(dict.fromkeys(methods.get(method) or {}, f"{path}, method {method}"))
    for key, text in sorted(options, key=lambda option: option[0] != "preset"):      # a preset first
        if key == "preset":
            if text not in presets:
                raise UserError(f"preset={text}: {path} has {', '.join(presets) or 'no presets'}"
                                f"{nearest(text, presets)}")
            given, where = dict(presets[text]), f"{path}, preset {text}"
            given.update((given.pop("methods", None) or {}).get(method) or {})
        else:
            try:
                given = {key: text if kinds.get(key) is str else yaml.safe_load(text)}
                where = "the command line"
            except yaml.YAMLError:
                raise UserError(f"{key}={text}: {text!r} cannot be read as a value") from None
        settings.update(given)
        sources.update(dict.fromkeys(given, where))
    for key in settings:
        settings[key] = number(settings[key])
    check(settings, kinds, sources)
    return Config(**settings)


def check(settings: dict[str, Any], kinds: dict[str, Any], sources: dict[str, str]) -> None:
    """Raises UserError for the first key that is unknown, mistyped or impossible."""
    for key, value in settings.items():
        if key not in kinds:
            raise UserError(f"{sources[key]}: there is no key {key!r}{nearest(key, kinds)}")
        if not fits(value, kinds[key]):
            raise UserError(f"{sources[key]}: {key} is {value!r}, but must be {says(kinds[key])}")
    for key, holds, message in RANGES:
        if not holds(settings[key]):
            raise UserError(f"{sources[key]}: {key} {message}, not {settings[key]!r}")
    for key, holds, message in TOGETHER:
        if settings[key] and not holds(settings):
            raise UserError(f"{sources[key]}: {key}={settings[key]} {message}")
    for key in ("seed", "trees", "init", "evaluate_base") if settings["method"] == "compare" else ():
        if sources[key] == "the command line":
            raise UserError(f"{key}: method=compare sets it for each of its runs{'; use seeds=' * (key == 'seed')}")
    if max(settings["ks"]) > settings["samples"]:
        raise UserError(f"{sources['ks']}: ks asks for Pass@{max(settings['ks'])}, but samples is "
                        f"{settings['samples']}: k can be at most the number of samples")
    if settings["row_tokens"] < settings["context"]:
        raise UserError(f"{sources['row_tokens']}: row_tokens is {settings['row_tokens']}, but must be "
                        f"at least context ({settings['context']}), so that every episode fits into a row")


def refuse(cfg: Config, **reasons: str) -> None:
    """Raise UserError if one of these keys is set: the script would not heed it."""
    for key, reason in reasons.items():
        if getattr(cfg, key):
            raise UserError(f"{key}: {reason}")


def policy_name(cfg: Config) -> str:
    """What eval.py's samples are called: the method of the run that the adapter or the playbook came from."""
    made = Path(cfg.playbook or cfg.adapter).parent / "config.yaml"
    if Path(cfg.adapter).name == "warm_start" and not cfg.playbook:
        return "warm_start"
    if not (cfg.adapter or cfg.playbook):
        return "base"
    return yaml.safe_load(made.read_text()).get("method", "trained") if made.is_file() else "trained"


def number(value: Any) -> Any:
    """YAML reads 1e-3 as text; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) and "e" in value.lower() else value
        except ValueError:
            return value
    return value


def nearest(word: str, words: Any) -> str:
    close = get_close_matches(word, list(words), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# ------------------------------------------------------------------------------------------- the run's folder

class Jsonl:
    """Append-only records; the file comes with the first. A half-written last line (process killed) is cut off.
    Of several ranks, rank 0 writes to the file, the others to parts of it until `gather` (or nothing, if `alone`)."""
    def __init__(self, path: Path, alone: bool = False):
        self.path = path
        self.file: TextIO | None = None                  # opened when it is first written to
        self.own = path.with_name(f"{path.name}.{ranks.rank()}.part") if ranks.rank() else path
        self.silent = alone and ranks.rank() > 0
        self.records = list(read_jsonl(path, repair=ranks.rank() == 0)) if path.exists() else []

    def append(self, record: dict) -> None:
        self.records.append(record)
        if not self.silent:
            self.file = self.file or open(self.own, "a", encoding="utf-8")
            self.file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self.file.flush()

    def gather(self) -> None:
        """Have what all ranks have appended; to be called by all of them."""
        if ranks.world() > 1:
            self.close()
            ranks.wait_for_all()
            if ranks.rank() == 0:
                absorb(self.path)
            ranks.wait_for_all()
            self.records = list(read_jsonl(self.path)) if self.path.exists() else []
            ranks.wait_for_all()                       # or one rank reads what another appends already

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


def read_jsonl(path: Path, repair: bool = False) -> Iterator[dict]:
    """Every record of a file. Only the last line may be damaged: it is left out, and cut off if `repair`."""
    with open(path, "rb") as file:
        good = 0
        for number_, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError
                record = json.loads(line)
            except ValueError:
                if file.read(1):
                    raise UserError(f"{path}: line {number_} is damaged, and is not the last; "
                                    f"restore the file or delete it") from None
                print(f"{path}: the last line was cut short (killed while writing?) and is dropped",
                      file=sys.stderr)
                break
            good += len(line)
            yield record
    if repair and good < path.stat().st_size:
        os.truncate(path, good)


def absorb(path: Path) -> None:
    """Move the parts of a JSONL file into it. Killed in between, it can be done again: what is there stays single."""
    parts = sorted(path.parent.glob(path.name + ".*.part"))
    there = set(path.read_bytes().splitlines(keepends=True)) if parts and path.exists() else set()
    for part in parts:
        list(read_jsonl(part, repair=True))
        with open(path, "ab") as file:
            file.writelines(line for line in part.read_bytes().splitlines(keepends=True) if line not in there)
        part.unlink()


def write_aside(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


class RunFolder:
    """out/<name>/, held by one process at a time (of several ranks, by rank 0 for all)."""
    def __init__(self, config: Config):
        self.path = Path(config.out)
        if ranks.rank() == 0:
            self._hold(config)
            self._settle(config)
            for name in {part.name.split(".")[0] for part in self.path.glob("*.part")}:      # killed before
                Jsonl(self.path / f"{name}.jsonl")                                           # repairs it
                absorb(self.path / f"{name}.jsonl")
        ranks.wait_for_all()

    def _hold(self, config: Config) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(f"out: cannot write to {config.out}: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"out: another process is running in {config.out}; "
                            f"wait for it, or choose another out=") from None

    def _settle(self, config: Config) -> None:
        """Keep config.yaml; refuse to mix results of two configurations in one folder."""
        kept, now = self.path / "config.yaml", dict(vars(config))
        if kept.exists():
            before = {**shipped(), **(yaml.safe_load(kept.read_text()) or {})}
            odd = [key for key in now if key not in NOT_PART_OF_RESULTS and before.get(key) != now[key]]
            if odd:
                raise UserError(f"{self.path} holds a run with {odd[0]}={before.get(odd[0])!r}, "
                                f"not {now[odd[0]]!r}; choose another out=, or delete that folder")
        write_aside(kept, yaml.safe_dump(now, sort_keys=False))

    def jsonl(self, name: str, alone: bool = False) -> Jsonl:
        store = Jsonl(self.path / name, alone)
        ranks.wait_for_all()                           # as in Jsonl.gather: all ranks read the same
        return store

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Add the seconds that the block takes to seconds.json (those of a process that was killed are lost)."""
        path, began = self.path / "seconds.json", time.time()
        try:
            yield
        finally:
            if ranks.rank() == 0:
                before = json.loads(path.read_text()) if path.exists() else 0.0
                write_aside(path, json.dumps(round(before + time.time() - began, 1)))


def spent(folder: Path) -> dict[str, float]:
    """What training took so far: environment steps (replayed ones included), sampled tokens, trained tokens, seconds;
    from the run's files. Of out/<run>/warm_start, its trained tokens (its seconds are not kept apart)."""
    if folder.name == "warm_start":
        shown = [record["tokens"] for record in read_jsonl(folder.parent / "metrics.jsonl") if record["round"] == 0]
        return dict(steps=0, sampled=0, trained=max(shown), seconds=0.0)
    lived = [record for name in ("trees.jsonl", "alternatives.jsonl") if (folder / name).exists()
             for record in read_jsonl(folder / name)]
    trained = {record["round"]: record["tokens"] for record in read_jsonl(folder / "metrics.jsonl")
               if "tokens" in record} if (folder / "metrics.jsonl").exists() else {}
    seconds = folder / "seconds.json"
    return dict(steps=sum(record["steps"] + record["replayed"] for record in lived),
                sampled=sum(record["tokens"] for record in lived), trained=sum(trained.values()),
                seconds=json.loads(seconds.read_text()) if seconds.exists() else 0.0)


def guarded(main: Callable[[list[str]], None], usage: str = "") -> None:
    """Run a script's main, or show `usage`, if given: the user's mistakes become one line, Ctrl-C loses nothing."""
    args = sys.argv[1:]
    try:
        if usage and (not args or args[0] in ("-h", "--help")):
            print(usage)
        else:
            main(args)
        sys.stdout.flush()
    except BrokenPipeError:                             # "| head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; nothing is lost: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(f"error: {error.filename or 'out'}: {error.strerror}; nothing is lost: "
                 f"free the way and run the same command again")
