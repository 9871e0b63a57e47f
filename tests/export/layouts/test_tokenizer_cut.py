"""Cut tokenizers of every kind: dense ids, the same segmentation wherever the tokens are kept, no new unk."""

import dataclasses
import json
import unicodedata

import pytest

pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.folders import make_vocab
from tests.support.realdata import TOKENIZERS, corpus_slices
from tests.support.tiny_tokenizers import KINDS, TEXT, save_model_folder
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export.layouts.closure import CLOSED_KEY, MergeTrees, close_vocab, read_content
from trimserve_export.layouts.segmentation import Sample, compare_segmentation
from trimserve_export.layouts.tokenizer_cut import cut_tokenizer, write_cut_tokenizer

pytestmark = pytest.mark.export

# The vocab is selected from the first sentences; the others bring words, an emoji and a script never seen.
SEEN = "The cat sat on the mat. The dog sat on the log; a cat and a dog sat."
TEXTS = [*TEXT.splitlines(), SEEN, "", " ", "unseen Ωmega 🦊", "<s> [CLS] <|end|>", "tab\there\n\nnew"]


def cut(source: ModelSource, path, *, coverage=0.9, multiple_of=1, texts=(SEEN,)):
    """Select from texts, close, cut: the closed vocab and the cut tokenizer."""
    counted = profile([], source, texts=texts, progress=False)
    vocab = close_vocab(select(counted, coverage=coverage, multiple_of=multiple_of), source, counted)
    path.mkdir(exist_ok=True)
    return vocab, write_cut_tokenizer(source, vocab, path)


def unknown_id(source: ModelSource) -> int | None:
    model = read_content(source)["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return source.tokenizer().token_to_id(model.get("unk_token") or "")


def check(source: ModelSource, vocab: VocabMap, tokenizer: Tokenizer, texts) -> int:
    """Check the promises on texts; returns how many are segmented identically."""
    original, unknown = source.tokenizer(), unknown_id(source)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(vocab)))
    identical = 0
    for text in texts:
        before = original.encode(text).ids
        after = vocab.to_original(tokenizer.encode(text).ids).tolist()
        all_kept = all(id_ < vocab.vocab_size and vocab.is_kept(id_) for id_ in before)
        if all_kept and unknown not in before:
            assert after == before
        if unknown not in after and unknown not in before:
            assert tokenizer.decode(vocab.to_compact(after).tolist()) == original.decode(before)
        identical += after == before
    return identical


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_segmented_as_before(model_folders, tmp_path, kind):
    source = resolve_model(model_folders[kind])
    vocab, tokenizer = cut(source, tmp_path / kind)
    assert len(vocab) < len(source.tokenizer().get_vocab())
    assert check(source, vocab, tokenizer, TEXTS) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kept_token_is_made_of_its_own_text(model_folders, tmp_path, kind):
    source = resolve_model(model_folders[kind])
    vocab, tokenizer = cut(source, tmp_path / kind, coverage=0.5)
    original = source.tokenizer()
    for text in (original.decode([id_]) for id_ in vocab.kept_ids.tolist()):
        check(source, vocab, tokenizer, [text])


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from(sorted(set(TEXT) | set("éΩ🦊▁#<>"))), max_size=40))
def test_any_text(model_folders, tmp_path_factory, kind, text):
    source = resolve_model(model_folders[kind])
    vocab, tokenizer = cut(source, tmp_path_factory.mktemp("cut"))
    check(source, vocab, tokenizer, [text])


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "unigram_bytes"])
def test_no_profiled_text_gets_unknown_tokens(model_folders, tmp_path, kind):
    source = resolve_model(model_folders[kind])
    texts = [*TEXT.splitlines(), "cat cats catas lattes undone teen"]
    # So little coverage that most of the seen tokens go.
    vocab, tokenizer = cut(source, tmp_path / kind, coverage=0.1, texts=texts)
    unknown = unknown_id(source)
    for text in texts:
        before = source.tokenizer().encode(text).ids
        after = vocab.to_original(tokenizer.encode(text).ids).tolist()
        assert after.count(unknown) <= before.count(unknown)
    dependencies = vocab.kept_ids[vocab.reason == Reason.DEPENDENCY].tolist()
    tokens = {source.tokenizer().id_to_token(id_) for id_ in dependencies}
    assert tokens >= {"unigram": {"c"}, "wordpiece": {"##t"}, "unigram_bytes": {"▁"}}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_k_is_rounded_again_with_real_ids(model_folders, tmp_path, kind):
    source = resolve_model(model_folders[kind])
    vocab, tokenizer = cut(source, tmp_path / kind, multiple_of=8, coverage=0.3)
    assert len(vocab) % 8 == 0 or len(vocab) == len(source.tokenizer().get_vocab())
    assert sum(vocab.rule["reasons"].values()) == len(vocab)
    check(source, vocab, tokenizer, TEXTS)
    assert close_vocab(vocab, source) is vocab


def test_closing_without_a_profile(model_folders):
    source = resolve_model(model_folders["byte_level_bpe"])
    token = source.tokenizer().token_to_id("Ġthe")
    vocab = close_vocab(make_vocab([token], source.vocab_size), source)
    tokens = {source.tokenizer().id_to_token(id_) for id_ in vocab.kept_ids.tolist()}
    assert {"Ġ", "t", "h", "e", "Ġthe", "<|end|>", "<think>"} <= tokens
    assert vocab.rule[CLOSED_KEY] == "tokenizer"
    assert vocab.kept_ids[vocab.reason == Reason.PROFILE].tolist() == [token]


def test_ids_without_a_token_leave(model_folders, caplog):
    source = resolve_model(model_folders["byte_level_bpe"])  # 7 padding rows
    vocab = close_vocab(make_vocab([70, source.vocab_size - 1], source.vocab_size), source)
    assert source.vocab_size - 1 not in vocab.kept_ids
    assert "1 kept ids name no token" in caplog.text


def test_added_tokens_without_a_row_leave(tmp_path, caplog):
    # <think> is the last of the tokenizer's ids; the model has rows for those below it alone.
    last = KINDS["byte_level_bpe"]().token_to_id("<think>")
    source = resolve_model(save_model_folder("byte_level_bpe", tmp_path / "model", vocab_size=last))
    vocab, tokenizer = cut(source, tmp_path / "cut")
    assert "1 added tokens have no row" in caplog.text
    assert tokenizer.token_to_id("<think>") is None
    assert tokenizer.decode(tokenizer.encode("<think>a cat").ids) == "<think>a cat"
    check(source, vocab, tokenizer, [text for text in TEXTS if "<think>" not in text])


def test_merges_that_make_a_token_are_those_of_the_library():
    # "abcd" is made as ab + cd, although a + bcd is a merge too: only the pieces of the first are needed.
    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("ab", "cd"), ("bc", "d"), ("a", "bcd")]
    trees = MergeTrees({"merges": merges})
    assert trees.pieces("abcd") == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert trees.pieces("bcd") == set()  # c + d goes first: this token is never made
    assert trees.pieces("x") == {"x"}
    ends = MergeTrees({"merges": ["a b</w>"], "end_of_word_suffix": "</w>"})
    assert ends.pieces("ab</w>") == {"a", "b</w>", "ab</w>"}
    inside = MergeTrees({"merges": [["a", "##b"], ["##b", "##c"]], "continuing_subword_prefix": "##"})
    assert inside.pieces("ab") == {"a", "##b", "ab"}
    assert inside.pieces("##bc") == {"##b", "##c", "##bc"}


def test_cut_of_a_vocab_that_is_not_closed_is_refused(model_folders, tmp_path):
    for kind, needed in (("sentencepiece_bpe", "post-processor"), ("unigram", "unk_id")):
        source = resolve_model(model_folders[kind])
        with pytest.raises(MismatchError, match=needed):
            cut_tokenizer(read_content(source), make_vocab([7, 8, 20], source.vocab_size))
    source = resolve_model(model_folders["byte_level_bpe"])  # a padding row: no token for its compact id
    with pytest.raises(MismatchError, match="close the vocab"):
        write_cut_tokenizer(source, make_vocab([7, source.vocab_size - 1], source.vocab_size), tmp_path)


def test_tokenizers_of_another_type_are_refused(model_folders):
    """A type of model that a later release of tokenizers may bring."""
    source = resolve_model(model_folders["wordpiece"])
    content = read_content(source)
    content["model"]["type"] = "Hashing"
    later = dataclasses.replace(source)
    vars(later)["effective"] = dataclasses.replace(source.effective, content=json.dumps(content).encode())
    with pytest.raises(UnsupportedModelError, match="Hashing"):
        read_content(later)


def test_files_beside_tokenizer_json(model_folders, tmp_path):
    source_path = tmp_path / "source"
    source_path.mkdir()
    for file in model_folders["byte_level_bpe"].iterdir():
        (source_path / file.name).write_bytes(file.read_bytes())
    source = resolve_model(source_path)
    tokenizer = source.tokenizer()
    added = {str(id_): {"content": str(token)} for id_, token in tokenizer.get_added_tokens_decoder().items()}
    config = source.read_json("tokenizer_config.json") | {"added_tokens_decoder": added, "b": 1}
    (source_path / "tokenizer_config.json").write_text(json.dumps(config))
    (source_path / "special_tokens_map.json").write_text('{"eos_token":   "<|end|>"}')
    (source_path / "added_tokens.json").write_text("{}")
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (source_path / name).write_text("stale")
    _, cut_ = cut(source, tmp_path / "cut")
    written = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    found = json.loads(written["tokenizer_config.json"])
    assert found["chat_template"] == config["chat_template"]
    assert found["b"] == 1
    for id_, token in found["added_tokens_decoder"].items():
        assert cut_.token_to_id(token["content"]) == int(id_)
    assert len(found["added_tokens_decoder"]) == len(added)
    assert written["special_tokens_map.json"] == b'{"eos_token":   "<|end|>"}'
    assert json.loads(written["added_tokens.json"])["<|end|>"] == cut_.token_to_id("<|end|>")
    assert "tokenizer.model" not in written
    again = Tokenizer(
        models.BPE.from_file(*(str(tmp_path / "cut" / n) for n in ("vocab.json", "merges.txt")))
    )
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert again.encode(SEEN).ids == cut_.encode(SEEN).ids


def test_truncation_and_padding_move(model_folders, tmp_path):
    source = resolve_model(model_folders["wordpiece"])
    vocab, _ = cut(source, tmp_path / "cut")
    content = json.loads((tmp_path / "cut" / "tokenizer.json").read_text())
    assert content["padding"]["pad_id"] == vocab.to_compact(0)
    assert content["truncation"]["max_length"] == 8
    assert content["post_processor"]["cls"] == ["[CLS]", int(vocab.to_compact(2))]


def test_segmentation_is_counted(model_folders, tmp_path):
    source = resolve_model(model_folders["wordpiece"])
    vocab, tokenizer = cut(source, tmp_path / "cut", texts=["the cat the cat the mat"], coverage=0.6)
    sample = Sample(["the cat", "the mat", "Ω the"])
    found = compare_segmentation(source.tokenizer(), tokenizer, vocab, sample)
    assert (found.texts, found.words) == (3, 6)
    before = [
        len(source.tokenizer().encode(t, add_special_tokens=False)) for t in ("the cat", "the mat", "Ω the")
    ]
    after = [len(tokenizer.encode(t, add_special_tokens=False)) for t in ("the cat", "the mat", "Ω the")]
    assert (found.tokens_before, found.tokens_after) == (sum(before), sum(after))
    assert found.unknown_before == found.unknown_after == 1
    assert found.to_dict()["fertility_before"] == round(sum(before) / 6, 4)


@pytest.mark.realdata
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers(data_dir, tmp_path, name):
    source = resolve_model(data_dir / "tokenizers" / name, weights=False)
    slices = corpus_slices(data_dir, 20_000)
    seen = [text for corpus in ("banking77-en", "dialogue-zh-kdconv") for text in slices[corpus]]
    vocab, tokenizer = cut(source, tmp_path / "cut", coverage=0.99, multiple_of=128, texts=seen)
    lines = [line for texts in slices.values() for text in texts for line in text[:6_000].splitlines()]
    lines += ["👩‍👩‍👧‍👦 Ωmega ﷺ", unicodedata.normalize("NFD", "é à ü"), "   spaces \t tabs", ""]
    assert check(source, vocab, tokenizer, lines) > len(lines) // 10
    unknown = unknown_id(source)
    if unknown is not None:
        for text in seen:
            before = source.tokenizer().encode(text).ids.count(unknown)
            assert (vocab.to_original(tokenizer.encode(text).ids) == unknown).sum() <= before
