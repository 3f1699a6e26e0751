"""Execute the notebooks, and write each as .ipynb and .html with its outputs and plots.

    python notebooks/run.py [--out build/notebooks] [NAME ...]

The sources are scripts with cells (`# %%`), which a reviewer reads and an editor opens as notebooks; jupytext makes the
.ipynb. Each runs in a process and a temporary folder of its own, without a network. Ends with 1 at the first cell that
fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = sorted(file.stem for file in HERE.glob("[0-9]_*.py"))
FIRST = """from prunella.io.load import import_module

try:
    import_module("torchvision")  # one that does not fit this torch would keep transformers from being imported
except ImportError:
    pass
"""


def executed(name: str, seconds: int) -> object:
    """The notebook with its outputs. Errors: those of nbclient, with the cell that failed."""
    import jupytext
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = jupytext.read(HERE / f"{name}.py")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in the file system where there are some: by TCP every user of the machine could read along.
        sockets = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{folder}/kernel"}
        kernel = AsyncKernelManager(kernel_name="python3", **sockets)
        NotebookClient(notebook, km=kernel, timeout=seconds, resources={"metadata": {"path": folder}}).execute()
    del notebook.cells[0]
    return notebook


def write(notebook: object, folder: Path, name: str) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "notebooks")
    parser.add_argument("--seconds", type=int, default=600, help="most for one cell")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(NAMES))
    if unknown:
        parser.error(f"no notebook is called {unknown[0]}: choose from {', '.join(NAMES)}")
    from nbclient.exceptions import CellExecutionError

    for name in asked.names or NAMES:
        start = time.perf_counter()
        try:
            notebook = executed(name, asked.seconds)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        write(notebook, asked.out, name)
        print(f"{asked.out / name}.ipynb and .html ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
