"""A trie of pieces in one hash table of its edges, which is read where it is mapped.

The table has 2^b slots. A slot holds one edge as ``(parent << 21 | symbol) + 1``, 0 where it is empty; a node
is the number of the slot of the edge that leads to it, and the root is 2^b. So an edge is found with one
multiplication and few reads, whatever the vocab's size. Symbols are code points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int32]
Nodes = npt.NDArray[np.int64]

# No code point: a walk ends at it.
BREAK = 0x1FFFFF
_SYMBOL_BITS = 21
# D. Knuth, The Art of Computer Programming 3, 6.4: multiplicative hashing, with 2^64 over the golden ratio.
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MOST_LOAD = 0.7
# Below so many symbols a loop is sooner done than numpy's calls.
_FEW = 400


@dataclass(frozen=True)
class Trie:
    """Pieces by their symbols.

    Attributes:
        edges: uint64 (2^b,), see the module.
        pieces: int32 (2^b,), the piece that ends at each node, or -1.
    """

    edges: Words
    pieces: Places

    @property
    def root(self) -> int:
        """The node of the empty piece."""
        return len(self.edges)

    @property
    def _shift(self) -> int:
        return 65 - len(self.edges).bit_length()

    def node(self, text: str) -> int | None:
        """The node that a text leads to; None where no piece begins with it."""
        node: int | None = self.root
        for symbol in map(ord, text):
            if node is None:
                return None
            node = self._step(node, symbol)
        return node

    def find(self, text: str) -> int | None:
        """The piece that is spelled like this, if there is one."""
        node = self.node(text)
        piece = -1 if node is None or node == self.root else int(self.pieces[node])
        return None if piece < 0 else piece

    def within(self, symbols: Symbols, roots: Sequence[int]) -> npt.NDArray[np.int32]:
        """Find every piece that is a part of a text.

        Args:
            symbols: code points, with `BREAK` where no piece may cross, uint32 (n,).
            roots: nodes from which pieces are followed at each place.

        Returns:
            Numbers of the pieces, each once, int32.
        """
        if len(symbols) < _FEW:
            return np.array([*self._within_few(symbols.tolist(), roots)], np.int32)
        parts = [self._within_many(symbols, root) for root in roots]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int32)

    def _within_few(self, symbols: list[int], roots: Sequence[int]) -> set[int]:
        edges, pieces = self.edges.data, self.pieces.data
        shift, mask = self._shift, len(edges) - 1
        found = set()
        for root in roots:
            for start in range(len(symbols)):
                node = root
                for place in range(start, len(symbols)):
                    key = (node << _SYMBOL_BITS | symbols[place]) + 1
                    node = (key * _MULTIPLIER & _MASK) >> shift
                    while (edge := edges[node]) != key and edge:
                        node = (node + 1) & mask
                    if not edge:
                        break
                    if pieces[node] >= 0:
                        found.add(pieces[node])
        return found

    def _within_many(self, symbols: Symbols, root: int) -> npt.NDArray[np.int32]:
        """All places advance together, a symbol a round; those that no piece goes on with drop out."""
        places: Nodes = np.arange(len(symbols))
        nodes: Nodes = np.full(len(symbols), root)
        found = np.zeros(0, np.int32)
        while places.size:
            nodes = self._steps(nodes, symbols[places])
            alive = nodes >= 0
            nodes, places = nodes[alive], places[alive] + 1
            here = self.pieces[nodes]
            found = np.union1d(found, here[here >= 0])
            inside = places < len(symbols)
            nodes, places = nodes[inside], places[inside]
        return found

    def _step(self, node: int, symbol: int) -> int | None:
        (found,) = self._steps(np.array([node]), np.array([symbol], np.uint32)).tolist()
        return None if found < 0 else int(found)

    def _steps(self, nodes: Nodes, symbols: Symbols) -> Nodes:
        """The node behind each node's edge of a symbol, -1 where there is none."""
        keys = _keys(nodes, symbols)
        slots = _hashed(keys, self._shift)
        found: Nodes = np.full(len(keys), -1, np.int64)
        open_ = np.arange(len(keys))
        while open_.size:
            edges = self.edges[slots]
            hit = edges == keys
            found[open_[hit]] = slots[hit]
            onward = ~hit & (edges != 0)
            open_, keys = open_[onward], keys[onward]
            slots = (slots[onward] + 1) & (len(self.edges) - 1)
        return found


def build_trie(pieces: Sequence[str]) -> Trie:
    """Make the trie of pieces, each by its place in the list; an empty one is left out."""
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    symbols = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), np.uint32)
    starts = np.cumsum(lengths) - lengths
    edges, ends = np.zeros(1 << _bits(_edge_count(pieces)), np.uint64), np.empty(0, np.int32)
    ends = np.full(len(edges), -1, np.int32)
    shift = 65 - len(edges).bit_length()
    nodes: Nodes = np.full(len(pieces), len(edges), np.int64)
    for depth in range(int(lengths.max(initial=0))):
        active = np.flatnonzero(lengths > depth)
        keys, which = np.unique(_keys(nodes[active], symbols[starts[active] + depth]), return_inverse=True)
        nodes[active] = _place(edges, keys, shift)[which]
        done = active[lengths[active] == depth + 1]
        ends[nodes[done]] = done
    return Trie(edges, ends)


def _edge_count(pieces: Sequence[str]) -> int:
    """Distinct beginnings of the pieces: of neighbours in order, what the second has beyond the first."""
    count, last = 0, ""
    for piece in sorted(pieces):
        common = 0
        for one, other in zip(last, piece, strict=False):
            if one != other:
                break
            common += 1
        count += len(piece) - common
        last = piece
    return count


def _bits(edges: int) -> int:
    return max(4, int(edges / _MOST_LOAD).bit_length())


def _place(edges: Words, keys: Words, shift: int) -> Nodes:
    """Put new edges into the table; gives their slots."""
    slots = _hashed(keys, shift)
    open_ = np.arange(len(keys))
    while open_.size:
        empty = open_[edges[slots[open_]] == 0]
        taken, first = np.unique(slots[empty], return_index=True)
        edges[taken] = keys[empty[first]]
        open_ = open_[edges[slots[open_]] != keys[open_]]
        slots[open_] = (slots[open_] + 1) & (len(edges) - 1)
    return slots


def _keys(nodes: Nodes, symbols: Symbols) -> Words:
    return (nodes.astype(np.uint64) << np.uint64(_SYMBOL_BITS) | symbols) + np.uint64(1)


def _hashed(keys: Words, shift: int) -> Nodes:
    return (keys * np.uint64(_MULTIPLIER) >> np.uint64(shift)).astype(np.int64)
