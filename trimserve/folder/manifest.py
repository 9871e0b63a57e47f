"""`trimserve.json`: what a trimmed folder was made from and which files it has."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self

from trimserve.errors import MismatchError, UsageError
from trimserve.files.artefact import SCHEMA_VERSION
from trimserve.files.atomic import atomic_path, replace_in_order
from trimserve.folder.names import COLD_PREFIX, MANIFEST_NAME, VOCAB_NAME, check_inner_name
from trimserve.folder.tasks import Task

# Where ids are remapped: see docs/layouts.md.
Layout = Literal["runtime", "tokenizer", "graph"]
# What weights of a graph are stored in.
Dtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of one file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CutTensor:
    """A tensor that lost rows: where its vocab axis was and what is left of it."""

    name: str
    axis: int
    rows_before: int
    rows_after: int
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

    longest: int | None = None
    unchanged: int | None = None
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
        exporter: its name and the versions of what it used.
        verification: result of `trimserve verify`, or None.
        bytes_before: bytes of the source's weights in the graph's dtype.
        quantization: how products are quantised (`blocks.BlockScheme`), or None; `dtype` is then the dtype
            of what is not: embedding, norms, activations.
        segmentation: how a cut tokenizer segments texts beside the original (layout tokenizer), or None.
        sketch: of the cold rows: bits, rows a group, bytes of its files, and how wide its bound is relative
            to the rows' norms; or None.
        head_rows: rows of the head where it has fewer than the embedding, else None.
        tokenizer: which file texts are tokenized with (`file`), the library and version that made or proved
            it, and `settings` that the file cannot hold; empty in folders of older versions.
        lengths: how long a text may be; None in folders made before this was written down.
        generation: of a generator: `transformers_version`, which read the source's configs, and the settings
            that it takes from config.json where there is no generation_config.json.
    """

    source: Source
    tokenizer_sha256: str
    vocab_size: int
    kept: int
    task: Task
    layout: Layout
    dtype: str
    graphs: dict[str, str]
    cut: tuple[CutTensor, ...]
    selection: dict[str, Any]
    exporter: dict[str, str]
    created: str
    files: dict[str, FileEntry]
    bytes_before: int = 0
    verification: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    segmentation: dict[str, Any] | None = None
    sketch: dict[str, Any] | None = None
    head_rows: int | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    lengths: Lengths | None = None
    generation: dict[str, Any] | None = None
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
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise MismatchError(
                    f"{origin} has schema {version}, this trimserve reads {SCHEMA_VERSION}: "
                    "export the folder again or update trimserve."
                )
            raw["source"] = Source(**raw["source"])
            raw["cut"] = tuple(CutTensor(**entry) for entry in raw["cut"])
            raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            if raw.pop("pooling", None) is not None:
                raise MismatchError(
                    f"{origin} was written by an earlier trimserve, which kept the pooling there: export the "
                    "folder again."
                )
            raw["lengths"] = Lengths(**raw["lengths"]) if raw.get("lengths") else None
            manifest = cls(**raw)
            parts = (manifest.source, *manifest.cut, *manifest.files.values())
            optional = [manifest.lengths] if manifest.lengths is not None else []
            for part in (manifest, *parts, *optional):
                _check_types(part)
            for name in (*manifest.files, *manifest.graphs.values()):
                check_inner_name(name, origin)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, MismatchError):
                raise
            raise MismatchError(
                f"{origin} is not a manifest this version understands ({error}): export the folder again."
            ) from error
        return manifest


def _field_types(part: type) -> dict[str, tuple[Any, ...]]:
    """Field of a dataclass -> the classes that its value may have; what containers hold is not looked at."""
    hints = typing.get_type_hints(part)
    return {
        name: typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        for name, hint in hints.items()
    }


def _check_types(part: object) -> None:
    """Raise a TypeError that names a field of another type than declared, or of a word that is not known."""
    for name, types in _field_types(type(part)).items():
        value = getattr(part, name)
        words = [word for one in types if typing.get_origin(one) is Literal for word in typing.get_args(one)]
        if words and value not in words:
            raise TypeError(f"{name} is {value!r}, and known are {', '.join(words)}")
        classes = () if words else tuple(typing.get_origin(one) or one for one in types)
        if classes and (not isinstance(value, classes) or (isinstance(value, bool) and bool not in classes)):
            raise TypeError(f"{name} is {value!r}")


def is_trimmed(path: Path) -> bool:
    """Tell whether a folder holds a `trimserve.json`."""
    return (path / MANIFEST_NAME).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a trimmed folder.

    Raises:
        UsageError: not a trimmed folder.
        MismatchError: not UTF-8, or see `Manifest.from_json`.
    """
    if not is_trimmed(path):
        raise UsageError(
            f"{path} is not a trimmed folder (no {MANIFEST_NAME} in it): make one with `trimserve export`."
        )
    file = path / MANIFEST_NAME
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise MismatchError(f"{file} is not UTF-8 text: export the folder again.") from error
    return Manifest.from_json(text, str(file))


def stored_weight_bytes(files: Mapping[str, FileEntry]) -> int:
    """Bytes of the graphs and their data, or of the trimmed checkpoint; never of vocab map or cold rows."""
    names = (name for name in files if name != VOCAB_NAME and not name.startswith(COLD_PREFIX))
    return sum(files[name].bytes for name in names if name.endswith((".onnx", ".onnx_data", ".safetensors")))


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
