"""Keep lists in every form that is read, and the refusal of all others."""

import json

import pytest

from trimserve.errors import MismatchError, UsageError
from trimserve.model.resolve import resolve_model
from trimserve.profiles.profiling import profile
from trimserve.selection.keep_file import KeepList, read_keep_file
from trimserve.selection.select_ids import select
from trimserve.vocab.map import Reason


def write(tmp_path, name: str, content: str):
    path = tmp_path / name
    path.write_text(content, "utf-8")
    return path


def test_lines_of_whole_numbers_are_ids(tmp_path, caplog):
    assert read_keep_file(write(tmp_path, "k.txt", "5\n 7\n\n36\n")) == KeepList(ids=(5, 7, 36))
    assert "3 token ids" in caplog.text


def test_other_lines_are_tokens_or_texts(tmp_path):
    assert read_keep_file(write(tmp_path, "k.txt", "42\n cat\nthe dog\n")) == KeepList(
        words=("42", " cat", "the dog")
    )
    assert read_keep_file(write(tmp_path, "k.txt", "-1\n5\n")).words == ("-1", "5")
    assert read_keep_file(write(tmp_path, "k.txt", "")) == KeepList()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([5, 7], KeepList(ids=(5, 7))),
        (["cat", "the dog"], KeepList(words=("cat", "the dog"))),
        ({"Ġcat": 5, "é": 7}, KeepList(named={"Ġcat": 5, "é": 7})),
    ],
)
def test_json_forms(tmp_path, content, expected):
    assert read_keep_file(write(tmp_path, "k.json", json.dumps(content))) == expected


@pytest.mark.parametrize(
    "content", ['{"a": "b"}', "[1, true]", '[1, "a"]', "5", '{"keep": [1]}', "[1,", "null"]
)
def test_json_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(UsageError, match="list of ids"):
        read_keep_file(write(tmp_path, "k.json", content))


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_keep_file(tmp_path / "absent.txt")
    (tmp_path / "k.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_keep_file(tmp_path / "k.txt")


def explicit_tokens(model, keep_file) -> set[str]:
    tokenizer = resolve_model(model).tokenizer()
    vocab = select(profile([], model, texts=["a cat"]), coverage=0, multiple_of=1, keep_file=keep_file)
    return {tokenizer.id_to_token(id_) for id_ in vocab.kept_ids[vocab.reason == Reason.EXPLICIT].tolist()}


def test_select_reads_every_form(model_folders, tmp_path):
    model = model_folders["byte_level_bpe"]
    tokenizer = resolve_model(model).tokenizer()
    named = {token: tokenizer.token_to_id(token) for token in ("Ġon", "at")}
    ids = list(named.values())
    for name, content in {
        "ids.txt": "\n".join(map(str, ids)),
        "tokens.txt": "\n".join(named),
        "ids.json": json.dumps(ids),
        "tokens.json": json.dumps(list(named)),
        "vocab_tailor.json": json.dumps(named),
    }.items():
        assert explicit_tokens(model, write(tmp_path, name, content)) == set(named)


def test_ids_of_another_tokenizer_are_refused(model_folders, tmp_path):
    model = model_folders["byte_level_bpe"]
    for named in ({"Ġon": 5}, {"Ġabsent": 5}):
        with pytest.raises(MismatchError, match="another model"):
            explicit_tokens(model, write(tmp_path, "k.json", json.dumps(named)))
