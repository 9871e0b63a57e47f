import json
import threading

import numpy as np
import pytest
from safetensors.numpy import save

from tests.support.folders import make_folder
from tests.support.tiny_tokenizers import KINDS, save_model_folder
from trimserve.errors import MismatchError, UnknownIdError, UsageError
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.names import VOCAB_NAME
from trimserve.folder.opening import list_files, open_folder
from trimserve.text.batching import join
from trimserve.text.codec import Codec, shorten
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import VocabMap

TEXTS = ["The cat sat on the mat.", "", "a", "latte? 😀 世界 مرحبا\n\n  done", "The dog " * 40]


def vocab_size(source) -> int:
    return json.loads((source / "config.json").read_text())["vocab_size"]


def codec(tmp_path, source, dropped=(), *, cold=True, rows=None, **options) -> Codec:
    """A codec over a folder that keeps all tokens but `dropped` (tokens or ids)."""
    tokenizer = KINDS[source.name]()
    rows = rows or vocab_size(source)
    lost = {tokenizer.token_to_id(token) if isinstance(token, str) else token for token in dropped}
    kept = [id_ for id_ in range(rows) if id_ not in lost]
    cold_rows = save({"embedding": np.ones((rows - len(kept), 5), np.float32)}) if cold else None
    return Codec(make_folder(tmp_path / "folder", kept, rows, source=source, cold_rows=cold_rows, **options))


def test_token_ids_are_the_original_tokenizers(tmp_path, model_folder):
    text = codec(tmp_path, model_folder)
    tokenizer = KINDS[model_folder.name]()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for special in (True, False):
        ids = text.encode(TEXTS, add_special_tokens=special)
        assert [row.tolist() for row in ids] == [
            tokenizer.encode(t, add_special_tokens=special).ids for t in TEXTS
        ]
        assert all(row.dtype == np.int32 for row in ids)
        assert [text.decode(row) for row in ids] == [tokenizer.decode(row.tolist()) for row in ids]
    assert text.encode([]) == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_the_special_tokens(tmp_path, side):
    source = save_model_folder("unigram", tmp_path / "unigram")
    (source / "tokenizer_config.json").write_text(json.dumps({"truncation_side": side}))
    text = codec(tmp_path, source)
    (full,) = text.encode([TEXTS[4]])
    (cut,) = text.encode_typed([TEXTS[4]], max_tokens=9)
    middle = full[1:8] if side == "right" else full[-8:-1]
    assert cut.ids.tolist() == [0, *middle.tolist(), 2]
    assert cut.truncated
    assert not text.encode_typed([TEXTS[4]], max_tokens=len(full))[0].truncated
    np.testing.assert_array_equal(text.encode([TEXTS[4]])[0], full)  # the limit does not stay


def test_a_limit_below_the_special_tokens_is_refused(tmp_path, model_folders):
    text = codec(tmp_path, model_folders["wordpiece"])
    assert text.encode(["the cat"], max_tokens=2)[0].tolist() == [2, 3]
    for limit in (1, 0, -1):
        with pytest.raises(UsageError, match="special tokens alone take 2"):
            text.encode(["the cat"], max_tokens=limit)


def test_an_id_beyond_the_models_rows_names_text_and_token(tmp_path, model_folders):
    source = model_folders["byte_level_bpe"]
    rows = KINDS["byte_level_bpe"]().token_to_id("<think>")
    text = codec(tmp_path, source, rows=rows)
    assert len(text.encode(["the cat"])) == 1
    with pytest.raises(UnknownIdError, match=rf"text 'no <think>': its token '<think>' has id {rows}"):
        text.encode(["the cat", "no <think>"])


@pytest.mark.parametrize("bad", ["half \ud800", 3, None])
def test_what_is_no_text_is_refused(tmp_path, model_folders, bad):
    text = codec(tmp_path, model_folders["byte_level_bpe"])
    with pytest.raises(UsageError):
        text.encode(["fine", bad])


def test_one_string_is_no_list_of_texts(tmp_path, model_folders):
    with pytest.raises(UsageError, match="one string"):
        codec(tmp_path, model_folders["byte_level_bpe"]).encode("the cat")


def test_slots_give_every_token_its_row(tmp_path, model_folder):
    everything = codec(tmp_path / "all", model_folder)
    ids = everything.encode(TEXTS)
    cold = sorted(set(np.concatenate(ids).tolist()) - everything.special_ids)[::3]
    text = codec(tmp_path, model_folder, cold)
    batch = text.slots(ids)
    rows = np.concatenate([text.vocab.kept_ids, batch.cold_ids])
    lengths = [len(row) for row in ids]
    assert batch.attention_mask.sum(axis=1).tolist() == lengths
    for row, mask, expected in zip(batch.ids, batch.attention_mask, ids, strict=True):
        assert mask[: len(expected)].all()
        np.testing.assert_array_equal(rows[row[mask == 1]], expected)
        assert (row[mask == 0] == text.vocab.to_compact(text.pad_id)).all()
    assert sorted(batch.cold_ids.tolist()) == cold
    assert batch.cold_tokens == sum(int(np.isin(row, cold).sum()) for row in ids)
    assert batch.ids.max() == len(text.vocab) + len(cold) - 1


@pytest.mark.parametrize(
    ("side", "ids"), [("right", [[4, 5, 6], [7, 9, 9]]), ("left", [[4, 5, 6], [9, 9, 7]])]
)
def test_shorter_sequences_are_padded_on_one_side(side, ids):
    found, mask = join([np.array([4, 5, 6], np.int32), np.array([7], np.int32)]).padded(9, side)
    assert found.tolist() == ids
    np.testing.assert_array_equal(mask, found != 9)


def test_without_cold_rows_a_cold_token_is_split_and_counted(tmp_path, model_folders):
    text = codec(tmp_path, model_folders["wordpiece"], ["cat"], cold=False)
    batch = text.slots(text.encode(["the cat", "the dog"]))
    tokens = [text.tokenizer.token_to_id(token) for token in ("[CLS]", "the", "c", "##at", "[SEP]")]
    assert text.vocab.to_original(batch.ids[0]).tolist() == tokens
    assert (batch.cold_ids.size, batch.cold_tokens) == (0, 1)
    servable = text.servable(text.encode(["the cat"]))
    assert servable.repeats[0].tolist() == [1, 1, 2, 1]


def test_a_cold_token_that_cannot_be_split_names_the_text(tmp_path, model_folders):
    text = codec(tmp_path, model_folders["wordpiece"], ["dog", "##og"], cold=False)
    with pytest.raises(UnknownIdError, match=r"text 'the dog sat': token 'dog' \(id 10\)"):
        text.slots(text.encode(["the cat", "the dog sat"]))


def test_the_pad_id_is_the_models_own(tmp_path):
    source = save_model_folder("unigram", tmp_path / "a" / "unigram")
    assert codec(tmp_path / "a", source).pad_id == 1
    source = save_model_folder("wordpiece", tmp_path / "b" / "wordpiece", pad_token_id=-1)
    (source / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[MASK]"}}))
    assert codec(tmp_path / "b", source).pad_id == 4
    source = save_model_folder("sentencepiece_bpe", tmp_path / "c" / "sentencepiece_bpe", eos_token_id=[7])
    assert codec(tmp_path / "c", source, [0, 1]).pad_id == 2  # nobody names one: any kept id, it is masked


def test_padding_of_nothing():
    ids, mask = join([]).padded(0)
    assert ids.shape == mask.shape == (0, 0)
    ids, mask = join([np.zeros(0, np.int32)] * 2).padded(0)
    assert ids.shape == (2, 0)


def test_a_vocab_of_another_tokenizer_is_refused(tmp_path, model_folders):
    path = tmp_path / "folder"
    vocab = codec(tmp_path, model_folders["wordpiece"]).vocab
    save_vocab(VocabMap(vocab.kept_ids, vocab.reason, vocab.vocab_size, "f" * 64), path / VOCAB_NAME)
    manifest = read_manifest(path)
    manifest.files.update(list_files(path))
    write_manifest(path, manifest)
    with pytest.raises(MismatchError, match="the vocab belongs to ffffffffffff"):
        Codec(open_folder(path))


def test_another_tokenizer_is_refused(tmp_path, model_folders):
    codec(tmp_path, model_folders["wordpiece"])
    path = tmp_path / "folder"
    (path / "tokenizer.json").write_bytes((model_folders["unigram"] / "tokenizer.json").read_bytes())
    with pytest.raises(MismatchError, match=r"tokenizer\.json"):
        open_folder(path)
    manifest = read_manifest(path)
    manifest.files.update(list_files(path))
    write_manifest(path, manifest)
    with pytest.raises(MismatchError, match=r"tokenizer\.json belongs to"):
        Codec(open_folder(path))


def test_threads_may_encode_with_different_limits(tmp_path, model_folders):
    text = codec(tmp_path, model_folders["wordpiece"])
    wrong = []

    def work(limit: int) -> None:
        for _ in range(50):
            lengths = {len(ids) for ids in text.encode([TEXTS[4]] * 3, max_tokens=limit)}
            if lengths != {limit}:
                wrong.append((limit, lengths))

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (5, 9, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shorten_quotes_and_cuts():
    assert shorten("a\nb") == "'a\\nb'"
    assert shorten("x" * 100, 10) == "'xxxxxxxxx…'"
