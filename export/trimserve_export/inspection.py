"""Say what a path is: a model and the most that trimming it saves, a trimmed folder, or an ONNX graph."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.arguments import Count, checked
from trimserve.folder.manifest import is_trimmed, read_manifest
from trimserve.folder.names import COLD_NAME
from trimserve.model.prize import WeightBytes, read_vocab_specs, read_weight_bytes
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.model.weights import no_weights

if TYPE_CHECKING:
    from trimserve.files.tensors import TensorSpec
    from trimserve_export.checkpoint.stored import StoredVocab

# A K that most single-domain profiles stay below.
DEFAULT_KEPT = 16_384
# Without them the files' headers alone are read.
_HEAVY = ("torch", "transformers", "onnx_ir")
# The module of sentence-transformers; such a folder needs no config.json.
STATIC_TYPE = "StaticEmbedding"


@dataclass(frozen=True, slots=True)
class VocabTensorFacts:
    """One stored tensor with a vocab axis."""

    name: str
    role: str  # embedding, head, head_bias, or "copy" of a tied tensor that is stored twice
    axis: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Prize:
    """What trimming can win at most, by the shapes alone.

    Attributes:
        kept: the K that the ratio and the removed bytes are for.
        vocab_share: share of all weight bytes that have a vocab axis; no K removes more.
        bytes_removed: bytes of the rows beyond K.
        decode_ratio: weight bytes read for one token by the full model over those at K: every weight is
            read once but an encoder's and the embedding, of which a token needs one row. None for models
            without a head.
    """

    kept: int
    vocab_share: float
    bytes_removed: int
    decode_ratio: float | None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model folder.

    Attributes:
        vocab_size: V.
        tokenizer_size: ids that the tokenizer has; V may exceed it or fall short of it.
        hidden_size: width of the embedding's rows.
        tied: the head is the embedding.
        weight_bytes: bytes of all weights as stored, a tied tensor once.
        told_by: ``"class"``, if the model's class said which tensors have a vocab axis; ``"headers"``, if
            names and shapes in the files did, where torch or transformers is not installed: whether the model
            can be exported is then not known.
    """

    path: str
    model_type: str
    architecture: str
    vocab_size: int
    tokenizer_size: int
    hidden_size: int
    tied: bool
    weight_bytes: int
    vocab_tensors: tuple[VocabTensorFacts, ...]
    prize: Prize
    told_by: str = "class"
    kind: str = "model"


# Of a folder without tables (`trimserve_export.tokenizer_tables`).
WHOLE = "loaded whole"


@dataclass(frozen=True, slots=True)
class TrimmedFacts:
    """A trimmed folder, by its manifest; `fusion` as there."""

    path: str
    base_model: str
    task: str
    dtype: str
    vocab_size: int
    kept: int
    coverage: float | None
    cut: tuple[str, ...]
    cold_bytes: int
    bytes: int
    verified: bool | None
    head_rows: int | None = None
    tokenizer: str = WHOLE
    fusion: dict[str, Any] | None = None
    kind: str = "trimmed"


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    """An ONNX graph without a checkpoint."""

    path: str
    bytes: int
    note: str = "trimserve export -m trims it as it is, its numbers kept"
    kind: str = "onnx"


Inspection = ModelFacts | TrimmedFacts | OnnxFacts


@checked
def inspect(path: str | Path, *, kept: Count = DEFAULT_KEPT, revision: str | None = None) -> Inspection:
    """Tell what a path or hub id is.

    Args:
        path: a model folder or hub id, a trimmed folder, a GGUF file, or an ONNX file or a folder with one.
        kept: the K to compute the maximum saving for.
        revision: hub branch, tag or commit.

    Raises:
        UsageError: nothing that trimserve knows.
        UnsupportedModelError: a model that cannot be exported; see `admission.check_source`.
    """
    local = Path(path)
    if is_trimmed(local):
        return _inspect_trimmed(local)
    source = resolve_model(path, revision=revision)
    if source.has_quantized_rows:
        return _inspect_gguf(source, kept)
    if source.packed_checkpoint() is not None or any(find_spec(name) is None for name in _HEAVY):
        return _inspect_headers(source, kept)
    from trimserve_export.source.admission import check_source
    from trimserve_export.source.whole import whole_source

    with whole_source(source) as whole:
        if whole.graph is not None:
            whole = _one_variant(whole)
        check_source(whole)
        return (
            _inspect_model(whole, kept)
            if whole.graph is None
            else OnnxFacts(str(whole.graph), _onnx_bytes(whole.graph))
        )


def _inspect_headers(source: ModelSource, kept: int) -> ModelFacts | OnnxFacts:
    """What the files alone tell."""
    if source.graph is not None:
        return OnnxFacts(str(source.graph), _onnx_bytes(source.graph))
    weights = read_weight_bytes(source)
    if weights is None:
        raise no_weights(source.path)
    found = read_vocab_specs(source)
    told = [
        *((spec, "head" if spec in found.heads else "embedding") for spec in found.tables),
        *((spec, "head_bias") for spec in found.biases),
        *((spec, "copy") for spec in found.copies),
    ]
    tensors = tuple(
        VocabTensorFacts(
            spec.name, role, spec.shape.index(source.vocab_size), spec.shape, spec.dtype, spec.nbytes
        )
        for spec, role in told
    )
    return ModelFacts(
        path=source.name,
        model_type=str(source.config.get("model_type") or STATIC_TYPE),
        architecture=", ".join(source.config.get("architectures") or ["unknown"]),
        vocab_size=source.vocab_size,
        tokenizer_size=source.tokenizer().get_vocab_size(with_added_tokens=True),
        hidden_size=next((spec.shape[1] for spec in found.tables), 0),
        tied=weights.head > 0 and not found.heads,
        weight_bytes=weights.total,
        vocab_tensors=tensors,
        prize=_prize_of(weights, kept),
        told_by="headers",
    )


def to_dict(facts: Inspection) -> dict[str, Any]:
    """The JSON document of the command line."""
    return dataclasses.asdict(facts)


def _inspect_trimmed(path: Path) -> TrimmedFacts:
    manifest = read_manifest(path)
    cold = manifest.files.get(COLD_NAME)
    return TrimmedFacts(
        path=str(path),
        base_model=manifest.source.name,
        task=manifest.task,
        dtype=manifest.dtype,
        vocab_size=manifest.vocab_size,
        kept=manifest.kept,
        coverage=manifest.selection.get("coverage"),
        cut=tuple(tensor.name for tensor in manifest.cut),
        cold_bytes=cold.bytes if cold else 0,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        verified=manifest.verification["ok"] if manifest.verification else None,
        head_rows=manifest.head_rows,
        tokenizer=manifest.tokenizer.get("tables", WHOLE),
        fusion=manifest.fusion,
    )


def _onnx_bytes(path: Path) -> int:
    data = (path.with_name(path.name + suffix) for suffix in ("_data", ".data"))
    return sum(file.stat().st_size for file in (path, *data) if file.is_file())


def _one_variant(source: ModelSource) -> ModelSource:
    """The first variant of a folder that has several and no plain one: export asks for the one to take."""
    from trimserve_export.trimming.parts import find_parts

    variants = sorted({part.variant for part in find_parts(source)})
    return source if "" in variants or len(variants) < 2 else dataclasses.replace(source, variant=variants[0])


def _inspect_model(source: ModelSource, kept: int) -> ModelFacts:
    from trimserve_export.checkpoint.axes import load_config
    from trimserve_export.checkpoint.stored import read_specs, stored_vocab
    from trimserve_export.static_embedding import is_static, stored_static

    specs, static = read_specs(source), is_static(source)
    stored = stored_static(source) if static else stored_vocab(source)
    tensors = _vocab_tensors(stored)
    copies = {tensor.name for tensor in tensors if tensor.role == "copy"}
    total = sum(spec.nbytes for name, spec in specs.items() if name not in copies)
    return ModelFacts(
        path=source.name,
        model_type=STATIC_TYPE if static else str(load_config(source.path).model_type),
        architecture=", ".join(source.config.get("architectures") or [STATIC_TYPE if static else "unknown"]),
        vocab_size=source.vocab_size,
        tokenizer_size=source.tokenizer().get_vocab_size(with_added_tokens=True),
        hidden_size=next(tensor.shape[1] for tensor in tensors if tensor.role == "embedding"),
        tied=stored.tied,
        weight_bytes=total,
        vocab_tensors=tensors,
        prize=prize(
            tensors,
            total,
            source.vocab_size,
            kept,
            tied=stored.tied,
            encoder=_encoder_bytes(source, specs, stored),
        ),
    )


def _inspect_gguf(source: ModelSource, kept: int) -> ModelFacts:
    """A GGUF file by its header alone; its tensors have known names, so that no class is asked."""
    specs, tied = source.tensors, source.tied
    roles = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    tensors = tuple(
        VocabTensorFacts(name, role, 0, specs[name].shape, specs[name].dtype, specs[name].nbytes)
        for name, role in roles.items()
        if name in specs
    )
    total = sum(spec.nbytes for spec in specs.values())
    return ModelFacts(
        path=source.name,
        model_type=str(source.config["model_type"]),
        architecture=str(source.config["architectures"][0]),
        vocab_size=source.vocab_size,
        tokenizer_size=source.tokenizer().get_vocab_size(with_added_tokens=True),
        hidden_size=tensors[0].shape[1],
        tied=tied,
        weight_bytes=total,
        vocab_tensors=tensors,
        prize=prize(tensors, total, source.vocab_size, kept, tied=tied),
    )


def _encoder_bytes(source: ModelSource, specs: Mapping[str, "TensorSpec"], stored: "StoredVocab") -> int:
    """Bytes of an encoder beside a decoder, which reads what it made and not its weights."""
    if not source.config.get("is_encoder_decoder"):
        return 0
    names = (name for name in specs if name.removeprefix("model.").startswith("encoder."))
    return sum(specs[name].nbytes for name in names if name not in stored.cut)


def _vocab_tensors(stored: "StoredVocab") -> tuple[VocabTensorFacts, ...]:
    role_of = {name: role for role, name in stored.roles.items()}
    return tuple(
        VocabTensorFacts(name, role_of.get(name, "copy"), axis, spec.shape, spec.dtype, spec.nbytes)
        for name, (spec, axis) in stored.cut.items()
    )


def prize(
    tensors: tuple[VocabTensorFacts, ...],
    total: int,
    vocab_size: int,
    kept: int,
    *,
    tied: bool,
    encoder: int = 0,
) -> Prize:
    """Compute what trimming to K ids can win at most.

    Args:
        tensors: the vocab tensors; copies of tied ones do not count.
        total: bytes of all weights, copies left out.
        vocab_size: V.
        kept: K; at most V counts.
        tied: the head is the embedding, so the embedding is read as a whole for each token.
        encoder: bytes of the weights that are read once a text and not for each token.
    """
    counted = [tensor for tensor in tensors if tensor.role != "copy"]
    rows = sum(tensor.bytes for tensor in counted)
    has_head = tied or any(tensor.role == "head" for tensor in counted)
    head_roles = {"head", "head_bias", *(["embedding"] if tied else [])}
    head = sum(tensor.bytes for tensor in counted if tensor.role in head_roles) if has_head else 0
    return _prize_of(WeightBytes(vocab_size, rows, head, total - rows - encoder, encoder), kept)


def _prize_of(weights: WeightBytes, kept: int) -> Prize:
    total = weights.total
    return Prize(
        min(kept, weights.vocab_size),
        weights.rows / total,
        total - weights.at(kept),
        weights.decode_ratio(kept),
    )
