import pytest

from trimserve.errors import MismatchError
from trimserve.files.inner import inner_path


@pytest.mark.parametrize("name", ["model.onnx", "onnx/model.onnx", "1_Pooling", "a b é.onnx"])
def test_names_within_the_folder(tmp_path, name):
    assert inner_path(tmp_path, name, "x.json") == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a\\b",
        "C:x",
        "C:/x",
        "//host/x",
        "a\0",
        "a\nb",
        "x" * 5000,
    ],
)
def test_names_that_may_lead_out(tmp_path, name):
    with pytest.raises(MismatchError, match="is not a plain name") as caught:
        inner_path(tmp_path, name, "x.json")
    assert "\n" not in str(caught.value)


def test_links(tmp_path):
    cache = tmp_path / "models--a--b"
    blobs, snapshot, elsewhere = cache / "blobs", cache / "snapshots" / "main", tmp_path / "secret"
    for folder in (blobs, snapshot / "onnx", elsewhere):
        folder.mkdir(parents=True)
    (blobs / "aa11").write_text("1")
    (elsewhere / "bb22").write_text("2")
    (snapshot / "config.json").symlink_to("../../blobs/aa11")
    (snapshot / "onnx" / "model.onnx").symlink_to("../../../blobs/aa11")
    (snapshot / "inside").symlink_to("onnx")
    (snapshot / "outside").symlink_to(elsewhere)
    (snapshot / "circle").symlink_to("circle")
    (snapshot / "linked.onnx").symlink_to(elsewhere / "bb22")
    for name in ("config.json", "onnx/model.onnx", "inside", "inside/model.onnx", "linked.onnx"):
        assert inner_path(snapshot, name, "x.json") == snapshot / name
    assert inner_path(snapshot / "onnx", "model.onnx", "x.json").is_file()
    for name in ("outside", "circle"):
        with pytest.raises(MismatchError, match="is a link out of the folder"):
            inner_path(snapshot, name, "x.json")
