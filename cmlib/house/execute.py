"""Run one notebook afresh and store what its cells show: ``python -m cmlib.house.execute notebooks/00_start_here.ipynb``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

SECONDS = 600  # the longest that one cell may run


class CellError(RuntimeError):
    """A cell of a notebook failed; the message names both."""


def execute(path: Path) -> None:
    """Run all cells in a new kernel and put the result in the notebook's place; on an error the file stays as it was."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    current = 0

    def note(cell, cell_index):
        nonlocal current
        current = cell_index

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS,
        record_timing=False,
        on_cell_start=note,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError, NoSuchKernel) as error:
        raise CellError(f"{path}, cell {current + 1} ({_first_line(notebook.cells[current])}): {_reason(error)}") from error
    aside = path.with_name(f".{path.name}.part")
    try:
        nbformat.write(notebook, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _first_line(cell) -> str:
    return next(iter(cell.source.splitlines()), "")


def _reason(error: Exception) -> str:
    if isinstance(error, CellExecutionError):
        return f"{error.ename}: {error.evalue}"
    if isinstance(error, CellTimeoutError):
        return f"ran longer than {SECONDS} s"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    try:
        execute(Path(sys.argv[1]))
    except CellError as error:
        sys.exit(f"cmlib: {error}")
