import csv
import gzip
import io
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny_tokenizers import CHAT_TEMPLATE
from trimserve.corpus.conversations import conversation
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import Faults, Reading, split_units
from trimserve.corpus.reader import SliceReader
from trimserve.corpus.slices import plan_slices
from trimserve.errors import MissingExtraError, UsageError
from trimserve.text.chat import ChatTemplate

ROWS = [
    {"text": 'one, "two"\nthree', "answer": "yes"},
    {"text": "日本 é", "answer": "no"},
    {"text": " ", "answer": "x" * 200_000},
]


def texts(*paths, **options):
    corpus = Corpus([str(path) for path in paths], reading=Reading(**options))
    return [document.text for document in corpus.documents()]


def write_csv(path, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path, rows=ROWS, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def compress(path, suffix):
    content = path.read_bytes()
    target = path.with_name(path.name + suffix)
    if suffix == ".gz":
        target.write_bytes(gzip.compress(content))
    else:
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames: a reader that stops at the first one loses the rest
        frames = [zstandard.compress(part) for part in (content[:half], content[half:])]
        target.write_bytes(b"".join(frames))
    return target


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
def test_formats_hold_the_same_texts(tmp_path, kind, compression):
    path = tmp_path / f"a.{kind}"
    expected = [row["text"] for row in ROWS]
    if kind == "txt":
        path.write_text("".join(expected), "utf-8", newline="")
        expected = ["".join(expected)]
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        write_csv(path, "\t" if kind == "tsv" else ",")
    path = compress(path, compression) if compression else path
    assert texts(path, text_column="text") == expected


def test_parquet_holds_the_same_texts_in_slices_of_row_groups(tmp_path):
    rows = [{"a": {"b": {"c": f"text {number} 日本"}}, "other": number} for number in range(7)]
    path = tmp_path / "a.parquet"
    write_parquet(path, rows, row_group_size=2)
    reading = Reading(text_column="a.b.c")
    assert texts(path, text_column="a.b.c") == [f"text {number} 日本" for number in range(7)]
    slices = plan_slices(Corpus([str(path)], reading=reading).files, reading, 1)
    assert [(piece.start, piece.end) for piece in slices] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    found = [read_slice(piece, reading) for piece in slices]
    assert [len(part) for part in found] == [2, 2, 2, 1]
    assert [document.text for part in found for document in part] == texts(path, text_column="a.b.c")
    with pytest.raises(UsageError, match=r"a\.parquet: no field 'x' \(found 'a', 'other'\)"):
        texts(path, text_column="x")


def read_slice(piece, reading, **options):
    return list(SliceReader(piece, reading, Faults(skip=False), **options).documents())


def test_folders_and_globs_are_read_in_order_of_their_paths(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    for name in ("b/2.txt", "b/1.txt", "a.txt", "b/.hidden/3.txt", "b/.4.txt", "b/notes.docx"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt"]
    assert texts(tmp_path / "*" / "*.txt") == ["b/1.txt", "b/2.txt"]
    assert texts(tmp_path / "**" / "*.txt") == ["a.txt", "b/1.txt", "b/2.txt"]
    with pytest.raises(UsageError, match=r"no file matches .*\*\.csv"):
        texts(tmp_path / "*.csv")
    with pytest.raises(UsageError, match="none of the formats"):
        texts(tmp_path / "b" / "notes.docx")


class Hub(SimpleNamespace):
    """Stands for huggingface_hub: a dataset that lies in a folder."""

    def snapshot_download(self, repo, **options):
        self.calls = [*getattr(self, "calls", []), (repo, options)]
        if repo != "owner/name":
            raise OSError("404 no such dataset\nmore")
        return str(self.folder)


def test_hub_datasets_are_fetched(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data" / "test.jsonl").write_text('{"text": "b"}\n')
    hub = Hub(folder=tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    corpus = Corpus(["hf://datasets/owner/name@v1/data/tr*.jsonl"], "text")
    assert [document.text for document in corpus.documents()] == ["a"]
    assert corpus.sources[0].name == "hf://owner/name@v1/data/train.jsonl"
    repo, options = hub.calls[0]
    assert (repo, options["repo_type"], options["revision"]) == ("owner/name", "dataset", "v1")
    assert "data/tr*.jsonl" in options["allow_patterns"]
    assert texts("hf://owner/name", text_column="text") == ["b", "a"]
    assert texts("hf://owner/name/data", text_column="text") == ["b", "a"]
    with pytest.raises(UsageError, match=r"hf://owner/other could not be fetched .*404 no such dataset\)"):
        texts("hf://owner/other", text_column="text")
    with pytest.raises(UsageError, match="should read hf://OWNER/NAME"):
        texts("hf://name", text_column="text")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[hub\]'"):
        texts("hf://owner/name", text_column="text")


def test_formats_without_their_package_name_the_command(tmp_path, monkeypatch):
    for name, module in (("a.parquet", "pyarrow.parquet"), ("a.txt.zst", "zstandard")):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[corpus\]'"):
            texts(tmp_path / name, text_column="text")


def test_units_are_lines_or_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n two \n\n \t\nthree\n\n\n")
    assert texts(path) == ["one\r\n two \n\n \t\nthree\n\n\n"]
    assert texts(path, unit="line") == ["one", " two ", "three"]
    assert texts(path, unit="paragraph") == ["one\r\n two ", "three"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": "a\nb\n\nc"}) + "\n")
    assert texts(tmp_path / "a.jsonl", text_column="t", unit="line") == ["a", "b", "c"]
    assert texts(tmp_path / "a.jsonl", text_column="t", unit="paragraph") == ["a\nb", "c"]
    assert [
        document.text for document in Corpus([], texts=["a\nb"], reading=Reading(unit="line")).documents()
    ] == [
        "a",
        "b",
    ]


@given(st.text("ab \n\r\t", max_size=60), st.integers(1, 7), st.sampled_from(["line", "paragraph"]))
def test_units_do_not_depend_on_blocks(text, size, unit):
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(split_units(pieces, unit)) == list(split_units([text], unit))


@pytest.mark.parametrize("unit", ["document", "line", "paragraph"])
@pytest.mark.parametrize("size", [1, 3, 10, 64])
def test_slices_hold_every_document_once(tmp_path, unit, size):
    text = "alpha é\n日本 x\n\n \nbeta\r\ngamma\n\n\ndelta\n- no cut\n😀\nend 日\n終" * 3
    path = tmp_path / "a.txt"
    path.write_text(text, "utf-8", newline="")
    reading = Reading(unit=unit)
    (file,) = Corpus([str(path)]).files
    slices = plan_slices([file], reading, size)
    assert len(slices) == -(-file.bytes // size)
    parts = [read_slice(piece, reading) for piece in slices]
    found = [document for part in parts for document in part]
    if unit == "document":
        assert "".join(document.text for document in found) == text
        assert [document.part == 0 for document in found] == [True] + [False] * (len(found) - 1)
        assert all(document.cut for document in found[:-1])
        assert not found[-1].cut
        assert len(found) > 1
        for left, right in itertools.pairwise(found):
            assert left.text[-1] == "\n"
            assert not left.text[-2].isspace()
            assert right.text[0].isalnum()
            assert right.context == "\n"
    else:
        assert [document.text for document in found] == texts(path, unit=unit)


def test_slices_of_records_hold_every_record_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"t": "x" * number or "-"}) + "\n" for number in range(30)))
    reading = Reading(text_column="t")
    (file,) = Corpus([str(path)], "t").files
    for size in (1, 20, 100):
        pieces = plan_slices([file], reading, size)
        found = [document.text for piece in pieces for document in read_slice(piece, reading)]
        assert found == texts(path, text_column="t")


def test_a_fault_in_a_late_slice_has_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"t": "a"}\n' for _ in range(50)) + '{"t": \n')
    reading = Reading(text_column="t")
    (file,) = Corpus([str(path)], "t").files
    last = plan_slices([file], reading, 100)[-1]
    with pytest.raises(UsageError, match=r"a\.jsonl, line 51: broken JSON"):
        read_slice(last, reading)


BAD = (
    b'{"t": "good"}\n{"t": "\xff"}\n{"t": \n{"t": ""}\n{"t": null}\n{"x": 1}\n{"t": 7}\n'
    b'{"t": "\\ud83d"}\n[]\n{"t": "also good"}\n'
)


def test_bad_rows_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD)
    corpus = Corpus([str(path)], reading=Reading("t", skip_bad=True))
    assert [document.text for document in corpus.documents()] == ["good", "also good"]
    assert corpus.faults.found == {"undecodable": 2, "broken": 1, "empty": 2, "no text": 3}


def test_bad_bytes_of_a_text_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one \xff two\n\xe2\x82 three \xe2\x82\xac\xe2")
    corpus = Corpus([str(path)], reading=Reading(skip_bad=True))
    assert [document.text for document in corpus.documents()] == ["one  two\n three €"]
    assert corpus.faults.found == {"undecodable": 4}


def test_bad_bytes_of_a_table_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\n"two\nlines",1\n\xff,2\nok,3\nshort\n')
    with pytest.raises(UsageError, match=r"a\.csv, line 4, field 'text': byte 0xff is not UTF-8"):
        texts(path, text_column="text")
    assert texts(path, text_column="text", skip_bad=True) == ["two\nlines", "ok"]


@pytest.mark.parametrize("row", [{"t": []}, {"t": None}, {"u": "x"}, {"t": {"v": ""}}])
def test_nested_fields_that_are_missing_or_empty_are_refused(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=r"line 1.* ('t\.v'|is empty)"):
        texts(path, text_column="t.v")


def test_options_that_contradict_each_other_are_refused(tmp_path):
    template = ChatTemplate(CHAT_TEMPLATE, {})
    for options, message in (
        ({"unit": "word"}, "should be one of document, line, paragraph"),
        ({"unit": "line", "output_column": "a", "text_column": "t"}, "leave --unit out"),
        ({"template": template, "output_column": "a"}, "leave --output-column out"),
        ({"output_column": "a"}, "needs --text-column"),
    ):
        with pytest.raises(UsageError, match=message):
            Reading(**options)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="plain text has no prompts"):
        Corpus([str(tmp_path / "a.txt")], reading=Reading(template=template))


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No."},
]


def test_a_conversation_is_prompts_and_completions_in_turn():
    template = ChatTemplate(CHAT_TEMPLATE, {})
    turns = list(conversation(template, CHAT))
    assert [(turn.text, turn.output) for turn in turns] == [
        ("<|turn|>user\nHi<|end|>\n<|turn|>assistant\n", False),
        ("Hello!<|end|>\n", True),
        ("<|turn|>user\nMore<|end|>\n<|turn|>assistant\n", False),
        ("No.<|end|>\n", True),
    ]
    assert "".join(turn.text for turn in turns) == template.render(CHAT, add_generation_prompt=False)
    assert [turn.part for turn in turns] == [0, 1, 2, 3]
    assert turns[1].context.endswith("<|turn|>assistant\n")
    (open_,) = conversation(template, CHAT[:1])
    assert open_.text == template.render(CHAT[:1])


def test_a_template_that_forgets_earlier_thoughts_shows_what_each_turn_adds():
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.thought %}({{ m.thought }}){% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "thought": "t"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    turns = [(turn.text, turn.output) for turn in conversation(ChatTemplate(source, {}), messages)]
    # The second prompt is another one than the first answer continued: it is counted whole.
    assert turns == [
        ("[user]a[assistant]", False),
        ("(t)b", True),
        ("[user]a[assistant]b[user]c[assistant]", False),
        ("d", True),
    ]


def test_rows_of_messages_and_of_prompts_with_completions(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "p": "ask", "c": {"d": "tell"}}) + "\n")
    template = ChatTemplate(CHAT_TEMPLATE, {})
    assert "".join(texts(path, template=template)) == template.render(CHAT, add_generation_prompt=False)
    documents = list(Corpus([str(path)], reading=Reading("p", "c.d")).documents())
    assert [(document.text, document.output, document.part) for document in documents] == [
        ("ask", False, 0),
        ("tell", True, 1),
    ]


@pytest.mark.parametrize(
    "messages", ["text", [1], [{"role": "user"}], [{"role": "user", "content": "\ud83d"}], [{"content": "x"}]]
)
def test_messages_that_cannot_be_rendered_name_the_line(tmp_path, messages):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": messages}) + "\n")
    template = ChatTemplate("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", {})
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2"):
        texts(path, template=template)
    assert len(texts(path, template=template, skip_bad=True)) == 4


def test_stdin_takes_units_and_skips_bad_bytes():
    corpus = Corpus(["-"], stdin=io.BytesIO(b"a\n\xff\nb\n"), reading=Reading(unit="line", skip_bad=True))
    assert [document.text for document in corpus.documents()] == ["a", "b"]
    assert corpus.faults.found == {"undecodable": 1}
