"""The ground, which imports nothing of ours: the user's mistakes, the configuration, files that are asked for by name.

    load_config    config.yaml, what the method brings, a preset, the command line: each goes over the one before
    method_file    the door of the methods: `method=grpo` is methods/grpo.py, `method=path/to/file.py` is your own
    visible        text of worlds, models and files, as a terminal may be given it
    guarded        what every script's main runs in: a mistake is one line, Ctrl-C loses nothing
"""
import errno
import os
import re
import sys
import time
import traceback
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterable, Iterator
from unicodedata import category

import yaml

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "config.yaml"


class UserError(Exception):
    """A mistake of the user's: shown as one line, without a traceback."""


class Config(SimpleNamespace):
    """config.yaml, resolved: an attribute for each key, its own and the method's. What a key means stands there."""

    def but(self, **changes: Any) -> "Config":
        return Config(**{**vars(self), **changes})


# --------------------------------------------------------------------------------------------- checks of settings
Check = tuple[str, Callable[[Any, dict], Any], str]   # a key, what holds of it (and of all settings), else what must


def each(keys: str, holds: Callable[[Any, dict], Any], must: str) -> list[Check]:
    return [(key, holds, must) for key in keys.split()]


CHECKS: list[Check] = [
    *each("lora_rank context slots train_tasks test_tasks rounds roots reflect_every attempts action_tokens "
          "reflect_tokens corrections_per_task steps batch_tokens row_tokens checkpoint_every samples resamples "
          "warm_steps", lambda v, s: v >= 1, "must be 1 or more"),
    *each("snapshot_mb temperature reflect_temperature max_depth beta warmup seed warm_start engine_patience",
          lambda v, s: v >= 0, "must be 0 or more"),
    *each("lora_alpha lr clip engine_timeout env_timeout", lambda v, s: 0 < v < float("inf"), "must be above 0"),
    *each("workers horizon", lambda v, s: v is None or v >= 1, "must be 1 or more, or null (see config.yaml)"),
    ("observation_tokens", lambda v, s: v >= 8, "must be 8 or more"),
    ("rehearsal_share", lambda v, s: 0 <= v <= 1, "must lie in 0..1"),
    ("engine", lambda v, s: not v or re.match("https?://", v),
     "must be a server's address, like http://localhost:8000/v1"),
    ("corrections", lambda v, s: v in ("all", "improved", "successful"), "must be all, improved or successful"),
    ("correct", lambda v, s: v in ("branch", "first"), "must be branch or first"),
    ("train_split", lambda v, s: re.fullmatch("train(-[a-z]+)?", v),
     "must be train, or a part of it, like train-shallow"),
    ("split", lambda v, s: re.fullmatch("(train|valid|test)(-[a-z]+)?", v),
     "must be train, valid or test, or a part of one, like test-deep"),
    ("ks", lambda v, s: v and min(v) >= 1, "must be a list of numbers of 1 or more, like [1, 8]"),
    ("ks", lambda v, s: max(v) <= s["samples"], "samples is {samples}: k can be at most the number of samples"),
    ("out", lambda v, s: v.strip(), "must name a folder"),
    ("row_tokens", lambda v, s: v >= s["context"], "must be at least context ({context}): an episode fits into a row"),
    ("warm_start", lambda v, s: not v or not s["init"] and not s["react"], "goes with neither init= nor react=true"),
]


def check(settings: dict[str, Any], kinds: dict[str, Any], sources: dict[str, str], method: ModuleType | None) -> None:
    """Raises UserError for the first key that is unknown, mistyped or impossible."""
    for key, value in settings.items():
        if key not in kinds:
            owners = ", ".join(owners_of(key))
            fix = f"; it is a key of method={owners}" if owners else nearest(key, kinds)
            raise UserError(f"{sources[key]}: there is no key {key!r}{fix}")
        if not fits(value, kinds[key]):
            raise UserError(f"{sources[key]}: {key} is {value!r}, but must be {SAYS.get(kinds[key], kinds[key])}")
    for key, holds, must in [*CHECKS, *getattr(method, "CHECKS", [])]:
        if not holds(settings[key], settings):
            raise UserError(f"{sources[key]}: {key} is {settings[key]!r}, but "
                            + re.sub(r"\{(\w+)\}", lambda name: str(settings.get(name[1], name[0])), must))


SAYS = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
        int | None: "a whole number or null", bool | None: "true, false or null", list[int]: "a list of whole numbers",
        list[float]: "a list of numbers", list[str]: "a list of texts"}


def kind_of(key: str, shipped_value: Any) -> Any:
    """What a key's value must be: what its shipped value is. A key that ships as null takes a whole number, too."""
    if shipped_value is None:
        return bool | None if key == "load_in_4bit" else int | None
    if isinstance(shipped_value, list):
        return list[type(shipped_value[0]) if shipped_value else int]      # type: ignore[misc]
    return type(shipped_value)


def fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    if kind is float:
        return isinstance(value, (int, float)) and value == value
    if hasattr(kind, "__origin__"):
        return isinstance(value, list) and all(fits(v, *kind.__args__) for v in value)
    return isinstance(value, kind)


def nearest(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse(cfg: Config, **reasons: str) -> None:       # keys that are set, and that a script would not heed
    for key, reason in reasons.items():
        if getattr(cfg, key):
            raise UserError(f"{key}: {reason}")


# -------------------------------------------------------------------------------------------- the configuration
@lru_cache
def shipped() -> dict[str, Any]:
    """The values of the config.yaml that comes with the project: what another file leaves out, or is older than."""
    return yaml.safe_load(SHIPPED.read_text())


def load_config(args: list[str]) -> Config:
    """`config.yaml [preset=NAME] [key=value ...]`. Raises UserError: one line with key, file and fix."""
    path = next((arg for arg in args if "=" not in arg), "config.yaml")
    extra = [arg for arg in args if "=" not in arg and arg != path]
    if extra:
        raise UserError(f"{extra[0]}: not understood; write options as key=value")
    options = dict(arg.split("=", 1) for arg in args if "=" in arg and not arg.startswith("preset="))
    presets = [one for arg in args if arg.startswith("preset=") for one in read_presets(arg.partition("=")[2])]
    file = read_yaml(Path(path))
    method = options.get("method")
    below = read_presets(file.get("preset", ""))       # what the file itself builds on
    for _, layer in [*reversed(presets), (path, file), *reversed(below), ("", shipped())]:
        method = method or layer.get("method")
    brought = brought_by(str(method))
    # what the method sets and a copy of config.yaml has as it was shipped is not meant; in a run's own file it is
    if set(shipped()) <= set(file) and not set(brought) <= set(file):
        file = {key: value for key, value in file.items() if key not in brought or value != shipped().get(key)}
    kinds = {key: kind_of(key, value) for key, value in {**brought, **shipped()}.items()}
    given = {key: read_value(key, text, kinds.get(key)) for key, text in options.items()}

    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for where, layer in [(str(SHIPPED), shipped()), (f"method {method}", brought), *below, (path, file), *presets]:
        own = layer.get("methods", {}).get(method, {})             # what it says for this method alone
        for where, part in [(where, layer), (f"{where}, method {method}", own)]:
            for key, value in part.items():
                serves_another = key not in kinds and owners_of(key)
                if key not in ("methods", "preset") and not serves_another:
                    settings[key], sources[key] = number(value), where
    settings |= {key: number(value) for key, value in given.items()}
    sources |= dict.fromkeys(given, "the command line")
    check(settings, kinds, sources, method_file(str(method)))
    return Config(**settings)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = ("config.yaml comes with the project" if path.parent.is_dir() else
               f"there is no run {path.parent}; its folder is what out= named")
        raise UserError(f"{path}: there is no such file; {fix}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{path}: expected lines of `key: value`")
    methods = settings.get("methods", {})
    if not isinstance(methods, dict) or not all(isinstance(part, dict) for part in methods.values()):
        raise UserError(f"{path}: methods must hold the name of a method, and below it lines of `key: value`")
    if settings.get("experiences") and settings.get("method") == "leafe":           # as it was called
        settings["method"] = "other_lessons"
    if not isinstance(settings.get("preset", ""), str):
        raise UserError(f"{path}: preset must be the name of a file in configs/, or a .yaml file")
    return settings


def read_presets(name: str, above: tuple = ()) -> list[tuple[str, dict[str, Any]]]:
    """(where, settings) of configs/<name>.yaml, or of a .yaml file; what it builds on (`preset: other`) first."""
    if not name:
        return []
    path = Path(name) if name.endswith(".yaml") else ROOT / "configs" / f"{name}.yaml"
    if not path.is_file():
        there = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
        raise UserError(f"preset={name}: there is no such file in configs/; there are {', '.join(there)}"
                        f"{nearest(name, there)}")
    if path in above:
        raise UserError(f"{above[-1]}: preset: {name} builds on this file itself")
    settings = read_yaml(path)
    return [*read_presets(settings.get("preset", ""), (*above, path)), (f"{path}", settings)]


def read_value(key: str, text: str, kind: Any) -> Any:
    try:
        return text if kind is str else yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text}: {text!r} cannot be read as a value") from None


def number(value: Any) -> Any:
    """YAML reads 1e-3 as text; people mean a number."""
    means_one = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if means_one else value


# -------------------------------------------------------------------------------- files that are asked for by name
def method_names() -> list[str]:
    """The files of methods/ that are methods: they have `train`, or, being several runs, `several_runs`."""
    files = sorted((ROOT / "methods").glob("*.py"))
    return [file.stem for file in files if re.search(r"^def (train|several_runs)\(", file.read_text(), re.M)]


@lru_cache
def method_file(name: str) -> ModuleType | None:
    """The module of a method, which has `train(run, round_)`; None for leafe, which is train.py's own."""
    if name == "leafe":
        return None
    if not name.endswith(".py") and name not in method_names():
        there = ", ".join(["leafe", *method_names()])
        raise UserError(f"method: there is no {name!r}; there are {there}, and path/to/file.py"
                        f"{nearest(name, method_names())}")
    if Path(name).stem in ("base", "warm_start"):
        raise UserError(f"method: rename {name}; {Path(name).stem} is what the samples of a run's start are called")
    module = load_file(name, "method") if name.endswith(".py") else import_module(f"methods.{name}")
    if not hasattr(module, "train") and not hasattr(module, "several_runs"):
        raise UserError(f"method: {name} has no function train(run, round_)")
    return module


def keys_of(method: str) -> str:
    """The keys that a method brings, as lines of YAML with their comments: its own, and its values for the loop's."""
    return getattr(method_file(method), "KEYS", "")


def brought_by(method: str) -> dict[str, Any]:
    """The same as values."""
    try:
        brought = yaml.safe_load(keys_of(method)) or {}
        return {str(key): number(value) for key, value in brought.items()}
    except (yaml.YAMLError, AttributeError):
        raise UserError(f"method: KEYS of {method} must be text, a line `key: value` each") from None


@lru_cache
def owners_of(key: str) -> list[str]:
    return [name for name in method_names() if key in brought_by(name)]


@lru_cache
def load_file(path: str, key: str) -> ModuleType:
    """A Python file of the user's as a module. What it raises meanwhile is told with its own file and line."""
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"{key}: there is no file {path}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))              # it may import what lies beside it
    spec = spec_from_file_location(f"own_{file.stem}", file)
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module
    with blaming(str(file), f"{key}: {path} cannot be imported"):
        spec.loader.exec_module(module)
    return module


def installed(module: str, package: str, who: str = "env: this world") -> Any:
    """The door of the packages that only one world, or one kind of weights, needs."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{who} needs the package {package} ({error}); pip install {package}") from None


@contextmanager
def blaming(file: str, happened: str) -> Iterator[None]:
    """What the user's own code raises inside becomes two lines: what happened, and its file, line and message."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[2:]       # behind this one, and the one that asked
        where = file
        for frame in [frame for frame in frames if frame.filename == file] or frames:
            where = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{happened}\n  {where}: {type(error).__name__}: {' '.join(str(error).split())}") from None


# --------------------------------------------------------------------------------------------------------- scripts
def visible(text: Any, kept: str = "\n\t") -> str:
    """Text of a world, a model or a file, for a terminal: what would steer it or lie unseen (escape sequences, other
    controls, marks of direction, half of a surrogate pair) is shown escaped. `kept`="": for what stays on its line."""
    return "".join(c if c.isprintable() or c in kept or category(c) == "Zs" else repr(c)[1:-1] for c in str(text))


def usage_of(args: list[str], usage: str) -> str:
    """A script's own text; with method=, that method's, and the keys that it brings."""
    method = next((arg.partition("=")[2] for arg in args if arg.startswith("method=")), "leafe")
    text = usage if method == "leafe" else method_file(method).__doc__ or ""
    keys = f"\n\nkeys of method={method}, beside those of config.yaml:\n{keys_of(method)}" if keys_of(method) else ""
    return text.strip() + keys


def guarded(main: Callable[[list[str]], None], usage: str = "") -> None:
    """Run a script's main, or show `usage`, if given: the user's mistakes become one line, Ctrl-C loses nothing."""
    args = sys.argv[1:]
    if sys.stdout:                                      # an old terminal may not know all letters
        sys.stdout.reconfigure(errors="backslashreplace")              # type: ignore[union-attr]
    sys.excepthook = lambda *error: print(visible("".join(traceback.format_exception(*error))), file=sys.stderr)
    try:
        if usage and (not args or set(args) & {"-h", "--help"}):
            print(visible(usage_of(args, usage)))
        else:
            main(args)
        sys.stdout.flush()
    except BrokenPipeError:                             # "| head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):        # what all ranks have found rank 0 tells, and ends them
            time.sleep(10)
        sys.exit(visible(f"error: {error}"))
    except ModuleNotFoundError as error:                # a fork may have left a wing out
        if (error.name or "").partition(".")[0] not in ("methods", "worlds", "scale", "tools"):
            raise
        wing, dot, file = error.name.partition(".")
        sys.exit(f"error: this copy of the project has no {wing}/{file + '.py' * bool(dot)}")
    except KeyboardInterrupt:
        print("\nstopped; nothing is lost: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(visible(f"error: {error.filename or 'out'}: {error.strerror}; nothing is lost: "
                         f"free the way and run the same command again"))
