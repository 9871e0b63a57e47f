"""`finetune.json`: what a compact checkpoint was cut from, and what the full one has in its place."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from msgspec import Meta

from trimserve.errors import MismatchError, UsageError
from trimserve.files.artefact import SCHEMA_VERSION
from trimserve.files.atomic import atomic_path
from trimserve.files.checked_json import convert_json, read_json
from trimserve.files.hashes import sha256_file
from trimserve.files.model_json import Rows
from trimserve.folder.manifest import Source
from trimserve.model.source import ModelSource

PROVENANCE_NAME = "finetune.json"


@dataclass(frozen=True, slots=True)
class StoredCut:
    """A tensor that lost rows: the names a checkpoint may store it by, and its vocab axis."""

    names: tuple[str, ...]
    axis: Annotated[int, Meta(ge=0, le=7)]


@dataclass(frozen=True, slots=True)
class Provenance:
    """The content of `finetune.json`.

    Attributes:
        base: the model whose other rows belong to the checkpoint; None if it was not known.
        vocab_size: V.
        kept: K.
        tensors: the tensors that lost rows.
        prefix: the class's `base_model_prefix`; names in the base may lack it.
        config: entries of config.json that differ in the full model.
        generation_config: the same of generation_config.json.
    """

    base: Source | None
    vocab_size: Rows
    kept: Rows
    tensors: tuple[StoredCut, ...]
    prefix: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    schema_version: int = field(default=SCHEMA_VERSION)

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint, atomically."""
        with atomic_path(folder / PROVENANCE_NAME) as path:
            path.write_text(json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from a checkpoint.

        Raises:
            UsageError: the folder is not a compact checkpoint.
            MismatchError: it is damaged, or of another schema.
        """
        path = folder / PROVENANCE_NAME
        if not path.is_file():
            raise UsageError(
                f"{folder} has no {PROVENANCE_NAME}, so it is no compact checkpoint: pass one that was saved "
                "with save_pretrained inside a partial_vocab block."
            )
        advice = "save the checkpoint again."
        content = read_json(path, advice=advice, finite=False)
        version = content.get("schema_version") if isinstance(content, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise MismatchError(
                f"{path} has schema {str(version)[:40]}, this trimserve reads {SCHEMA_VERSION}: update "
                "trimserve."
            )
        return convert_json(content, cls, str(path), advice=advice)


def describe_base(source: ModelSource) -> Source:
    """Name a base model and hash its weight files."""
    return Source(
        source.name, source.revision, {file.name: sha256_file(file) for file in source.weight_files}
    )


def check_base(provenance: Provenance, source: ModelSource) -> None:
    """Refuse a base other than the one the checkpoint was cut from.

    Raises:
        MismatchError: another hash, or the checkpoint does not know its base.
    """
    if provenance.base is None:
        raise MismatchError(
            "the checkpoint does not say which base it was cut from, because the model came from no folder: "
            "name it with partial_vocab(model, vocab, base=...) and save again."
        )
    found = describe_base(source).files
    expected = provenance.base.files
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            theirs, ours = found.get(name, "no such file"), expected.get(name, "no such file")
            raise MismatchError(
                f"{source.name} is not the base of this checkpoint: {name} has sha256 {theirs[:12]}…, the "
                f"checkpoint was cut from {ours[:12]}… ({provenance.base.name}): pass that model."
            )
