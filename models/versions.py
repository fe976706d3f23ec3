"""The packages of requirements.txt as they are here, looked over before torch and transformers are imported: where one
is too old, too new or missing, their own words would come as a traceback from somewhere deep."""
import sys
from importlib.metadata import distributions
from types import TracebackType

from packaging.requirements import Requirement

from config import ROOT, fail, visible


def check() -> None:
    sys.excepthook = told                                # until the script's main begins
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        needed = Requirement(line)
        found = next((package.version for package in distributions(name=needed.name)), "")
        if found and not needed.specifier.contains(found, prereleases=True):
            fail(f"{needed.name} {found} is installed, {line} is needed; pip install '{line}'")


def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A package that is missing, or that finds another one missing or of the wrong version, in one line."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    own = name and ((ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file())
    if own or not isinstance(error, ImportError):
        return sys.__excepthook__(kind, error, trace)
    print(visible(f"error: {' '.join(str(error).split())[:300]}; pip install -r requirements.txt"), file=sys.stderr)
