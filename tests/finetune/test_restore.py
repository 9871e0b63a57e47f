"""Compact checkpoints: saved in the block, resumed, restored without a model, refused with a reason."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers
from safetensors.torch import load_file

from tests.support.finetuning import (
    COLD,
    KEPT,
    VOCAB,
    K,
    V,
    assert_same_state,
    make_model,
    rows_of,
    train_step,
)
from tests.support.folders import make_vocab
from tests.support.models import save_model
from tests.support.rounding import assert_within, model_bound
from tests.support.tiny_tokenizers import save_model_folder
from trimserve.cli.main import main
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.files.hashes import sha256_file
from trimserve.finetune import find_outside, grow, partial_vocab
from trimserve.finetune.restoring import full_source, restore
from trimserve.model.resolve import resolve_model
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import Reason, VocabMap

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

# family -> what its folder is made with.
FAMILIES = {
    "llama": {},
    "gemma3": {"eos_token_id": 36},
    "phi": {},
    "bert": {"pad_token_id": 36},
    "roberta": {"pad_token_id": 5},
    "gpt2": {"max_shard_size": "4KB"},
}
# The fields of a config that say where it was loaded from.
ORIGIN = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def load(folder, **options):
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, **options)


def tune(model, compact, steps: int = 2):
    """Train a little, so that every kept row differs from the base's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    ids = torch.tensor([KEPT, KEPT[::-1]])
    for step in range(steps):
        train_step(model, compact.remap({"input_ids": ids, "labels": ids}), optimizer, step)


def saved(root, family: str, *, dtype=torch.float32, stored=torch.float32, **config):
    """A base folder, a compact checkpoint of it after some training, and the model restored by the block."""
    base = save_model(family, root / "base", rows=V, dtype=stored, **FAMILIES[family] | config)
    shards = FAMILIES[family].get("max_shard_size", "5GB")
    model = load(base, dtype=dtype)
    with partial_vocab(model, VOCAB) as compact:
        tune(model, compact)
        model.save_pretrained(root / "compact", max_shard_size=shards)
    return base, root / "compact", model


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_checkpoint_is_the_model_that_the_block_restored(tmp_path, family):
    base, checkpoint, model = saved(tmp_path, family)
    made = restore(checkpoint, base, tmp_path / "full", progress=False)
    assert (made.kept, made.vocab_size) == (K, V)
    found = load(made.path)
    assert_same_state(found.state_dict(), model.state_dict())
    cold = list(COLD)
    assert torch.equal(rows_of(found)[cold], rows_of(load(base))[cold])
    assert not torch.equal(rows_of(found)[list(KEPT)], rows_of(load(base))[list(KEPT)])
    expected = {key: value for key, value in model.config.to_dict().items() if key not in ORIGIN}
    assert {key: found.config.to_dict().get(key) for key in expected} == expected
    settings = [str(getattr(one, "generation_config", None)) for one in (found, model)]
    assert settings[0] == settings[1]
    assert (made.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    # The block's model, saved by transformers, has the same bytes.
    model.save_pretrained(tmp_path / "by-transformers", max_shard_size="5GB")
    assert load_file(tmp_path / "by-transformers" / "model.safetensors").keys() == {
        name for file in made.path.glob("*.safetensors") for name in load_file(file)
    }


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_cold_rows_take_the_dtype_of_the_training(tmp_path, stored, dtype):
    base, checkpoint, model = saved(tmp_path, "llama", stored=stored, dtype=dtype)
    made = restore(checkpoint, base, tmp_path / "full", progress=False)
    weights = load_file(made.path / "model.safetensors")
    assert weights["lm_head.weight"].dtype == dtype
    assert_same_state(load(made.path, dtype=dtype).state_dict(), model.state_dict())


def test_checkpoint_is_compact_and_training_resumes_from_it(tmp_path):
    base, checkpoint, model = saved(tmp_path, "llama")
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vocab_size"] == K
    assert load_file(checkpoint / "model.safetensors")["lm_head.weight"].shape == (K, 16)
    again = load(base)
    with partial_vocab(again, VOCAB) as compact:
        again.load_state_dict(load_file(checkpoint / "model.safetensors"))
        tune(again, compact)
    with partial_vocab(model, VOCAB) as compact:
        tune(model, compact)
    assert_same_state(again.state_dict(), model.state_dict())


def test_compact_checkpoint_loads_in_transformers(tmp_path):
    _, checkpoint, model = saved(tmp_path, "bert")
    compact = load(checkpoint).eval()
    ids = torch.tensor([KEPT])
    logits = compact(input_ids=torch.tensor(VOCAB.to_compact(ids.numpy()))).logits
    bound = model_bound(model.eval(), lambda model: model(input_ids=ids).logits)
    assert_within(logits, model(input_ids=ids).logits[..., list(KEPT)], bound, rows=-1)
    assert compact.config.pad_token_id == 10


def test_classifier_of_a_bare_encoder_is_restored(tmp_path):
    # The base has no prefix and no classifier; the checkpoint has both.
    base = save_model("bert_encoder", tmp_path / "base", rows=V)
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    assert "embeddings.word_embeddings.weight" in load_file(base / "model.safetensors")
    with partial_vocab(model, VOCAB):
        with torch.no_grad():
            rows_of(model).add_(1)
        model.save_pretrained(tmp_path / "compact")
    made = restore(tmp_path / "compact", output=tmp_path / "full", progress=False)
    assert made.base == str(base)
    found = transformers.BertForSequenceClassification.from_pretrained(made.path)
    assert_same_state(found.state_dict(), model.state_dict())


def test_generation_settings_that_saving_moves_stay_token_ids(tmp_path):
    # transformers takes them out of the config and puts them into the generation config.
    model = make_model("bart")
    model.generation_config.forced_eos_token_id = None
    save_base(model, tmp_path / "base")
    if model.generation_config.forced_eos_token_id is None:
        pytest.skip(f"transformers {transformers.__version__} leaves them where they are")
    model = make_model("bart")
    model.generation_config.forced_eos_token_id = None
    with partial_vocab(model, VOCAB, base=tmp_path / "base"):
        model.save_pretrained(tmp_path / "compact")
        assert model.generation_config.forced_eos_token_id == 9
        model.save_pretrained(tmp_path / "compact")
    assert model.generation_config.forced_eos_token_id == 30
    restore(tmp_path / "compact", output=tmp_path / "full", progress=False)
    for name in ("config.json", "generation_config.json"):
        full, base = (json.loads((tmp_path / at / name).read_text()) for at in ("full", "base"))
        assert full == base


def save_base(model, folder):
    model.save_pretrained(folder)
    save_model_folder("wordpiece", folder.parent / "tokenizer")
    shutil.copy(folder.parent / "tokenizer" / "tokenizer.json", folder)


def test_another_base_is_refused_with_both_hashes(tmp_path):
    base, checkpoint, _ = saved(tmp_path, "llama")
    other = save_model("llama", tmp_path / "other", rows=V, seed=1)
    hashes = [sha256_file(folder / "model.safetensors")[:12] for folder in (other, base)]
    with pytest.raises(MismatchError, match=f"is not the base.*{hashes[0]}.*{hashes[1]}"):
        restore(checkpoint, other, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_checkpoint_without_a_base_says_how_to_name_it(tmp_path):
    base = save_model("llama", tmp_path / "base", rows=V)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(base))
    model.load_state_dict(load_file(base / "model.safetensors"))
    model.config._name_or_path = ""
    with partial_vocab(model, VOCAB):
        model.save_pretrained(tmp_path / "unknown")
    with pytest.raises(MismatchError, match="base="):
        restore(tmp_path / "unknown", base, tmp_path / "full")
    with partial_vocab(model, VOCAB, base=base):
        model.save_pretrained(tmp_path / "known")
    restore(tmp_path / "known", base, tmp_path / "full", progress=False)
    with (
        pytest.raises(UsageError, match="neither a folder"),
        partial_vocab(model, VOCAB, base="no such/model/"),
    ):
        pass


def test_damaged_checkpoints_are_refused(tmp_path):
    base, checkpoint, _ = saved(tmp_path, "llama")
    with pytest.raises(UsageError, match="no compact checkpoint"):
        restore(base, base, tmp_path / "full")
    with pytest.raises(UsageError, match="not empty"):
        restore(checkpoint, base, checkpoint)
    provenance = json.loads((checkpoint / "finetune.json").read_text())
    for changed, match in (
        ({"schema_version": 9}, "has schema 9"),
        ({"tensors": 3}, r"got `int` - at `.*tensors`"),
        ({"kept": 12}, "does not belong"),
    ):
        broken = shutil.copytree(checkpoint, tmp_path / "broken", dirs_exist_ok=True)
        (broken / "finetune.json").write_text(json.dumps(provenance | changed))
        with pytest.raises(MismatchError, match=match):
            restore(broken, base, tmp_path / "full")


def test_head_that_the_base_has_not_is_refused(tmp_path):
    base = save_model("llama", tmp_path / "base", rows=V)
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    transformers.LlamaModel.from_pretrained(base).save_pretrained(tmp_path / "bare")
    shutil.copy(base / "tokenizer.json", tmp_path / "bare")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "bare")
    with partial_vocab(model, VOCAB):
        model.save_pretrained(tmp_path / "compact")
    with pytest.raises(UnsupportedModelError, match=r"has lm_head\.weight but the base has no such tensor"):
        restore(tmp_path / "compact", output=tmp_path / "full")


def test_command_restores_and_reports(tmp_path, capsys):
    base, checkpoint, model = saved(tmp_path, "phi")
    command = ["finetune", "restore", str(checkpoint), "-o", str(tmp_path / "full")]
    assert main([*command, "--base", str(tmp_path)]) == 2
    assert main([*command, "--base", str(base), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kept"], report["vocab_size"], report["base"]) == (K, V, str(base))
    assert_same_state(load(tmp_path / "full").state_dict(), model.state_dict())
    assert main(command) == 2  # not empty by now


def test_command_names_texts_outside_the_vocab_and_grows_it(tmp_path, capsys):
    base = save_model("bert", tmp_path / "base", rows=V)
    tokenizer = resolve_model(base).tokenizer()
    texts = ["the cat", "the dog sat on the log"]
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    kept = sorted({0, 1, 2, 3, 4, *tokenizer.encode(texts[0]).ids})
    save_vocab(make_vocab(kept, V, sha256_file(base / "tokenizer.json")), tmp_path / "vocab.safetensors")
    command = ["finetune", "check", str(tmp_path / "train.txt"), "-m", str(base)]
    command += ["--vocab", str(tmp_path / "vocab.safetensors")]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "1 of 2 texts" in message
    assert "text 1 (" in message
    assert "'dog'" in message
    assert main([*command, "--grow", str(tmp_path / "grown.safetensors"), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    missing = sorted(set(tokenizer.encode(texts[1]).ids) - set(kept))
    assert report == {
        "texts": 2,
        "outside": 1,
        "ids": missing,
        "kept": len(kept) + len(missing),
        "vocab_size": V,
    }
    command[-1] = str(tmp_path / "grown.safetensors")
    assert main(command) == 0


def test_growing_keeps_reasons_and_rounds_with_the_lowest_ids():
    vocab = VocabMap(np.array([2, 9]), np.array([0, 1]), V, "hash", {"coverage": 0.9})
    grown = grow(vocab, [30, 9, 30], multiple_of=3, widths=[3])
    assert grown.kept_ids.tolist() == [0, 1, 2, 3, 9, 30]
    reasons = [Reason(reason).name for reason in grown.reason]
    assert reasons == ["FILL", "FILL", "STRUCTURAL", "FILL", "PROFILE", "EXPLICIT"]
    assert grown.tokenizer_sha256 == "hash"
    assert [found.index for found in find_outside([[2], [9, 30], []], vocab)] == [1]
    assert find_outside([[2], [9, 30], []], grown) == []


def test_a_full_model_needs_no_base(tmp_path):
    base, _, _ = saved(tmp_path, "llama")
    with pytest.raises(UsageError, match="needs no base"), full_source(resolve_model(base), base):
        pass


@pytest.mark.slow
def test_compact_checkpoint_exports_like_the_restored_one(tmp_path, capsys):
    pytest.importorskip("optimum.exporters.onnx")
    base, checkpoint, _ = saved(tmp_path, "llama")
    restore(checkpoint, base, tmp_path / "full", progress=False)
    assert main(["export", "-m", str(base), "-o", str(tmp_path / "none")]) == 2
    assert "--vocab --profile --corpus is required" in capsys.readouterr().err
    trimmed = tmp_path / "trimmed"
    moved = base.rename(tmp_path / "moved")
    assert main(["export", "-m", str(checkpoint), "-o", str(trimmed)]) == 2  # the base is not where it was
    assert main(["export", "-m", str(checkpoint), "--base", str(moved), "-o", str(trimmed)]) == 0
    assert main(["verify", str(trimmed), "-m", str(tmp_path / "full")]) == 0
    moved.rename(base)
    assert main(["verify", str(trimmed)]) == 0  # the checkpoint that the manifest names, restored again
    assert main(["verify", str(trimmed), "-m", str(base)]) == 3
    assert json.loads((trimmed / "trimserve.json").read_text())["kept"] == K
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "compact", "full", "trimmed"]
