"""`import trimserve` is light: nothing heavy comes with it, whatever is installed."""

import importlib
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import trimserve

HEAVY = (
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "pyarrow",
    "huggingface_hub",
    "jinja2",
    "trimserve_export",
)


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in sys.modules of a fresh interpreter after one statement."""
    code = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_import_leaves_heavy_packages_unloaded():
    assert loaded_after("import trimserve").isdisjoint(HEAVY)


def test_public_names_are_imported_when_they_are_used():
    assert loaded_after("import trimserve\ndir(trimserve)").isdisjoint({*HEAVY, "numpy", "tokenizers"})
    # Nor does any of them drag the export toolchain in.
    loaded = loaded_after("import trimserve\n[getattr(trimserve, name) for name in trimserve.__all__]")
    assert {"numpy", "tokenizers"} <= loaded
    assert loaded.isdisjoint(HEAVY)
    assert set(trimserve.__all__) <= set(dir(trimserve))
    with pytest.raises(AttributeError, match="'trimserve' has no attribute 'nothing'"):
        _ = trimserve.nothing


def test_help_says_what_a_generator_takes():
    text = pydoc.render_doc(trimserve.Generator, renderer=pydoc.plaintext)
    assert "class Generator" in text
    assert "generate(" in text
    assert "GenerationOptions" in text
    assert "temperature" in pydoc.render_doc(trimserve.GenerationOptions, renderer=pydoc.plaintext)
    assert "show_progress_bar" in pydoc.render_doc(trimserve.Encoder.encode, renderer=pydoc.plaintext)


FACES = {
    "trimserve.corpus": "Corpus",
    "trimserve.counting": "count_corpus",
    "trimserve.encoder": "Encoder",
    "trimserve.engine": "Engine",
    "trimserve.exact": "ExactChecker",
    "trimserve.finetune": "restore",
    "trimserve.folder": "TrimmedFolder",
    "trimserve.generation": "Generator",
    "trimserve.profiles": "Profile",
    "trimserve.reporting": "gather",
    "trimserve.selection": "select",
    "trimserve.text": "Codec",
    "trimserve.vocab": "VocabMap",
}


@pytest.mark.parametrize("package", FACES)
def test_public_packages_give_their_names_lazily(package):
    assert loaded_after(f"import {package}").isdisjoint({*HEAVY, "tokenizers"})
    face = importlib.import_module(package)
    assert FACES[package] in face.__all__
    assert all(getattr(face, name) is not None for name in face.__all__)
    assert set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'nothing'"):
        _ = face.nothing


def test_help_of_every_command_leaves_heavy_packages_unloaded():
    statement = (
        "import contextlib, io\n"
        "from trimserve.cli.main import COMMANDS, main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert [main([command, '--help']) for command in COMMANDS] == [0] * len(COMMANDS)"
    )
    assert loaded_after(statement).isdisjoint(HEAVY)


def test_suite_is_collected_by_a_light_install():
    code = """
import sys
import pytest
EXTRAS = {"torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxruntime", "ml_dtypes", "jinja2"}
EXTRAS |= {"starlette", "uvicorn", "prometheus_client", "llguidance", "openai"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "tests"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
