"""Other tools beside ours: their environments, who can take part, and what is compared."""

import sys

import pytest

from bench import arena, segmentation
from bench.memory import run as memory
from bench.peers import environments as peer_environments
from bench.peers import run as peers
from bench.peers import tables as peer_tables
from bench.peers import tools as peer_tools
from bench.peers.environments import CannotRunError, Environment


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(peer_environments, "FOLDER", tmp_path / "peers")
    return tmp_path / "peers"


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("folder")
def test_a_tool_without_its_python_says_so():
    with pytest.raises(CannotRunError, match=r"needs Python 9\.8 or later, before 9\.9, and none"):
        peer_environments.interpreter(Environment("some", (), pythons=((9, 8), (9, 9))))


@pytest.mark.skipif(sys.platform == "win32", reason="makes scripts with a shebang")
@pytest.mark.usefixtures("folder")
def test_a_name_on_the_path_that_does_not_run_is_passed_over(monkeypatch, tmp_path):
    program(tmp_path / "bin" / "python9.8", "import sys; sys.exit('not chosen for this shell')")
    good = program(tmp_path / "pyenv" / "versions" / "9.8.1" / "bin" / "python9.8", "print(9, 8)")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert peer_environments._base(Environment("some", (), pythons=((9, 8), (9, 9)))) == str(good)


def test_an_environment_is_made_again_when_its_requirements_change(folder, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        if "venv" in command:
            (folder / "some").mkdir(parents=True)
        return peer_environments.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(peer_environments, "_base", lambda _: "python")
    monkeypatch.setattr(peer_environments.subprocess, "run", run)
    for requirements in (("a==1",), ("a==1",), ("a==2",)):
        peer_environments.interpreter(Environment("some", requirements))
    assert [command[-1] for command in commands if "pip" in command] == ["a==1", "a==2"]


def test_a_failed_installation_is_told_by_its_last_line(folder, monkeypatch):
    def run(command, **_):
        folder.joinpath("some").mkdir(parents=True, exist_ok=True)
        return peer_environments.subprocess.CompletedProcess(command, 1, "", "much\nno such package\n")

    monkeypatch.setattr(peer_environments, "_base", lambda _: "python")
    monkeypatch.setattr(peer_environments.subprocess, "run", run)
    with pytest.raises(CannotRunError, match="cannot be installed: no such package"):
        peer_environments.interpreter(Environment("some", ("a",)))
    assert not (folder / "some" / ".ready").exists()


def test_tools_that_cannot_run_are_named_with_the_reason(monkeypatch, tmp_path):
    def fail(*_):
        raise CannotRunError("not today")

    monkeypatch.setattr(peer_tools, "run", fail)
    found, reasons = peer_tools.Workshop(tmp_path, "int4", 2).contenders()
    assert list(found) == [name for name in found if name.startswith("trimserve")]
    assert len(found) == 3
    assert reasons == {
        "optimum 0.1.0, untrimmed": "not today",
        "ONNX Runtime alone, untrimmed": "needs optimum's export",
        "onnxruntime-genai 0.18.0, untrimmed": "not today",
        "onnxsim 0.8.1, pruned": "does not cut a quantised head",
    }


def test_ids_agree_up_to_the_first_difference():
    assert peers._same({"ids": [1, 2, 3, 4]}, {"ids": [1, 2, 9, 4]}) == 0.5
    assert peers._same({"ids": [1, 2]}, {"ids": [1, 2, 3]}) == 1.0


def test_a_reason_of_one_number_format_names_it():
    rows = [
        {"precision": "fp32", "cannot_run": {"a": "needs a GPU"}},
        {"precision": "int4", "cannot_run": {"a": "needs a GPU", "b": "cuts no blocks"}},
    ]
    assert peer_tables._reasons(rows) == {"a": ["needs a GPU"], "b": ["int4: cuts no blocks"]}


def test_segments_are_compared_with_the_original_tokenizers():
    original = {"rows": 9, "tokens": 4, "unknown": 0, "pieces": [["ab", "c"], ["d", "e"]]}
    cut = {"rows": 5, "tokens": 5, "unknown": 1, "pieces": [["a", "b", "c"], ["d", "e"]]}
    found = segmentation.compared({segmentation.ORIGINAL: original, "tool": cut})
    assert found["tool"] == {
        "rows": 5,
        "tokens": 5,
        "unknown": 1,
        "identical_texts": 0.5,
        "fertility": 1.25,
    }
    assert found[segmentation.ORIGINAL]["identical_texts"] == 1


def test_arenas_of_all_sessions_add_up_by_provider(tmp_path):
    def event(provider, size):
        return f'{{"args": {{"provider": "{provider}", "mem_arena_held": "{size}"}}}}'

    first = ", ".join([event("CUDA", 5), event("CUDA", 9), event("CPU", 1), '{"args": {}}', "{}"])
    (tmp_path / "a.json").write_text(f"[{first}]")
    (tmp_path / "b.json").write_text(f"[{event('CUDA', 2)}]")
    assert arena.held(tmp_path.iterdir()) == {"CUDA": 11, "CPU": 1}


def test_a_real_sessions_profile_says_what_its_arena_holds(tmp_path):
    onnx, np = pytest.importorskip("onnx"), pytest.importorskip("numpy")
    pytest.importorskip("onnxruntime")
    from trimserve.runtime.session import open_session

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Exp", ["x"], ["y"]), onnx.helper.make_node("Exp", ["y"], ["z"])],
        "twice",
        [value("x", onnx.TensorProto.FLOAT, ["n"])],
        [value("z", onnx.TensorProto.FLOAT, ["n"])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    with arena.profiled_sessions(profiles):
        session = open_session(tmp_path / "model.onnx", threads=1)
        session.run(None, {"x": np.zeros(1 << 20, np.float32)})
        del session
    found = arena.held(profiles.iterdir())
    if not found:
        pytest.skip("this onnxruntime does not note its arenas")
    assert found["CPUExecutionProvider"] >= 4 << 20
    assert len(list(profiles.iterdir())) == 1
    open_session(tmp_path / "model.onnx", threads=1)  # no profile any more
    assert len(list(profiles.iterdir())) == 1


def test_each_part_of_memory_is_what_it_added():
    sizes = dict(zip((*memory.STAGES, memory.EXACT), (3, 10, 20, 25, 75, 90, 91, 100), strict=True))
    row = {"stages": {stage: {"anonymous": size} for stage, size in sizes.items()}}
    assert list(memory.added(row).values()) == [3, 7, 10, 5, 50, 15, 1, 9]
