"""Run the notebooks of docs/notebooks, each in an empty folder, and keep them with their outputs.

python docs/run_notebooks.py --output build/notebooks
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def run(path: Path, output: Path, timeout: int = 1200) -> Path:
    """Run a notebook, and write it with its outputs.

    Parameters
    ----------
    path : Path
        Source in jupytext's percent format.
    output : Path
        Folder for the `.ipynb`.
    timeout : int, default: 1200
        Most seconds per cell.

    Returns
    -------
    Path
        The file that was written.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell failed.
    """
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{path.stem}.ipynb"
    nbformat.write(notebook, file)
    return file


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/notebooks"), help="folder for the .ipynb files")
    for path in sorted(FOLDER.glob("*.py")):
        print(run(path, parser.parse_args().output), flush=True)


if __name__ == "__main__":
    main()
