"""Fetch models and datasets from the hub into its cache."""

from pathlib import Path
from types import ModuleType

from trimserve.errors import UsageError
from trimserve.foreign import foreign


def fetch_snapshot(
    hub: ModuleType, repo: str, *, refused: str, otherwise: str = "", **options: str | list[str] | None
) -> Path:
    """Fetch the files of a repository.

    Args:
        hub: huggingface_hub, which the caller requires with the extra that has it.
        repo: owner and name.
        refused: what the message says could not be fetched.
        otherwise: what else the message advises.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        UsageError: there is no such repository, or the hub cannot be reached.
    """
    advice = f"check the name, the revision and the connection{otherwise}."
    with foreign(f"{refused} could not be fetched from the hub", advice=advice, error=UsageError):
        return Path(hub.snapshot_download(repo, **options))
