"""Every family through the whole export: the trimmed graph is the full graph, and that is the model."""

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch

from tests.support.exports import KEPT, Exported, V, read_float32
from tests.support.models import FAMILIES, GENERATE
from tests.support.rounding import assert_within, gamma, model_bound, product_bound

pytestmark = pytest.mark.export

TASKS = {name: family.task for name, family in FAMILIES.items()}
GENERATORS = [name for name, task in TASKS.items() if task == GENERATE]
WITH_HEAD = [name for name, task in TASKS.items() if task in (GENERATE, "fill-mask")]


@pytest.fixture(params=list(FAMILIES))
def model(request, exported) -> Exported:
    return exported(request.param)


def batch(model: Exported, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (2, 9), kept and cold, and their mask; the second text is padded."""
    ids = np.random.default_rng(seed).integers(6, V, (2, 9))
    ids[0, :3] = KEPT[-3:]
    mask = np.ones(ids.shape, np.int64)
    if model.task != GENERATE:
        ids[1, 6:], mask[1, 6:] = model.torch_model.config.pad_token_id, 0
    return ids, mask


def logits_bound(model: Exported, hidden: np.ndarray) -> np.ndarray:
    """How far two orders of the same sums may lie apart in the kept logits: (B, T, K).

    On the shapes here the kernel gives equal bits; a wider matrix may be tiled differently. Bias, scale and
    cap follow the product.
    """
    head = model.torch_model.get_output_embeddings()
    bias = 0 if head.bias is None else 2 * gamma(8) * np.abs(head.bias.detach().numpy())
    return (product_bound(hidden, head_weight(model).T, after=8) + bias)[..., list(KEPT)]


def head_weight(model: Exported) -> np.ndarray:
    return model.torch_model.get_output_embeddings().weight.detach().numpy()


def test_trimmed_graph_is_the_full_graph_on_any_ids(model):
    ids, mask = batch(model)
    trimmed, full = model.run_trimmed(ids, mask=mask), model.run_full(ids, mask=mask)
    assert trimmed.keys() == full.keys()
    if "hidden_states" in trimmed:
        bound = logits_bound(model, full["hidden_states"])
        assert_within(trimmed["logits"], full["logits"][..., list(KEPT)], bound, rows=-1)
    vocab_wide = {"logits"} if "hidden_states" in trimmed else set()
    for name in trimmed.keys() - vocab_wide:
        np.testing.assert_array_equal(trimmed[name], full[name], err_msg=name)


def test_trimmed_graph_is_the_transformers_model(model):
    ids, mask = batch(model, seed=1)
    found = model.run_trimmed(ids, mask=mask)
    name = "last_hidden_state" if model.task == "feature-extraction" else "logits"
    real = mask.astype(bool) if found[name].ndim == 3 else slice(None)
    kept = list(KEPT) if "hidden_states" in found else slice(None)

    @torch.no_grad()
    def by_torch(torch_model) -> np.ndarray:
        return torch_model(torch.tensor(ids), attention_mask=torch.tensor(mask))[name].numpy()[real][
            ..., kept
        ]

    bound = model_bound(model.torch_model, by_torch)
    assert_within(found[name][real], by_torch(model.torch_model), bound, rows=-1)


def test_every_cold_id_goes_in_through_a_slot(model):
    ids = model.vocab.cold_ids[:13].reshape(1, -1).astype(np.int64)
    trimmed, full = model.run_trimmed(ids), model.run_full(ids)
    name = next(name for name in ("hidden_states", "last_hidden_state", "logits") if name in full)
    np.testing.assert_array_equal(trimmed[name], full[name])


def test_kept_ids_do_not_need_cold_rows(model):
    ids = np.array([KEPT], np.int64)
    found, expected = model.run_trimmed(ids), model.run_full(ids)
    name = "hidden_states" if "hidden_states" in expected else next(iter(expected))
    np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("family", WITH_HEAD)
@pytest.mark.parametrize("keep", [1, 3, 50])
def test_logits_to_keep_gives_the_last_positions(exported, family, keep):
    model = exported(family)
    ids, mask = batch(model)
    everything = model.run_trimmed(ids, mask=mask)
    last = model.run_trimmed(ids, mask=mask, logits_to_keep=keep)
    rows = min(keep, ids.shape[1])
    assert last["logits"].shape == (2, rows, len(KEPT))
    np.testing.assert_array_equal(last["hidden_states"], everything["hidden_states"][:, -rows:])
    bound = logits_bound(model, last["hidden_states"])
    assert_within(last["logits"], everything["logits"][:, -rows:], bound, rows=1)


@pytest.mark.parametrize("family", GENERATORS)
def test_generation_continues_from_the_past(exported, family):
    model = exported(family)
    ids, _ = batch(model)
    start = {name: value for name, value in model.run_trimmed(ids[:, :5]).items() if "present" in name}
    continued = model.run_trimmed(ids[:, 5:], past=start)
    full_start = {name: value for name, value in model.run_full(ids[:, :5]).items() if "present" in name}
    full = model.run_full(ids[:, 5:], past=full_start)
    np.testing.assert_array_equal(continued["hidden_states"], full["hidden_states"])
    at_once = model.run_trimmed(ids)["hidden_states"][:, 5:]

    def by_torch(torch_model) -> torch.Tensor:
        return torch_model(torch.tensor(ids), output_hidden_states=True).hidden_states[-1][:, 5:]

    # Another count of positions takes other kernels.
    bound = model_bound(model.torch_model, by_torch, draws=3)
    assert_within(continued["hidden_states"], at_once, bound, rows=1)


@pytest.mark.parametrize("family", WITH_HEAD)
def test_tied_matrix_is_stored_once(exported, family):
    model = exported(family)
    graph = ir.load(model.folder.path / "model.onnx").graph
    shapes = [value.const_value.shape.numpy() for value in graph.initializers.values()]
    width = head_weight(model).shape[1]
    tables = [shape for shape in shapes if sorted(shape) == sorted((len(KEPT), width))]
    weights = (
        model.torch_model.get_input_embeddings().weight,
        model.torch_model.get_output_embeddings().weight,
    )
    tied = weights[0] is weights[1]
    assert len(tables) == (1 if tied else 2)
    assert ("head" in model.cold) != tied


def test_cold_rows_are_the_rows_of_the_cold_ids(model):
    embedding = model.torch_model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(model.cold["embedding"], embedding[model.vocab.cold_ids])
    head = model.torch_model.get_output_embeddings()
    if "head" in model.cold:
        np.testing.assert_array_equal(model.cold["head"], head.weight.detach()[model.vocab.cold_ids])
    has_bias = head is not None and head.bias is not None
    assert ("head_bias" in model.cold) == has_bias
    if has_bias:
        np.testing.assert_array_equal(model.cold["head_bias"], head.bias.detach()[model.vocab.cold_ids])


def test_graph_has_the_contracts_inputs_and_outputs(model):
    inputs = {value.name: value.shape for value in model.trimmed.get_inputs()}
    outputs = {value.name: value.shape for value in model.trimmed.get_outputs()}
    assert inputs["cold_rows"] == ["cold_slots", model.cold["embedding"].shape[1]]
    has_head = model.task in (GENERATE, "fill-mask")
    assert ("logits_to_keep" in inputs) == has_head == ("hidden_states" in outputs)
    if has_head:
        assert outputs["logits"][-1] == len(KEPT)
    assert read_float32(model.folder.path / "cold_rows.safetensors").keys() == model.cold.keys()


def test_weights_are_external_data(model):
    graph = model.folder.path / "model.onnx"
    assert (model.folder.path / "model.onnx_data").stat().st_size > len(KEPT) * 8 * 4
    tensors = [value.const_value for value in ir.load(graph).graph.initializers.values()]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors if tensor.nbytes > 256)
