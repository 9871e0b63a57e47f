"""A folder of links, as the cache of the hub has it: `snapshots/REVISION/NAME` -> `../../blobs/HASH`."""

import hashlib
import os
import shutil

import pytest

pytest.importorskip("torch")

from tests.support.served_models import FILES, KINDS, answers, told
from trimserve import load
from trimserve.errors import MismatchError

pytestmark = pytest.mark.export


@pytest.fixture(scope="module", params=FILES)
def folder(request, tmp_path_factory):
    path = KINDS[request.param].export(tmp_path_factory.mktemp(request.param))
    return request.param, path, answers(request.param, path)


def link(path, root, *, relative=True):
    """The folder as links to blobs."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in path.rglob("*"):
        if file.is_file():
            blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            place = snapshot / file.relative_to(path)
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent) if relative else blob)
    return snapshot


@pytest.mark.parametrize("relative", [True, False])
def test_the_hubs_cache_is_a_folder(folder, tmp_path, relative):
    kind, path, said = folder
    assert answers(kind, link(path, tmp_path, relative=relative)) == said


def test_it_loads_by_a_relative_path_and_another_folder_later(folder, tmp_path, monkeypatch):
    kind, path, said = folder
    link(path, tmp_path)
    monkeypatch.chdir(tmp_path / "snapshots")
    model = load("abc", threads=1)
    monkeypatch.chdir("/")
    assert told(kind, model) == said


def test_a_link_to_the_folder_and_a_link_elsewhere(folder, tmp_path):
    kind, path, said = folder
    (tmp_path / "current").symlink_to(path)
    assert answers(kind, tmp_path / "current") == said
    copy = shutil.copytree(path, tmp_path / "copy")
    for name in ("config.json", "vocab_map.safetensors", "cold_rows.safetensors"):
        (tmp_path / name).write_bytes((copy / name).read_bytes())
        (copy / name).unlink()
        (copy / name).symlink_to(tmp_path / name)
    if kind in ("masks", "sentence"):  # no graph reads these
        assert answers(kind, copy) == said
    (tmp_path / "config.json").write_bytes(b"x" * (tmp_path / "config.json").stat().st_size)
    with pytest.raises(MismatchError, match=r"config\.json has changed"):
        load(copy)


def test_weights_in_another_folder_than_their_graph_are_refused_in_a_sentence(folder, tmp_path):
    _, path, _ = folder
    copy = shutil.copytree(path, tmp_path / "copy")
    data = [file for file in copy.iterdir() if file.name.endswith("model.onnx_data")]
    if not data:
        pytest.skip("the graph of this kind holds its weights")
    for file in data:
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    with pytest.raises(MismatchError, match=r"links to files in different folders.*cp -rL"):
        load(copy)


def test_a_link_to_nothing_is_a_missing_file(folder, tmp_path):
    _, path, _ = folder
    snapshot = link(path, tmp_path)
    (snapshot / "config.json").resolve().unlink()
    with pytest.raises(MismatchError, match=r"config\.json is listed .* but missing"):
        load(snapshot)
