"""The ground, which imports nothing of ours: the user's mistakes, the configuration, files that are asked for by name.

    load_config    config.yaml, what the method brings, a preset, the command line: each goes over the one before
    method_file    the door of the methods: `method=grpo` is methods/grpo.py, `method=path/to/file.py` is your own
    visible        text of worlds, models and files, as a terminal may be given it
    guarded        what every script's main runs in: a mistake is one line, Ctrl-C loses nothing
"""
import errno
import gc
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from reprlib import Repr
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterable, Iterator, TextIO
from unicodedata import category

import yaml

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "config.yaml"
SHORT = Repr()
SHORT.maxlist, SHORT.maxstring, SHORT.maxother, SHORT.maxlevel = 12, 80, 80, 2
short = SHORT.repr                                     # of a value, to be shown


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


def within(keys: str, low: int, high: int, null: str = "") -> list[Check]:
    """Above `high` lies what no machine holds, or no one means. `null`: what is said of keys that may be null."""
    return [*each(keys, lambda v, s: v is None or v >= low, f"must be {low} or more{null}"),
            *each(keys, lambda v, s: v is None or v <= high, f"must be at most {high:,}")]


CHECKS: list[Check] = [
    *within("context slots train_tasks test_tasks reflect_every action_tokens reflect_tokens corrections_per_task "
            "steps batch_tokens row_tokens checkpoint_every resamples warm_steps", 1, 1_000_000),
    *within("lora_rank rounds roots attempts", 1, 4096),
    *within("samples", 1, 100_000),
    *within("processes workers horizon", 1, 4096, ", or null (see config.yaml)"),
    *within("seed", 0, 10**18),
    *within("snapshot_mb max_depth warmup warm_start engine_patience engine_timeout env_timeout", 0, 1_000_000),
    *within("temperature reflect_temperature", 0, 100),
    *within("observation_tokens", 8, 1_000_000),
    ("beta", lambda v, s: v >= 0, "must be 0 or more"),
    ("gamma", lambda v, s: 0 <= v < 1e38, "must lie in 0..1e38"),
    *each("engine_timeout env_timeout", lambda v, s: 0 < v < float("inf"), "must be above 0"),
    *each("lora_alpha lr clip", lambda v, s: 0 < v < 1e38, "must be above 0, and below 1e38"),
    ("resamples", lambda v, s: v * s["test_tasks"] <= 10**8, "with test_tasks={test_tasks} no memory holds them"),
    *each("rehearsal_share rehearse_reflections", lambda v, s: 0 <= v <= 1, "must lie in 0..1"),
    ("engine", lambda v, s: not v or re.match("https?://", v),
     "must be a server's address, like http://localhost:8000/v1"),
    ("dtype", lambda v, s: v in ("", "bfloat16", "float16", "float32"), "must be bfloat16, float16 or float32, or '' (see config.yaml)"),
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
            raise UserError(f"{sources[key]}: there is no key {short(key)}{fix}")
        if not fits(value, kinds[key]) or isinstance(value, str) and visible(value) != value:
            raise UserError(f"{sources[key]}: {key} is {short(value)}, but must be {SAYS.get(kinds[key], kinds[key])}")
    for key, holds, must in [*CHECKS, *getattr(method, "CHECKS", [])]:
        if not holds(settings[key], settings):
            raise UserError(f"{sources[key]}: {key} is {short(settings[key])}, but "
                            + re.sub(r"\{(\w+)\}", lambda name: str(settings.get(name[1], name[0])), must))


SAYS = {int: "a whole number, of at most 18 digits", float: "a number", bool: "true or false",
        str: "text without controls (in quotes if it could be a number)", int | None: "a whole number or null",
        bool | None: "true, false or null", list[int]: "a list of whole numbers", list[float]: "a list of numbers",
        list[str]: "a list of texts"}


def kind_of(key: str, shipped_value: Any) -> Any:
    """What a key's value must be: what its shipped value is. A key that ships as null takes a whole number, too."""
    if shipped_value is None:
        return bool | None if key == "load_in_4bit" else int | None
    if key == "slots":
        return int | None
    if isinstance(shipped_value, list):
        return list[type(shipped_value[0]) if shipped_value else int]      # type: ignore[misc]
    return type(shipped_value)


def fits(value: Any, kind: Any) -> bool:
    if hasattr(kind, "__origin__"):
        return isinstance(value, list) and all(fits(v, *kind.__args__) for v in value)
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    if kind is float:
        return isinstance(value, (int, float)) and value == value
    return isinstance(value, kind) and (not isinstance(value, int) or abs(value) <= 10**18)


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
    return read_yaml(SHIPPED)


def load_config(args: list[str]) -> Config:
    """`config.yaml [preset=NAME] [key=value ...]`. Raises UserError: one line with key, file and fix."""
    paths = [arg for arg in args if "=" not in arg or "/" in arg.partition("=")[0]]     # a path may hold a "="
    given = [arg.split("=", 1) for arg in args if arg not in paths]
    if paths[1:]:
        raise UserError(f"{paths[1]}: not understood; write options as key=value")
    presets = [one for key, text in given if key == "preset" for one in read_presets(text)]
    return resolved(Path(*paths or ["config.yaml"]), presets, {key: text for key, text in given if key != "preset"})


def kept_config(folder: Path) -> Config:               # a run's
    return resolved(folder / "config.yaml", [], {})


def resolved(path: Path, presets: list[tuple[str, dict[str, Any]]], options: dict[str, str]) -> Config:
    file = read_yaml(path)
    method = options.get("method")
    below = read_presets(file.get("preset", ""), (path,))          # what the file itself builds on
    layers = [*below, (f"{path}", file), *presets]
    for _, layer in [*reversed(layers), ("", shipped())]:
        method = method or layer.get("method")
    brought = brought_by(str(method))
    kinds = {key: kind_of(key, value) for key, value in {**brought, **shipped()}.items()}
    # what the method sets and a copy of config.yaml has as it was shipped is not meant; in a run's own file it is
    a_runs = set(brought) <= set(file) and file.get("method") == method and path.resolve() != SHIPPED
    if set(shipped()) <= set(file) and not a_runs:
        for key in [key for key in brought if key in file and file[key] == shipped().get(key)]:
            del file[key]
    given = {key: text if kinds.get(key) is str else words(text, f"{key}={text:.80} cannot be read as a value")
             for key, text in options.items()}

    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for where, layer in [(str(SHIPPED), shipped()), (f"method {method}", brought), *layers]:
        for name in layer.get("methods", {}):
            if not name.endswith(".py") and method_names() and name not in (known := ["leafe", *method_names()]):
                raise UserError(f"{where}: methods: there is no method {short(name)}{nearest(name, known)}")
        own = layer.get("methods", {}).get(method, {})             # what it says for this method alone
        for where, part in [(where, layer), (f"{where}, method {method}", own)]:
            for key, value in part.items():
                serves_another = key not in kinds and owners_of(key)
                if key not in ("methods", "preset") and not serves_another:
                    settings[key], sources[key] = value, where
    settings |= given
    sources |= dict.fromkeys(given, "the command line")
    file_of_method = getattr(method_file(str(method)), "__file__", "")
    with blaming(file_of_method, f"method: the CHECKS of {method}, (key, holds(value, settings), must) each, failed"):
        check(settings, kinds, sources, method_file(str(method)))
    return Config(**settings)


class Words(yaml.SafeLoader):
    """YAML with numbers as people write them: 1e-3 is one; 010 and 1:30, bases of 8 and 60 by its rules, are none, nor
    are days. No key stands twice."""
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, line in [(str(key.value), key.start_mark.line + 1) for key, _ in node.value]:
            if key in seen:
                raise yaml.YAMLError(f"{key} stands in line {seen[key]} and again in line {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)


for tag, pattern in [("null", "~|null|"), ("bool", "true|yes|on|false|no|off"),
                     ("int", r"[-+]?(0|[1-9]\d{0,30}(_\d{3}){0,9})"),
                     ("float", r"[-+]?((?=.*[.e])(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|\.inf|\.nan)")]:
    Words.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})$", re.I | re.A), None)


class Dumper(yaml.SafeDumper):                         # writes what Words reads
    yaml_implicit_resolvers = Words.yaml_implicit_resolvers


def read_text(path: Path) -> str:
    try:
        return (text := path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {text.count(10, 0, error.start) + 1} is not UTF-8 text; save it so") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def words(text: str, fault: str) -> Any:
    try:
        return yaml.load(text, Words)
    except Exception as error:                         # YAML's own, or what its tags raise: !!int x
        raise UserError(f"{fault}: {' '.join(str(error).split())}") from None


def is_lines(value: Any) -> bool:                      # of `key: value`
    return isinstance(value, dict) and fits(list(value), list[str])


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        fix = ("config.yaml comes with the project" if path.parent.is_dir() else
               f"there is no run {path.parent}; its folder is what out= named")
        raise UserError(f"{path}: there is no such file; {fix}")
    settings = words(read_text(path), f"{path}: not YAML")
    if not is_lines(settings):
        raise UserError(f"{path}: expected lines of `key: value`")
    methods = settings.get("methods", {})
    if not is_lines(methods) or not all(map(is_lines, methods.values())):
        raise UserError(f"{path}: methods must hold the name of a method, and below it lines of `key: value`")
    if settings.get("experiences") and settings.get("method") == "leafe":           # as it was called
        settings["method"] = "other_lessons"
    if not isinstance(settings.get("preset", ""), str):
        raise UserError(f"{path}: preset must be the name of a file in configs/, or a .yaml file")
    return settings


def read_presets(name: str, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(where, settings) of configs/<name>.yaml, or of a .yaml file, beside the one that names it; what it builds on
    (`preset: other`) first."""
    if not name:
        return []
    beside = above[-1].parent if above else Path()
    path = beside / name if name.endswith(".yaml") else ROOT / "configs" / f"{name}.yaml"
    if not path.is_file():
        there = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
        raise UserError(f"{above[-1] if above else 'the command line'}: preset={name}: there is no such file in "
                        f"{beside if name.endswith('.yaml') else 'configs/; there are ' + ', '.join(there)}"
                        f"{nearest(name, there)}")
    if path.resolve() in [file.resolve() for file in above]:
        raise UserError(f"{above[-1]}: preset: {name} builds on this file itself")
    settings = read_yaml(path)
    return [*read_presets(settings.get("preset", ""), (*above, path)), (f"{path}", settings)]


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
        raise UserError(f"method: there is no {short(name)}; there are {there}, and path/to/file.py"
                        f"{nearest(name, method_names())}")
    if Path(name).stem in ("base", "warm_start"):
        raise UserError(f"method: rename {name}; {Path(name).stem} is what the samples of a run's start are called")
    module = load_file(name, "method") if name.endswith(".py") else import_module(f"methods.{name}")
    if not hasattr(module, "train") and not hasattr(module, "several_runs"):
        raise UserError(f"method: {name} has no function train(run, round_)")
    for part in {"train", "check", "several_runs"} & set(vars(module) if name.endswith(".py") else ()):
        setattr(module, part, blaming(module.__file__, f"method: {part} of {name} failed")(getattr(module, part)))
    return module


def keys_of(method: str) -> str:
    """The keys that a method brings, as lines of YAML with their comments: its own, and its values for the loop's."""
    return getattr(method_file(method), "KEYS", "")


def brought_by(method: str) -> dict[str, Any]:
    """The same as values."""
    fault, keys = f"method: KEYS of {method} must be text, a line `key: value` each", keys_of(method)
    brought = words(keys, fault) or {} if isinstance(keys, str) else None
    if not is_lines(brought):
        raise UserError(fault)
    return brought


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
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or getattr(error, "errno", 0) in FULL[:3]:
            raise
        frames = traceback.extract_tb(error.__traceback__)[2:]       # behind this one, and the one that asked
        where = file
        for frame in [frame for frame in frames if frame.filename == file] or frames:
            where = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
        if isinstance(error, SyntaxError) and error.filename:
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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)    # the way is to be freed; the first 3: a disk
STOPPED = "stopped; nothing is lost: the same command goes on from here"
gone: set[TextIO] = set()
in_mid_line: dict[TextIO, bool] = {}                   # where a progress bar stands
errors: TextIO = sys.stderr                            # what sys.stderr is; of several processes, only in the first
word = 0                                               # of several processes (ranks.word); 0: this is the only one


def mute(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def lasting(stream: TextIO, write: Callable, *args: Any) -> Any:
    """What its reader leaves unread ("| head" has seen enough) goes nowhere, and the run goes on."""
    if args:
        in_mid_line[stream] = not args[0].endswith("\n")
    try:
        return write(*args)
    except OSError:
        gone.add(stream)
        mute(stream)
        return write(*args)


def tells() -> bool:
    """Whether it is for this process to tell how the run ended: of several, the first that asks."""
    try:
        return not word or os.read(word, 1) != b""
    except BlockingIOError:
        return False


def tell(text: str) -> None:
    """The last word on stderr: nothing follows, not even what a progress bar still has to say."""
    if tells():
        print(visible("\n" * in_mid_line.get(errors, word > 0) + text), file=errors)
    mute(errors)


def wait_to_be_ended(seconds: float) -> None:
    """While others of several processes may tell better how the run ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def fail(text: str) -> None:
    tell(f"error: {text}")
    sys.exit(1)


def uncaught(*error: Any) -> None:                     # a fault of ours
    if word:                                           # or another process is gone
        wait_to_be_ended(1)
    tell("".join(traceback.format_exception(*error)).rstrip())


def guarded(main: Callable[[list[str]], None], usage: str = "") -> None:
    """Run a script's main, or show `usage`, if given: the user's mistakes become one line, Ctrl-C loses nothing."""
    global errors
    args = sys.argv[1:]
    for name, mode in dict(stdin="r", stdout="w", stderr="w").items():
        stream: Any = getattr(sys, name) or open(os.devnull, mode)     # or a file of the run's gets its number
        if mode == "w":
            stream.reconfigure(errors="backslashreplace")
            stream.write, stream.flush = (partial(lasting, stream, write) for write in (stream.write, stream.flush))
        setattr(sys, name, stream)
    errors = sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)           # see stopped
    gc.freeze()                                        # what is imported stays: see gc.disable below
    gc.enable()
    sys.excepthook = uncaught
    try:
        if usage and (not args or set(args) & {"-h", "--help"}):
            print(visible(usage_of(args, usage)))
        else:
            main(args)
        sys.stdout.flush()
        if gone:
            sys.exit(141)
    except UserError as error:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:                                  # what all ranks have found rank 0 tells
            wait_to_be_ended(1 if word else 10)
        elif word:                                     # what it found since another was killed, their parent
            wait_to_be_ended(0.5)
        fail(str(error))
    except ModuleNotFoundError as error:                # a fork may have left a wing out
        if (error.name or "").partition(".")[0] not in ("methods", "worlds", "models", "scale", "tools"):
            raise
        wing, dot, file = error.name.partition(".")
        fail(f"this copy of the project has no {wing}/{file + '.py' * bool(dot)}")
    except KeyboardInterrupt:
        in_mid_line[errors] = True                     # behind ^C
        tell(STOPPED)
        sys.exit(130)
    except OSError as error:
        if not error.filename and error.errno not in FULL:
            raise
        again = "; nothing is lost: free the way and run the same command again" * (error.errno in FULL)
        fail(f"{error.filename or 'out'}: {error.strerror}{again}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):           # torch's own, CPU's or GPU's
            raise
        fail(f"out of memory; lower slots=, context=, row_tokens= or snapshot_mb= ({error})")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                   # it ends already
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stopped(*_: Any) -> None:                          # by Ctrl-C, before there is anything to lose
    os.write(2, f"\n{STOPPED}\n".encode())
    os._exit(130)


def check_versions() -> None:                          # its door; before torch is imported, which would say less
    import_module("models.versions").check()


if Path(sys.argv[0] or "/").resolve().parent in (ROOT, ROOT / "tools", ROOT / "methods"):    # one of the scripts
    signal.signal(signal.SIGINT, stopped)              # its imports take seconds
    gc.disable()                                       # to look for waste in what they make would take as long again
    check_versions()
