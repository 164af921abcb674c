"""One published row: its cells as text, and the assumptions made while reading it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from simulator.errors import ProfileError


class Row:
    """Cells of one published row; a blank means "not printed".

    Parameters
    ----------
    cells : mapping
        A dict or a pandas Series, by column name.
    """

    def __init__(self, cells: Mapping[str, Any]):
        self._cells = cells
        self.assumptions: list[str] = []

    def text(self, column: str) -> str:
        """Return a cell as stripped text, empty when it is not printed."""
        value = self._cells.get(column, "")
        if value is None or (isinstance(value, float) and math.isnan(value)):  # a user's own read_csv gives NaN for a blank
            return ""
        return str(value).strip()

    def whole(self, column: str) -> int | None:
        """Return a cell as a whole number, None when it is not printed.

        Raises
        ------
        ProfileError
            When it is printed and is not a whole number.
        """
        text = self.text(column)
        if not text:
            return None
        try:
            number = float(text)
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
        raise ProfileError(f"{column} is not a whole number")

    def need(self, column: str) -> int:
        """Return a whole number that the row cannot do without.

        Raises
        ------
        ProfileError
            When the source does not print it.
        """
        value = self.whole(column)
        if value is None:
            raise ProfileError(f"not printed: {column}")
        return value

    def has(self, pattern: str, *columns: str) -> bool:
        """Return whether a regular expression occurs in any of the columns, whatever the case."""
        return any(re.search(pattern, self.text(column), re.IGNORECASE) for column in columns)

    def replaced(self, cells: Mapping[str, Any]) -> Row:
        """Return the row with other `cells` in place of its own, and the assumptions made so far."""
        found = Row({**self._cells, **cells})
        found.assumptions = list(self.assumptions)
        return found

    def assume(self, text: str) -> None:
        """Note an assumption, once."""
        if text not in self.assumptions:
            self.assumptions.append(text)

    def of_source(self, known: Iterable[tuple[str, Mapping[str, Any], str]], what: str) -> dict[str, Any]:
        """Return what is known of the row's source beside its cells, and note how.

        Parameters
        ----------
        known : iterable of (str, mapping, str)
            Pattern of sources or provenances, the fields that rows of them have, and how that is known; later ones go before.
        what : str
            What the row itself does not print.
        """
        fields: dict[str, Any] = {}
        for pattern, found, said in known:
            if self.has(pattern, "source", "provenance"):
                fields |= found
                self.assume(f"{what} not printed: {said}")
        return fields

    def default(self, column: str, value: Any, found: Any) -> Any:
        """Return `found`, or `value` with a note when the source does not print it."""
        if found not in (None, ""):
            return found
        self.assume(f"{column} not printed: {value}")
        return value
