"""Give a trimmed folder the tables of its tokenizer, or write down why it has none."""

import dataclasses
from pathlib import Path

from trimserve.errors import UnsupportedModelError
from trimserve.files.hashes import sha256_file
from trimserve.folder.manifest import FileEntry, Manifest
from trimserve.folder.names import TOKENIZER_TABLES_NAME
from trimserve.model.source import ModelSource
from trimserve.text.mapped.building import build_tables


def with_tables(manifest: Manifest, source: ModelSource, folder: Path) -> Manifest:
    """Write the tables of the source's tokenizer into a folder that this runtime will run.

    Args:
        manifest: of the folder so far.
        source: the model.
        folder: the folder.

    Returns:
        The manifest that lists the file; its `tokenizer` says under `tables` whether there is one:
        ``"mapped"``, or the reason why the tokenizer is loaded as it is.
    """
    if manifest.layout != "runtime" or not manifest.graphs:
        return manifest
    files, path = dict(manifest.files), folder / TOKENIZER_TABLES_NAME
    try:
        build_tables(source.effective.content, source.effective.sha256).write(path)
    except UnsupportedModelError as error:
        said = str(error)
    else:
        said = "mapped"
        files[path.name] = FileEntry(path.stat().st_size, sha256_file(path))
    tokenizer = {**manifest.tokenizer, "tables": said}
    return dataclasses.replace(manifest, files=dict(sorted(files.items())), tokenizer=tokenizer)
