"""The pooling that a sentence-transformers folder declares."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import Pooling
from trimserve.folder.opening import open_folder
from trimserve.model.resolve import resolve_model
from trimserve_export import export
from trimserve_export.checkpoint.pooling import is_sentence_transformers, read_pooling

pytestmark = pytest.mark.export

V = 37
PREFIX = "sentence_transformers.models"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_model("bert_encoder", tmp_path_factory.mktemp("encoder") / "model", rows=V)


@pytest.fixture
def folder(encoder, tmp_path) -> Path:
    """A copy that a test may add files to."""
    return Path(shutil.copytree(encoder, tmp_path / "model"))


def declare(folder: Path, *modules: str, pooling: dict | None = None, settings: dict | None = None) -> Path:
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{PREFIX}.Transformer"}]
    for index, module in enumerate(modules, 1):
        listed.append(
            {"idx": index, "name": str(index), "path": f"{index}_{module}", "type": f"{PREFIX}.{module}"}
        )
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(pooling or {"pooling_mode_mean_tokens": True})
    )
    if settings is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def pooling_of(folder: Path) -> Pooling:
    return read_pooling(resolve_model(folder))


def test_folder_that_declares_nothing_pools_by_mean(encoder):
    assert pooling_of(encoder) == Pooling("mean", False, None)
    assert not is_sentence_transformers(resolve_model(encoder))


@pytest.mark.parametrize(
    ("key", "mode"),
    [
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_max_tokens", "max"),
        ("pooling_mode_lasttoken", "last"),
    ],
)
def test_modes(folder, key, mode):
    off = dict.fromkeys(
        ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens"), False
    )
    declare(folder, "Pooling", pooling={"word_embedding_dimension": 16} | off | {key: True})
    assert pooling_of(folder).mode == mode
    assert not pooling_of(folder).normalize


def test_mode_by_name_as_newer_versions_write_it(folder):
    assert pooling_of(declare(folder, "Pooling", pooling={"pooling_mode": "cls"})).mode == "cls"


def test_normalize_and_length(folder):
    declare(folder, "Pooling", "Normalize", settings={"max_seq_length": 9, "do_lower_case": False})
    assert pooling_of(folder) == Pooling("mean", True, 9)


def test_length_falls_back_as_sentence_transformers_does(folder):
    declare(folder, "Pooling", settings={"max_seq_length": None})
    assert pooling_of(folder).max_tokens == 64  # max_position_embeddings
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 30}')
    assert pooling_of(folder).max_tokens == 30


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": False},
    ],
)
def test_pooling_that_the_runtime_has_not_is_refused(folder, pooling):
    declare(folder, "Pooling", pooling=pooling)
    with pytest.raises(UnsupportedModelError, match="the runtime has cls, mean, max, last"):
        pooling_of(folder)


def test_module_that_the_runtime_has_not_is_refused(folder):
    with pytest.raises(UnsupportedModelError, match="Dense module"):
        pooling_of(declare(folder, "Pooling", "Dense"))


def test_lower_casing_outside_the_tokenizer_is_refused(folder):
    declare(folder, "Pooling", settings={"do_lower_case": True})
    assert pooling_of(folder).mode == "mean"  # this tokenizer lower-cases anyway
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": None}))
    with pytest.raises(UnsupportedModelError, match="do_lower_case"):
        pooling_of(folder)


def test_export_records_the_pooling(folder, tmp_path):
    declare(
        folder,
        "Pooling",
        "Normalize",
        pooling={"pooling_mode_cls_token": True},
        settings={"max_seq_length": 9},
    )
    export(folder, make_vocab(range(11), V), tmp_path / "out")
    manifest = open_folder(tmp_path / "out").manifest
    assert manifest.pooling == Pooling("cls", True, 9)
    assert manifest.task == "feature-extraction"


def test_sentence_model_trained_as_a_masked_language_model_is_an_encoder(tmp_path):
    folder = declare(save_model("bert", tmp_path / "model", rows=V), "Pooling")
    export(folder, make_vocab(range(11), V), tmp_path / "out")
    assert open_folder(tmp_path / "out").manifest.task == "feature-extraction"
