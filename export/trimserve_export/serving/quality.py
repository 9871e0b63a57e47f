"""What rounding a model's weights costs on some texts: nats a token, or how alike vectors are."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from trimserve.files.checked_json import convert_json

Floats = npt.NDArray[np.float32]
# Above this rise of the nats a token, or below this cosine, an export warns.
LARGEST_RISE, SMALLEST_COSINE = 0.1, 0.98
_NEAREST = 10
_Count = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Quality:
    """A float graph and the quantised one, over the same texts.

    Attributes:
        measure: ``"nats a token"`` (of a decoder: minus the logarithm of the probability of the token that
            comes, among the kept ids), ``"nats from fp32"`` (masks: the KL divergence) or ``"cosine"``.
        before: of the float graph.
        after: of the quantised one.
        texts: how many.
        tokens: of them.
        top_10: of a search among the texts' mean vectors, the share of the ten nearest that stay so; None for
            a vocab head, or too few texts.
    """

    measure: Literal["nats a token", "nats from fp32", "cosine"]
    before: float
    after: float
    texts: _Count
    tokens: _Count
    top_10: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a manifest's entry.

        Raises:
            MismatchError: it is none.
        """
        return convert_json(values, cls, "the manifest's quality", advice="export the folder again.")

    def to_dict(self) -> dict[str, Any]:
        """The manifest's entry."""
        return asdict(self)

    @property
    def is_poor(self) -> bool:
        """Whether rounding costs more than most would take."""
        if self.measure == "cosine":
            return not self.after >= SMALLEST_COSINE  # what is no number is poor, too
        return not self.after - self.before <= LARGEST_RISE

    def describe(self) -> str:
        """One sentence, for card and terminal."""
        where = f"on {self.texts:,} held-out texts ({self.tokens:,} tokens)"
        if self.measure == "cosine":
            nearest = "" if self.top_10 is None else f", {self.top_10:.1%} of the ten nearest texts the same"
            return f"cosine {self.after:.4f} between vectors before and after{nearest}, {where}."
        rise = self.after - self.before
        return f"{self.before:.4f} {self.measure} became {self.after:.4f} ({rise:+.4f}), {where}."


def measure_quality(
    texts: Sequence[npt.NDArray[np.int64]],
    outputs: Callable[[npt.NDArray[np.int64]], list[Floats]],
    *,
    has_head: bool,
    causal: bool,
) -> Quality:
    """Compare two graphs.

    Args:
        texts: compact ids (T,) of each.
        outputs: what both graphs give for one text: logits (T, K), states (T, H), or a row.
        has_head: logits are over the vocab.
        causal: each position predicts the next token.
    """
    tokens = sum(map(len, texts))
    if not has_head:
        vectors = [[_vector(found) for found in outputs(ids)] for ids in texts]
        before, after = (_unit(np.stack(side)) for side in zip(*vectors, strict=True))
        cosine = float((before * after).sum(axis=1).mean())
        return Quality("cosine", 1.0, round(cosine, 5), len(texts), tokens, _same_nearest(before, after))
    sums = np.zeros(2)
    for ids in texts:
        floats, rounded = (_log_softmax(found) for found in outputs(ids))
        if causal:
            places = (np.arange(len(ids) - 1), ids[1:])
            sums -= [floats[places].sum(), rounded[places].sum()]
        else:
            sums[1] += (np.exp(floats) * (floats - rounded)).sum()
    nats = np.round(sums / (tokens - len(texts) * causal), 5).tolist()
    return Quality("nats a token" if causal else "nats from fp32", nats[0], nats[1], len(texts), tokens)


def _vector(found: Floats) -> npt.NDArray[np.float64]:
    """A text's mean state, or its one row."""
    wide = found.astype(np.float64)
    return wide.mean(axis=0) if wide.ndim > 1 else wide


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sizes = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = vectors / np.where(sizes > 0, sizes, 1)
    return result


def _same_nearest(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> float | None:
    """Mean overlap of each text's ten nearest others."""
    if len(before) < 2 * _NEAREST:
        return None
    nearest = []
    for vectors in (before, after):
        alike = vectors @ vectors.T
        np.fill_diagonal(alike, -np.inf)
        nearest.append(np.argsort(-alike, axis=1, kind="stable")[:, :_NEAREST])
    shared = [len(np.intersect1d(one, other)) for one, other in zip(*nearest, strict=True)]
    return round(float(np.mean(shared)) / _NEAREST, 4)


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result
