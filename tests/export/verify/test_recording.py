"""Where the result of a verification is written, and where not."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.folders import make_vocab
from tests.support.writers import static_model, tree
from trimserve.folder.manifest import read_manifest
from trimserve.folder.opening import open_folder
from trimserve.folder.staging import staged_folder
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.pipeline import export
from trimserve_export.verify import runner
from trimserve_export.verify.result import Check, VerifyResult

pytestmark = pytest.mark.export
PASSED = VerifyResult((Check("files", True, None, "as a test says"),))


@pytest.fixture
def verified(tmp_path):
    """A function that exports with so many ids, and what `verify` would record of the first such folder."""
    source = resolve_model(static_model(tmp_path / "model"))

    def make(last):
        kept = np.union1d(structural_ids(source), np.arange(10, last)).tolist()
        export(source, make_vocab(kept, source.vocab_size), tmp_path / "out", overwrite=True)
        return SimpleNamespace(folder=open_folder(tmp_path / "out"), source=source)

    return make


def test_card_and_manifest_say_the_result_and_agree(verified):
    context = verified(20)
    runner._store(context, PASSED)
    path = context.folder.path
    assert read_manifest(path).verification["ok"] is True
    assert "README.md" in read_manifest(path).files
    assert (path / "README.md").read_text() != ""
    open_folder(path)
    before = tree(path)
    runner._store(context, PASSED)  # the same again: nothing changes
    assert tree(path) == before


def test_nothing_is_recorded_in_a_folder_that_replaced_the_verified_one(verified, caplog):
    context = verified(20)
    path = verified(30).folder.path
    before = tree(path)
    with caplog.at_level(logging.WARNING):
        runner._store(context, PASSED)
    assert tree(path) == before
    assert "another export has replaced it meanwhile" in caplog.text


def test_nothing_is_recorded_while_an_export_is_about_to_replace_the_folder(verified, caplog):
    context = verified(20)
    path = context.folder.path
    before = tree(path)
    with staged_folder(path, overwrite=True) as staging, caplog.at_level(logging.WARNING):
        runner._store(context, PASSED)
        assert tree(path) == before
        (staging / "trimserve.json").write_bytes(before["trimserve.json"])
    assert "is writing" in caplog.text


def test_a_link_to_a_blob_of_the_hubs_cache_is_replaced_and_the_blob_is_not_changed(verified, tmp_path):
    context = verified(20)
    path = context.folder.path
    before = (path / "README.md").read_bytes(), (path / "trimserve.json").read_bytes()
    for number, name in enumerate(("README.md", "trimserve.json")):
        (path / name).rename(tmp_path / f"blob{number}")
        (path / name).symlink_to(f"../blob{number}")
    runner._store(context, PASSED)
    assert ((tmp_path / "blob0").read_bytes(), (tmp_path / "blob1").read_bytes()) == before
    assert read_manifest(path).verification is not None
    open_folder(path)
