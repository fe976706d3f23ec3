import fcntl
import gc
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if "PYTEST_XDIST_WORKER" in os.environ:                # tests side by side: a core each, for their processes too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

import torch  # noqa: E402
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,  # noqa: E402
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from config import load_config  # noqa: E402
from engine import Chat  # noqa: E402
from envs import Quest  # noqa: E402
from leafe import explore  # noqa: E402
from lora import load_model, lora_parameters  # noqa: E402
from run import Policy, Run, RunFolder  # noqa: E402

gc.freeze()                              # torch and transformers: not to be looked through again and again

SHARED = ROOT.parent / "shared" / "data"  # full data for full checks; a stranger's clone has only tests/data


def needs_shared_data():
    if not SHARED.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{SHARED} is not here")


def needs_package(name):
    if not find_spec(name):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the package {name} is not here")


@pytest.fixture
def alone():
    """For tests that see what any program leaves behind, and for those that start programs: one at a time, though
    tests run side by side."""
    with open(Path(tempfile.gettempdir()) / f"tests-of-leafe-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def settings(tmp_path):
    """config.yaml's smoke preset, with any override, writing below tmp_path."""
    def make(*args: str):
        return load_config([str(ROOT / "config.yaml"), "preset=smoke", f"out={tmp_path}/run", *args])
    return make


def run_of(cfg, pair, folder=False, **fields):
    """A Run of (model, chat), as train.py would make it; with `folder`, cfg.out is made and held."""
    return Run(cfg, Policy(*pair, cfg), RunFolder(cfg) if folder else None, **fields)


@pytest.fixture(scope="session")
def tiny():
    """(model, chat) of the embedded model; shared, so tests leave it as it is."""
    model, tokenizer = load_model("tiny", None, 768)
    return model, Chat(tokenizer)


@pytest.fixture(scope="session")
def grown(tiny, tmp_path_factory):
    """(folder, trees) of one exploration by it, ten tasks with eight attempts each; shared, too."""
    cfg = load_config([str(ROOT / "config.yaml"), "preset=smoke", "attempts=8", f"out={tmp_path_factory.mktemp('grown')}/run"])
    run = run_of(cfg, tiny, folder=True)
    trees = explore(run, Quest().tasks("train")[:10])
    run.folder.close()
    run.folder.lock.close()
    return run.folder.path, trees


@pytest.fixture
def own_tiny():
    """(model, chat) of the embedded model, for tests that change it."""
    model, tokenizer = load_model("tiny", None, 768)
    return model, Chat(tokenizer)


SHAPE = dict(vocab_size=470, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=64, max_position_embeddings=768,
             tie_word_embeddings=False, initializer_range=0.5)


def family(name, **more):
    """A small model of this architecture, weights at random."""
    torch.manual_seed(3)
    return {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | more)),
            "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE | more)),
            "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE | more, head_dim=16)),
            "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE | more, sliding_window=None)),
            }[name]().eval().requires_grad_(False)


def shake(model, seed=1, size=0.3):
    """Give the adapter weights that matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn_like(parameter) * size)
