"""A choice among token sequences, followed token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from soundstage_lm.writer import TokenSet

Share = Callable[[Iterable[int]], TokenSet]


class Node:
    """A place in a trie: which tokens may follow, and where they lead."""

    __slots__ = ("allowed", "children")

    def __init__(self, sequences: Iterable[Sequence[int]], share: Share) -> None:
        """Build a trie of token sequences, none of which may begin another; equal sets come from `share`."""
        tails: dict[int, list[Sequence[int]]] = {}
        for first, *rest in filter(None, sequences):
            tails.setdefault(first, []).append(rest)
        self.children = {token: Node(rests, share) for token, rests in tails.items()}
        self.allowed = share(self.children)


class Choice:
    """One walk through a trie."""

    def __init__(self, root: Node) -> None:
        self._node = root

    @property
    def allowed(self) -> TokenSet:
        """What may come next."""
        return self._node.allowed

    @property
    def is_whole(self) -> bool:
        """Whether nothing may follow."""
        return not self._node.children

    def take(self, token: int) -> bool:
        """Go on with one of `allowed`."""
        self._node = self._node.children[token]
        return True
