"""What encoders say of texts against transformers' pipelines with the full model in torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.folders import make_vocab  # noqa: E402
from tests.support.models import FAMILIES, with_random_weights  # noqa: E402
from tests.support.tiny_tokenizers import wordpiece  # noqa: E402
from trimserve.encoder.classification import classify, function_of  # noqa: E402
from trimserve.errors import UsageError  # noqa: E402
from trimserve.loading import load  # noqa: E402
from trimserve.model.resolve import resolve_model  # noqa: E402
from trimserve_export.pipeline import export  # noqa: E402

pytestmark = [pytest.mark.export, pytest.mark.optimum]

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = ("the cat sat on the mat.", "a latte on the log!", "un dog?", "The cats  told the dog")
CONTEXT = "The cat sat on the mat. A dog sat on the log, and a cat had a latte. " * 3
KEPT = (0, 1, 2, 3, 4, 5, 6, 7, 8, 20, 30, 36)


class Case:
    """A model with a head, its trimmed folder and its pipeline."""

    def __init__(self, root, name, task, *, seed=1, **config):
        model_class = getattr(transformers, name)
        sizes = FAMILIES["bert"].config | {"max_position_embeddings": 64, "vocab_size": 37, "pad_token_id": 0}
        model = with_random_weights(model_class(model_class.config_class(**sizes | config)), seed)
        model.save_pretrained(root / "model")
        made = wordpiece()
        made.no_truncation()
        made.no_padding()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made,
            model_max_length=64,
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            mask_token="[MASK]",
        )
        self.tokenizer.save_pretrained(root / "model")
        self.torch_model, self.task = model, task
        source = resolve_model(root / "model")
        export(source, make_vocab(KEPT, 37, ""), root / "trimmed", progress=False)
        self.path = root / "trimmed"
        self.encoder = load(self.path)

    def pipeline(self, **options):
        return transformers.pipeline(
            self.task, model=self.torch_model, tokenizer=self.tokenizer, device="cpu", **options
        )


def assert_same(found, expected):
    """Equal but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float | np.floating):
        assert found == pytest.approx(float(expected), abs=1e-5)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, one_thread):  # noqa: ARG001
    return Case(
        tmp_path_factory.mktemp("classify"),
        "BertForSequenceClassification",
        "text-classification",
        id2label={0: "bad", 1: "fine", 2: "good"},
        label2id={"bad": 0, "fine": 1, "good": 2},
    )


@pytest.fixture(scope="module")
def tagger(tmp_path_factory, one_thread):  # noqa: ARG001
    names = dict(enumerate(LABELS))
    return Case(
        tmp_path_factory.mktemp("tag"),
        "BertForTokenClassification",
        "token-classification",
        seed=15,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )


def test_classes_are_the_pipelines_for_each_kind_of_problem(classifier):
    pipe = classifier.pipeline()
    logits = classifier.encoder.forward(list(TEXTS))
    for kind in (None, "single_label_classification", "multi_label_classification", "regression"):
        classifier.torch_model.config.problem_type = kind
        config = classifier.torch_model.config.to_dict()
        config["id2label"] = {str(number): name for number, name in config["id2label"].items()}
        for top_k in (None, 1, 2):
            expected = pipe(list(TEXTS), top_k=top_k)
            assert_same([classify(row, config, top_k=top_k) for row in logits], expected)
        expected = pipe(list(TEXTS), top_k=None, function_to_apply="none")
        assert_same([classify(row, config, function="none") for row in logits], expected)
    classifier.torch_model.config.problem_type = None
    assert_same(classifier.encoder.classify(list(TEXTS), top_k=1), pipe(list(TEXTS), top_k=1))
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    assert_same(classifier.encoder.classify((TEXTS[0], TEXTS[1]))[0], pipe(pair, top_k=None))
    kinds = [
        function_of({"problem_type": kind}, 3) for kind in (None, "multi_label_classification", "regression")
    ]
    assert kinds == ["softmax", "sigmoid", "none"]
    assert function_of({}, 1) == "sigmoid"
    with pytest.raises(UsageError, match="top_k"):
        classifier.encoder.classify("the cat", top_k=0)


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_entities_are_the_pipelines_for_each_strategy(tagger, aggregation):
    pipe = tagger.pipeline(aggregation_strategy=aggregation)
    expected = pipe(list(TEXTS))
    found = tagger.encoder.tag(list(TEXTS), aggregation=aggregation)
    assert_same(found, expected)
    assert_same(
        tagger.encoder.tag(TEXTS[0], aggregation=aggregation, ignore_labels=()),
        [pipe(TEXTS[0], ignore_labels=[])],
    )
    assert any("start" in entity for entities in found for entity in entities)


def test_strategies_differ(tagger):
    """Or the test before could not fail."""
    words = [
        tagger.encoder.tag(list(TEXTS), aggregation=how) for how in ("simple", "first", "average", "max")
    ]
    assert all(words.count(found) == 1 for found in words)


def test_answers_are_the_pipelines(tmp_path, one_thread):  # noqa: ARG001
    case = Case(tmp_path, "BertForQuestionAnswering", "question-answering")
    with torch.inference_mode():
        made = case.torch_model(**case.tokenizer(TEXTS[0], return_tensors="pt"))
    (found,) = case.encoder.forward([TEXTS[0]])
    assert_same(found[:, 0].tolist(), made.start_logits[0].tolist())
    assert_same(found[:, 1].tolist(), made.end_logits[0].tolist())
    if "question-answering" not in transformers.pipelines.SUPPORTED_TASKS:
        pytest.skip("transformers 5 has no question-answering pipeline")
    pipe = case.pipeline()
    seen = []
    for options in (
        {},
        {"top_k": 4},
        {"max_seq_len": 24, "doc_stride": 6, "top_k": 3},
        {"max_seq_len": 24, "doc_stride": 10, "top_k": 3},
        {"max_answer_len": 2, "top_k": 3},
        {"align_to_words": False, "top_k": 3},
        {"handle_impossible_answer": True, "top_k": 5},
    ):
        for question in ("what sat on the mat", "a dog?"):
            expected = pipe(question=question, context=CONTEXT, **options)
            found = case.encoder.answer(question, CONTEXT, **options)
            assert_same(found, expected if isinstance(expected, list) else [expected])
        seen.append([(answer["start"], answer["end"], answer["score"]) for answer in found])
    assert all(seen.count(found) == 1 for found in seen)
    with pytest.raises(UsageError, match=r"leaves -?\d+ of 64 tokens"):
        case.encoder.answer("the cat " * 30, CONTEXT)


def test_masks_are_filled_as_the_pipeline_does(tmp_path, one_thread):  # noqa: ARG001
    case = Case(tmp_path, "BertForMaskedLM", "fill-mask")
    pipe = case.pipeline()
    texts = ["the [MASK] sat.", "a [MASK] on the [MASK]"]
    for options in ({}, {"top_k": 2}, {"targets": ["dog", "cat", "lattes"], "top_k": 2}):
        found = [
            [[_with_pipelines_keys(candidate) for candidate in mask] for mask in masks]
            for masks in case.encoder.fill_mask(texts, **options)
        ]
        expected = [pipe(text, **options) for text in texts]
        assert_same(found, [[expected[0]], expected[1]])


def _with_pipelines_keys(candidate):
    return {
        "score": candidate.probability,
        "token": candidate.id,
        "token_str": candidate.token,
        "sequence": candidate.sequence,
    }
