"""Nothing but a command's data comes on stdout, whatever Python or native code prints."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from trimserve.cli.main import main
from trimserve.cli.output import emit, to_json
from trimserve.stdout import data_only, data_stream

_NOISY = """
import os, sys, ctypes
from trimserve.cli import main as module
import argparse, types
command = types.ModuleType("trimserve.cli.commands.stub")
def run(args):
    from trimserve.cli.output import emit
    os.write(1, b"native\\n")  # as Rust and C++ libraries do
    ctypes.CDLL(None).printf(b"held by libc until the process ends\\n")
    print("python")
    {fail}
    emit(args, {{"nan": float("nan"), "text": "日本"}}, "people")
    os.write(1, b"native, after\\n")
    return 0
command.run, command.add_arguments = run, lambda parser: None
sys.modules["trimserve.cli.commands.stub"] = command
module.COMMANDS["stub"] = "a stub"
sys.exit(module.main())
"""


def _program(*words, fail="", **environment):
    return subprocess.run(
        [sys.executable, "-c", _NOISY.format(fail=fail), "stub", *words],
        capture_output=True,
        env=os.environ | environment,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX C library")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_is_one_document_whatever_prints(encoding):
    done = _program("--format", "json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode()) == {"nan": None, "text": "日本"}
    for noise in (b"native\n", b"held by libc", b"python\n", b"native, after"):
        assert noise in done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX C library")
def test_text_for_people_is_as_clean():
    assert _program().stdout == b"people\n"
    failed = _program(fail="from trimserve.errors import UsageError; raise UsageError('no.')")
    assert (failed.stdout, failed.returncode) == (b"", 2)
    assert b"trimserve: no.\n" in failed.stderr


def test_a_program_that_calls_main_gets_its_stdout_back(capfd):
    with data_only(utf8=True):
        os.write(1, b"native\n")
        print("python")
        emit(argparse.Namespace(format="json"), {"a": 1}, "")
    print("afterwards")
    os.write(1, b"native afterwards\n")
    found = capfd.readouterr()
    assert found.out == '{"a": 1}\nafterwards\nnative afterwards\n'
    assert found.err == "native\npython\n"
    assert data_stream() is sys.stdout


def test_stdout_comes_back_after_an_error(capsys):
    outer = sys.stdout
    assert main(["inspect", "no/such/folder-anywhere"]) != 0
    assert sys.stdout is outer
    assert capsys.readouterr().out == ""


def test_json_has_no_words_for_infinity():
    document = {"a": [1.0, float("inf"), {"b": (float("-inf"), None)}]}
    assert json.loads(to_json(document)) == {"a": [1.0, None, {"b": [None, None]}]}
