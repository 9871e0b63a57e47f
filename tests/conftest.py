"""Fixtures for every test module; makers of tiny tokenizers are in `tests.support.tiny_tokenizers`."""

import os
import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from bench.realdata import VARIABLE, data_folder
from tests.support import legs, traces
from tests.support.counting import shown as counted
from tests.support.realdata import hide, shown, unmarked
from tests.support.tiny_tokenizers import KINDS, save_model_folder

# A busy machine is slow now and then; that is no failure.
settings.register_profile("trimserve", deadline=None)
settings.load_profile("trimserve")

# Helper modules hold no tests, and some of them need the [export] extra as soon as they are imported.
collect_ignore = ["support"]


def is_there(package: str) -> bool:
    """Whether a package can be imported; a test hides some by an error in place of their absence."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def pytest_configure(config: pytest.Config) -> None:
    """Hide the real data, so that what a test needs is the same on every machine; store what is traced."""
    hide()
    if traces.VARIABLE not in os.environ:
        store = traces.make_store()
        config.add_cleanup(lambda: shutil.rmtree(store, ignore_errors=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Export the same model once."""
    if item.get_closest_marker("export") and is_there("torch"):
        traces.remember_traces()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that asks for the data and says so nowhere; skip what needs optimum-onnx without it."""
    if wrong := unmarked(items):
        raise pytest.UsageError(f"uses data_dir without the mark realdata: {', '.join(wrong)}")
    for item in items:
        legs.mark(item)
    if not is_there("optimum"):
        skip = pytest.mark.skip(reason="needs optimum-onnx (make test-optimum)")
        for item in items:
            if any(mark.kwargs.get("only") for mark in item.iter_markers("optimum")):
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what the tests of tests/hardening counted: pytest hides what passing tests print."""
    reports = (report for found in terminalreporter.stats.values() for report in found)
    if lines := list(dict.fromkeys(counted(reports))):
        terminalreporter.section("attempts that were counted")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Show the real data to a test with the mark realdata, its fixtures and what it starts."""
    with shown() if item.get_closest_marker("realdata") else nullcontext():
        return (yield)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder without weights for each kind of tokenizer, by kind; read-only by agreement."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model_folder(kind, root / kind) for kind in KINDS}


@pytest.fixture(params=list(KINDS))
def model_folder(request, model_folders) -> Path:
    """One model folder after the other: the test runs for each kind of tokenizer."""
    return model_folders[request.param]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora, tokenizers and models; skips the test where it is absent."""
    path = data_folder()
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set {VARIABLE}")
    return path


@pytest.fixture(scope="module")
def one_thread():
    """Train tiny models with one torch thread: more cost them more than they bring."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def traced_anew():
    """Have every model traced: the test changes how that is done."""
    traces.forgetful.append("test")
    yield
    traces.forgetful.pop()


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Give a family's tiny model, its trimmed folder and full graph, each made once: `exported("llama")`."""
    pytest.importorskip("torch")
    from tests.support.exports import Exports

    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def translators(tmp_path_factory):
    """Give a family's tiny encoder-decoder and its trimmed folder, each made once: `translators("t5")`."""
    pytest.importorskip("torch")
    from tests.support.translators import make_translator

    made = {}

    def get(family: str):
        if family not in made:
            made[family] = make_translator(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Give the trimmed folder of a kind of `tests.support.served_models`, `served("tied")`."""
    pytest.importorskip("torch")
    from tests.support.served_models import KINDS

    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = KINDS[name].export(tmp_path_factory.mktemp(name))
        return made[name]

    return get
