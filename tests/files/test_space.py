"""Room on a disk, asked for before the work."""

import pytest

pytest.importorskip("torch")

from tests.support.exports import KEPT, V
from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.errors import TrimserveError
from trimserve.files import space
from trimserve.files.space import check_space
from trimserve_export.pipeline import export

pytestmark = pytest.mark.export


class Disk:
    """A disk with so many free bytes."""

    def __init__(self, free):
        self.free = free


def test_work_that_cannot_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    source = save_model("bert_encoder", tmp_path / "model", rows=V)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: Disk(4096))
    with pytest.raises(TrimserveError, match=r"the trimmed checkpoint takes at least .* has 4.1 kB free"):
        export(source, make_vocab(KEPT, V), tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_needed_is_no_more_than_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda place: Disk(7) if place == tmp_path else Disk(0))
    check_space(tmp_path / "a" / "b", 7, "it")
    with pytest.raises(TrimserveError):
        check_space(tmp_path / "a" / "b", 8, "it")
