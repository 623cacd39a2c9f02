"""A small table that says what cases come to, as text for Markdown and the page."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """Rows of text under a title; columns between names and remarks hold numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    num_names: int = 1
    """Columns of text that the rows begin with."""
    num_remarks: int = 0
    """Columns of text that they end with."""

    @property
    def numbers(self) -> range:
        """Places of the columns that hold numbers."""
        return range(self.num_names, len(self.head) - self.num_remarks)
