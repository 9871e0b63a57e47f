"""Trimmed folders on the hub: from owner/name to a folder of the hub's cache."""

import re
from pathlib import Path

from trimserve.arguments import AnyPath
from trimserve.errors import UsageError, require
from trimserve.files.hub import fetch_snapshot

# As the hub spells them. A path with more parts, or none, is a path.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What a trimmed folder can hold: never pickle or code.
_FILES = ("*.json", "*.safetensors", "*.onnx", "*.onnx_data", "*.jinja", "*.txt", "*.model", "README.md")


def find_folder(path: AnyPath, revision: str | None = None) -> Path:
    """A folder on this machine, or one of the hub that is fetched into its cache.

    Args:
        path: a path, or as a string owner/name where there is no such path.
        revision: branch, tag or commit of a hub id.

    Raises:
        UsageError: the hub has no such repository or cannot be reached; or a revision of a local folder.
        MissingExtraError: a hub id, and huggingface_hub is not installed.
    """
    folder = Path(path)
    if folder.exists() or not (isinstance(path, str) and _HUB_ID.fullmatch(path)):
        if revision is not None:
            raise UsageError(f"{path} is a local path, which has no revisions: leave revision out.")
        return folder
    hub = require("huggingface_hub", extra="hub", purpose=f"there is no folder {path}, and fetching it")
    return fetch_snapshot(
        hub,
        path,
        refused=f"{path} is no local folder and",
        otherwise=", or pass a folder",
        revision=revision,
        allow_patterns=list(_FILES),
    )
