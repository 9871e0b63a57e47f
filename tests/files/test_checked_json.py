from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest

from trimserve.errors import MismatchError
from trimserve.files.checked_json import convert_json, parse_json, read_json


@dataclass(frozen=True, slots=True)
class Entry:
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str = ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[NaN]", "NaN is not a number"),
        ("[1e999]", "beyond float64"),
        ('["\\ud800"]', "surrogates"),
        (b'["\xff"]', "utf-8"),
        ("", "Expecting value"),
        ("[1" + "0" * 5000 + "]", "digits"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(MismatchError, match=words) as caught:
        parse_json(text, "x.json")
    assert str(caught.value).startswith("x.json is ")


def test_what_passes(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + '{"a": "é\\ud83d\\ude00"}'.encode())
    assert read_json(tmp_path / "x.json") == {"a": "é😀"}
    assert parse_json("[Infinity]", "x", finite=False) == [float("inf")]


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    with pytest.raises(MismatchError, match="more than 4 bytes"):
        read_json(tmp_path / "x.json", most_bytes=4)


def test_converts_to_a_dataclass():
    assert convert_json({"bytes": 3}, Entry, "x") == Entry(3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"bytes": -1}, r"bytes"),
        ({"bytes": "3"}, r"bytes"),
        ({"bytes": True}, r"bytes"),
        ({}, r"bytes"),
        ({"bytes": 3, "more": 1}, "'more'"),
        ([], "Expected `object`"),
    ],
)
def test_conversion_names_the_place(content, words):
    with pytest.raises(MismatchError, match=words):
        convert_json(content, Entry, "x")
