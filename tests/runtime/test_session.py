"""Sessions: what is asked of ONNX Runtime, and what is said when it cannot be had."""

import gc
import sys
import timeit

import numpy as np
import pytest

from trimserve.errors import MismatchError, MissingExtraError, TrimserveError, UsageError
from trimserve.process import memory, release_free_memory
from trimserve.runtime.session import MemoryPlan, Session, open_session, plan_memory

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


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("quantized", [False, True])
def test_packed_copies_go_only_where_the_kernels_do_without(caplog, quantized, memory):
    caplog.set_level("INFO")
    plan = plan_memory(memory, quantized=quantized)
    assert plan == MemoryPlan(prepack=quantized or memory == "fast", arena=memory == "fast")
    assert (
        f"packed copies {'on' if plan.prepack else 'off'}, arena {'on' if plan.arena else 'off'}"
        in caplog.text
    )


@pytest.fixture
def summing(tmp_path):
    """The path of a graph that makes as many zeros as it is asked for, and adds them up."""
    onnx = pytest.importorskip("onnx")
    value, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        onnx.helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
    ]
    inputs, outputs = [value("shape", types.INT64, [1])], [value("sum", types.FLOAT, [])]
    graph = onnx.helper.make_graph(nodes, "summing", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "model.onnx"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters")
@pytest.mark.parametrize(
    ("arena", "trims", "kept"),
    [(True, False, True), (True, True, False), (False, False, False), (False, True, False)],
)
def test_an_arena_gives_back_what_a_long_input_took_when_it_is_told_to(summing, arena, trims, kept):
    session, zeros = open_session(summing, threads=1, arena=arena), 64 << 20
    session.run(None, {"shape": np.array([1], np.int64)})
    gc.collect()  # other tests' sessions do not end meanwhile
    release_free_memory()
    before = memory().anonymous
    (total,) = session.run(None, {"shape": np.array([zeros // 4], np.int64)}, trims=trims)
    assert total == 0
    assert (memory().anonymous - before > zeros // 2) is kept
    assert session.run(None, {"shape": np.array([1], np.int64)}) == [0]  # and it goes on


@pytest.fixture
def reader(tmp_path):
    """A graph that makes as many zeros as it is asked for, and picks entries of a table of three."""
    onnx = pytest.importorskip("onnx")
    value, ints = onnx.helper.make_tensor_value_info, onnx.TensorProto.INT64
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        onnx.helper.make_node("Gather", ["table", "ids"], ["found"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "reader",
        [value("shape", ints, [1]), value("ids", ints, ["n"])],
        [value("zeros", onnx.TensorProto.FLOAT, ["m"]), value("found", ints, ["n"])],
        [onnx.helper.make_tensor("table", ints, [3], [7, 8, 9])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return open_session(tmp_path / "model.onnx", threads=1)


def ways(session):
    """The three ways to run a session."""

    def plain(feeds):
        return session.run(["found", "zeros"], feeds)

    def values(feeds):
        given = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        return [value.numpy() for value in session.run_with_ort_values(["found", "zeros"], given)]

    def bound(feeds):
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in ("found", "zeros"):
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    return {"run": plain, "run_with_ort_values": values, "run_with_iobinding": bound}


@pytest.mark.parametrize("way", ["run", "run_with_ort_values", "run_with_iobinding"])
def test_what_onnxruntime_raises_while_running_is_one_sentence(reader, way, capfd):
    run = ways(reader)[way]
    good = {"shape": np.array([2], np.int64), "ids": np.array([0, 2], np.int64)}
    assert run(good)[0].tolist() == [7, 9]
    with pytest.raises(TrimserveError, match=r"\(out of memory\): give it a shorter text") as caught:
        run(good | {"shape": np.array([1 << 50], np.int64)})
    assert "\n" not in str(caught.value)
    with pytest.raises(
        MismatchError, match=r"cannot run .*model\.onnx \(.*out of data bounds.*\): the file is"
    ):
        run(good | {"ids": np.array([5], np.int64)})
    with pytest.raises(MismatchError, match="cannot run"):
        reader.run(["found"], {"nothing": good["ids"]})
    # Nor does it write lines of its own to stderr, or keep anything of a run that failed.
    assert capfd.readouterr() == ("", "")
    assert run(good)[0].tolist() == [7, 9]
    assert reader._in_use.count == 0


def test_a_graph_that_does_not_fit_in_memory_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception: std::bad_alloc")

    monkeypatch.setattr(runtime, "InferenceSession", refuse)
    with pytest.raises(TrimserveError, match=r"\(out of memory\): free some, or load it with memory='low'"):
        open_session(tmp_path / "model.onnx")


def test_the_border_around_a_run_costs_next_to_nothing(tmp_path):
    """Below two microseconds; the best of many tries, since others use the machine, too."""

    class Quick:
        def run(self, names, _feeds):
            return names

    quick = Quick()
    session = Session(tmp_path / "m.onnx", lambda: quick, device="cpu", threads=1)

    def best(run):
        return min(timeit.repeat(lambda: run(None, None), number=1000, repeat=30)) / 1000

    assert best(session.run) - best(quick.run) < 2e-6
