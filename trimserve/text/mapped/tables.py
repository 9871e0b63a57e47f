"""The file of a tokenizer's tables: what its model is made of, to be mapped, and the rest of it as JSON.

tokenizer_tables.safetensors has n pieces in the order of their ids:

    edges, nodes        the trie of the pieces (`trimserve.text.mapped.trie`)
    ids                 int32 (n,), increasing
    spelling, ends      uint8, the pieces in UTF-8 one behind the other; int64 (n,), where each ends
    scores              float64 (n,): Unigram; exactly what `tokenizers` reads from the decimals
    left, right         int32 (m,), the two pieces of each merge, in the order of the merges: BPE
    merges, merge_ends  int32 (m,), the merges in the order of the piece they make; int64 (n,)
    always              int32, pieces that every text needs: for unknown characters, for bytes
    shell               uint8, tokenizer.json without its model
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from trimserve.errors import MismatchError
from trimserve.files.artefact import map_artefact, save_artefact
from trimserve.files.checked_json import convert_json
from trimserve.files.held import HeldFile
from trimserve.text.mapped.trie import Trie

_KIND = "tokenizer tables"
_AGAIN = "export the folder again."
_FEW = 600  # pieces
Numbers = npt.NDArray[np.int32]
Ends = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Facts:
    """The metadata of the file."""

    model: dict[str, Any]
    longest: Annotated[int, Meta(ge=0, le=1 << 30)]
    tokenizer_sha256: str


@dataclass(frozen=True)
class Tables:
    """What is in the file; see the module.

    Attributes:
        model: `type` and the settings of the tokenizer's model, without its vocab and merges.
        longest: code points of the longest piece.
        tokenizer_sha256: hash of the tokenizer.json that they were made of.
    """

    edges: npt.NDArray[np.uint64]
    nodes: Numbers
    ids: Numbers
    spelling: npt.NDArray[np.uint8]
    ends: Ends
    scores: npt.NDArray[np.float64]
    left: Numbers
    right: Numbers
    merges: Numbers
    merge_ends: Ends
    always: Numbers
    shell: npt.NDArray[np.uint8]
    model: Mapping[str, Any]
    longest: int
    tokenizer_sha256: str

    @classmethod
    def read(cls, file: HeldFile) -> Self:
        """Map a file of tables.

        Raises:
            MismatchError: it is no such file, or its arrays do not fit together.
        """
        arrays, facts = map_artefact(file, _KIND)
        told = convert_json(facts, _Facts, f"the metadata of {file.path}", advice=_AGAIN)
        if arrays.keys() != {field.name for field in fields(cls)} - {field.name for field in fields(_Facts)}:
            raise MismatchError(f"{file.path} does not hold the tables of a tokenizer: {_AGAIN}")
        tables = cls(**arrays, model=told.model, longest=told.longest, tokenizer_sha256=told.tokenizer_sha256)
        tables._check(file.path)
        return tables

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        facts = {field.name: getattr(self, field.name) for field in fields(_Facts)}
        save_artefact(path, _KIND, arrays, facts)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trie(self) -> Trie:
        """The pieces by their symbols; they are numbered as in `ids`."""
        return Trie(self.edges, self.nodes)

    def shell_json(self) -> dict[str, Any]:
        """tokenizer.json without its model: added tokens, normalizer, pre-tokenizer, processor, decoder."""
        shell: dict[str, Any] = json.loads(self.shell.tobytes())
        return shell

    def piece(self, number: int) -> str:
        """A piece as the tokenizer writes it."""
        (piece,) = self.pieces([number])
        return piece

    def pieces(self, numbers: Iterable[int]) -> list[str]:
        """Pieces as the tokenizer writes them."""
        ends, spelling = self.ends.data, self.spelling.data
        return [str(spelling[ends[n - 1] if n else 0 : ends[n]], "utf-8") for n in numbers]

    def number(self, id_: int) -> int | None:
        """The piece that has an id; None where no piece of the model has it."""
        # In most vocabs every id has a piece, so that the first guess is right.
        guess = 0 <= id_ < len(self) and int(self.ids[id_]) == id_
        place = id_ if guess else int(np.searchsorted(self.ids, id_))
        return place if place < len(self) and int(self.ids[place]) == id_ else None

    def merged_from(self, number: int) -> list[int]:
        """The pieces of all merges that make a piece."""
        ends, merges, left, right = self.merge_ends.data, self.merges.data, self.left.data, self.right.data
        made = merges[ends[number - 1] if number else 0 : ends[number]]
        return [side[merge] for merge in made for side in (left, right)]

    def merges_into(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """The merges that make one of these pieces of two others of them, in their order, int64."""
        if len(numbers) < _FEW:
            return self._few_merges_into(numbers.tolist())
        starts = np.where(numbers > 0, self.merge_ends[numbers - 1], 0)
        counts = self.merge_ends[numbers] - starts
        places = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        found = np.sort(self.merges[places]).astype(np.int64)
        both = np.isin(self.left[found], numbers) & np.isin(self.right[found], numbers)
        return found[both]

    def _few_merges_into(self, numbers: list[int]) -> npt.NDArray[np.int64]:
        """The same in a loop, which is sooner done than numpy's calls."""
        ends, merges, left, right = (
            array.data for array in (self.merge_ends, self.merges, self.left, self.right)
        )
        inside, found = set(numbers), []
        for number in numbers:
            for place in range(ends[number - 1] if number else 0, ends[number]):
                merge = merges[place]
                if left[merge] in inside and right[merge] in inside:
                    found.append(merge)
        return np.array(sorted(found), np.int64)

    def _check(self, path: Path) -> None:
        dtypes = {"edges": np.uint64, "spelling": np.uint8, "shell": np.uint8, "scores": np.float64}
        dtypes |= dict.fromkeys(("ends", "merge_ends"), np.int64)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and (
                value.ndim != 1 or value.dtype != np.dtype(dtypes.get(name, np.int32))
            ):
                raise MismatchError(f"{path}: {name} is {value.dtype} {value.shape}: {_AGAIN}")
        slots, pieces, merges = len(self.edges), len(self.ids), len(self.left)
        fits = (
            slots >= 2
            and slots & (slots - 1) == 0
            and len(self.nodes) == slots
            and len(self.ends) == pieces
            and len(self.scores) in (0, pieces)
            and len(self.right) == len(self.merges) == merges
            and len(self.merge_ends) in (0, pieces)
        )
        if not fits:
            raise MismatchError(f"{path}: its arrays do not fit together: {_AGAIN}")
