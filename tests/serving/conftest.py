"""One server process for the modules that only ask it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """See `make_folders`."""
    pytest.importorskip("torch")
    from tests.support.serving import make_folders

    return make_folders(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(folders):
    """A server of three models."""
    pytest.importorskip("uvicorn")
    from tests.support.serving import served

    names = [f"--name={name}={folders[name]}" for name in ("chat", "embed", "rank")]
    with served([*names, "--max-body", "100000"]) as process:
        yield process
