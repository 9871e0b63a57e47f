"""Fixtures for every test module; makers of tiny tokenizers are in `tests.support.tiny_tokenizers`."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.tiny_tokenizers import KINDS, save_model_folder

# A busy machine is slow now and then; that is no failure.
settings.register_profile("trimserve", deadline=None)
settings.load_profile("trimserve")

# Helper modules hold no tests, and some of them need the [export] extra as soon as they are imported.
collect_ignore = ["support"]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder without weights for each kind of tokenizer, by kind; read-only by agreement."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model_folder(kind, root / kind) for kind in KINDS}


@pytest.fixture(params=list(KINDS))
def model_folder(request, model_folders) -> Path:
    """One model folder after the other: the test runs for each kind of tokenizer."""
    return model_folders[request.param]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora, tokenizers and models; skips the test where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("TRIMSERVE_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set TRIMSERVE_DATA")
    return path


@pytest.fixture(scope="module")
def one_thread():
    """Train tiny models with one torch thread: more cost them more than they bring."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Give a family's tiny model, its trimmed folder and full graph, each made once: `exported("llama")`."""
    pytest.importorskip("torch")
    from tests.support.exports import Exports

    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def translators(tmp_path_factory):
    """Give a family's tiny encoder-decoder and its trimmed folder, each made once: `translators("t5")`."""
    pytest.importorskip("torch")
    from tests.support.translators import make_translator

    made = {}

    def get(family: str):
        if family not in made:
            made[family] = make_translator(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get
