import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if "PYTEST_XDIST_WORKER" in os.environ:                # tests side by side: a core each, for their processes too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from model import Chat, load_model  # noqa: E402
from run import load_config  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # full data for full checks; a stranger's clone has only tests/data


def needs_shared_data():
    if not SHARED.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{SHARED} is not here")


@pytest.fixture
def settings(tmp_path):
    """config.yaml's smoke preset, with any override, writing below tmp_path."""
    def make(*args: str):
        return load_config([str(ROOT / "config.yaml"), "preset=smoke", f"out={tmp_path}/run", *args])
    return make


@pytest.fixture(scope="session")
def tiny():
    """(model, chat) of the embedded model; shared, so tests leave it as it is."""
    model, tokenizer = load_model("tiny", None, 768)
    return model, Chat(tokenizer)


@pytest.fixture
def own_tiny():
    """(model, chat) of the embedded model, for tests that change it."""
    model, tokenizer = load_model("tiny", None, 768)
    return model, Chat(tokenizer)
