"""`trimserve.json`: what a trimmed folder was made from and which files it has."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict

from msgspec import Meta

from trimserve.errors import MismatchError, UsageError
from trimserve.files.artefact import SCHEMA_VERSION
from trimserve.files.atomic import atomic_path, replace_in_order
from trimserve.files.checked_json import convert_json, parse_json, read_json
from trimserve.files.held import HeldFile
from trimserve.files.model_json import MOST_ROWS
from trimserve.files.quantized import Quantization
from trimserve.folder.names import (
    CALIBRATION_NAME,
    COLD_PREFIX,
    MANIFEST_NAME,
    TOKENIZER_TABLES_NAME,
    VOCAB_NAME,
    check_inner_name,
)
from trimserve.folder.tasks import Task

# Where ids are remapped: see docs/layouts.md.
Layout = Literal["runtime", "tokenizer", "graph"]
# What weights of a graph are stored in.
Dtype = Literal["fp32", "fp16", "bf16"]
# A manifest is small beside this, with the results of a long verification and a corpus of many files.
MOST_BYTES = 64 << 20
_ADVICE = "export the folder again."
_FINITE = False  # of a row that is not finite, the sketch's bound is infinite
_Count = Annotated[int, Meta(ge=0, le=1 << 62)]
_Ids = Annotated[int, Meta(ge=1, le=MOST_ROWS)]
_Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
# Hashes that older folders may lack.
_MaybeSha256 = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
_Name = Annotated[str, Meta(max_length=200)]
_Word = Annotated[str, Meta(max_length=32)]
_Role = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,31}$")]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of one file of the folder."""

    bytes: _Count
    sha256: _Sha256


@dataclass(frozen=True, slots=True)
class CutTensor:
    """A tensor that lost rows: where its vocab axis was and what is left of it."""

    name: str
    axis: int
    rows_before: _Count
    rows_after: _Count
    dtype: str


@dataclass(frozen=True, slots=True)
class Source:
    """What the folder was made from.

    Attributes:
        name: of the model, a path or a hub id.
        revision: of a hub id.
        files: each weight file, those of an adapter too -> its sha256.
        adapter: name of the adapter that was merged into the model, if it was given beside it.
    """

    name: str
    revision: str | None
    files: dict[str, str]
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a text may be, and where its length changes how positions are computed.

    Attributes:
        longest: tokens of the longest text that the model takes; None for no limit.
        unchanged: tokens of the longest text whose rotary frequencies do not depend on its length (longrope,
            dynamic NTK); None where they never do.
        restarts: a text that grows beyond `unchanged` while it is generated is read again (Phi-3).
    """

    longest: _Count | None = None
    unchanged: _Count | None = None
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `trimserve.json` (DESIGN.md section 4).

    Attributes:
        task: optimum's task name, e.g. ``"text-generation-with-past"``.
        dtype: dtype of the graph's weights, a `Dtype`; of a checkpoint that is stored as its source is, the
            one that most of its weights have, which may be another, in safetensors' words.
        graphs: role -> file name; the role is ``"model"`` for a single graph.
        selection: the vocab's rule and coverage.
        exporter: its name, the versions of what it used, and `reason`, why it was taken.
        verification: result of `trimserve verify`, or None.
        bytes_before: bytes of the source's weights in the graph's dtype.
        quantization: how products are quantised (`files.quantized.Quantization`), or None; `dtype` is then
            the dtype of what is not: embedding, norms, activations.
        quality: what quantising cost on held-out texts (`serving.quality.Quality`), or None.
        segmentation: how a cut tokenizer segments texts beside the original (layout tokenizer), or None.
        sketch: of the cold rows: bits, rows a group, bytes of its files, and how wide its bound is relative
            to the rows' norms; or None.
        head_rows: rows of the head where it has fewer than the embedding, else None.
        tokenizer: which file texts are tokenized with (`file`), the library and version that made or proved
            it, and `settings` that the file cannot hold; empty in folders of older versions.
        lengths: how long a text may be; None in folders made before this was written down.
        fusion: of a decoder's graph: whether its attention is fused, nodes before and after, and the reason
            where it is not (`fusion.fuse.Fusion`); None of other graphs, and in folders of older versions.
        generation: of a generator: `transformers_version`, which read the source's configs, and the settings
            that it takes from config.json where there is no generation_config.json.
    """

    source: Source
    tokenizer_sha256: _MaybeSha256
    vocab_size: _Ids
    kept: _Ids
    task: Task
    layout: Layout
    dtype: _Word
    graphs: dict[_Role, _Name]
    cut: tuple[CutTensor, ...]
    selection: dict[str, Any]
    exporter: dict[str, str]
    created: str
    files: dict[_Name, FileEntry]
    bytes_before: _Count = 0
    verification: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    segmentation: dict[str, Any] | None = None
    sketch: dict[str, Any] | None = None
    head_rows: _Ids | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    lengths: Lengths | None = None
    generation: dict[str, Any] | None = None
    fusion: dict[str, Any] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Serialise with stable key order and a final newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = MANIFEST_NAME) -> Self:
        """Parse and check a manifest.

        Raises:
            MismatchError: not JSON, another schema, a missing key, or a path that leaves the folder.
        """
        return cls._of(parse_json(text, origin, advice=_ADVICE, finite=_FINITE), origin)

    @classmethod
    def read(cls, file: HeldFile) -> Self:
        """Read an opened manifest.

        Raises:
            MismatchError: too large, or see `from_json`.
        """
        raw = read_json(file, advice=_ADVICE, finite=_FINITE, most_bytes=MOST_BYTES)
        return cls._of(raw, str(file.path))

    @classmethod
    def _of(cls, raw: Any, origin: str) -> Self:  # noqa: ANN401 - whatever JSON holds
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version is None:
            raise MismatchError(f"{origin} is not a manifest this version understands: {_ADVICE}")
        if version != SCHEMA_VERSION:
            raise MismatchError(
                f"{origin} has schema {str(version)[:80]}, this trimserve reads {SCHEMA_VERSION}: "
                "export the folder again or update trimserve."
            )
        if raw.pop("pooling", None) is not None:
            raise MismatchError(
                f"{origin} was written by an earlier trimserve, which kept the pooling there: {_ADVICE}"
            )
        raw["lengths"] = raw.get("lengths") or None
        subject = f"{origin} is not a manifest this version understands: it"
        manifest = convert_json(raw, cls, subject, advice=_ADVICE)
        manifest._check(raw, subject, origin)
        return manifest

    def _check(self, raw: Mapping[str, Any], subject: str, origin: str) -> None:
        """Check what the fields' types do not say: keys within, names, and the free parts we rely on."""
        inner: list[tuple[type, object]] = [(Source, raw["source"]), (_Settings, self._settings)]
        inner += [(FileEntry, entry) for entry in raw["files"].values()]
        inner += [(CutTensor, entry) for entry in raw["cut"]]
        inner += [(Lengths, raw["lengths"])] if self.lengths is not None else []
        for kind, part in inner:
            convert_json(part, kind, subject, advice=_ADVICE)
        Quantization.from_dict(self.quantization, subject)
        named = self.tokenizer.get("file")
        if named is not None and not (isinstance(named, str) and named in self.files):
            raise MismatchError(
                f"{origin} names the tokenizer {str(named)[:80]!r} and does not list it: {_ADVICE}"
            )
        for name in (*self.files, *self.graphs.values()):
            check_inner_name(name, origin)
        if missing := sorted(set(self.graphs.values()) - self.files.keys()):
            raise MismatchError(f"{origin} names the graph {missing[0]!r} and does not list it: {_ADVICE}")

    @property
    def _settings(self) -> object:
        return self.tokenizer.get("settings") or {}


class _Settings(TypedDict, total=False):
    """What `Manifest.tokenizer` may say beside the tokenizer's file; see `declared_settings`."""

    truncation_side: Literal["left", "right"]
    model_max_length: _Count | None
    clean_up: bool
    split_special_tokens: bool
    special_tokens: dict[str, str]


def is_trimmed(path: Path) -> bool:
    """Tell whether a folder holds a `trimserve.json`."""
    return (path / MANIFEST_NAME).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a trimmed folder.

    Raises:
        UsageError: not a trimmed folder.
        MismatchError: see `Manifest.read`.
    """
    if not is_trimmed(path):
        raise UsageError(
            f"{path} is not a trimmed folder (no {MANIFEST_NAME} in it): make one with `trimserve export`."
        )
    return Manifest.read(HeldFile(path / MANIFEST_NAME))


def stored_weight_bytes(files: Mapping[str, FileEntry]) -> int:
    """Bytes of the graphs and their data, or of the trimmed checkpoint; never of what lies beside them."""
    others = (VOCAB_NAME, CALIBRATION_NAME, TOKENIZER_TABLES_NAME)
    names = (name for name in files if name not in others and not name.startswith(COLD_PREFIX))
    return sum(
        files[name].bytes for name in names if name.endswith((".onnx", ".onnx_data", ".safetensors", ".gguf"))
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `trimserve.json` into a folder, atomically."""
    with atomic_path(path / MANIFEST_NAME, follow=False) as temporary:
        temporary.write_text(manifest.to_json(), "utf-8")


def replace_listed(path: Path, manifest: Manifest, name: str, content: bytes) -> None:
    """Replace a file of a folder that may be in use, and its manifest.

    No step replaces two files, and a folder loads only if the manifest's hash is the file's. So between the
    old pair and the new one stands a manifest that does not list the file, and each of the three steps leaves
    a folder that loads, whatever ends this process between them:

        old manifest, old file  ->  manifest without it, old file  ->  the same, new file  ->  new manifest

    All three are on the disk before the first step, so that a full disk changes nothing.

    Args:
        path: the folder.
        manifest: the new one; what it says of the file is set here.
        name: of a file that nothing needs in order to load the folder.
        content: its new bytes.

    Raises:
        OSError: the folder cannot be written.
    """
    entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    listed = dataclasses.replace(manifest, files=manifest.files | {name: entry})
    others = {other: found for other, found in manifest.files.items() if other != name}
    unlisted = dataclasses.replace(manifest, files=others)
    last = (MANIFEST_NAME, listed.to_json().encode())
    if manifest.files.get(name) == entry and _holds(path / name, content):
        replace_in_order(path, [last])
    else:
        first = (MANIFEST_NAME, unlisted.to_json().encode())
        replace_in_order(path, [first, (name, content), last])


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file holds these bytes."""
    return path.is_file() and path.read_bytes() == content


def with_verification(manifest: Manifest, result: Mapping[str, Any]) -> Manifest:
    """Return the manifest with the result of a verification in it."""
    return dataclasses.replace(manifest, verification=dict(result))
