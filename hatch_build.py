"""The readme of the package's page on an index: README.md with links that lead to the repository.

On an index there are no files beside the page, so links to them, and pictures, name the repository's own.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s]+)(?=\))")
_PICTURE = re.compile(r"(\bsrc(?:set)?=\")(?!https?:)([^\"]+)")


class ReadmeHook(MetadataHookInterface):
    """Gives the field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme, which pyproject.toml calls dynamic."""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(text, metadata["urls"]["Repository"]),
        }


def absolute(text: str, repository: str) -> str:
    """Markdown whose links and pictures are those of a repository."""
    text = _LINK.sub(rf"\1{repository}/blob/main/\2", text)
    return _PICTURE.sub(rf"\1{repository}/raw/main/\2", text)
