"""Coupled layers: exact inversion, gradients equal to those without recomputation, the pre-trained start."""

import copy
import itertools
import logging
import pickle

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from tests.support.finetuning import assert_same_state, make_model, state_of
from tests.support.reversing import (
    FAMILIES,
    LAYERS,
    assert_same_gradients,
    batch_of,
    gradients,
    make,
    use_adapters,
)
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.finetune import load_reversible, make_reversible, reversible
from trimserve_export.finetune.reversible.digits import Scale, snap

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

VARIANTS = (1, 2, 3)


@pytest.mark.parametrize("value", [1.0, 0.5, 0.1, 1 / 14, 1 / 15, 0.03, 1 / 250])
def test_a_scaled_stream_comes_back_exactly(value):
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-9, 6, (1001,), generator=generator)
    stream = snap(torch.randn(1001, generator=generator) * sizes)
    scale = Scale(value)
    product, digits = scale.shrink(stream)
    assert torch.equal(scale.expand(product, digits), stream)
    # Halves of grid steps are rounded to even, so both signs of the largest digit occur.
    edges = snap(torch.arange(-2000, 2000) * 2.0**-30)
    product, digits = scale.shrink(edges)
    assert torch.equal(scale.expand(product, digits), edges)
    kept = 0 if digits is None else digits.numel() / edges.numel()
    assert kept == {0: 0, 4: 0.5, 8: 1}[scale.bits]


def test_a_stream_keeps_what_is_no_number():
    stream = snap(torch.tensor([float("nan"), float("inf"), 1.0]))
    product, _ = Scale(0.1).shrink(stream)
    assert product.isnan().tolist() == [True, False, False]
    assert product[1] == float("inf")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_without_recomputation(family, variant):
    model, batch = make(family), batch_of(family)
    with reversible(model, variant=variant, rank=3, freeze=False) as meft:
        use_adapters(meft)
        found = gradients(model, batch)
        meft.recompute = False
        expected = gradients(model, batch)
    assert torch.equal(found["loss"], expected["loss"])
    assert_same_gradients(found, expected)
    assert any(".adapters." in name for name in expected)
    assert torch.count_nonzero(expected[next(name for name in expected if ".adapters." in name)])


def test_inversion_is_exact_at_any_depth():
    model, batch = make("bert", 48), batch_of("bert")
    with reversible(model, variant=3, rank=3) as meft:
        use_adapters(meft)
        found = gradients(model, batch)
        meft.recompute = False
        expected = gradients(model, batch)
    # The same numbers bit for bit, so also those of every layer's gradient.
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_inversion_in_floats_falls_back_to_checkpoints_and_says_so(variant, caplog):
    model, batch = make("bert", 8), batch_of("bert")
    with caplog.at_level(logging.WARNING), reversible(model, variant=variant, rank=3, exact=False) as meft:
        use_adapters(meft)
        found = gradients(model, batch)
        (errors,), (stack,) = meft.inversion_errors, meft.stacks
        assert 0 < stack.checkpointed < 8
        assert errors[stack.checkpointed] <= stack.tolerance < errors[stack.checkpointed - 1]
        # Each layer loses a digit (two in the third variant): what the issue of MEFT is.
        assert errors[0] > 1e3 * errors[6]
        assert f"first {stack.checkpointed} of 8 layers" in caplog.text
        meft.recompute = False
        expected = gradients(model, batch)
        assert_same_gradients(found, expected)
        meft.recompute, stack.checkpointed = True, 0
        broken = gradients(model, batch)
    with pytest.raises(AssertionError):
        assert_same_gradients(broken, expected)


def hidden_of(model, batch) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.base_model(**inputs).last_hidden_state.double()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_starts_at_the_pretrained_model(family, variant):
    # As the factor goes to zero, the output goes to the model's: to first order in proportion.
    model, batch = make(family).eval(), batch_of(family)
    expected = hidden_of(model, batch)
    distances = []
    for factor in (0.02, 0.01, 0.005):
        scales = tuple(1.0 if scale == 1 else factor for scale in {1: (0, 1), 2: (1, 0), 3: (0, 0)}[variant])
        with reversible(model, variant=variant, scales=scales, rank=3):
            distances.append(float((hidden_of(model, batch) - expected).norm()))
    assert distances[0] > 0
    for further, nearer in itertools.pairwise(distances):
        assert 1.8 < further / nearer < 2.2
    assert torch.equal(hidden_of(model, batch), expected)


@pytest.mark.parametrize("factor", [0.1, 0.02])
def test_start_is_within_the_bound_of_the_factors(factor):
    # Each layer adds factor * x to the stream; what the rest of the pre-trained layers makes of that is the
    # distance, layer by layer: |out - pretrained| <= sum_n |R_n(F(h) + factor x) - R_n(F(h))|.
    model, batch = make("bert").eval(), batch_of("bert")
    layers, taken = list(model.bert.encoder.layer), {}
    hook = layers[0].register_forward_pre_hook(
        lambda _, args, named: taken.update(args=args, named=named), with_kwargs=True
    )
    expected = hidden_of(model, batch)
    hook.remove()

    def rest(hidden: torch.Tensor, begin: int) -> torch.Tensor:
        for layer in layers[begin:]:
            made = layer(hidden, *taken["args"][1:], **taken["named"])
            hidden = made[0] if isinstance(made, tuple) else made
        return hidden

    with torch.no_grad():
        older, hidden, bound = taken["args"][0], taken["args"][0], 0.0
        for number in range(LAYERS):
            made = layers[number](hidden, *taken["args"][1:], **taken["named"])
            made = made[0] if isinstance(made, tuple) else made
            bound += float((rest(made + factor * older, number + 1) - rest(made, number + 1)).norm())
            older, hidden = hidden, made + factor * older
    with reversible(model, variant=1, scales=(factor, 1.0), rank=3):
        distance = float((hidden_of(model, batch) - expected).norm())
    assert 0.1 * bound < distance <= bound * (1 + 1e-4)


def test_autocast_and_gradient_accumulation():
    model = make("bert")
    batches = [batch_of("bert", step) for step in range(3)]

    def accumulate() -> dict[str, torch.Tensor]:
        model.zero_grad()
        for step, batch in enumerate(batches):
            torch.manual_seed(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
                (loss / len(batches)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        found = accumulate()
        meft.recompute = False
        expected = accumulate()
    assert_same_gradients(found, expected)


def test_other_checkpointing_around_it_and_a_frozen_model():
    model, batch = make("bert"), batch_of("bert")
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        expected = gradients(model, batch)
        torch.manual_seed(0)
        model.zero_grad()
        checkpoint(lambda **inputs: model(**inputs).loss, use_reentrant=False, **batch).backward()
        assert torch.equal(
            meft.stacks[0].adapters[0].up.weight.grad,
            expected["bert.encoder.layer.adapters.0.up.weight"],
        )
        model.requires_grad_(False)
        assert not model(**batch).loss.requires_grad


def saved_bytes(model, batch) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
        count = sum(kept.values())
        loss.backward()
    return count


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_more_keeps_only_the_digits(variant):
    sizes = {}
    for layers in (2, 6):
        model, batch = make("bert", layers), batch_of("bert")
        with reversible(model, variant=variant, rank=3):
            sizes[layers] = saved_bytes(model, batch)
    numbers = batch["input_ids"].numel() * model.config.hidden_size
    digits = 1.0 if variant == 3 else 0.5  # bytes a number and layer
    assert (sizes[6] - sizes[2]) / 4 == digits * numbers
    assert saved_bytes(make("bert", 6), batch) - saved_bytes(make("bert", 2), batch) > 40 * (
        sizes[6] - sizes[2]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_24_layers_a_fifth_of_the_activations_is_kept_at_most(variant):
    # Narrow layers of the usual proportions; attention's T x T numbers are few, which is the harder case.
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
    model, batch = make("bert", 24, **sizes), batch_of("bert")
    full = saved_bytes(model, batch)
    with reversible(model, variant=variant):
        kept = saved_bytes(model, batch)
    assert kept <= 0.2 * full  # the target
    assert kept >= 0.01 * full  # something was counted


def test_the_block_leaves_no_trace():
    model = make("bert")
    before, attributes = state_of(model), set(model.__dict__)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    layers = model.bert.encoder.layer
    with pytest.raises(ZeroDivisionError), reversible(model):
        _ = 1 // (model.bert.encoder.layer is layers)
    assert model.bert.encoder.layer is layers
    assert_same_state(model.state_dict(), before)
    assert set(model.__dict__) == attributes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model._forward_pre_hooks


def test_a_coupled_model_can_be_copied_and_pickled():
    model, batch = make("bert").eval(), batch_of("bert")
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        expected = model(**batch).logits
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.zero_()
        assert torch.equal(twin(**batch).logits, expected)
        assert torch.equal(again(**batch).logits, expected)


def test_what_is_trained_is_saved_and_loaded(tmp_path, caplog):
    model, batch = make("bert"), batch_of("bert")
    other = copy.deepcopy(model).eval()
    with reversible(model, variant=2, scales=(1.0, 0.2), rank=3) as meft:
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(meft.model.parameters(), lr=0.1)
        for step in range(3):
            gradients(model, batch, step)
            optimizer.step()
        meft.save(tmp_path / "adapters")
        model.eval()
        expected = model(**batch).logits
    assert all(".adapters." in name or name.startswith("classifier") for name in names)
    loaded = load_reversible(other, tmp_path / "adapters")
    assert torch.equal(other(**batch).logits, expected)
    assert (loaded.form.variant, loaded.form.scales, loaded.form.rank) == (2, (1.0, 0.2), 3)
    loaded.restore()
    loaded.restore()
    assert "not saved" not in caplog.text
    with pytest.raises(MismatchError, match=r"layer\.adapters\.0\.down\.\w+ has another shape"):
        load_reversible(make("bert", hidden_size=4, intermediate_size=6), tmp_path / "adapters")
    with pytest.raises(MismatchError, match="trained in a BertForSequenceClassification"):
        load_reversible(make_model("bert-mlm"), tmp_path / "adapters")
    with pytest.raises(UsageError, match=r"no reversible\.json"):
        load_reversible(make("bert"), tmp_path)


def test_unsaved_training_is_noted(caplog):
    with reversible(make("bert")) as meft:
        use_adapters(meft)
    assert "were not saved" in caplog.text


def test_generation_uses_the_cache():
    model = make("llama", eos_token_id=None).eval()
    ids = batch_of("llama")["input_ids"][1:]
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        made = model.generate(ids, max_new_tokens=5, do_sample=False)
        plain = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(made, plain)
    assert made.shape[1] == ids.shape[1] + 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": 4}, "variant"),
        ({"scales": (0.001, 1.0)}, "scales"),
        ({"checkpointed": 1}, "exact=False"),
        ({"rnk": 3}, "rank"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_reversible(make("bert"), **arguments)


def test_models_that_are_not_covered():
    with pytest.raises(UnsupportedModelError, match=r"distilbert\.transformer\.layer of TransformerBlock"):
        make_reversible(make_model("distilbert"))
    with pytest.raises(UsageError, match="takes a transformers model but got a Linear"):
        make_reversible(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="layerdrop"):
        make_reversible(make("bart", encoder_layerdrop=0.5))
    mixed = {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True}
    with pytest.raises(UnsupportedModelError, match="several kinds"):
        make_reversible(make("qwen3", **mixed))
    model = make("bert")
    with reversible(model), pytest.raises(UsageError, match="coupled already"):
        make_reversible(model)
    with reversible(model), pytest.raises(UsageError, match="no output_hidden_states"):
        model(**batch_of("bert"), output_hidden_states=True)
    hook = model.bert.encoder.layer[2].register_forward_hook(lambda *_: None)
    with reversible(model), pytest.raises(UsageError, match="hooked on a whole layer"):
        model(**batch_of("bert"))
    hook.remove()


def test_layers_that_compute_something_else_are_refused(monkeypatch):
    layer = transformers.models.bert.modeling_bert.BertLayer
    forward = layer.forward

    def changed(self, hidden_states, *args, **named):
        made = forward(self, hidden_states, *args, **named)
        return (made[0] + 1,) if isinstance(made, tuple) else made + 1

    changed.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(layer, "forward", changed)
    with reversible(make("bert")) as meft, pytest.raises(UnsupportedModelError, match="computes something"):
        meft.model(**batch_of("bert"))


def test_numbers_that_change_between_the_passes_are_an_error():
    model, batch = make("bert"), batch_of("bert")
    with reversible(model, rank=3) as meft:
        use_adapters(meft)
        loss = model(**batch).loss
        model.bert.encoder.layer[0].eval()  # no dropout in backward
        with pytest.raises(MismatchError, match="did not come back"):
            loss.backward()
        model.train()
        loss = model(**batch).loss
        with torch.no_grad():
            meft.stacks[0].adapters[0].up.weight.add_(1)
        with pytest.raises(UsageError, match="changed between forward and backward"):
            loss.backward()


def test_digits_are_as_small_as_they_are_said_to_be():
    # |d| <= 0.5 / scale + 0.5 grid steps, over a range that has every remainder.
    for value in np.linspace(1 / 250, 0.99, 40):
        edges = torch.arange(-3000.0, 3000.0, dtype=torch.float64) * 2.0**-30
        product = snap(edges * value)
        digits = (edges - snap(product / value)) * 2.0**30
        assert digits.abs().max() <= 0.5 / value + 0.5
