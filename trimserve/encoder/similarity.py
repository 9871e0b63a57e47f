"""Similarity of embeddings, by the function that a folder names."""

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats
from trimserve.encoder.pooling import normalize_rows
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.foreign import foreign

_ADVICE = "pass what encode() gave."
_KNOWN = "cosine, dot, euclidean and manhattan"


def similarity(name: str, first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """Compare every embedding of one list with every one of another.

    Args:
        name: ``"cosine"``, ``"dot"``, ``"euclidean"`` or ``"manhattan"``; distances are negative, so that
            more is always more alike.
        first: (n, D), or (D,) for one.
        second: (m, D), or (D,) for one.

    Returns:
        float32 (n, m).

    Raises:
        UsageError: no arrays of numbers, or of different widths.
        UnsupportedModelError: unknown name.
    """
    one, other = _tables(first, second)
    if name == "cosine":
        one, other = normalize_rows(one), normalize_rows(other)
    if name in ("cosine", "dot"):
        return np.asarray(one @ other.T, np.float32)
    if name in ("euclidean", "manhattan"):
        return np.stack([-_distance(name, row[None], other) for row in one])
    raise UnsupportedModelError(f"unknown similarity {name!r}: this version has {_KNOWN}.")


def similarity_pairwise(name: str, first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """Compare each embedding of one list with the one at its place in another; see `similarity`.

    Returns:
        float32 (n,).
    """
    one, other = _tables(first, second)
    if len(one) != len(other) and 1 not in (len(one), len(other)):
        raise UsageError(
            f"embeddings that are compared one by one should be equally many, found {len(one):,} and "
            f"{len(other):,}: call similarity() for every one with every other."
        )
    if name == "cosine":
        one, other = normalize_rows(one), normalize_rows(other)
    if name in ("cosine", "dot"):
        return np.asarray(np.einsum("nd,nd->n", one, other), np.float32)
    if name in ("euclidean", "manhattan"):
        return np.asarray(-_distance(name, one, other), np.float32)
    raise UnsupportedModelError(f"unknown similarity {name!r}: this version has {_KNOWN}.")


def _tables(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Two lists of embeddings, float32 (n, D) and (m, D)."""
    with foreign("embeddings should be arrays of numbers", advice=_ADVICE, error=UsageError):
        one, other = (np.atleast_2d(np.asarray(values, np.float32)) for values in (first, second))
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise UsageError(
            f"embeddings should be (n, D) and (m, D), found {one.shape} and {other.shape}: {_ADVICE}"
        )
    return one, other


def _distance(name: str, one: Floats, other: Floats) -> Floats:
    apart = np.abs(one - other)
    found = np.sqrt(np.square(apart).sum(axis=-1)) if name == "euclidean" else apart.sum(axis=-1)
    return np.asarray(found, np.float32)
