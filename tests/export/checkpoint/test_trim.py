"""Trimming a checkpoint by streaming: the right rows, every other byte, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.hashes import sha256_file
from trimserve.files.tensors import exhaust
from trimserve.model.resolve import resolve_model
from trimserve_export.checkpoint.stored import stored_vocab
from trimserve_export.checkpoint.trim import stream_tensors, trim_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.optimum]

V = 37
KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
COLD = tuple(sorted(set(range(V)) - set(KEPT)))


def trim(source, tmp_path, kept=KEPT, vocab_size=V, **options):
    target = tmp_path / "trimmed"
    target.mkdir(parents=True)
    vocab = make_vocab(kept, vocab_size)
    made = trim_checkpoint(
        resolve_model(source),
        vocab,
        target,
        cold_path=tmp_path / "cold.safetensors",
        progress=False,
        **options,
    )
    return made, load_all(target), load_file(tmp_path / "cold.safetensors")


def load_all(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_kept_rows_and_every_other_tensor_are_the_sources(tmp_path):
    source = save_model("llama", tmp_path / "model", rows=V)
    made, trimmed, cold = trim(source, tmp_path)
    full = load_all(source)
    cut = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    assert trimmed.keys() == full.keys()
    for name, tensor in full.items():
        expected = tensor[list(KEPT)] if name in cut else tensor
        assert torch.equal(trimmed[name], expected), name
    for name, role in cut.items():
        assert torch.equal(cold[role], full[name][list(COLD)])
    assert {tensor.name: (tensor.axis, tensor.rows_before, tensor.rows_after) for tensor in made.cut} == {
        name: (0, V, len(KEPT)) for name in cut
    }


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    folder = save_model("llama", tmp_path_factory.mktemp("llama") / "model", rows=V)
    source = resolve_model(folder)
    return source, stored_vocab(source), load_all(folder)


@settings(deadline=None, max_examples=25)
@given(kept=st.sets(st.integers(0, V - 1), min_size=1))
def test_any_kept_ids_split_the_rows_exactly(tmp_path_factory, small_llama, kept):
    source, stored, full = small_llama
    target = tmp_path_factory.mktemp("any")
    vocab = make_vocab(sorted(kept), V)
    written = exhaust(stream_tensors(source, vocab, target, stored, target / "cold_rows"))
    trimmed, cold = load_all(target), load_file(target / "cold_rows")
    whole = torch.empty_like(full["lm_head.weight"])
    whole[vocab.kept_ids.tolist()] = trimmed["lm_head.weight"]
    whole[vocab.cold_ids.tolist()] = cold["head"]
    assert torch.equal(whole, full["lm_head.weight"])
    assert written == sum(tensor.nbytes for tensor in full.values())


def test_bfloat16_rows_keep_their_bits(tmp_path):
    source = save_model("qwen3", tmp_path / "model", rows=V, dtype=torch.bfloat16)
    made, trimmed, cold = trim(source, tmp_path)
    full = load_all(source)["model.embed_tokens.weight"]
    assert full.dtype == torch.bfloat16
    assert torch.equal(trimmed["model.embed_tokens.weight"], full[list(KEPT)])
    assert torch.equal(cold["embedding"], full[list(COLD)])
    assert cold.keys() == {"embedding"}
    assert made.tied


def test_sharded_checkpoint_stays_sharded(tmp_path):
    source = save_model("llama", tmp_path / "model", rows=V, max_shard_size="4KB")
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 2
    _, trimmed, _ = trim(source, tmp_path)
    target = tmp_path / "trimmed"
    assert sorted(file.name for file in target.glob("*.safetensors")) == shards
    model, report = transformers.LlamaForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(model.lm_head.weight, load_all(source)["lm_head.weight"][list(KEPT)])
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in trimmed.values())


def test_tie_that_is_stored_twice_is_cut_twice_and_cold_once(tmp_path):
    source = save_model("llama_tied", tmp_path / "model", rows=V)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    made, trimmed, cold = trim(source, tmp_path)
    assert trimmed["lm_head.weight"].shape == trimmed["model.embed_tokens.weight"].shape == (len(KEPT), 16)
    assert cold.keys() == {"embedding"}
    assert len(made.cut) == 2
    once = sum(tensor.nbytes for name, tensor in weights.items() if name != "lm_head.weight")
    assert made.bytes_before("fp32") == once
    assert made.bytes_before("fp16") == once // 2


def test_head_bias_is_cut(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V)
    _, trimmed, cold = trim(source, tmp_path)
    bias = load_all(source)["cls.predictions.bias"]
    assert torch.equal(trimmed["cls.predictions.bias"], bias[list(KEPT)])
    assert torch.equal(cold["head_bias"], bias[list(COLD)])
    assert cold.keys() == {"embedding", "head_bias"}


def renamed(source, rename):
    weights = load_file(source / "model.safetensors")
    weights = {rename(name): tensor for name, tensor in weights.items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return source


def test_checkpoint_without_the_classes_prefix(tmp_path):
    # The hub's gpt2 has "wte.weight" where GPT2LMHeadModel has "transformer.wte.weight".
    source = renamed(
        save_model("gpt2", tmp_path / "model", rows=V), lambda name: name.removeprefix("transformer.")
    )
    _, trimmed, cold = trim(source, tmp_path, model_class=transformers.AutoModelForCausalLM)
    assert trimmed["wte.weight"].shape == (len(KEPT), 16)
    assert cold["embedding"].shape == (len(COLD), 16)


def test_checkpoint_with_a_prefix_that_the_task_has_not(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V)
    made, trimmed, _ = trim(source, tmp_path, model_class=transformers.AutoModel)
    assert trimmed["bert.embeddings.word_embeddings.weight"].shape == (len(KEPT), 16)
    assert trimmed["cls.predictions.bias"].shape == (
        len(KEPT),
    )  # cut too: the folder is one vocab throughout
    loaded = transformers.AutoModel.from_pretrained(made.path)
    assert loaded.embeddings.word_embeddings.weight.shape == (len(KEPT), 16)


def test_padding_rows_are_rows_like_others(tmp_path):
    rows = 41  # the tokenizer has 37
    source = save_model("qwen3", tmp_path / "model", rows=rows)
    _, trimmed, cold = trim(source, tmp_path, kept=(*KEPT, 40), vocab_size=rows)
    embedding = load_all(source)["model.embed_tokens.weight"]
    assert torch.equal(trimmed["model.embed_tokens.weight"][-1], embedding[40])
    assert len(cold["embedding"]) == rows - len(KEPT) - 1


def test_tokens_beyond_the_rows_do_not_matter_here(tmp_path):
    source = save_model("qwen3", tmp_path / "model", rows=35)  # the tokenizer has 37
    _, trimmed, _ = trim(source, tmp_path, kept=(0, 1, 34), vocab_size=35)
    assert trimmed["model.embed_tokens.weight"].shape == (3, 16)


def resized(source, rows: int):
    weights = load_file(source / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    filled = torch.cat([table, torch.ones(8, 16)])[:rows].contiguous()
    save_file(weights | {"model.embed_tokens.weight": filled}, source / "model.safetensors", {"format": "pt"})
    return source


def test_rows_beyond_the_configs_vocab_size_are_left_behind(tmp_path):
    source = resized(save_model("qwen3", tmp_path / "model", rows=V), V + 3)
    made, trimmed, cold = trim(source, tmp_path)
    assert len(trimmed["model.embed_tokens.weight"]) + len(cold["embedding"]) == V
    assert made.cut[0].rows_before == V + 3


def test_fewer_rows_than_the_config_says_are_refused(tmp_path):
    source = resized(save_model("qwen3", tmp_path / "model", rows=V), V - 1)
    with pytest.raises(MismatchError, match="36 rows but the model's vocab_size is 37"):
        trim(source, tmp_path)


def test_vocab_of_another_size_is_refused(tmp_path):
    source = save_model("qwen3", tmp_path / "model", rows=V)
    with pytest.raises(MismatchError, match=r"38 rows.* has 37"):
        trim(source, tmp_path, vocab_size=38)


def test_vocab_of_another_tokenizer_is_refused(tmp_path):
    source = save_model("qwen3", tmp_path / "model", rows=V)
    digest = sha256_file(source / "tokenizer.json")
    target = tmp_path / "trimmed"
    target.mkdir()
    trim_checkpoint(resolve_model(source), make_vocab(KEPT, V, digest), target, progress=False)
    with pytest.raises(MismatchError, match=digest[:12]):
        trim_checkpoint(resolve_model(source), make_vocab(KEPT, V, "0" * 64), target, progress=False)


@pytest.mark.parametrize(("pad", "kept"), [(5, (0, 1, 2, 5, 9)), (1, (1, 5, 9)), (5, (0, 1, 2, 3, 4, 9))])
def test_pad_that_positions_are_counted_from_must_not_move(tmp_path, pad, kept):
    source = save_model("roberta", tmp_path / "model", rows=V, pad_token_id=pad)
    with pytest.raises(UnsupportedModelError, match=f"pad id {pad} .*position_embeddings"):
        trim(source, tmp_path, kept=kept)


def test_pad_may_move_where_positions_do_not_depend_on_it(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V, pad_token_id=5)
    made, _, _ = trim(source, tmp_path, kept=(1, 5, 9))
    assert json.loads((made.path / "config.json").read_text())["pad_token_id"] == 1


def test_pickled_weights_are_refused(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin is a pickle"):
        trim(source, tmp_path)


def test_checkpoint_without_the_tasks_embedding_is_refused(tmp_path):
    source = renamed(save_model("qwen3", tmp_path / "model", rows=V), lambda name: f"other.{name}")
    with pytest.raises(UnsupportedModelError, match=r"no model\.embed_tokens\.weight"):
        trim(source, tmp_path)


def test_architecture_that_transformers_has_not_is_refused(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["MadeUpModel"]}))
    with pytest.raises(UnsupportedModelError, match="MadeUpModel"):
        trim(source, tmp_path)


def test_truncated_weights_are_noticed(tmp_path):
    source = save_model("bert", tmp_path / "model", rows=V)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(MismatchError, match="cut off or changed"):
        trim(source, tmp_path)


def test_source_is_never_changed(tmp_path):
    source = save_model("llama", tmp_path / "model", rows=V, max_shard_size="4KB")
    before = {path.name: sha256_file(path) for path in source.iterdir()}
    shutil.copytree(source, tmp_path / "copy")
    trim(source, tmp_path)
    assert {path.name: sha256_file(path) for path in source.iterdir()} == before


def test_vocab_that_keeps_everything_leaves_no_cold_rows(tmp_path):
    source = save_model("llama", tmp_path / "model", rows=V)
    _, trimmed, cold = trim(source, tmp_path, kept=range(V))
    assert cold["embedding"].shape == (0, 16)
    assert all(torch.equal(trimmed[name], tensor) for name, tensor in load_all(source).items())


def test_awkward_sizes(tmp_path):
    source = save_model("llama", tmp_path / "model", rows=V, hidden_size=8, intermediate_size=V, head_dim=4)
    made, trimmed, _ = trim(source, tmp_path)
    assert trimmed["lm_head.weight"].shape == (11, 8)
    assert [tensor.name for tensor in made.cut] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert np.all([tensor.shape[0] == V for name, tensor in trimmed.items() if "up_proj" in name])
