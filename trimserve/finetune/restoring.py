"""A full checkpoint of a compact one: tuned rows and body, and the base's other rows, streamed file to file.

No model is loaded, and torch is not needed.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trimserve.arguments import checked
from trimserve.console import progress as progress_bar
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.scratch import scratch_folder
from trimserve.files.space import check_space
from trimserve.files.tensors import (
    CHUNK_BYTES,
    STORAGE_DTYPES,
    TensorSource,
    TensorSpec,
    WholeTensor,
    map_tensor,
    to_bfloat16,
    to_float32,
    write_tensors,
)
from trimserve.finetune.provenance import PROVENANCE_NAME, Provenance, StoredCut, check_base
from trimserve.folder.names import ADAPTER_CONFIG, COUPLED_CONFIG, VOCAB_NAME
from trimserve.folder.staging import staged_folder
from trimserve.model.resolve import resolve_model
from trimserve.model.source import INDEX_NAME, ModelSource
from trimserve.model.tensor_names import stored_names
from trimserve.vocab.file import load_vocab
from trimserve.vocab.map import VocabMap

_FLOATS = ("F64", "F32", "F16", "BF16")
_CONFIGS = ("config.json", "generation_config.json")
# What a checkpoint folder may hold besides weights; a Trainer's own files are left behind.
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_LEFT_BEHIND = (*_CONFIGS, INDEX_NAME, PROVENANCE_NAME, "trainer_state.json", ADAPTER_CONFIG, COUPLED_CONFIG)


@dataclass(frozen=True, slots=True)
class Restored:
    """What `restore` wrote.

    Attributes:
        path: the folder.
        base: name of the model that the other rows came from.
        kept: K, tuned rows of each vocab tensor.
        vocab_size: V.
        bytes_written: bytes of all tensors.
    """

    path: Path
    base: str
    kept: int
    vocab_size: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class MergedRows:
    """A full tensor: the kept rows of one stored tensor, the others of another one.

    Attributes:
        tuned: the kept rows (K, ...), in order of their ids.
        base: at least V rows, in any float dtype.
        vocab: which are which.
        axis: the vocab axis of both; every axis before it has length 1.
    """

    tuned: TensorSpec
    base: TensorSpec
    vocab: VocabMap
    axis: int

    @property
    def dtype(self) -> str:
        """Safetensors dtype name: that of the tuned rows."""
        return self.tuned.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with V rows."""
        shape = self.tuned.shape
        return (*shape[: self.axis], self.vocab.vocab_size, *shape[self.axis + 1 :])

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file, a block at a time; yield their sizes."""
        tuned = map_tensor(self.tuned).reshape(len(self.vocab), -1)
        base = map_tensor(self.base).reshape(self.base.shape[self.axis], -1)
        step = max(1, CHUNK_BYTES // max(1, tuned.itemsize * tuned.shape[1]))
        for start in range(0, self.vocab.vocab_size, step):
            stop = min(start + step, self.vocab.vocab_size)
            block = _convert(np.array(base[start:stop]), self.base.dtype, self.dtype)
            first, last = np.searchsorted(self.vocab.kept_ids, (start, stop))
            block[self.vocab.kept_ids[first:last] - start] = tuned[first:last]
            view = memoryview(block.reshape(-1).view(np.uint8).data)
            while view:
                view = view[os.write(file.fileno(), view) :]
            yield block.nbytes


@checked
def is_compact(path: str | Path) -> bool:
    """Tell whether a folder is a compact checkpoint."""
    return (Path(path) / PROVENANCE_NAME).is_file()


@checked
def restore(
    checkpoint: str | Path,
    base: str | Path | ModelSource | None = None,
    output: str | Path = "restored",
    *,
    progress: bool = True,
) -> Restored:
    """Write the full checkpoint of a compact one.

    Args:
        checkpoint: a folder that `save_pretrained` wrote inside a `partial_vocab` block.
        base: the model it was cut from, a folder or hub id; by default the one the checkpoint names.
        output: the folder to make; it must not exist, or be empty.
        progress: show a bar on stderr if it is a terminal.

    Raises:
        UsageError: not a compact checkpoint, no such base, or an output that is not empty.
        MismatchError: the base's hashes are not those that the checkpoint was cut from, or a file is damaged.
        UnsupportedModelError: the checkpoint holds a vocab tensor that the base has not.
    """
    folder = Path(checkpoint)
    provenance = Provenance.read(folder)
    vocab = load_vocab(folder / VOCAB_NAME)
    if (len(vocab), vocab.vocab_size) != (provenance.kept, provenance.vocab_size):
        raise MismatchError(
            f"{folder}: {VOCAB_NAME} does not belong to {PROVENANCE_NAME}: save the checkpoint again."
        )
    source = _base_source(provenance, base)
    with staged_folder(Path(output)) as staging:
        written = _write_full(resolve_model(folder), source, vocab, provenance, staging, progress=progress)
    return Restored(Path(output), source.name, len(vocab), vocab.vocab_size, written)


@contextlib.contextmanager
def full_source(
    source: ModelSource, base: str | Path | ModelSource | None = None, *, near: Path | None = None
) -> Iterator[ModelSource]:
    """Give any model as a full one: a compact checkpoint is restored into a temporary folder for the block.

    Args:
        source: a model; one that is no compact checkpoint is given back as it is.
        base: see `restore`.
        near: the folder to make the temporary one in; the system's by default.

    Raises:
        UsageError: a base is given for a model that needs none.
        TrimserveError: see `restore`.
    """
    if not is_compact(source.path):
        if base is not None:
            raise UsageError(
                f"{source.name} is no compact checkpoint, so it needs no base: leave --base out."
            )
        yield source
        return
    beside = near if near is not None and os.access(near, os.W_OK) else None
    with scratch_folder("source", beside) as scratch:
        full = restore(source.path, base, scratch / "full")
        yield ModelSource(source.name, source.revision, full.path)


def _base_source(provenance: Provenance, base: str | Path | ModelSource | None) -> ModelSource:
    named = provenance.base
    if base is None and named is not None:
        base = resolve_model(named.name, revision=named.revision)
    if base is None:
        check_base(provenance, ModelSource("", None, Path()))  # says how to name one
        raise AssertionError("unreachable")
    source = resolve_model(base)
    check_base(provenance, source)
    return source


def _write_full(
    compact: ModelSource,
    base: ModelSource,
    vocab: VocabMap,
    provenance: Provenance,
    target: Path,
    *,
    progress: bool,
) -> int:
    base_specs = {name: spec for specs, _ in base.headers.values() for name, spec in specs.items()}
    cuts = {name: cut for cut in provenance.tensors for name in stored_names(cut.names, [provenance.prefix])}
    plans: dict[Path, tuple[dict[str, TensorSource], dict[str, str]]] = {}
    for file, (specs, metadata) in compact.headers.items():
        tensors = {
            name: _source_of(spec, cuts.get(name), base_specs, vocab, provenance)
            for name, spec in specs.items()
        }
        plans[file] = (tensors, metadata)
    sizes = {file: sum(map(_nbytes, tensors.values())) for file, (tensors, _) in plans.items()}
    check_space(target, sum(sizes.values()), "the restored checkpoint")
    with progress_bar(sum(sizes.values()), "restoring", "B") as bar:
        for file, (tensors, metadata) in plans.items():
            for count in write_tensors(target / file.name, tensors, metadata):
                if progress:
                    bar.update(count)
    _write_index(compact, target, sum(sizes.values()))
    _write_configs(compact, provenance, target)
    _copy_small_files(base.path, target)
    _copy_small_files(compact.path, target)
    return sum(sizes.values())


def _source_of(
    spec: TensorSpec,
    cut: StoredCut | None,
    base: Mapping[str, TensorSpec],
    vocab: VocabMap,
    provenance: Provenance,
) -> TensorSource:
    if cut is None:
        return WholeTensor(spec)
    found = next((name for name in stored_names(cut.names, [provenance.prefix]) if name in base), None)
    if found is None:
        raise UnsupportedModelError(
            f"the checkpoint has {spec.name} but the base has no such tensor to take the other rows from: it "
            "was made anew when the model was loaded, so restore inside the program that trains it."
        )
    _check_shapes(spec, base[found], cut.axis, vocab)
    return MergedRows(spec, base[found], vocab, cut.axis)


def _check_shapes(tuned: TensorSpec, base: TensorSpec, axis: int, vocab: VocabMap) -> None:
    expected = (*base.shape[:axis], len(vocab), *base.shape[axis + 1 :])
    if tuned.shape != expected or base.shape[axis] < vocab.vocab_size:
        raise MismatchError(
            f"{tuned.name} of the checkpoint has shape {tuned.shape}, which does not fit {base.shape} in the "
            f"base cut to {len(vocab):,} rows: the checkpoint was changed after it was saved."
        )
    if tuned.dtype not in _FLOATS or base.dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"{tuned.name} is {tuned.dtype}, {base.dtype} in the base: only floating-point rows can be "
            "merged."
        )


def _nbytes(source: TensorSource) -> int:
    return math.prod(source.shape) * STORAGE_DTYPES[source.dtype].itemsize


def _convert(values: npt.NDArray[Any], dtype: str, target: str) -> npt.NDArray[Any]:
    """Stored rows in another dtype, as loading the base in it gives them: to nearest, ties to even."""
    if dtype == target:
        return values
    wide = values if dtype == "F64" else to_float32(values, dtype)
    if target == "BF16":
        return to_bfloat16(wide.astype(np.float32, copy=False))
    with np.errstate(over="ignore"):  # beyond float16's range: infinity, as torch converts
        return wide.astype(STORAGE_DTYPES[target])


def _write_index(compact: ModelSource, target: Path, total: int) -> None:
    if not (index := compact.read_json(INDEX_NAME)) or len(compact.weight_files) == 1:
        return
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    index["weight_map"] = {name: file.name for file, (specs, _) in compact.headers.items() for name in specs}
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_configs(compact: ModelSource, provenance: Provenance, target: Path) -> None:
    for name, entries in zip(_CONFIGS, (provenance.config, provenance.generation_config), strict=True):
        if content := compact.read_json(name):
            full = json.dumps(_overlaid(content, entries), indent=2, ensure_ascii=False)
            (target / name).write_text(full + "\n", "utf-8")


def _overlaid(content: dict[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _overlaid(content.get(key) or {}, value) if isinstance(value, dict) else value
        for key, value in entries.items()
    }
    return content | nested


def _copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and the like."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _SMALL_SUFFIXES and path.name not in _LEFT_BEHIND:
            shutil.copyfile(path, target / path.name)
