"""Every setting of a tokenizer's folder against AutoTokenizer of the transformers at hand.

Where a setting changes ids, tokenizer.json by itself gives others: ignoring the setting turns its test red.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import transformers
from tokenizers import AddedToken, Tokenizer

from tests.support.folders import make_folder
from tests.support.tiny_tokenizers import KINDS, save_model_folder
from trimserve.encoder.limits import longest_input
from trimserve.errors import MismatchError, MissingExtraError, UnsupportedModelError, UsageError
from trimserve.folder.manifest import write_manifest
from trimserve.folder.names import VOCAB_NAME
from trimserve.folder.opening import list_files, open_folder
from trimserve.model import effective_tokenizer as effective
from trimserve.model.library_tokenizer import read_with_transformers
from trimserve.model.resolve import resolve_model
from trimserve.text.chat import ChatTemplate
from trimserve.text.codec import Codec
from trimserve.vocab.file import load_vocab, save_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.source_tokenizer import (
    ask_library,
    copy_tokenizer,
    library_ids,
    tokenizer_entry,
)
from trimserve_export.checkpoint.trim import check_vocab
from trimserve_export.verify.checks.rows import check_tokenizer

pytestmark = [pytest.mark.export, pytest.mark.next]

TRANSFORMERS = int(transformers.__version__.partition(".")[0])
TEXTS = [
    "The cat sat on the mat.",
    "",
    " a  dog",
    "Thé 世界",
    "<tool> the </s> cat<s>dog",
    "the<mask> cat",
    "[SEP] a",
]
_LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BERT = {"tokenizer_class": "BertTokenizer"}
_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
_FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
_TOOL = {"content": "<tool>", "special": False, **_FLAGS}
# name -> (kind, tokenizer_config.json, other files, versions of transformers in which it changes ids)
SETTINGS = {
    "add_eos_token": ("sentencepiece_bpe", _LLAMA | {"add_eos_token": True}, {}, (4, 5)),
    "add_bos_token": ("sentencepiece_bpe", _LLAMA | {"add_bos_token": False}, {}, (4, 5)),
    "do_lower_case": ("wordpiece", _BERT | {"do_lower_case": False}, {}, (4, 5)),
    "strip_accents": ("wordpiece", _BERT | {"strip_accents": False}, {}, (4, 5)),
    "tokenize_chinese_chars": ("wordpiece", _BERT | {"tokenize_chinese_chars": False}, {}, (4, 5)),
    "add_prefix_space": (
        "byte_level_bpe",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {},
        (4, 5),
    ),
    "added_tokens_decoder": ("wordpiece", _PLAIN | {"added_tokens_decoder": {"37": _TOOL}}, {}, (4, 5)),
    "eos_token": ("wordpiece", _PLAIN | {"eos_token": "</s>"}, {}, (4, 5)),
    "additional_special_tokens": (
        "wordpiece",
        _PLAIN | {"additional_special_tokens": ["<tool>"]},
        {},
        (4, 5),
    ),
    "special_tokens_map.json": (
        "wordpiece",
        _PLAIN,
        {"special_tokens_map.json": {"bos_token": "<s>"}},
        (4, 5),
    ),
    "added_tokens.json": ("wordpiece", _PLAIN, {"added_tokens.json": {"<tool>": 37}}, (4, 5)),
    "mask_token's lstrip": (
        "wordpiece",
        _PLAIN
        | {
            "mask_token": {
                "__type": "AddedToken",
                "content": "<mask>",
                "special": True,
                **_FLAGS,
                "lstrip": True,
            }
        },
        {},
        (4, 5),
    ),
    "split_special_tokens": ("sentencepiece_bpe", _PLAIN | {"split_special_tokens": True}, {}, (4, 5)),
}


def save_source(path, kind, config, files=(), **entries):
    """A folder without weights whose tokenizer_config.json says `config`."""
    folder = save_model_folder(kind, path, **{"hidden_size": 64, "tokenizer_class": None} | entries)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in dict(files).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def ids_of(source):
    return [encoding.ids for encoding in source.tokenizer().encode_batch_fast(TEXTS)]


@pytest.fixture(params=list(SETTINGS))
def setting(request):
    return request.param


def test_ids_are_the_librarys(tmp_path, setting):
    kind, config, files, versions = SETTINGS[setting]
    source = resolve_model(save_source(tmp_path / "m", kind, config, files))
    expected = library_ids(source, TEXTS)
    assert ids_of(source) == expected
    made_by = source.effective.made_by
    assert (made_by["library"], made_by["version"]) == ("transformers", transformers.__version__)
    if TRANSFORMERS in versions:  # ignoring it would give other ids
        raw = Tokenizer.from_file(str(source.path / "tokenizer.json"))
        raw.no_padding()
        raw.no_truncation()
        assert [encoding.ids for encoding in raw.encode_batch(TEXTS)] != expected


def test_ids_through_a_trimmed_folder_and_what_verify_says(tmp_path, setting):
    kind, config, files, _ = SETTINGS[setting]
    source = ask_library(resolve_model(save_source(tmp_path / "m", kind, config, files)))
    folder = trimmed(tmp_path / "out", source)
    assert [ids.tolist() for ids in Codec(folder).encode(TEXTS)] == library_ids(source, TEXTS)
    for name in ("tokenizer.json", "tokenizer_config.json", *files):
        assert (folder.path / name).read_bytes() == (source.path / name).read_bytes()
    assert verified(folder, source).ok
    # Taken without its setting, the tokenizer is not the library's.
    settings = folder.manifest.tokenizer["settings"] | {"split_special_tokens": False}
    entry = {"file": "tokenizer.json", "settings": settings}
    plain = dataclasses.replace(folder.manifest, tokenizer=entry)
    assert not verified(with_manifest(folder, plain), source).ok


def trimmed(path, source):
    """A trimmed folder of every id, with the tokenizer as `export` writes it."""
    folder = make_folder(path, range(400), 400)
    copy_tokenizer(source, path)
    save_vocab(
        VocabMap(folder.vocab.kept_ids, folder.vocab.reason, 400, source.tokenizer_sha256),
        path / VOCAB_NAME,
    )
    entry = tokenizer_entry(source, "runtime")
    return with_manifest(folder, dataclasses.replace(folder.manifest, tokenizer=entry))


def with_manifest(folder, manifest):
    path, name = folder.path, manifest.tokenizer["file"]
    files = list_files(path)
    digest = files[name].sha256
    vocab = load_vocab(path / VOCAB_NAME)
    save_vocab(dataclasses.replace(vocab, tokenizer_sha256=digest), path / VOCAB_NAME)
    write_manifest(path, dataclasses.replace(manifest, tokenizer_sha256=digest, files=list_files(path)))
    return open_folder(path)


def verified(folder, source):
    return check_tokenizer(SimpleNamespace(folder=folder, source=source, texts=TEXTS, codec=Codec(folder)))


@pytest.mark.parametrize(
    ("setting", "other"),
    [("truncation_side", "right"), ("model_max_length", None), ("clean_up", False), ("special_tokens", {})],
)
def test_verify_compares_what_the_file_cannot_hold(tmp_path, setting, other):
    said = {"truncation_side": "left", "model_max_length": 9, "clean_up_tokenization_spaces": True}
    config = _PLAIN | said | {"bos_token": "<s>"}
    source = ask_library(resolve_model(save_source(tmp_path / "m", "unigram", config)))
    folder = trimmed(tmp_path / "out", source)
    assert verified(folder, source).ok
    settings = dict(folder.manifest.tokenizer["settings"]) | {setting: other}
    entry = folder.manifest.tokenizer | {"settings": settings}
    found = verified(with_manifest(folder, dataclasses.replace(folder.manifest, tokenizer=entry)), source)
    assert not found.ok
    assert setting in found.detail


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_the_librarys(tmp_path, side):
    source = ask_library(
        resolve_model(save_source(tmp_path / "m", "unigram", _PLAIN | {"truncation_side": side}))
    )
    codec = Codec(trimmed(tmp_path / "out", source))
    texts = ["the cat sat on a dog and the total is a latte"]
    assert [ids.tolist() for ids in codec.encode(texts, max_tokens=6)] == library_ids(
        source, texts, max_length=6
    )


@pytest.mark.parametrize("key", ["model_max_length", "max_len"])
def test_the_longest_text_is_the_librarys(tmp_path, key):
    source = ask_library(resolve_model(save_source(tmp_path / "m", "unigram", _PLAIN | {key: 11})))
    assert longest_input(trimmed(tmp_path / "out", source)) == 11
    loaded = transformers.AutoTokenizer.from_pretrained(source.path)
    assert loaded.model_max_length == 11


@pytest.mark.parametrize("kind", ["byte_level_bpe", "wordpiece"])
@pytest.mark.parametrize("clean", [True, False])
def test_decoded_text_is_the_librarys(tmp_path, kind, clean):
    config = _PLAIN | {"clean_up_tokenization_spaces": clean}
    source = ask_library(resolve_model(save_source(tmp_path / "m", kind, config)))
    codec = Codec(trimmed(tmp_path / "out", source))
    loaded = transformers.AutoTokenizer.from_pretrained(source.path)
    for text in ("the cat , a dog . is n't it ' s ?", " . ", "the ' ve 's"):
        ids = loaded(text).input_ids
        assert codec.decode(ids) == loaded.decode(ids, skip_special_tokens=True)
        stream = codec.stream()
        pieces = [stream.push([id_]) for id_ in ids] + [stream.flush()]
        assert "".join(pieces) == codec.decode(ids)


def test_templates_see_tokens_that_only_special_tokens_map_names(tmp_path):
    files = {"special_tokens_map.json": {"bos_token": "<s>"}}
    template = "{{ bos_token }}{{ messages[0].content }}"
    source = save_source(tmp_path / "m", "unigram", _PLAIN | {"chat_template": template}, files)
    expected = transformers.AutoTokenizer.from_pretrained(source).special_tokens_map.get("bos_token")
    assert ChatTemplate.of(resolve_model(source)).special_tokens.get("bos_token") == expected == "<s>"


def test_a_folder_with_vocab_txt_alone(tmp_path):
    folder = save_source(tmp_path / "m", "wordpiece", {"do_lower_case": False})
    vocab = KINDS["wordpiece"]().get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)))
    (folder / "tokenizer.json").unlink()
    source = ask_library(resolve_model(folder))
    assert ids_of(source) == library_ids(source, TEXTS)
    out = trimmed(tmp_path / "out", source)
    assert out.tokenizer_path.name == "tokenizer.effective.json"
    assert [ids.tolist() for ids in Codec(out).encode(TEXTS)] == library_ids(source, TEXTS)
    assert verified(out, source).ok


def test_a_folder_with_vocab_json_and_merges_alone(tmp_path):
    folder = save_source(
        tmp_path / "m", "byte_level_bpe", {"tokenizer_class": "GPT2Tokenizer"}, model_type="gpt2"
    )
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()
    source = resolve_model(folder)
    assert ids_of(source) == library_ids(source, TEXTS)


def save_sentencepiece(path):
    """A SentencePiece Unigram model, written without the sentencepiece library."""
    # The library's own choice of two modules, which cannot both be loaded.
    proto = importlib.import_module("transformers.convert_slow_tokenizer").import_protobuf().ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for piece, score in [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("▁the", -1.0),
        ("▁cat", -1.5),
        ("▁", -2.0),
    ]:
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    for rank, letter in enumerate("abcdefghijklmnopqrstuvwxyz.ABT"):
        proto.pieces.add(piece=letter, score=-5.0 - 0.01 * rank, type=1)
    proto.trainer_spec.model_type = 1
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.precompiled_charsmap = b""
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model"])
def test_a_folder_with_a_sentencepiece_model_alone(tmp_path, name):
    pytest.importorskip("google.protobuf")
    model_type = {"spiece.model": "t5", "sentencepiece.bpe.model": "xlm-roberta"}[name]
    folder = save_source(tmp_path / "m", "unigram", {}, model_type=model_type)
    (folder / "tokenizer.json").unlink()
    save_sentencepiece(folder / name)
    source = ask_library(resolve_model(folder))
    try:
        expected = library_ids(source, TEXTS)
    except UnsupportedModelError:  # transformers 4 without sentencepiece
        with pytest.raises(UnsupportedModelError, match=f"only .*{name}.* install sentencepiece"):
            source.tokenizer()
        return
    assert ids_of(source) == expected
    assert [ids.tolist() for ids in Codec(trimmed(tmp_path / "out", source)).encode(TEXTS)] == expected


@pytest.fixture
def light(monkeypatch):
    """An installation without transformers."""
    monkeypatch.setattr(effective, "_has_transformers", lambda: False)
    effective._cached.cache_clear()
    yield
    effective._cached.cache_clear()


@pytest.mark.usefixtures("light")
def test_without_transformers_a_setting_is_never_ignored(tmp_path, setting):
    kind, config, files, _ = SETTINGS[setting]
    source = resolve_model(save_source(tmp_path / "m", kind, config, files))
    if setting == "split_special_tokens":  # the tokenizers library has it
        assert source.tokenizer().encode_special_tokens
        return
    with pytest.raises(MissingExtraError, match=r"pip install 'trimserve\[export\]'") as caught:
        source.tokenizer()
    assert setting.partition("'")[0].removesuffix("_token") in str(caught.value)


@pytest.mark.usefixtures("light")
def test_without_transformers_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(UsageError, match="no other file of a tokenizer"):
        resolve_model(save_empty(tmp_path / "empty")).tokenizer()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MissingExtraError, match=r"has no tokenizer\.json, only vocab\.txt"):
        resolve_model(tmp_path).tokenizer()


def save_empty(path):
    path.mkdir()
    return path


def test_a_profile_of_a_light_installation_fits(tmp_path, monkeypatch):
    """The hash of an unaffected folder is that of its tokenizer.json, whoever asks."""
    folder = save_source(tmp_path / "m", "unigram", _PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(effective, "_has_transformers", lambda: False)
        effective._cached.cache_clear()
        light = resolve_model(folder).tokenizer_sha256
    effective._cached.cache_clear()
    source = ask_library(resolve_model(folder))
    assert source.effective.made_by["library"] == "transformers"
    assert source.tokenizer_sha256 == light
    vocab = make_folder(tmp_path / "out", range(5), source.vocab_size).vocab
    check_vocab(source, dataclasses.replace(vocab, tokenizer_sha256=light))


def test_a_vocab_of_the_unchanged_file_is_refused_where_loading_changes_it(tmp_path):
    kind, config, files, _ = SETTINGS["add_eos_token"]
    folder = save_source(tmp_path / "m", kind, config, files)
    raw = effective.original_tokenizer(folder).sha256
    assert resolve_model(folder).has_tokenizer(raw)  # select and report need no library for it
    source = ask_library(resolve_model(folder))
    vocab = make_folder(
        tmp_path / "out",
        range(5),
        source.vocab_size,
    ).vocab
    with pytest.raises(MismatchError, match=r"changes tokenizer\.json on loading"):
        check_vocab(source, dataclasses.replace(vocab, tokenizer_sha256=raw))


def test_a_process_of_its_own_says_the_same(tmp_path):
    kind, config, files, _ = SETTINGS["add_eos_token"]
    folder, answer = save_source(tmp_path / "m", kind, config, files), tmp_path / "answer.json"
    command = [sys.executable, "-m", "trimserve.model.library_tokenizer", str(folder), str(answer), "0"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == b""
    assert json.loads(answer.read_text()) == read_with_transformers(folder)


def test_a_tokenizer_that_cannot_be_loaded_is_taken_as_it_is_or_refused(tmp_path, caplog):
    folder = save_source(
        tmp_path / "m", "wordpiece", {"tokenizer_class": "NoSuchTokenizer"}, model_type="no-such"
    )
    source = ask_library(resolve_model(folder))
    if "transformers" not in source.effective.made_by["library"]:
        assert "is taken as it is" in caplog.text
        assert source.effective.original
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "NoSuchTokenizer", "do_lower_case": false}'
        )
        with pytest.raises(UnsupportedModelError, match="do_lower_case = false"):
            resolve_model(folder).tokenizer()


def test_added_tokens_keep_their_flags(tmp_path):
    folder = save_source(tmp_path / "m", "wordpiece", _PLAIN)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    source = ask_library(resolve_model(folder))
    assert source.effective.original
    assert ids_of(source) == library_ids(source, TEXTS)


def test_a_class_in_python_is_refused(tmp_path):
    folder = save_source(
        tmp_path / "m", "wordpiece", {"tokenizer_class": "CanineTokenizer"}, model_type="canine"
    )
    with pytest.raises(UnsupportedModelError, match="tokenizes with CanineTokenizer, a class in Python"):
        resolve_model(folder).tokenizer()


def test_a_limit_that_is_no_number_is_refused(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "12"})
    )
    with pytest.raises(MismatchError, match=r"got `str` - at `\$\.model_max_length`"):
        effective.effective_tokenizer(folder, always=True)


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_an_id_that_would_take_all_memory(tmp_path, kind):
    """A tokenizer is written id by id: 8 GB were taken for the largest id of 32 bits."""
    folder = save_model_folder(kind, tmp_path / "model")
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = document["model"]["vocab"]
    vocab[sorted(vocab)[-1]] = 20_000_000
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = read_with_transformers(folder)
    assert "20,000,000" in found["error"]
    assert "16,777,215" in found["error"]
