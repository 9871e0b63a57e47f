"""Sessions: what is asked of ONNX Runtime, and what is said when it cannot be had."""

import sys

import pytest

from trimserve.errors import MismatchError, MissingExtraError, UsageError
from trimserve.runtime.session import open_session, prepacks

runtime = pytest.importorskip("onnxruntime")


class Asked:
    """Stands in for InferenceSession and keeps what it was asked for."""

    def __init__(self, path, options, providers):
        self.path, self.options, self.providers = path, options, providers


@pytest.fixture
def fake_cuda(monkeypatch):
    """An onnxruntime that says it was built for CUDA; nothing runs."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime, "get_available_providers", lambda: names)
    monkeypatch.setattr(runtime, "InferenceSession", Asked)


@pytest.mark.usefixtures("fake_cuda")
def test_cuda_comes_before_the_cpu_and_takes_no_more_memory_than_asked(tmp_path):
    session = open_session(tmp_path / "model.onnx", device="cuda", threads=3)
    (cuda, settings), cpu = session.raw.providers
    assert (cuda, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert settings["arena_extend_strategy"] == "kSameAsRequested"
    assert session.raw.options.intra_op_num_threads == 3


@pytest.mark.usefixtures("fake_cuda")
def test_the_cpu_is_alone_where_it_is_asked_for(tmp_path):
    assert open_session(tmp_path / "model.onnx").raw.providers == ["CPUExecutionProvider"]


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("prepack", [True, False])
def test_one_copy_of_each_weight_is_asked_for(tmp_path, prepack):
    entry = open_session(tmp_path / "m.onnx", prepack=prepack).raw.options.get_session_config_entry
    assert entry("session.disable_prepacking") == ("0" if prepack else "1")
    assert entry("optimization.constant_folding_max_output_size_in_bytes") == str(1 << 20)
    assert entry("session.intra_op.allow_spinning") == "0"


def test_a_missing_cuda_provider_names_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"pip install 'trimserve\[gpu\]'"):
        open_session(tmp_path / "model.onnx", device="cuda")


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        open_session(tmp_path / "model.onnx", device="tpu")


def test_a_missing_onnxruntime_names_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[cpu\]'"):
        open_session(tmp_path / "model.onnx")


def test_a_damaged_graph_is_one_sentence(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(MismatchError, match=r"model\.onnx cannot be loaded") as caught:
        open_session(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantized", "low_memory", "packed"),
    [(False, False, True), (False, True, False), (True, False, True), (True, True, True)],
)
def test_packed_copies_go_only_where_the_kernels_do_without(caplog, quantized, low_memory, packed):
    caplog.set_level("INFO")
    assert prepacks(quantized=quantized, low_memory=low_memory) is packed
    assert f"packed copies {'on' if packed else 'off'}" in caplog.text
