"""A folder that is replaced while it is loaded, or after: old and new never mix."""

import os
import shutil
import sys

import pytest

pytest.importorskip("torch")

from tests.support.counting import Counter
from tests.support.served_models import FILES, KINDS, answers, told
from trimserve import load
from trimserve.errors import MismatchError
from trimserve.files import held

pytestmark = pytest.mark.export
onnxruntime = pytest.importorskip("onnxruntime")

# Each n-th moment of a load is tried.
EVERY = {"chat": 2, "masks": 4, "seq2seq": 4, "sentence": 4}


@pytest.fixture(params=[held.SMALL_BYTES, 0], autouse=True)
def small_bytes(request, monkeypatch):
    """The tiny folders' files are all read at load; with 0 they are held open as larger ones are."""
    monkeypatch.setattr(held, "SMALL_BYTES", request.param)
    return request.param


@pytest.fixture(scope="module", params=FILES)
def pair(request, tmp_path_factory):
    """Two folders of one kind that answer differently, and what each says."""
    root = tmp_path_factory.mktemp(request.param)
    folders = [KINDS[request.param].export(root / str(seed), seed) for seed in (0, 1)]
    said = [answers(request.param, folder) for folder in folders]
    assert said[0] != said[1]
    return request.param, folders, said


class Swap:
    """Replaces a folder by another, as `export --overwrite` does: the old one is gone afterwards."""

    def __init__(self, root, old, new):
        self.target, self._new, self._gone = root / "served", root / "new", root / "gone"
        shutil.copytree(old, self.target)
        shutil.copytree(new, self._new)
        self.done = False

    def __call__(self):
        self.done = True
        self.target.rename(self._gone)
        self._new.rename(self.target)
        shutil.rmtree(self._gone)


@pytest.fixture(scope="module")
def on_open():
    """Call something at each opening of a file: an audit hook stays for as long as the process."""
    calls = []

    def hook(event, arguments):
        if event == "open" and calls:
            calls[0](os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "")

    sys.addaudithook(hook)
    yield calls
    calls.clear()


def test_a_loaded_model_stays_what_it_was(pair, tmp_path):
    kind, (old, new), said = pair
    swap = Swap(tmp_path, old, new)
    model = load(swap.target, threads=1)
    swap()
    assert told(kind, model) == said[0]
    assert answers(kind, swap.target) == said[1]


def test_a_model_that_was_asked_before_stays_what_it_was(pair, tmp_path):
    kind, (old, new), said = pair
    swap = Swap(tmp_path, old, new)
    model = load(swap.target, threads=1)
    assert told(kind, model) == said[0]
    swap()
    assert told(kind, model) == said[0]


def test_a_folder_replaced_while_it_is_loaded_is_the_old_or_the_new_one(pair, tmp_path, on_open):
    kind, (old, new), said = pair
    counter = Counter(f"replacements of {kind} while it is loaded", "none")
    moment = 0
    while True:
        swap, seen = Swap(tmp_path / str(moment), old, new), 0
        names = {path.name for path in old.rglob("*")} | {swap.target.name}

        def watch(name, swap=swap, names=names, moment=moment):
            nonlocal seen
            if name.rpartition("/")[2] in names and not swap.done:
                seen += 1
                if seen > moment:
                    swap()

        on_open[:] = [watch]
        try:
            model = load(swap.target, threads=1)
        finally:
            on_open.clear()
        if not swap.done:
            break
        answer = told(kind, model)
        found = ("the old one", "the new one")[said.index(answer)] if answer in said else "mixture"
        counter.add(found, f"moment {moment}", found if found == "mixture" else None)
        shutil.rmtree(swap.target)
        moment += EVERY[kind]
    counter.check()
    assert counter.tried


@pytest.mark.parametrize("after", [False, True])
def test_a_folder_replaced_while_its_graph_is_opened_is_the_old_one(pair, tmp_path, monkeypatch, after):
    kind, (old, new), said = pair
    swap, real = Swap(tmp_path, old, new), onnxruntime.InferenceSession

    def opening(path, *arguments, **options):
        if after:
            session = real(path, *arguments, **options)
        if not swap.done:
            swap()
        return session if after else real(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opening)
    assert answers(kind, swap.target) == said[0]


def test_a_file_that_is_written_into_before_it_is_mapped_is_noticed(pair, tmp_path, small_bytes):
    kind, (old, _), said = pair
    shutil.copytree(old, tmp_path / "served")
    model = load(tmp_path / "served", threads=1)
    name = "cold_rows.safetensors"
    status = (tmp_path / "served" / name).stat()
    with (tmp_path / "served" / name).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    os.utime(tmp_path / "served" / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    if kind == "chat" and not small_bytes:
        with pytest.raises(MismatchError, match=r"cold_rows\.safetensors was changed after it was opened"):
            KINDS[kind].answers(model)
    elif small_bytes:
        assert told(kind, model) == said[0]
