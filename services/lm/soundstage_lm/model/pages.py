"""Which page of the cache belongs to whom. Bookkeeping only: no tensors."""

import heapq
from dataclasses import dataclass, field
from typing import Final

PAGE: Final = 64  # tokens


def count_pages(tokens: int) -> int:
    """Return the number of pages that hold `tokens`."""
    return -(-tokens // PAGE)


@dataclass(slots=True, eq=False)
class Row:
    """The pages of one row, in order."""

    pages: list[int] = field(default_factory=list[int])


class PagePool:
    """A fixed number of pages; the lowest free one is handed out first, to keep those in use together."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap
        self._owners: list[Row | None] = [None] * num_pages
        self._last = -1  # no page after this one is in use

    @property
    def num_used(self) -> int:
        """How many pages belong to a row."""
        return self.num_pages - len(self._free)

    def grow(self, row: Row, tokens: int) -> list[int]:
        """Give a row room for `tokens`; returns the pages that it did not have before."""
        taken = [heapq.heappop(self._free) for _ in range(count_pages(tokens) - len(row.pages))]
        for page in taken:
            self._owners[page] = row
        self._last = max([self._last, *taken])
        row.pages += taken
        return taken

    def release(self, row: Row) -> None:
        """Take all pages of a row back."""
        for page in row.pages:
            self._owners[page] = None
            heapq.heappush(self._free, page)
        row.pages = []

    def compact(self, most: int) -> list[tuple[int, int]]:
        """Close up to `most` gaps with the last pages in use; returns what is to be copied, from and to."""
        moves: list[tuple[int, int]] = []
        while True:
            while self._last >= 0 and self._owners[self._last] is None:
                self._last -= 1
            if len(moves) == most or not self._free or self._free[0] > self._last:
                return moves
            row, target = self._owners[self._last], heapq.heapreplace(self._free, self._last)
            assert row is not None
            row.pages[row.pages.index(self._last)] = target
            self._owners[self._last], self._owners[target] = None, row
            moves.append((self._last, target))
