import hashlib
import io
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimserve.corpus import documents, reader
from trimserve.corpus.corpus import Corpus, iter_documents
from trimserve.errors import UsageError


def read(*paths, **options):
    return list(iter_documents([str(path) for path in paths], **options))


def test_text_file_is_one_document_with_its_newlines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\ntwo\n\n\tthree \xe2\x82\xac\n")
    (document,) = read(file)
    assert (document.text, document.origin()) == ("one\r\ntwo\n\n\tthree €\n", str(file))


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"t": "two"}\n\xef\xbb\xbf{"t": "three"}\n')
    texts = [document.text for document in read(tmp_path / "a.txt", tmp_path / "b.jsonl", text_column="t")]
    assert texts == ["one\n", "two", "three"]


def test_records_are_documents_and_blank_lines_are_not(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"t": "a\\nb", "n": 1}\n\n{"t": " "}\n{"t": "日本"}', "utf-8")
    found = read(file, text_column="t")
    assert [document.text for document in found] == ["a\nb", " ", "日本"]
    assert found[2].origin() == f"{file}, line 4"


def test_line_separators_inside_a_record_do_not_split_it(tmp_path):
    # str.splitlines would; U+2028 is legal inside a JSON string.
    (tmp_path / "a.jsonl").write_text('{"t": "a\u2028b\x85c"}\n', "utf-8")
    assert [document.text for document in read(tmp_path / "a.jsonl", text_column="t")] == ["a\u2028b\x85c"]


def test_stdin_is_a_document_or_records():
    assert [document.text for document in read("-", stdin=io.BytesIO(b"a\nb\n"))] == ["a\nb\n"]
    records = read("-", stdin=io.BytesIO(b'{"t": "a"}\n{"t": "b"}\n'), text_column="t")
    assert [document.text for document in records] == ["a", "b"]


def test_sources_are_hashed_while_they_are_read(tmp_path):
    text, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes(b"x" * 100)
    records.write_bytes(b'{"t": "y"}\n\n')
    read_from = Corpus([str(text), str(records)], "t")
    assert read_from.total_bytes == 112
    assert len(list(read_from.documents())) == 2
    assert read_from.bytes_read == 112
    expected = [(str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in (text, records)]
    assert [(source.name, source.sha256) for source in read_from.sources] == expected
    assert [source.bytes for source in read_from.sources] == [100, 12]


def test_texts_from_memory_have_a_hash_that_knows_their_borders():
    def digest(texts):
        read_from = Corpus([], texts=iter(texts))
        assert [document.text for document in read_from.documents()] == texts
        return read_from.sources[0].sha256

    assert digest(["ab", "c"]) == digest(["ab", "c"])
    assert digest(["ab", "c"]) != digest(["a", "bc"])


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 20)
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 7)


@pytest.mark.usefixtures("short_parts")
def test_long_document_is_cut_behind_lone_newlines_alone(tmp_path):
    text = "first line\nsecond line\n\nparagraph \nno cut\n- no cut\nyes, 日本\n日本 cut\n"
    file = tmp_path / "a.txt"
    file.write_text(text, "utf-8", newline="")
    found = read(file)
    assert "".join(document.text for document in found) == text
    assert [document.part for document in found] == list(range(len(found)))
    assert [document.text for document in found] == [
        "first line\n",
        "second line\n\nparagraph \nno cut\n- no cut\n",
        "yes, 日本\n日本 cut\n",
    ]


@pytest.mark.usefixtures("short_parts")
def test_document_without_a_place_to_cut_stays_whole(tmp_path):
    text = "x" * 95 + "\n\n" + "y" * 50
    (tmp_path / "a.txt").write_text(text)
    assert [document.text for document in read(tmp_path / "a.txt")] == [text]


@given(st.text(alphabet="ab \n-é日😀", max_size=200))
def test_parts_join_to_the_text_and_border_on_lone_newlines(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "MAX_CHARACTERS", 10)
        parts = [part.text for part in documents.cut_documents(re.findall(r"(?s).{1,7}", text))]
    assert "".join(parts) == text
    for left, right in itertools.pairwise(parts):
        assert re.search(r"\S\n$", left)
        assert re.match(r"\w", right)
    whole = [document.text for document in documents.cut_documents([text])]
    assert whole == [text]


@pytest.mark.usefixtures("short_parts")
def test_the_place_to_cut_does_not_depend_on_the_blocks(tmp_path, monkeypatch):
    text = "alpha beta\ngamma\n\ndelta\nepsilon zeta eta theta iota\nkappa\n" * 3
    (tmp_path / "a.txt").write_text(text)
    found = [document.text for document in read(tmp_path / "a.txt")]
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 1)
    assert [document.text for document in read(tmp_path / "a.txt")] == found
    assert len(found) > 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nth\xffree", "a.txt, line 3: byte 0xff is not UTF-8"),
        ("a.txt", b"one\ncut \xe2\x82", "a.txt, line 2: byte 0xe2 is not UTF-8"),
        ("a.jsonl", b'{"t": "a"}\n{"t": "\xff"}\n', "a.jsonl, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"t": "a"}\n{"t": \n', "a.jsonl, line 2: broken JSON"),
        ("a.jsonl", b'{"x": "a"}\n', "a.jsonl, line 1: no field 't' .found 'x'."),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: no field 't' .found list."),
        ("a.jsonl", b'{"t": null}\n', "a.jsonl, line 1, field 't': is empty .NoneType"),
        ("a.jsonl", b'{"t": "\xed\xa0\xbd"}\n', "a.jsonl, line 1: byte 0xed is not UTF-8"),
        ("a.jsonl", b'{"t": null, "\\u00e9": 1}\n', "a.jsonl, line 1, field 't': is empty .NoneType"),
        ("a.jsonl", b'{"t": 7}\n', "a.jsonl, line 1, field 't': should be text but is int"),
        ("a.jsonl", b'{"t": "\\ud83d"}\n', "a.jsonl, line 1, field 't': holds half a surrogate pair"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'\n{"t": ""}\n', "a.jsonl, line 2, field 't': is empty"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.docx", b"PK", "none of the formats"),
    ],
)
def test_bad_input_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name, text_column="t")
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.usefixtures("short_parts")
def test_undecodable_byte_far_into_a_file_has_the_right_line(tmp_path):
    lines = [f"line {number} é\n".encode() for number in range(50)]
    (tmp_path / "a.txt").write_bytes(b"".join(lines) + b"ab\x80\n")
    with pytest.raises(UsageError, match=r"line 51: byte 0x80"):
        read(tmp_path / "a.txt")


def test_what_cannot_be_a_corpus_is_refused_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": "a"}))
    with pytest.raises(UsageError, match="--text-column"):
        Corpus([str(tmp_path / "a.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no file"):
        Corpus([str(tmp_path / "empty")])
    with pytest.raises(UsageError, match="does not exist"):
        Corpus([str(tmp_path / "none.txt")])
    with pytest.raises(UsageError, match="only once"):
        Corpus(["-", "-"])
    with pytest.raises(UsageError, match="corpus is empty"):
        Corpus([])
