"""docs/leafe.ipynb: run in a copy of the project, and stored with what came out.

    python tests/lesson.py        after a change of a cell, or of what it shows; three minutes on two cores
"""
import os
import re
import shutil
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "leafe.ipynb"


def ran(home: Path) -> nbformat.NotebookNode:
    """It, after all of its cells, in a copy below `home`. Raises with the cell and its error if one fails."""
    copy = home / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".*_cache", "tests"))
    notebook = nbformat.read(copy / "docs" / "leafe.ipynb", as_version=4)
    own = dict(IPYTHONDIR=f"{home}/ipython", JUPYTER_RUNTIME_DIR=f"{home}/jupyter")        # nothing of the user's, nor there
    with patch.dict(os.environ, own):
        kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # so python3 is this interpreter
        NotebookClient(notebook, km=kernel, timeout=None, startup_timeout=600, iopub_timeout=600,
                       record_timing=False, resources={"metadata": {"path": str(copy / "docs")}}).execute()
    return notebook


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """As it is kept: without progress and times, which are of one machine, and with the digest of the code that ran."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            kept: list[nbformat.NotebookNode] = []
            for output in cell.outputs:
                if output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
                    kept[-1].text += output.text           # it came in pieces
                elif output.get("name") != "stderr":
                    kept.append(output)
            for output in kept:
                if "text" in output:
                    output.text = re.sub(r"  [\d.]+ minutes", "", output.text)
            cell.outputs = kept
    notebook.metadata = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"),
                             language_info=dict(name="python"), ran=digest(notebook))
    return notebook


def digest(notebook: nbformat.NotebookNode) -> str:
    return sha256("\0".join(code(notebook)).encode()).hexdigest()


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def said(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell of code printed."""
    return ["".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            for cell in notebook.cells if cell.cell_type == "code"]


def drawn(notebook: nbformat.NotebookNode) -> list[str]:
    """Its pictures, in order."""
    return [output.data["image/svg+xml"] for cell in notebook.cells if cell.cell_type == "code"
            for output in cell.outputs if "image/svg+xml" in output.get("data", {})]


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The kind of each output of each cell of code."""
    return [[output.get("name") or ", ".join(sorted(output.get("data", {}))) for output in cell.outputs]
            for cell in notebook.cells if cell.cell_type == "code"]


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as home:
        nbformat.write(stored(ran(Path(home))), NOTEBOOK)
    print(f"results: {NOTEBOOK.relative_to(ROOT)}, {NOTEBOOK.stat().st_size // 1000} kB")
