"""Checks of bytes: the folder's files, its tokenizer, and each row of the vocab tensors."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import MismatchError
from trimserve.files.hashes import sha256_file
from trimserve.files.tensors import TensorSpec, map_tensor, read_header
from trimserve.folder.names import COLD_NAME, SOURCE_TOKENIZER_FILES, TOKENIZER_TABLES_NAME, VOCAB_NAME
from trimserve.folder.opening import open_folder
from trimserve.text.codec import Codec
from trimserve_export.checkpoint.source_tokenizer import library_ids
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check

Array = npt.NDArray[Any]
_BLOCK_BYTES = 16 << 20
_FLOATS: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
# safetensors dtype -> the dtype that its bytes are
_STORED: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


def check_files(context: Context) -> Check:
    """Hash every file that the manifest lists, and the weights that it says it was made from."""
    folder, source = context.folder, context.source
    open_folder(folder.path, verify="full")
    recorded = folder.manifest.source.files
    for path in source.recorded_files:
        if path.name in recorded and recorded[path.name] != sha256_file(path):
            raise MismatchError(
                f"{path} is not the file that this folder was made from (expected sha256 "
                f"{recorded[path.name][:12]}…): verify with the model named {folder.manifest.source.name}."
            )
    count = len(folder.manifest.files)
    return Check("files", True, None, f"{count} files have the sizes and hashes of the manifest")


def check_tokenizer(context: Context) -> Check:
    """Compare the tokenizer's files byte for byte, and the ids of the texts with its library's."""
    source = context.source
    if problem := _tokenizer_problem(context):
        return Check("tokenizer", False, None, problem)
    made_by = source.effective.made_by
    by_library = made_by["library"] == "transformers"
    expected = library_ids(source, context.texts) if by_library else _own_ids(context)
    found = context.codec.encode(context.texts)
    for text, ids, ours in zip(context.texts, expected, found, strict=True):
        if ids != ours.tolist():
            return Check("tokenizer", False, None, f"the runtime segments {text[:40]!r} differently")
    if problem := _tables_problem(context, found):
        return Check("tokenizer", False, None, problem)
    whose = f"AutoTokenizer's (transformers {made_by['version']})" if by_library else "tokenizer.json's"
    detail = f"same files, and {whose} ids for {len(context.texts)} texts of any script"
    return Check("tokenizer", True, None, detail)


def _tokenizer_problem(context: Context) -> str | None:
    """What is wrong with the tokenizer's files, if anything."""
    folder, source = context.folder, context.source
    for name in SOURCE_TOKENIZER_FILES:
        if (source.path / name).is_file():
            ours, theirs = folder.file(name), source.path / name
            if ours.read_bytes() != theirs.read_bytes():
                return f"{ours} differs from {theirs}"
    if folder.tokenizer_path.read_bytes() != source.effective.content:
        return (
            f"{folder.tokenizer_path} was made by {_library(folder.manifest.tokenizer)}, and "
            f"{_library(source.effective.made_by)} makes another tokenizer of {source.name}: export it again"
        )
    recorded = folder.manifest.tokenizer.get("settings", source.effective.settings)
    if wrong := [key for key, value in source.effective.settings.items() if recorded.get(key) != value]:
        return f"the manifest says {wrong[0]} = {recorded.get(wrong[0])!r} of the tokenizer, which is not so"
    bound = {folder.manifest.tokenizer_sha256, folder.vocab.tokenizer_sha256} - {"", source.tokenizer_sha256}
    return "the vocab belongs to another tokenizer" if bound else None


def _tables_problem(context: Context, expected: Sequence[Ids]) -> str | None:
    """What is wrong with the tokenizer's mapped tables, if the folder has some, by the ids of the texts."""
    if TOKENIZER_TABLES_NAME not in context.folder.manifest.files:
        return None
    try:
        mapped = Codec(context.folder, mapped=True).encode(context.texts)
    except MismatchError as error:
        return str(error)
    for text, ids, found in zip(context.texts, expected, mapped, strict=True):
        if not np.array_equal(ids, found):
            return f"{TOKENIZER_TABLES_NAME} segments {text[:40]!r} differently: export the folder again"
    return None


def _library(made_by: Mapping[str, Any]) -> str:
    return f"{made_by.get('library', 'tokenizers')} {made_by.get('version', '')}".strip()


def _own_ids(context: Context) -> list[list[int]]:
    tokenizer = context.source.tokenizer()
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(context.texts))]


@dataclass(frozen=True, slots=True)
class RowDifference:
    """How two matrices differ.

    Attributes:
        rows: rows with a differing bit.
        first_id: token id of the first of them, -1 if there is none.
        max_abs_diff: over all entries; NaN if one of the two is not a number.
    """

    rows: int
    first_id: int
    max_abs_diff: float


def check_kept_rows(context: Context) -> Check:
    """Compare the rows in the graph and in the cold rows with the source checkpoint's, bit for bit."""
    weights = _matrices(context)
    # A trimmed checkpoint keeps the source's dtype, a graph has its own.
    dtype = context.folder.manifest.dtype if context.folder.manifest.graphs else None
    cold = read_header(context.folder.file(COLD_NAME))[0] if context.folder.has_cold else {}
    quantized = context.quantized_roles
    differences: list[tuple[str, RowDifference]] = []
    for role, name in context.stored.roles.items():
        if role in quantized:
            continue  # the checks of quantised rows make their integers again
        spec, axis = context.stored.cut[name]
        is_table = role.startswith("embedding")
        vocab = context.folder.vocab if is_table else context.folder.vocab.head
        expected = _row_matrix(spec, axis)
        kept = _closest(expected, vocab.kept_ids[vocab.kept_ids < len(expected)], weights, dtype)
        differences.append((f"{role} rows in the weights", kept))
        if context.folder.has_cold:
            stored = [_row_matrix(cold[role], 0)] if role in cold else []
            # Per-layer embeddings may end before V: ids beyond them read their first row.
            cold_ids = np.where(vocab.cold_ids < len(expected), vocab.cold_ids, 0)
            difference = _closest(expected, cold_ids, stored, None)
            differences.append((f"{role} rows in {COLD_NAME}", difference))
    return _rows_check(context, differences)


def _rows_check(context: Context, differences: list[tuple[str, RowDifference]]) -> Check:
    largest = max((difference.max_abs_diff for _, difference in differences), default=0.0)
    for where, difference in differences:
        if difference.rows:
            detail = (
                f"{difference.rows:,} of the {where} differ from {context.source.name}, "
                f"the first is that of token id {difference.first_id:,}"
            )
            return Check("kept-rows", False, largest, detail)
    vocab, roles = context.folder.vocab, " and ".join(context.stored.roles)
    cold = f"{len(vocab.cold_ids):,} cold rows" if context.folder.has_cold else "no cold rows stored"
    ok = bool(differences) or bool(context.quantized_roles)
    return Check("kept-rows", ok, largest, f"{len(vocab):,} kept rows, {cold}: {roles} of the checkpoint")


def _matrices(context: Context) -> list[Array]:
    """Every weight of the folder as a matrix with a row a compact id, in both orientations; mapped."""
    arrays = _graph_weights(context) if context.folder.manifest.graphs else _checkpoint_weights(context)
    return [matrix for array in arrays for matrix in _orientations(array)]


def _graph_weights(context: Context) -> Iterator[Array]:
    for name in context.folder.manifest.graphs.values():
        weights = ir.load(context.folder.file(name)).graph.initializers.values()
        yield from (weight.const_value.numpy() for weight in weights if weight.const_value is not None)


def _checkpoint_weights(context: Context) -> Iterator[Array]:
    names = (name for name in context.folder.manifest.files if name.endswith(".safetensors"))
    for name in names:
        if name not in (VOCAB_NAME, COLD_NAME):
            specs = read_header(context.folder.file(name))[0].values()
            yield from (_as_floats(spec) for spec in specs if spec.dtype in _STORED)


def _orientations(array: Array) -> tuple[Array, ...]:
    squeezed = array.squeeze()
    if squeezed.ndim == 1:
        return (squeezed[:, None],)
    return (squeezed, squeezed.T) if squeezed.ndim == 2 else ()


def _row_matrix(spec: TensorSpec, axis: int) -> Array:
    """A stored tensor with a row an id: (V, H), or (V, 1) for a bias; mapped, in its own dtype."""
    return _as_floats(spec).reshape(spec.shape[axis], math.prod(spec.shape[axis + 1 :]))


def _as_floats(spec: TensorSpec) -> Array:
    values: Array = map_tensor(spec).view(_STORED[spec.dtype])
    return values


def _closest(expected: Array, ids: Ids, candidates: Iterable[Array], dtype: str | None) -> RowDifference:
    """Compare with the candidate that has the fewest differing rows; without any, every row differs."""
    fitting = (matrix for matrix in candidates if matrix.shape[1] == expected.shape[1])
    found = [_compare(expected, ids, matrix, dtype) for matrix in fitting if len(matrix) == len(ids)]
    missing = RowDifference(len(ids), int(ids[0]) if len(ids) else -1, float("nan"))
    return min(found, key=lambda difference: difference.rows, default=missing)


def _compare(expected: Array, ids: Ids, found: Array, dtype: str | None) -> RowDifference:
    rows, first, largest = 0, -1, 0.0
    for start, wanted in _blocks(expected, ids, dtype):
        actual = np.ascontiguousarray(found[start : start + len(wanted)])
        if actual.dtype != wanted.dtype:
            return RowDifference(len(ids), int(ids[0]), float("nan"))
        unequal = np.flatnonzero((_bits(actual) != _bits(wanted)).any(axis=1))
        if len(unequal):
            first = int(ids[start + unequal[0]]) if first < 0 else first
            gap = np.abs(actual[unequal].astype(np.float64) - wanted[unequal].astype(np.float64))
            largest = max(largest, float(gap.max()))
        rows += len(unequal)
    return RowDifference(rows, first, largest)


def _blocks(expected: Array, ids: Ids, dtype: str | None) -> Iterator[tuple[int, Array]]:
    """Yield the rows of `ids` in blocks, converted to a graph's dtype or, for None, as stored."""
    step = max(1, _BLOCK_BYTES // (expected.shape[1] * expected.itemsize))
    for start in range(0, len(ids), step):
        rows = np.ascontiguousarray(expected[ids[start : start + step]])
        if dtype is not None:
            # Through float32, which holds every bf16 and fp16 exactly, as torch converts.
            rows = rows.astype(np.float32).astype(_FLOATS[dtype])
        yield start, rows


def _bits(values: Array) -> Array:
    return values.view(f"u{values.itemsize}")
