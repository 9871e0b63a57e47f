"""Make trimmed folders without an exporter: the files the runtime reads, with rows the test chooses."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trimserve.files.hashes import sha256_file
from trimserve.folder.manifest import Manifest, Source, write_manifest
from trimserve.folder.names import COLD_NAME, TOKENIZER_NAME, VOCAB_NAME
from trimserve.folder.opening import TrimmedFolder, list_files, open_folder
from trimserve.folder.sentence import SentenceSettings, write_settings
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import Reason, VocabMap


def make_vocab(kept_ids: Sequence[int], vocab_size: int, tokenizer_sha256: str = "") -> VocabMap:
    kept = np.array(kept_ids, np.int32)
    return VocabMap(kept, np.full(kept.shape, Reason.PROFILE, np.uint8), vocab_size, tokenizer_sha256)


def make_folder(
    path: Path,
    kept_ids: Sequence[int],
    vocab_size: int,
    *,
    source: Path | None = None,
    cold_rows: bytes | None = None,
    files: Mapping[str, bytes] | None = None,
    graphs: Mapping[str, str] | None = None,
    task: str = "feature-extraction",
    layout: str = "runtime",
    dtype: str = "fp32",
    settings: SentenceSettings | None = None,
) -> TrimmedFolder:
    """Write a trimmed folder and open it.

    Args:
        source: a model folder without weights, whose files are copied.
        cold_rows: the bytes of a safetensors file.
        files: further files, as they are.
    """
    path.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir() if source else ():
        if file.suffix == ".json":
            shutil.copyfile(file, path / file.name)
    digest = sha256_file(source / TOKENIZER_NAME) if source else ""
    save_vocab(make_vocab(kept_ids, vocab_size, digest), path / VOCAB_NAME)
    contents = {**(files or {}), **({COLD_NAME: cold_rows} if cold_rows is not None else {})}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    if settings is not None:
        write_settings(path, settings, {})
    manifest = Manifest(
        source=Source("made by a test", None, {}),
        tokenizer_sha256=digest,
        vocab_size=vocab_size,
        kept=len(kept_ids),
        task=task,
        layout=layout,
        dtype=dtype,
        graphs=dict(graphs or {}),
        cut=(),
        selection={},
        exporter={},
        created="2026-01-01T00:00:00+00:00",
        files=list_files(path),
    )
    write_manifest(path, manifest)
    return open_folder(path)
