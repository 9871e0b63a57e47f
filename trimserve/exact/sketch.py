r"""The sketch: a coarse copy of the cold rows that bounds every cold logit, at a quarter of the bytes.

The rows are cut into groups of 64. A row w of a group with scale s is q = rint(w / s), integers of 8 bits,
and what is left: w = s q + e. A hidden state h becomes one or two vectors of such integers ("digits"),
h = t1 a1 + t2 a2 + r. Then

    <w, h> = s t1 <q, a1> + s t2 <q, a2> + <s q, r> + <e, h>
          <= s (t1 max<q, a1> + t2 max<q, a2>) + max||s q|| * ||r|| + max||e|| * ||h||,

each maximum over a group, by Cauchy-Schwarz. The products <q, a> are sums of integers that 32 bits hold, so
ONNX Runtime computes them *exactly*, in whatever order; all the rest is one float64 expression a group, to
which `bounds.product_error` adds what the head's own rounding can make of <w, h>. The norms are
stored rounded up. So the bound holds for the logit that the cold head would have computed, not only for
the real number; nothing here is an estimate.

A sketch of 4 bits has half the bytes. Its product is MatMulNBits', of floats, so two things are added:
how far the kernel may round h (to r) and what the rounding of its sum can be; `bounds` derives both.

Rows of a group should be alike: each run of `run_rows` rows is sorted, by largest entries or by what their
residuals are proportional to, before it is cut into groups, and `order` says where a row went.

The integers of 8 bits are stored plus 128 as unsigned bytes, and the activations alike: the kernel for two
unsigned operands is exact on every processor, that for a signed one may saturate on those without VNNI. A
product with the most extreme operands is compared when the sketch is opened.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Doubles, Floats, Ids
from trimserve.concurrency import Once
from trimserve.errors import MismatchError
from trimserve.exact.bounds import X86, HeadArithmetic, norms, product_error, rounding_distance
from trimserve.exact.sketch_rows import (
    BLOCKS,
    GROUP_ROWS,
    LEVELS,
    ZERO,
    Digits,
    to_blocks,
    to_digits,
    unpacked,
)
from trimserve.files.held import HeldFile
from trimserve.files.quantized import Quantization
from trimserve.files.tensors import TensorSpec, map_tensor, read_header
from trimserve.folder.names import SKETCH_DATA_NAME, SKETCH_GRAPH_NAME, SKETCH_MASS_NAME, SKETCH_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.runtime.after_head import AfterHead, slope_after
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.session import Session, open_session

SORTED_ROWS = 16_384
# An export holds one run's integers, and a session packs them: the rows of a wide model make shorter runs.
RUN_BYTES = 1 << 25
# What float32 (the exponent, its argument, the sum) and float16 (what follows the head) round away is less.
_MASS_MARGIN = 2.0**-7
_STEEPEST = 1e30


def run_rows(width: int) -> int:
    """Rows of H entries that are sorted together and make one matrix of the graph: whole groups."""
    return max(1, min(SORTED_ROWS, RUN_BYTES // width) // GROUP_ROWS) * GROUP_ROWS


@dataclass(frozen=True, slots=True)
class SketchedProduct:
    """What the sketch says of the cold logits of some steps.

    Attributes:
        upper: float64 (N, groups), above every logit of a group.
        alike: float64 (N, groups), 1 to 64: so many ids with a logit of `upper` have at least the group's
            mass, at the temperature that was asked for.
        hidden: float64 (N, H).
        distances: see `bounds.rounding_distance` (N,).
        slope: see `bounds.product_error` (N,).
        constant: likewise.
    """

    upper: Doubles
    alike: Doubles
    hidden: Doubles
    distances: Doubles
    slope: Doubles
    constant: Doubles


class Sketch:
    """The sketch of a folder's cold rows.

    Attributes:
        ids: int32 (64 * groups,), the token id at each place; the last one may be repeated.
        bits: 8 or 4.
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
        file, data = folder.opened(SKETCH_NAME), folder.opened(SKETCH_DATA_NAME)
        self._path = file.path
        self.bits = bits_of(folder)
        self._cold = cold
        self._width = cold.width
        self._read(file, cold)
        self.ids: Ids = cold.head_cold_ids[self._order]
        self.arithmetic = arithmetic_of(folder, after_head)
        self._session = open_session(folder.graph(SKETCH_GRAPH_NAME), threads=threads, prepack=True)
        self._folder, self._threads = folder, threads
        self._mass_session: Once[Session] = Once()
        self._slope = slope_after(after_head) if SKETCH_MASS_NAME in folder.manifest.files else None
        stored = self._order.size * row_bytes(self._width, self.bits)
        if data.size < stored:
            raise MismatchError(
                f"{data.path} should have at least {stored:,} bytes but has {data.size:,}: export the folder "
                "again."
            )
        # What is read is the packed form behind it, where there is one.
        self.nbytes = max(stored, data.size - stored) + file.size
        self._check(data)

    def _read(self, file: HeldFile, cold: ColdRows) -> None:
        """Read the arrays, a number for each group of rows."""
        specs, _ = read_header(file)
        groups = -(-cold.head_cold_ids.size // GROUP_ROWS)
        arrays = {
            name: self._array(specs, name, groups) for name in ("scales", "residuals", "norms", "magnitudes")
        }
        self._scales, self._residuals, self._norms, self._magnitudes = arrays.values()
        self._roundings = np.zeros_like(self._norms)
        if self.bits == 4:
            self._roundings = self._array(specs, "roundings", groups)
        self._bias = self._array(specs, "bias", groups) if "bias" in specs else np.zeros(1)
        self._order = self._array(specs, "order", groups * GROUP_ROWS, "i")
        # Each cold row has a place, or its logits would be bounded by nothing.
        places = np.zeros(cold.head_cold_ids.size, bool)
        inside = (self._order >= 0) & (self._order < places.size)
        places[self._order[inside]] = True
        if not (inside.all() and places.all()):
            raise MismatchError(
                f"{self._path}: its order is not one of the {places.size:,} cold rows: export the "
                "folder again."
            )
        self._rests = np.stack([self._norms, self._residuals, self._magnitudes, self._roundings])

    def _array(
        self, specs: Mapping[str, TensorSpec], name: str, size: int, kind: str = "f"
    ) -> npt.NDArray[Any]:
        if name not in specs:
            raise MismatchError(f"{self._path} has no tensor {name!r}: export the folder again.")
        array = np.array(map_tensor(specs[name]))
        if array.shape != (size,) or array.dtype.kind != kind or (kind == "f" and np.isnan(array).any()):
            raise MismatchError(
                f"{self._path}: {name!r} should be {size:,} numbers but is {specs[name].dtype} of shape "
                f"{array.shape}, or not numbers: export the folder again."
            )
        return array

    def product(self, hidden: Floats, temperature: float = 0.0) -> SketchedProduct:
        """Bound all cold logits: hidden states (N, H), in the graph's dtype.

        Args:
            hidden: the states.
            temperature: bound the groups' masses at it, too, if it is above 0.
        """
        values = hidden.astype(np.float64)
        digits = to_digits(values) if self.bits == 8 else to_blocks(values)
        count = len(values)
        if temperature > 0 and self._slope is not None:
            maxima, alike = self._maxima_and_masses(digits, count, self._slope / temperature)
        else:
            maxima = self._maxima(digits)
            alike = np.full((count, maxima.shape[1]), float(GROUP_ROWS))
        upper = maxima[:count] * digits.scales[:count, None]
        upper[digits.steps[count:]] += maxima[count:] * digits.scales[count:, None]
        upper *= self._scales
        distances = rounding_distance(values, self.arithmetic.scheme)
        sizes = digits.norms + distances
        slope, constant = product_error(self._width, sizes, float(self._magnitudes.max()))
        factors = [digits.rest + distances, sizes, slope, digits.rounding]
        upper += np.einsum("tn,tg->ng", factors, self._rests, optimize=False)
        upper += constant[:, None]
        return SketchedProduct(
            self.arithmetic.bound(upper, self._bias, 1), alike, values, distances, slope, constant
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

    def _maxima(self, digits: Digits) -> Doubles:
        """The largest product of each digit with a group's rows, without their scales: (M, groups)."""
        (maxima,) = self._session.run(["maximum"], {"digits": digits.values})
        return np.asarray(maxima, np.float64)

    def _maxima_and_masses(self, digits: Digits, count: int, slope: float) -> tuple[Doubles, Doubles]:
        """As `_maxima`, and `SketchedProduct.alike` of the first `count` digits.

        With p the products of a group and u its bound, its logits are at most u - s t (max p - p), so its
        mass is at most exp(u) sum exp(-s t (max p - p)). What a second digit adds is in u.
        """
        steepness = np.zeros((len(digits.values), self._scales.size), np.float32)
        steps = slope * (1 - _MASS_MARGIN) * digits.scales[:count, None] * self._scales
        steepness[:count] = np.minimum(steps, _STEEPEST)
        fed = {"digits": digits.values, "steepness": steepness}
        maxima, masses = self._mass_session.get(self._open_masses).run(["maximum", "mass"], fed)
        alike = np.asarray(masses[:count], np.float64) * (1 + _MASS_MARGIN)
        return np.asarray(maxima, np.float64), np.minimum(alike, float(GROUP_ROWS))

    def _open_masses(self) -> Session:
        return open_session(self._folder.graph(SKETCH_MASS_NAME), threads=self._threads, prepack=True)

    def _check(self, data: HeldFile) -> None:
        """Compare a product with the most extreme operands: a kernel that saturates would show here."""
        rows = min(run_rows(self._width), self._order.size)
        group = _first_group(data, rows, self._width, self.bits)
        signs = np.where(group[:1] > 0, 1.0, -1.0)
        states = LEVELS * np.concatenate([signs, -signs])
        digits = to_digits(states) if self.bits == 8 else to_blocks(states)
        found = self._maxima(digits) * digits.scales[:, None]
        arrays = (self._scales, self._residuals, self._norms, self._magnitudes, self._roundings)
        fits = {array.size for array in arrays} == {found.shape[1]}
        if fits:
            # Without the group's scale, as the products are; integers leave no error.
            error = digits.rounding * self._roundings[0] / self._scales[0]
            error += digits.rest * norms(group).max()
            fits = bool((np.abs(found[:, 0] - (states @ group.T).max(axis=1)) <= error).all())
        if not fits:
            raise MismatchError(
                f"{self._path} does not fit {data.path}, or this processor's product is not as accurate as "
                "its bounds take for granted: export the folder again, or with --sketch none."
            )


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of H entries in the sketch's data: an integer each, or 4-bit blocks with scales."""
    return width if bits == 8 else BLOCKS.blocks(width) * (BLOCKS.block_bytes + 4)


def _first_group(data: HeldFile, rows: int, width: int, bits: int) -> Doubles:
    """What the first rows stand for, without their group's scale: (64, H)."""
    if bits == 8:
        tile = np.ndarray((width, rows), np.uint8, data.map())
        return tile[:, :GROUP_ROWS].T.astype(np.float64) - ZERO
    shape = (rows, BLOCKS.blocks(width), BLOCKS.block_bytes)
    integers = np.ndarray(shape, np.uint8, data.map())
    scales = np.ndarray(shape[:2], np.float32, data.map(), integers.size)
    return unpacked(np.array(integers[:GROUP_ROWS]), np.array(scales[:GROUP_ROWS]))


def bits_of(folder: TrimmedFolder) -> int:
    """Of a folder's sketch: 8 or 4.

    Raises:
        MismatchError: another number, by a later version of this package.
    """
    bits = (folder.manifest.sketch or {}).get("bits", 8)
    if bits not in (4, 8):
        raise MismatchError(
            f"{folder.path} has a sketch of {bits} bits, expected 4 or 8: export the folder again, or with "
            "--sketch none."
        )
    return int(bits)


def arithmetic_of(folder: TrimmedFolder, after_head: AfterHead) -> HeadArithmetic:
    """How a folder's graph computes logits."""
    quantization = Quantization.from_dict(folder.manifest.quantization)
    scheme = None if quantization is None else quantization.rows
    return HeadArithmetic(after_head, folder.manifest.dtype != "fp32", scheme)


def can_be_certified(folder: TrimmedFolder, after_head: AfterHead) -> bool:
    """Whether a folder has a sketch, and bounds of its logits are known on this processor.

    How MatMulNBits rounds, which multiplies a sketch of 4 bits, is known on x86 alone.
    """
    if SKETCH_NAME not in folder.manifest.files:
        return False
    known = bits_of(folder) == 8 or platform.machine() in X86
    return known and arithmetic_of(folder, after_head).can_be_bounded
