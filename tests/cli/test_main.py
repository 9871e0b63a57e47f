import argparse
import errno
import json
import os
import platform
import shlex
import subprocess
import sys
import types
from importlib import metadata

import pytest

from trimserve import __version__
from trimserve.cli import main as main_module
from trimserve.cli.main import COMMANDS, main
from trimserve.cli.output import emit
from trimserve.errors import (
    MismatchError,
    MissingExtraError,
    TrimserveError,
    UnknownIdError,
    UnsupportedModelError,
    UsageError,
    require,
)


@pytest.fixture
def command(monkeypatch):
    """A subcommand `stub` whose run does what the test says."""
    module = types.ModuleType("trimserve.cli.commands.stub")
    module.add_arguments = lambda parser: parser.add_argument("word", nargs="?")
    module.run = lambda _: 0
    monkeypatch.setitem(sys.modules, "trimserve.cli.commands.stub", module)
    monkeypatch.setitem(COMMANDS, "stub", "does what a test says")
    return module


def raising(error):
    def run(_):
        raise error

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_common_options(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--format {human,json}" in out
    assert "--verbose" in out


def test_version_and_no_command(capsys):
    assert main(["--version"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"trimserve {__version__} (Python {platform.python_version()}, ")
    assert f"tokenizers {metadata.version('tokenizers')}, numpy {metadata.version('numpy')})" in told
    assert main([]) == 2
    assert main(["unheard-of"]) == 2
    assert main(["profile", "--unheard-of"]) == 2
    assert capsys.readouterr().out == ""


def test_version_names_what_is_missing_and_what_stands_for_it(monkeypatch):
    monkeypatch.setattr(main_module, "_installed", {"onnxruntime-gpu": "1.31", "numpy": "2"}.get)
    assert main_module.versions().endswith(", onnxruntime-gpu 1.31, no tokenizers, numpy 2)")


def test_completion_of_every_command(capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(f"_trimserve_{name}" in script for name in COMMANDS)
    assert "--held-out" in script


def test_completion_says_what_it_needs_and_which_shells_there_are(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert "pip install 'trimserve[completion]'" in capsys.readouterr().err
    assert main(["--print-completion", "powershell"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("say it."), 2, "say it."),
        (MismatchError("say it."), 1, "say it."),
        (UnsupportedModelError("say it."), 1, "say it."),
        (UnknownIdError("say it."), 1, "say it."),
        (TrimserveError("say it."), 1, "say it."),
        (KeyboardInterrupt(), 130, "interrupted; no file was written."),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 1, "No such file: a.txt."),
        (PermissionError(errno.EACCES, "Permission denied", "b"), 1, "Permission denied: b."),
        (
            OSError(errno.ENOSPC, "No space left", "c"),
            1,
            "No space left: c. Free some space and run it again.",
        ),
        (OSError("odd"), 1, "odd."),
    ],
)
def test_errors_become_one_sentence_and_a_code(command, capsys, error, code, message):
    command.run = raising(error)
    assert main(["stub"]) == code
    assert capsys.readouterr() == ("", f"trimserve: {message}\n")


def test_programming_errors_are_not_hidden(command):
    command.run = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["stub"])


def test_debug_shows_the_trace(command, capsys, monkeypatch):
    monkeypatch.setenv("TRIMSERVE_DEBUG", "1")
    command.run = raising(MismatchError("say it."))
    assert main(["stub"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_code_of_the_command_is_passed_on(command):
    command.run = lambda args: 3 if args.word == "fail" else 0
    assert main(["stub", "fail"]) == 3
    assert main(["stub"]) == 0


def test_only_the_called_command_is_imported():
    code = (
        "import sys; from trimserve.cli.main import main; main(['select', '--help']);"
        "print([name for name in sys.modules if name.startswith('trimserve.cli.commands.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "trimserve.cli.commands.select" in loaded
    others = ("profile", "export", "run", "verify")
    assert not any(f"trimserve.cli.commands.{name}'" in loaded for name in others)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("arguments", [["--version"], ["select", "--help"], ["profile", "{file}"]])
def test_a_reader_that_goes_away_is_no_error_message(tmp_path, model_folders, arguments):
    (tmp_path / "a.txt").write_text("a cat\n")
    if "{file}" in arguments:
        model = str(model_folders["wordpiece"])
        arguments = ["profile", str(tmp_path / "a.txt"), "-m", model, "-o", str(tmp_path / "p")]
    command = [sys.executable, "-m", "trimserve", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    running.wait(60)


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_closed_stdout_and_stdin_are_no_traceback(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m trimserve"
    for words in ("--version", f"run {tmp_path} -"):
        done = subprocess.run(["sh", "-c", f"{command} {words} >&- <&-"], capture_output=True, text=True)
        assert "Traceback" not in done.stderr


def test_emit_writes_one_json_document_or_text(capsys):
    emit(argparse.Namespace(format="json"), {"text": "日本"}, "for people")
    assert json.loads(capsys.readouterr().out) == {"text": "日本"}
    emit(argparse.Namespace(format="human"), {}, "for people")
    assert capsys.readouterr().out == "for people\n"


def test_missing_extra_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "absent_package", None)
    with pytest.raises(MissingExtraError) as caught:
        require("absent_package.module", extra="cpu", purpose="trimserve run")
    assert "trimserve run needs absent_package" in str(caught.value)
    assert "pip install 'trimserve[cpu]'" in str(caught.value)
    assert require("json", extra="cpu", purpose="x") is json


def test_errors_can_be_caught_as_what_they_are():
    assert issubclass(UsageError, ValueError)
    assert issubclass(MissingExtraError, ImportError)
    assert UsageError.exit_code == 2
    assert main_module.TrimserveError is TrimserveError


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("other", ["raise", "raise ImportError('initialization failed') from None"])
def test_a_signal_ends_a_command_whatever_a_library_makes_of_it(name, code, other):
    program = f"""
import os, signal, sys, types
# A shell that starts a job in the background lets it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from trimserve.cli import main as module
def run(args):
    try:
        os.kill(os.getpid(), signal.{name})
        signal.pause()
    except KeyboardInterrupt:
        {other}
stub = types.ModuleType("trimserve.cli.commands.stub")
stub.add_arguments, stub.run = lambda parser: None, run
sys.modules[stub.__name__] = stub
module.COMMANDS["stub"] = "does what a test says"
sys.argv = ["trimserve", "stub"]
sys.exit(module.main())
"""
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (code, "trimserve: interrupted; no file was written.\n")
