"""Profile: how often each token id occurs in a corpus, its coverage, and how much is still unseen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from trimserve.arguments import AnyPath, checked
from trimserve.arrays import Counts, Ids
from trimserve.corpus.files import CorpusSource
from trimserve.errors import MismatchError
from trimserve.files.artefact import load_artefact, save_artefact
from trimserve.files.checked_json import convert_json
from trimserve.files.model_json import MOST_ROWS
from trimserve.profiles.estimates import guaranteed_bound, likely_bound


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Profile:
    """How often each token id occurs in a corpus.

    Attributes:
        counts: int64 (V,), occurrences of each token id.
        tokenizer_sha256: hash of the tokenizer.json that made the ids.
        tokenizer_name: the model's path or hub id.
        texts: number of documents.
        characters: number of characters in them.
        beyond_rows: occurrences of ids >= V, which the model has no row for; not in `counts`.
        sources: the files that were read.
        structural: int32, ids that are never dropped.
        padding_ids: int32, rows below V that no token of the tokenizer names.
        linear_widths: widths of the model's linear layers.
        row_bytes: bytes of one id's rows as stored in the checkpoint; 0 if unknown.
        shares: float64 (V,), probability of each id in a weighted merge; None means counts / tokens.
        effective_tokens: number of equally weighted tokens that a weighted merge is worth.
        output_counts: int64 (V,), those of `counts` that stand in completions; None where prompts and
            completions were not told apart.
        document_counts: int64 (V,), number of documents that hold each id; None in older files.
        skipped: bad rows and bytes of the corpus that were left out, by kind.
        unfinished: what it takes to go on counting (JSON), if counting was interrupted; else None.
    """

    counts: Counts
    tokenizer_sha256: str
    tokenizer_name: str
    texts: int
    characters: int
    beyond_rows: int
    sources: tuple[CorpusSource, ...]
    structural: Ids
    padding_ids: Ids
    linear_widths: tuple[int, ...] = ()
    row_bytes: int = 0
    shares: npt.NDArray[np.float64] | None = None
    effective_tokens: float = 0.0
    output_counts: Counts | None = None
    document_counts: Counts | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    unfinished: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_arrays(self)
        for name in (*_ARRAYS, *_OPTIONAL_ARRAYS):
            if (array := getattr(self, name)) is not None:
                locked = array.view()  # the caller's own array stays writable
                locked.setflags(write=False)
                object.__setattr__(self, name, locked)
        if self.effective_tokens == 0.0:
            object.__setattr__(self, "effective_tokens", float(self.tokens))

    @property
    def vocab_size(self) -> int:
        """V, rows of the model's embedding."""
        return int(self.counts.size)

    @property
    def tokens(self) -> int:
        """Number of counted token occurrences."""
        return int(self.counts.sum())

    @property
    def distinct(self) -> int:
        """Number of different ids that occur."""
        return int(np.count_nonzero(self.counts))

    @property
    def mass(self) -> npt.NDArray[np.float64]:
        """Estimated probability of each id, float64 (V,): its share of the (weighted) occurrences."""
        return self.shares if self.shares is not None else self.counts / max(self.tokens, 1)

    def coverage(self, kept_ids: npt.ArrayLike) -> float:
        """Share of the profile's token occurrences whose id is kept, weighted if the profile is.

        Args:
            kept_ids: distinct token ids, int, any order.
        """
        ids = np.asarray(kept_ids, np.int64)
        if self.shares is not None:
            return min(1.0, float(self.shares[ids].sum()))
        return int(self.counts[ids].sum()) / max(self.tokens, 1)

    @property
    def missing_mass(self) -> float:
        """Estimated share of future tokens whose id is not in the profile.

        The Good-Turing estimate N1 / N: the share of occurrences whose id occurs once. In a weighted
        merge each such occurrence counts with its own weight (law of total probability over the parts).

        Source: I. J. Good, The population frequencies of species, Biometrika 40 (1953), 237-264,
        https://doi.org/10.1093/biomet/40.3-4.237
        """
        return float(self.mass[self.counts == 1].sum())

    @property
    def missing_mass_bound(self) -> float:
        """Upper bound of the missing mass at `CONFIDENCE`, whatever the distribution of independent draws.

        Tokens of a text are not independent, so another domain or genre can exceed it. See
        `estimates.guaranteed_bound`.
        """
        return guaranteed_bound(self.missing_mass, self.effective_tokens)

    @property
    def missing_mass_likely(self) -> float:
        """Upper bound of the missing mass at `CONFIDENCE`, by its normal limit: `estimates.likely_bound`."""
        once, twice = self.mass[self.counts == 1], self.mass[self.counts == 2]
        return likely_bound(once, twice, self.effective_tokens)

    @property
    def document_missing_mass(self) -> float | None:
        """Estimated share of a further document's tokens whose id is not in the profile.

        Each document is held back in turn: the tokens that no other document holds, over all tokens. Words
        come in bursts, so it exceeds `missing_mass`, which takes tokens for independent. None where the
        documents of each id were not counted, or there is one document alone.
        """
        if self.document_counts is None or self.texts < 2:
            return None
        return float(self.mass[self.document_counts == 1].sum())

    @checked
    def save(self, path: AnyPath) -> None:
        """Write the profile as one safetensors file, atomically."""
        arrays: dict[str, npt.NDArray[Any]] = {name: getattr(self, name) for name in _ARRAYS}
        optional = {name: getattr(self, name) for name in _OPTIONAL_ARRAYS}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        facts["sources"] = [[source.name, source.sha256, source.bytes] for source in self.sources]
        save_artefact(Path(path), "profile", arrays, facts | {"tokens": self.tokens})

    @classmethod
    @checked
    def load(cls, path: AnyPath) -> Self:
        """Read a profile.

        Raises:
            UsageError: there is no such file.
            MismatchError: it is no profile, or damaged.
        """
        arrays, facts = load_artefact(Path(path), "profile")
        advice = "make the profile again."
        told = convert_json(facts, _Facts, f"the metadata of {path}", advice=advice)
        names = {*_ARRAYS, *_OPTIONAL_ARRAYS}
        if wrong := sorted(arrays.keys() ^ (names & (arrays.keys() | set(_ARRAYS)))):
            raise MismatchError(f"{path} lacks {wrong[0]!r}, or should not have it: {advice}")
        values: dict[str, Any] = arrays | {name: getattr(told, name) for name in _FACTS}
        loaded = cls(**values, sources=tuple(CorpusSource(*source) for source in told.sources))
        if loaded.tokens != told.tokens:
            raise MismatchError(
                f"{path} should count {told.tokens:,} tokens but counts {loaded.tokens:,}: {advice}"
            )
        return loaded


Count = Annotated[int, Meta(ge=0, le=1 << 53)]


@dataclass(frozen=True, slots=True)
class _Facts:
    """The metadata of a profile's file."""

    tokenizer_sha256: str
    tokenizer_name: str
    texts: Count
    characters: Count
    beyond_rows: Count
    tokens: Count
    sources: list[tuple[str, str, Count]]
    linear_widths: tuple[Count, ...] = ()
    row_bytes: Count = 0
    effective_tokens: Annotated[float, Meta(ge=0)] = 0.0
    skipped: dict[str, Count] = field(default_factory=dict)
    unfinished: dict[str, Any] | None = None


# Sums of counts stay far below 2**63.
_MOST_OCCURRENCES = 1 << 53


def _check_arrays(profile: Profile) -> None:
    counts, size = profile.counts, profile.counts.size
    whole = counts.ndim == 1 and counts.dtype == np.int64 and 0 < counts.size <= MOST_ROWS
    whole = whole and counts.min() >= 0 and float(counts.sum(dtype=np.float64)) <= _MOST_OCCURRENCES
    parts = (profile.structural, profile.padding_ids)
    flat = all(part.ndim == 1 and part.dtype.kind in "iu" for part in parts)
    ids = np.concatenate([profile.structural, profile.padding_ids]) if flat else np.array([-1])
    inside = ids.min(initial=0) >= 0 and ids.max(initial=-1) < size
    shares = profile.shares
    whole = whole and (shares is None or (shares.dtype.kind == "f" and bool(np.all(shares >= 0))))
    optional = [getattr(profile, name) for name in _OPTIONAL_ARRAYS]
    fits = all(array is None or array.shape == counts.shape for array in optional)
    some = [profile.output_counts, profile.document_counts]  # neither can exceed the occurrences
    within = fits and all(
        part is None or (part.dtype == np.int64 and bool(np.all((part >= 0) & (part <= counts))))
        for part in some
    )
    if not (whole and inside and fits and within):
        raise MismatchError(
            f"a profile needs int64 counts of at least 0 and ids below their number: found {counts.dtype} "
            f"counts of shape {counts.shape} and ids up to {ids.max(initial=-1):,}. Make the profile again."
        )


_ARRAYS = ("counts", "structural", "padding_ids")
_OPTIONAL_ARRAYS = ("shares", "output_counts", "document_counts")
_FACTS = (
    "tokenizer_sha256",
    "tokenizer_name",
    "texts",
    "characters",
    "beyond_rows",
    "linear_widths",
    "row_bytes",
    "effective_tokens",
    "skipped",
    "unfinished",
)
