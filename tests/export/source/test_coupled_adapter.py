"""Saved reversible adapters: export puts them on their base and computes what the trained model did."""

import json
import shutil

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

import trimserve
from tests.support.folders import make_vocab
from tests.support.models import save_model
from tests.support.reversing import use_adapters
from tests.support.rounding import assert_within, model_bound
from trimserve.cli.main import main
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.hashes import sha256_file
from trimserve.finetune import partial_vocab, reversible
from trimserve.folder.manifest import read_manifest
from trimserve.model.resolve import resolve_model
from trimserve.vocab.file import save_vocab
from trimserve_export.checkpoint.tasks import load_model
from trimserve_export.source.whole import whole_source

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

V = 37
KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
CLASSES = {"bert_classifier": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
TEXTS = ("the cat", "a dog sat on the mat", "the")


def load(family, path):
    return getattr(transformers, CLASSES[family]).from_pretrained(path).eval()


def save_adapters(family, base, folder, *, variant=1, seed=0, rank=3, **options):
    """Save adapters as if they were trained; the coupled model's numbers of the texts."""
    model = load(family, base)
    with reversible(model, variant=variant, rank=rank, **options) as meft:
        use_adapters(meft, seed)
        meft.save(folder)
        return numbers(family, model, base)


def encoded(base):
    tokenizer = resolve_model(base).tokenizer()
    return [torch.tensor([tokenizer.encode(text).ids]) for text in TEXTS]


def numbers(family, model, base):
    """Logits of the texts; of a language model, the ids that it goes on with."""
    if family == "llama":
        return [
            model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, ids.shape[1] :
            ].tolist()
            for ids in encoded(base)
        ]
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits for ids in encoded(base)])


@pytest.fixture(scope="module", params=CLASSES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    return save_model(family, tmp_path_factory.mktemp("base") / "model", rows=V)


@pytest.fixture
def vocab(base, tmp_path):
    save_vocab(make_vocab(KEPT, V, sha256_file(base / "tokenizer.json")), tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


@pytest.mark.parametrize("variant", [1, *(pytest.param(other, marks=pytest.mark.slow) for other in (2, 3))])
def test_export_computes_what_the_trained_model_did(family, base, vocab, variant, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    expected = save_adapters(family, base, adapter, variant=variant)
    words = ["export", "-m", base, "--adapter", adapter, "-o", out, "--vocab", vocab]
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    loaded = trimserve.load(out)
    if family == "llama":
        made = [list(loaded.generate([text], max_new_tokens=8)[0].ids) for text in TEXTS]
        assert made == expected
        assert made != numbers(family, load(family, base), base)
        return
    scores = np.array(
        [
            [label["score"] for label in sorted(labels, key=lambda label: label["label"])]
            for labels in loaded.classify(list(TEXTS))
        ]
    )
    with whole_source(resolve_model(base), adapter=adapter) as whole:
        coupled = load_model(whole.path, "text-classification", "fp32")

        def outputs(model):
            return numbers(family, model, base).softmax(-1)

        assert_within(scores, outputs(coupled), model_bound(coupled, outputs), rows=0)
        # The grid of 2^-30 that training rounds to is finer than fp32.
        assert_within(scores, expected.softmax(-1), model_bound(coupled, outputs), rows=0)


@pytest.mark.slow
def test_manifest_names_both_and_verify_finds_them(family, base, vocab, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    save_adapters(family, base, adapter)
    for name, model in {"a": [base, "--adapter", adapter], "b": [adapter]}.items():
        out = tmp_path / name
        assert main(list(map(str, ["export", "-m", *model, "-o", out, "--vocab", vocab]))) == 0
        hashes = [
            base / "model.safetensors",
            adapter / "reversible.safetensors",
            adapter / "reversible.json",
        ]
        assert read_manifest(out).source.files == {path.name: sha256_file(path) for path in hashes}
        assert main(["verify", str(out)]) == 0, capsys.readouterr().out
    # Other adapters under the same name are not what the folder was made from.
    save_adapters(family, base, adapter, seed=1)
    assert main(["verify", str(tmp_path / "a")]) == 3


@pytest.mark.slow
def test_a_compact_checkpoint_of_a_coupled_model_is_exported(family, base, tmp_path, capsys):
    model, vocab = load(family, base), make_vocab(KEPT, V, sha256_file(base / "tokenizer.json"))
    with partial_vocab(model, vocab), reversible(model, rank=3, freeze=False) as meft:
        use_adapters(meft)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)  # rows are trained, too
        model.save_pretrained(tmp_path / "compact")
        meft.save(tmp_path / "frozen")
    assert json.loads((tmp_path / "compact" / "config.json").read_text())["trimserve_coupling"]["rank"] == 3
    shutil.copy(base / "tokenizer.json", tmp_path / "compact")
    out = tmp_path / "out"
    words = ["export", "-m", tmp_path / "compact", "--base", base, "-o", out]
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    assert main(["verify", str(out), "-m", str(tmp_path / "compact")]) == 0, capsys.readouterr().out
    # Rows of a cut table fit no full model.
    with (
        pytest.raises(MismatchError, match="another shape"),
        whole_source(resolve_model(base), adapter=tmp_path / "frozen"),
    ):
        pass


def test_adapters_trained_on_the_kept_rows_fit_the_full_model(family, base, tmp_path):
    model, vocab = load(family, base), make_vocab(KEPT, V, sha256_file(base / "tokenizer.json"))
    with partial_vocab(model, vocab), reversible(model, rank=3) as meft:
        use_adapters(meft)
        meft.save(tmp_path / "adapter")
    save_adapters(family, base, tmp_path / "other")
    made, expected = (
        load_file(tmp_path / folder / "reversible.safetensors") for folder in ("adapter", "other")
    )
    trained = {name for name in expected if name.endswith("up.weight") or "adapters" not in name}
    assert trained
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in trained)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_model("bert_classifier", tmp_path_factory.mktemp("bert") / "model", rows=V)


def test_a_classifier_that_the_adapters_bring(tmp_path):
    encoder = save_model("bert_encoder", tmp_path / "encoder", rows=V)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=5).eval()
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        meft.save(tmp_path / "adapter")
        weight = model.classifier.weight.clone()
    with whole_source(resolve_model(encoder), adapter=tmp_path / "adapter") as whole:
        assert whole.config["architectures"] == ["BertForSequenceClassification"]
        found = transformers.AutoModelForSequenceClassification.from_pretrained(whole.path)
    assert torch.equal(found.classifier.weight, weight)


def test_what_does_not_fit_is_refused(bert, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapters("bert_classifier", bert, adapter)

    def put_on(model, brought=adapter):
        with whole_source(resolve_model(model), adapter=brought):
            pass

    other = save_model("bert_classifier", tmp_path / "other", rows=V, seed=1)
    with pytest.raises(MismatchError, match=r"is not the model that the adapters in .* were trained on"):
        put_on(other)
    with pytest.raises(UsageError, match="is an adapter itself"):
        put_on(adapter)
    both = shutil.copytree(bert, tmp_path / "both")
    for file in adapter.iterdir():
        shutil.copy(file, both)
    with (
        pytest.raises(UsageError, match=r"holds a model and an adapter: pass --adapter .* reversible\.json"),
        whole_source(resolve_model(both)),
    ):
        pass
    put_on(both, both)
    settings = json.loads((adapter / "reversible.json").read_text())
    changes = {
        "transformers does not have": {"architecture": "SentenceClassifier"},
        "which is not at hand": {"base": settings["base"] | {"name": str(tmp_path / "gone")}},
        "does not name the model": {"base": None},
        "reversible.json": {"base": 3},
    }
    for message, change in changes.items():
        broken = shutil.copytree(adapter, tmp_path / f"broken{len(message)}")
        (broken / "reversible.json").write_text(json.dumps(settings | change))
        with pytest.raises((UsageError, UnsupportedModelError, MismatchError), match=message):
            put_on(bert, broken) if "architecture" in change else whole_source(
                resolve_model(broken)
            ).__enter__()
    (adapter / "reversible.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(MismatchError, match=r"reversible\.safetensors"):
        put_on(bert)
    (adapter / "reversible.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no reversible\.safetensors"):
        put_on(bert)
