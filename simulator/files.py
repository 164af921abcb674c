"""Files are replaced in one move or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.errors import ProfileError

if TYPE_CHECKING:
    import pandas as pd


def write_atomically(path: str | Path, write: Callable[[Any], Any], mode: str = "w") -> None:
    """Call ``write(file)`` on a temporary neighbour of `path`, then put it in place in one move."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            write(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as ``.parquet`` or ``.csv``, atomically.

    Raises
    ------
    ProfileError
        When the ending is another, or Parquet is asked for and pyarrow is missing.
    """
    kind = Path(path).suffix
    if kind == ".csv":
        write_atomically(path, lambda file: table.to_csv(file, index=False))
    elif kind == ".parquet":
        try:
            import pyarrow  # noqa: F401 - pandas would say less well that it is missing
        except ImportError:
            raise ProfileError(f"{path}: Parquet needs pyarrow; pip install 'myriad-simulator[parquet]', or write .csv") from None
        write_atomically(path, lambda file: table.to_parquet(file, index=False), mode="wb")
    else:
        raise ProfileError(f"{path}: write .parquet or .csv")
