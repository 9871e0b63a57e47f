"""Similarity of embeddings, by the function that a folder names."""

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats
from trimserve.encoder.pooling import normalize_rows
from trimserve.errors import UnsupportedModelError

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
        UnsupportedModelError: unknown name.
    """
    one, other = (np.atleast_2d(np.asarray(values, np.float32)) for values in (first, second))
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
    one, other = (np.atleast_2d(np.asarray(values, np.float32)) for values in (first, second))
    if name == "cosine":
        one, other = normalize_rows(one), normalize_rows(other)
    if name in ("cosine", "dot"):
        return np.asarray(np.einsum("nd,nd->n", one, other), np.float32)
    if name in ("euclidean", "manhattan"):
        return np.asarray(-_distance(name, one, other), np.float32)
    raise UnsupportedModelError(f"unknown similarity {name!r}: this version has {_KNOWN}.")


def _distance(name: str, one: Floats, other: Floats) -> Floats:
    apart = np.abs(one - other)
    found = np.sqrt(np.square(apart).sum(axis=-1)) if name == "euclidean" else apart.sum(axis=-1)
    return np.asarray(found, np.float32)
