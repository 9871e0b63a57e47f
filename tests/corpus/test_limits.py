"""What is read of a corpus is bounded, and is what lies there: long lines, loops, pipes, changing files."""

import gzip
import os

import pytest

from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import Faults, Reading
from trimserve.corpus.page_headers import Page, most_bytes
from trimserve.corpus.reader import SliceReader
from trimserve.corpus.slices import plan_slices
from trimserve.errors import MismatchError, UsageError


def texts(path, column=None, **options):
    corpus = Corpus([str(path)], reading=Reading(column, **options))
    return [document.text for document in corpus.documents()]


@pytest.mark.parametrize(
    ("name", "content", "unit", "message"),
    [
        (
            "a.jsonl",
            b'{"t": "a"}\n{"t": "' + b"x" * 100 + b'"}\n',
            "document",
            "line 2: a line of more than 99",
        ),
        ("a.csv", b't\nab\n"' + b"x\n" * 60 + b'"\n', "document", "line 3: a row of more than 99"),
        ("a.csv", b"t" * 200, "document", "line 1: a row of more than 99"),
        ("a.txt", b"ok\n" + b"x" * 101 + b"\nok\n", "line", "a line of more than 99"),
        ("a.txt", b"xxxxxxxxx\n" * 11, "paragraph", "a paragraph of more than 99"),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_held(tmp_path, name, content, unit, message):
    (tmp_path / name).write_bytes(content)
    column = None if name.endswith("txt") else "t"
    with pytest.raises(UsageError, match=rf"{name}.*{message} characters: .*--max-line"):
        texts(tmp_path / name, column, unit=unit, max_line=99)
    if b"t" * 200 not in content:
        assert texts(tmp_path / name, column, unit=unit, max_line=1000)


def test_text_that_cannot_be_cut_has_a_limit(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 300_000)
    (tmp_path / "a.jsonl").write_text('{"t": "' + "x" * 300_000 + '"}\n')
    for name, column in (("a.txt", None), ("a.jsonl", "t")):
        assert texts(tmp_path / name, column) == ["x" * 300_000]
        with pytest.raises(UsageError, match="more than 100,000 characters without a place to cut"):
            texts(tmp_path / name, column, max_line=400_000)
    reading = Reading(max_line=400)
    slices = plan_slices(Corpus([str(tmp_path / "a.txt")]).files, reading, 1000)
    with pytest.raises(UsageError, match="without a place to cut"):
        list(SliceReader(slices[0], reading, Faults(skip=False)).documents())


def test_rows_of_parquet_have_the_limit_too(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"t": ["a", "x" * 1000, "b"]}), path)
    with pytest.raises(UsageError, match=r"a\.parquet, row 2: a row of more than 999"):
        texts(path, "t", max_line=999)
    assert texts(path, "t") == ["a", "x" * 1000, "b"]


def test_a_dictionary_that_rows_share_does_not_multiply(tmp_path, monkeypatch):
    """Rows of a batch take at most what they are allowed together: here 100 of one entry of 200 kB."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("trimserve.corpus.parquet._BATCH_BYTES", 1 << 21)
    path = tmp_path / "a.parquet"
    entry = "word\n" * 40_000
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100), pyarrow.array([entry]))
    parquet.write_table(pyarrow.table({"t": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    pool = pyarrow.default_memory_pool()
    before = pool.max_memory()
    assert sum(map(len, texts(path, "t"))) == 100 * len(entry)
    assert pool.max_memory() < before + (8 << 20)
    monkeypatch.setattr("trimserve.corpus.parquet._BATCH_BYTES", 1 << 17)
    with pytest.raises(UsageError, match="has a page of 200,004 bytes in column 't'"):
        texts(path, "t", max_line=1000)


def test_pages_say_what_neighbouring_rows_can_take():
    pages = [Page(1, 50, True), Page(10, 100, False), Page(1, 900, False), Page(10, 100, False)]
    assert most_bytes(pages, 1) == 900 + 50
    assert most_bytes(pages, 2) == 1000 + 100
    assert most_bytes(pages, 3) == 1100 + 150
    assert most_bytes([], 5) == 0


def test_a_footer_that_contradicts_itself_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"t": [f"row {i}" for i in range(37)]}), path, compression="none")
    content = path.read_bytes()
    fewer = 0
    for at in range(content.index(b"schema"), content.index(b"ARROW:schema")):
        if content[at] == 2 * 37:  # zigzag
            path.write_bytes(content[:at] + bytes([2 * 30]) + content[at + 1 :])
            try:
                assert len(texts(path, "t")) == 37, at  # a byte of something else
            except UsageError:
                fewer += 1
    assert fewer >= 3


def test_a_footer_that_would_end_the_process_is_refused(tmp_path):
    """pyarrow 26 aborts where one asks a footer for a column of text whose type became BOOLEAN."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"t": ["the cat", "a dog"]}), path, use_dictionary=False)
    content = path.read_bytes()
    text, boolean = b"\x15\x0c\x25", b"\x15\x00\x25"  # a SchemaElement's type: BYTE_ARRAY
    assert content.count(text) == 1
    path.write_bytes(content.replace(text, boolean))
    with pytest.raises(UsageError, match=r"a\.parquet is no whole parquet file"):
        texts(path, "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b't,n\na,1\n"b', r"line 3: the file ends within a quoted field"),
        (b't,n\na,1\n"b\n\nc,2\nd,3\n', r"line 3: the file ends within a quoted field"),
        (b"t,n\na,1\nb", r"line 3: the row has 1 fields, the header 2"),
        (b"t,n\na,1,2\n", r"line 2: the row has 3 fields, the header 2"),
        (b't,n\n"a"b,1\n', r"line 2: broken csv"),
        (b"t,t\na,1\n", r"line 1: 2 columns, two of them 't'"),
        (b"", r"line 1: there is no header"),
        (b"x,n\n", r"line 1: no field 't' \(found 'x', 'n'\)"),
        (b't"\n"a', r"no field 't'"),
    ],
)
def test_damage_of_csv_shows(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.csv, {message}|a\.csv.*{message}"):
        texts(tmp_path / "a.csv", "t")


def test_a_file_that_ends_in_a_character_or_in_its_mark_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("é".encode()[:1], "the 日".encode()[:-1], b"\xef", b"\xef\xbb"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"a\.txt, line 1: byte 0x.. is not UTF-8"):
            texts(path)
    path.write_bytes(b"\xef\xbb\xbfa")
    assert texts(path) == ["a"]


def test_a_compressed_file_under_a_plain_name_is_told(tmp_path):
    for name, content, told in (
        ("a.csv", gzip.compress(b"t\na\n"), ".gz"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x04", ".zst"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            UsageError, match=rf"{name} is compressed with {told}, and its name does not say so"
        ):
            texts(tmp_path / name, "t" if name == "a.csv" else None)


def test_a_closed_stdin_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="stdin is closed"):
        Corpus(["-"])


def test_a_slice_is_as_long_as_it_was_planned(tmp_path):
    """What a worker sees, who knows no more of a file than its slice."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "a"}\n' * 100)
    reading = Reading("t")
    files = Corpus([str(path)], reading=reading).files
    whole, parts = (plan_slices(files, reading, size) for size in (10_000, 500))
    path.write_text('{"t": "a"}\n' * 90)
    for piece in (*whole, parts[-1]):
        with pytest.raises(MismatchError, match=r"a\.jsonl changed while it was read"):
            list(SliceReader(piece, reading, Faults(skip=False)).documents())


def test_links_lead_nowhere_twice(tmp_path):
    below = tmp_path / "data" / "sub"
    below.mkdir(parents=True)
    (below / "a.txt").write_text("a")
    (tmp_path / "data" / "b.txt").write_text("b")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    for name in ("loop", "loop2", "loop3"):  # two of them alone make 2^40 paths
        (below / name).symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "far").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data" / "itself").symlink_to("itself")
    (tmp_path / "data" / "itself.txt").symlink_to("itself.txt")
    names = {"sub/a.txt", "b.txt", "far/c.txt"}
    for pattern in ("data", "data/**/*.txt", "**/*.txt", "data/**", "data/**/sub/**/*.txt"):
        found = {file.path for file in Corpus([str(tmp_path / pattern)]).files}
        expected = {str(tmp_path / "data" / name) for name in names}
        if pattern == "**/*.txt":
            expected = (expected - {str(tmp_path / "data/far/c.txt")}) | {str(tmp_path / "elsewhere/c.txt")}
        if "sub" in pattern:
            expected = {path for path in found if path.endswith("/a.txt")}
        if pattern == "**/*.txt":
            assert sorted(map(os.path.basename, found)) == ["a.txt", "b.txt", "c.txt"]
        else:
            assert found >= expected
            assert len({os.path.realpath(path) for path in found}) == len(found)


def test_a_pipe_or_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name, kind in (("a.txt", "a pipe"), ("zero.txt", "a device")):
        with pytest.raises(UsageError, match=rf"{name} is {kind}, no file: pipe its content in"):
            Corpus([str(tmp_path / name)])
    with pytest.raises(UsageError, match="holds no file"):
        Corpus([str(tmp_path)])


@pytest.mark.parametrize("change", ["grows", "shrinks", "other"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "a"}\n' * 300_000)
    documents = Corpus([str(path)], "t").documents()
    next(documents)
    content = path.read_bytes()
    if change == "other":
        path.write_bytes(content.replace(b'"a"', b'"b"'))
        os.utime(path, ns=(1, 1))
    else:
        os.truncate(path, len(content) // 11 * 5 + 0) if change == "shrinks" else path.open("ab").write(
            b'{"t": "c"}\n'
        )
    with pytest.raises((MismatchError, UsageError), match=r"a\.jsonl"):
        for _ in documents:
            pass
