"""Trim a checkpoint: stream the kept rows of its vocab tensors and every other byte into a new one.

No tensor is ever loaded as a whole, so peak memory does not grow with the model.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from transformers import PretrainedConfig

from trimserve.arrays import Ids
from trimserve.console import progress as progress_bar
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.tensors import (
    STORAGE_DTYPES,
    TensorRows,
    TensorSource,
    TensorSpec,
    WholeTensor,
    map_tensor,
    read_header,
    write_tensors,
)
from trimserve.folder.manifest import CutTensor
from trimserve.model.source import INDEX_NAME, ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.axes import PER_LAYER, ModelClass, Role, VocabAxes, load_config
from trimserve_export.checkpoint.configs import write_compact_configs
from trimserve_export.checkpoint.head_ids import check_untied
from trimserve_export.checkpoint.stored import StoredVocab, axes_of, find_stored_vocab, read_specs

_MANIFEST_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_FLOATS = frozenset({"F64", *_MANIFEST_DTYPES})
_ROLES: tuple[Role, ...] = ("embedding", PER_LAYER, "head", "head_bias")
_TABLES = ("embedding", PER_LAYER)


@dataclass(frozen=True, slots=True)
class TrimmedCheckpoint:
    """What `trim_checkpoint` wrote.

    Attributes:
        path: the folder: config.json, model*.safetensors.
        cut: the tensors that lost rows.
        tied: the head is the embedding.
        bytes_written: bytes of all tensors that were streamed, cold rows included.
        source_elements: numbers that the source stores in each dtype, a tied tensor once.
    """

    path: Path
    cut: tuple[CutTensor, ...]
    tied: bool
    bytes_written: int
    source_elements: Mapping[str, int]

    @property
    def dtype(self) -> str:
        """The dtype that most weights are stored in: fp32, fp16 or bf16, else safetensors' name."""
        most = max(self.source_elements, key=self.source_elements.__getitem__)
        return _MANIFEST_DTYPES.get(most, most)

    def bytes_before(self, dtype: str | None) -> int:
        """Bytes of the source's weights if floating-point numbers are stored as `dtype`, or as they are."""
        size = {"fp32": 4, "fp16": 2, "bf16": 2}.get(dtype or "")
        return sum(
            count * (size if size and stored in _FLOATS else STORAGE_DTYPES[stored].itemsize)
            for stored, count in self.source_elements.items()
        )


def trim_checkpoint(
    source: ModelSource,
    vocab: VocabMap,
    target: Path,
    *,
    model_class: ModelClass | None = None,
    cold_path: Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> TrimmedCheckpoint:
    """Write the checkpoint of a model with the kept rows alone.

    Args:
        source: the model; never changed.
        vocab: the kept ids, made for this model's tokenizer and vocab size.
        target: an existing folder for config.json, generation_config.json and the weights, in as many
            files as the source has.
        model_class: the class the weights will be loaded in; by default config.architectures' class.
        cold_path: where to write the rows that were not kept; None leaves them out.
        trust_remote_code: allow code that the model folder brings.
        progress: show a bar on a terminal.

    Raises:
        UnsupportedModelError: the model has a vocab tensor that is not understood, or its pad id would
            move although positions are counted from it.
        MismatchError: the vocab was made for another tokenizer or another vocab size.
    """
    check_vocab(source, vocab)
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    axes = axes_of(config, model_class, trust_remote_code=trust_remote_code)
    for found in axes:
        check_pad(config, found, vocab)
    specs = read_specs(source)
    stored = find_stored_vocab(specs, axes, vocab.vocab_size)
    check_untied(vocab, tied=stored.tied)
    write_compact_configs(source.path, target, config, vocab)
    steps = stream_tensors(source, vocab, target, stored, cold_path)
    total = sum(spec.nbytes for spec in specs.values())
    written = _run(steps, total, progress=progress)
    elements = _count_elements(specs, stored)
    return TrimmedCheckpoint(target, _cut_tensors(stored, vocab), stored.tied, written, elements)


def check_vocab(source: ModelSource, vocab: VocabMap) -> None:
    """Refuse a vocab that was made for another tokenizer or another vocab size.

    Raises:
        MismatchError: see above; the message has both hashes or sizes.
    """
    if vocab.vocab_size != source.vocab_size:
        raise MismatchError(
            f"the vocab was selected for {vocab.vocab_size:,} rows, {source.name} has "
            f"{source.vocab_size:,}: profile and select with this model."
        )
    if vocab.tokenizer_sha256 and not source.has_tokenizer(vocab.tokenizer_sha256):
        raise MismatchError(
            f"the vocab was selected for the tokenizer {vocab.tokenizer_sha256[:12]}…, {source.name} has "
            f"{source.tokenizer_sha256[:12]}… ({_changed_by(source)}): profile and select with this model."
        )


def _changed_by(source: ModelSource) -> str:
    """Whose tokenizer a source's is; a light installation may have profiled tokenizer.json as it is."""
    made_by = source.effective.made_by
    library = f"{made_by['library']} {made_by.get('version', '')}".strip()
    return library if source.effective.original else f"{library} changes tokenizer.json on loading"


def check_pad(config: PretrainedConfig, axes: VocabAxes, vocab: VocabMap) -> None:
    """Refuse a vocab that moves the pad id of a model that counts positions from it.

    Raises:
        UnsupportedModelError: see above.
    """
    pad = config.get_text_config().pad_token_id
    if not axes.pad_moves_positions or pad is None:
        return
    if pad < len(vocab) and vocab.kept_ids[pad] == pad:
        return
    raise UnsupportedModelError(
        f"positions of this model are counted from its pad id {pad} ({axes.pad_moves_positions[0]}), which "
        f"this vocab moves: keep all ids 0..{pad} (trimserve select does, they are structural)."
    )


def stream_tensors(
    source: ModelSource, vocab: VocabMap, target: Path, stored: StoredVocab, cold_path: Path | None
) -> Iterator[int]:
    """Write the trimmed weight files, their index, and the cold rows; a generator to be run to its end.

    Args:
        source: the model.
        vocab: the kept ids.
        target: an existing folder for the weight files, named as in the source.
        stored: the source's vocab tensors.
        cold_path: where to write the rows that were not kept; None leaves them out.

    Yields:
        The bytes of each chunk as it is written.
    """
    for file, (specs, metadata) in source.headers.items():
        tensors = {name: _kept(spec, stored, vocab.kept_ids) for name, spec in specs.items()}
        yield from write_tensors(target / file.name, tensors, metadata)
    if (source.path / INDEX_NAME).is_file() and len(source.weight_files) > 1:
        _write_index(source, target)
    if cold_path is not None:
        yield from _write_cold(cold_path, stored, vocab)


def _kept(spec: TensorSpec, stored: StoredVocab, kept_ids: Ids) -> TensorSource:
    if spec.name not in stored.cut:
        return WholeTensor(spec)
    axis = stored.cut[spec.name][1]
    return TensorRows(spec, kept_ids[kept_ids < spec.shape[axis]], axis)


def _write_cold(path: Path, stored: StoredVocab, vocab: VocabMap) -> Iterator[int]:
    tensors: dict[str, TensorSource] = {}
    for role in _ROLES:
        if role in stored.roles:
            spec, axis = stored.cut[stored.roles[role]]
            # A bias may be stored as (1, V): in the cold file every tensor begins with its rows.
            rows_first = dataclasses.replace(spec, shape=spec.shape[axis:])
            ids = vocab.cold_ids if role in _TABLES else vocab.head.cold_ids
            tensors[role] = GuardedRows(rows_first, ids) if role == PER_LAYER else TensorRows(rows_first, ids)
    return write_tensors(path, tensors, {"tied": str(stored.tied).lower()})


@dataclass(frozen=True, slots=True)
class GuardedRows:
    """Rows of per-layer embeddings: an id beyond the table reads its first row, as the model does (Gemma 3n).

    Attributes:
        spec: the stored tensor.
        ids: int array (n,), strictly increasing.
    """

    spec: TensorSpec
    ids: Ids

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape with as many rows as ids."""
        return (len(self.ids), *self.spec.shape[1:])

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file; yield their sizes."""
        inside = self.ids[self.ids < self.spec.shape[0]]
        yield from TensorRows(self.spec, inside).write_to(file)
        first = np.asarray(map_tensor(self.spec)[0]).tobytes()
        yield file.write(first * (len(self.ids) - len(inside)))


def _write_index(source: ModelSource, target: Path) -> None:
    index = source.read_json(INDEX_NAME)
    headers = {file.name: read_header(target / file.name)[0] for file in source.weight_files}
    size = sum(spec.nbytes for header in headers.values() for spec in header.values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": size}
    index["weight_map"] = {name: file for file, header in headers.items() for name in header}
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _run(steps: Iterator[int], total: int, *, progress: bool) -> int:
    written = 0
    with progress_bar(total, "trimming", "B") as bar:
        for count in steps:
            written += count
            if progress:
                bar.update(count)
    return written


def _cut_tensors(stored: StoredVocab, vocab: VocabMap) -> tuple[CutTensor, ...]:
    heads = {stored.roles.get("head"), stored.roles.get("head_bias")}
    return tuple(
        CutTensor(
            name,
            axis,
            spec.shape[axis],
            int((vocab.head if name in heads else vocab).kept_ids.searchsorted(spec.shape[axis])),
            spec.dtype,
        )
        for name, (spec, axis) in stored.cut.items()
    )


def _count_elements(specs: Mapping[str, TensorSpec], stored: StoredVocab) -> dict[str, int]:
    aliases = stored.cut.keys() - set(stored.roles.values())
    counts: Counter[str] = Counter()
    for name, spec in specs.items():
        if name not in aliases:
            counts[spec.dtype] += spec.nbytes // STORAGE_DTYPES[spec.dtype].itemsize
    return dict(counts)
