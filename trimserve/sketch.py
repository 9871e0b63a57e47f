r"""The sketch: a coarse copy of the cold rows that bounds every cold logit, at a quarter of the bytes.

The rows are cut into groups of 64 that share a scale. A row w of a group with scale s is q = rint(w / s),
integers of 8 bits, and what is left: w = s q + e. A hidden state h becomes one or two vectors of such
integers ("digits"), h = t1 a1 + t2 a2 + r. Then

    <w, h> = s t1 <q, a1> + s t2 <q, a2> + <s q, r> + <e, h>
          <= s (t1 max<q, a1> + t2 max<q, a2>) + max||s q|| * ||r|| + max||e|| * ||h||,

each maximum over a group, by Cauchy-Schwarz. The products <q, a> are sums of integers that 32 bits hold, so
ONNX Runtime computes them *exactly*, in whatever order; all the rest is one float64 expression a group, to
which `bounds.product_error` adds what the head's own rounding can make of <w, h>. The norms are
stored rounded up. So the bound holds for the logit that the cold head would have computed, not only for
the real number; nothing here is an estimate.

Rows of a group should have scales of their own that are alike: each run of `run_rows` rows is sorted by
its largest entries before it is cut into groups, and `order` says where a row went.

The integers are stored plus 128 as unsigned bytes, and the activations alike: the kernel for two unsigned
operands is exact on every processor, that for a signed one may saturate on those without VNNI. A product
with the most extreme operands is compared when the sketch is opened.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimserve.blocks import BlockScheme
from trimserve.bounds import Doubles, HeadArithmetic, norms, product_error, round_up, rounding_distance
from trimserve.cold import ColdRows
from trimserve.decoder import AfterHead, Floats
from trimserve.errors import MismatchError
from trimserve.folder import TrimmedFolder
from trimserve.session import open_session
from trimserve.tensorfile import map_tensor, read_header
from trimserve.vocab import Ids

# Scales, norms and the order; the integers and what ONNX Runtime packed them into; their graph.
SKETCH_NAME = "cold_sketch.safetensors"
SKETCH_DATA_NAME = "cold_sketch.onnx_data"
SKETCH_GRAPH_NAME = "cold_sketch.onnx"
SKETCH_FILES = (SKETCH_NAME, SKETCH_DATA_NAME, SKETCH_GRAPH_NAME)
GROUP_ROWS = 64
SORTED_ROWS = 16_384
# An export holds one run's integers, and a session packs them: the rows of a wide model make shorter runs.
RUN_BYTES = 1 << 25
LEVELS = 127
ZERO = 128
# The second digit costs as much as another step. It is worth that where outliers in the hidden states make
# the first one's rounding matter more than that of the rows, whose residual is about 0.007 of their norm.
_SECOND_DIGIT_ABOVE = 0.02


def run_rows(width: int) -> int:
    """Rows of H entries that are sorted together and make one matrix of the graph: whole groups."""
    return max(1, min(SORTED_ROWS, RUN_BYTES // width) // GROUP_ROWS) * GROUP_ROWS


@dataclass(frozen=True, slots=True)
class Digits:
    """Hidden states as integers: ``h = sum of scales * integers + rest``.

    Attributes:
        integers: uint8 (M, H), each plus 128; the N first digits, then the second ones.
        scales: float64 (M,).
        steps: the hidden state that a digit belongs to (M,).
        rest: bounds of the rests' norms (N,).
        norms: bounds of the hidden states' norms (N,).
    """

    integers: npt.NDArray[np.uint8]
    scales: Doubles
    steps: npt.NDArray[np.intp]
    rest: Doubles
    norms: Doubles


def to_digits(hidden: Doubles) -> Digits:
    """Round hidden states (N, H) to one digit, or two where one leaves too much."""
    sizes = norms(hidden)
    first, scales, rest = _digit(hidden)
    rests = norms(rest)
    again = np.flatnonzero(rests > _SECOND_DIGIT_ABOVE * sizes)
    second, second_scales, rest = _digit(rest[again])
    rests[again] = norms(rest)
    # What float64 itself rounds away in h - t a.
    rests = rests + 1e-12 * sizes
    return Digits(
        np.concatenate([first, second]),
        np.concatenate([scales, second_scales]),
        np.concatenate([np.arange(len(hidden)), again]),
        rests,
        sizes,
    )


def _digit(values: Doubles) -> tuple[npt.NDArray[np.uint8], Doubles, Doubles]:
    largest = np.abs(values).max(axis=1, initial=0)
    scales = np.where((largest > 0) & np.isfinite(largest), largest / LEVELS, 1.0)
    integers = np.clip(np.nan_to_num(np.rint(values / scales[:, None])), -LEVELS, LEVELS)
    return (integers + ZERO).astype(np.uint8), scales, values - scales[:, None] * integers


@dataclass(frozen=True, slots=True)
class SketchedRows:
    """The integers of some groups of rows, and what bounds the rest.

    Attributes:
        integers: uint8 (n, H), each plus 128; n is a multiple of `GROUP_ROWS`.
        scales: float64 (groups,).
        residuals: bounds of ``||w - s q||`` in a group (groups,).
        norms: bounds of ``||s q||`` in a group (groups,).
    """

    integers: npt.NDArray[np.uint8]
    scales: Doubles
    residuals: Doubles
    norms: Doubles


def sketch_rows(rows: npt.NDArray[np.float32]) -> SketchedRows:
    """Round rows (n, H) to integers, a group at a time; n is a multiple of `GROUP_ROWS`.

    A row that is not finite has an infinite residual: nothing is ever proven of its group.
    """
    groups = rows.reshape(-1, GROUP_ROWS, rows.shape[1]).astype(np.float64)
    largest = np.abs(groups).max(axis=(1, 2))
    scales = np.where((largest > 0) & np.isfinite(largest), largest / LEVELS, 1.0)
    integers = np.clip(np.nan_to_num(np.rint(groups / scales[:, None, None])), -LEVELS, LEVELS)
    sketched = integers * scales[:, None, None]
    with np.errstate(invalid="ignore"):
        residuals = norms(groups - sketched).max(axis=1)
    sizes = norms(sketched).max(axis=1)
    # What float64 itself rounds away in w - s q.
    residuals = np.where(np.isfinite(largest), residuals + 1e-12 * sizes, np.inf)
    return SketchedRows(
        (integers + ZERO).astype(np.uint8).reshape(rows.shape), scales, residuals, round_up(sizes)
    )


@dataclass(frozen=True, slots=True)
class SketchedProduct:
    """What the sketch says of the cold logits of some steps.

    Attributes:
        upper: float64 (N, groups), above every logit of a group.
        hidden: float64 (N, H).
        distances: see `bounds.rounding_distance` (N,).
        slope: see `bounds.product_error` (N,).
        constant: likewise.
    """

    upper: Doubles
    hidden: Doubles
    distances: Doubles
    slope: Doubles
    constant: Doubles


class Sketch:
    """The sketch of a folder's cold rows.

    Attributes:
        ids: int32 (64 * groups,), the token id at each place; the last one may be repeated.
        arithmetic: how the graph computes logits.
        nbytes: bytes that a product reads.
    """

    def __init__(
        self, folder: TrimmedFolder, cold: ColdRows, after_head: AfterHead, *, threads: int | None = None
    ) -> None:
        """Map a sketch.

        Args:
            folder: a folder for which `can_be_certified`.
            cold: its cold rows.
            after_head: what stands between the head's product and the logits.
            threads: of the product.

        Raises:
            MismatchError: the files do not fit each other.
        """
        path = folder.file(SKETCH_NAME)
        specs, _ = read_header(path)
        try:
            self._order, self._scales, self._residuals, self._norms, self._magnitudes = (
                np.array(map_tensor(specs[name]))
                for name in ("order", "scales", "residuals", "norms", "magnitudes")
            )
            self._bias = np.array(map_tensor(specs["bias"])) if "bias" in specs else np.zeros(1)
        except KeyError as error:
            raise MismatchError(f"{path} has no tensor {error}: export the folder again.") from error
        self._rests = np.stack([self._norms, self._residuals, self._magnitudes])
        self._path = path
        self._cold = cold
        self._width = cold.width
        self.ids: Ids = cold.cold_ids[self._order]
        self.arithmetic = arithmetic_of(folder, after_head)
        self._session = open_session(folder.file(SKETCH_GRAPH_NAME), threads=threads, prepack=True)
        self.nbytes = self._order.size * self._width + path.stat().st_size
        self._check(folder.file(SKETCH_DATA_NAME))

    def product(self, hidden: Floats) -> SketchedProduct:
        """Bound all cold logits: hidden states (N, H), in the graph's dtype."""
        values = hidden.astype(np.float64)
        digits = to_digits(values)
        maxima = self._maxima(digits.integers)
        count = len(values)
        upper = maxima[:count] * digits.scales[:count, None]
        upper[digits.steps[count:]] += maxima[count:] * digits.scales[count:, None]
        upper *= self._scales
        distances = rounding_distance(values, self.arithmetic.scheme)
        sizes = digits.norms + distances
        slope, constant = product_error(self._width, sizes, float(self._magnitudes.max()))
        upper += np.einsum("tn,tg->ng", [digits.rest + distances, sizes, slope], self._rests, optimize=False)
        upper += constant[:, None]
        return SketchedProduct(
            self.arithmetic.bound(upper, self._bias, 1), values, distances, slope, constant
        )

    def score(
        self, product: SketchedProduct, step: int, places: npt.NDArray[np.intp]
    ) -> tuple[Doubles, Doubles]:
        """Read rows and bound their logits from both sides.

        Args:
            product: what `product` gave.
            step: which of its hidden states.
            places: entries of `ids` (n,).

        Returns:
            float64 (n,) each: the logit that the cold head would compute lies between them.
        """
        ids, groups = self.ids[places], places // GROUP_ROWS
        scores = self._cold.head(ids).astype(np.float64) @ product.hidden[step]
        error = product.slope[step] * self._magnitudes[groups] + product.constant[step]
        error += (self._norms + self._residuals)[groups] * product.distances[step]
        bias = self._cold.head_bias(ids).astype(np.float64) if self._cold.has_head_bias else np.zeros(1)
        bound = self.arithmetic.bound
        return bound(scores - error, bias, -1), bound(scores + error, bias, 1)

    def _maxima(self, integers: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        """The largest product of each digit with a group's integers: (M, H) -> int32 (M, groups)."""
        (maxima,) = self._session.run(["maximum"], {"digits": integers})
        return np.asarray(maxima)

    def _check(self, data: Path) -> None:
        """Compare a product with the most extreme integers: a kernel that saturates would show here."""
        rows = min(run_rows(self._width), self._order.size)
        tile = np.memmap(data, np.uint8, "r", shape=(self._width, rows))
        group = tile[:, :GROUP_ROWS].astype(np.int64) - ZERO
        signs = np.where(group[:, 0] > 0, LEVELS, -LEVELS)
        digits = np.stack([signs, -signs])
        found = self._maxima((digits + ZERO).astype(np.uint8))
        sizes = {array.size for array in (self._scales, self._residuals, self._norms, self._magnitudes)}
        if sizes != {found.shape[1]} or not np.array_equal(found[:, 0], (digits @ group).max(axis=1)):
            raise MismatchError(
                f"{self._path} does not fit {data}, or this processor's integer product is not exact: "
                "export the folder again, or with --sketch none."
            )


def arithmetic_of(folder: TrimmedFolder, after_head: AfterHead) -> HeadArithmetic:
    """How a folder's graph computes logits."""
    scheme = BlockScheme.from_dict(folder.manifest.quantization)
    return HeadArithmetic(after_head, folder.manifest.dtype != "fp32", scheme)


def can_be_certified(folder: TrimmedFolder, after_head: AfterHead) -> bool:
    """Whether a folder has a sketch, and bounds of its logits are known on this processor."""
    return SKETCH_NAME in folder.manifest.files and arithmetic_of(folder, after_head).can_be_bounded
