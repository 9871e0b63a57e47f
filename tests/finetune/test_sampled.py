"""Sampled weight gradients: unbiased, of least variance, exact in everything else; with LoRA and MEFT."""

import copy
import itertools
import pickle

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from tests.support.finetuning import VOCAB, assert_same_state, make_batch, make_model, state_of
from tests.support.reversing import batch_of, gradients, make, use_adapters
from trimserve.errors import UsageError
from trimserve.finetune import make_sampled, partial_vocab, reversible, sampled_gradients
from trimserve_export.finetune.sampled.norms import NormCache, sample_places
from trimserve_export.finetune.sampled.selection import choose_rows

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("one_thread")]

ROWS, COUNT, DRAWS = 40, 12, 2000


def rows_of_a_product(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and gradients with few large rows, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand((ROWS, 1), generator=generator, dtype=torch.float64) ** 4
    left = torch.randn((ROWS, 5), generator=generator, dtype=torch.float64) * sizes
    return left, torch.randn((ROWS, 3), generator=generator, dtype=torch.float64)


def variance(left, right, shares, winners: int, count: int) -> float:
    """Of the estimate, summed over its entries: that of draws from what the winners leave."""
    order = shares.argsort(descending=True)[winners:]
    norms = (left.norm(dim=1) * right.norm(dim=1))[order] ** 2
    total = (right[order].T @ left[order]).norm() ** 2
    mass = shares[order].sum()
    return float((mass * (norms / shares[order]).sum() - total) / (count - winners))


def best_winners(shares: torch.Tensor, count: int) -> int:
    sorted_shares = shares.sort(descending=True).values
    return min(range(count), key=lambda c: float(1 - sorted_shares[:c].sum()) / (count - c))


@pytest.mark.parametrize("exact_norms", [True, False], ids=["best", "any"])
def test_estimate_is_unbiased_and_has_the_variance_of_theory(exact_norms):
    left, right = rows_of_a_product()
    sizes = left.norm(dim=1) * (right.norm(dim=1) if exact_norms else 1)
    exact, generator = right.T @ left, torch.Generator().manual_seed(0)
    made = []
    for _ in range(DRAWS):
        kept = choose_rows(sizes, COUNT, generator)
        assert kept.rows.shape == kept.scales.shape == (COUNT,)
        made.append((right[kept.rows] * kept.scales[:, None].double()).T @ left[kept.rows])
    draws = torch.stack(made)
    shares = sizes / sizes.sum()
    expected = variance(left, right, shares, best_winners(shares, COUNT), COUNT)
    # The mean's squared distance has the expectation variance / DRAWS; five times that is beyond chance.
    assert float((draws.mean(0) - exact).norm() ** 2) < 5 * expected / DRAWS
    # Each entry within 5 of its own standard errors.
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / DRAWS**0.5 + 1e-6).all()
    found = float(((draws - exact) ** 2).sum((1, 2)).mean())
    assert abs(found / expected - 1) < 0.15
    assert 0 < best_winners(shares, COUNT) < COUNT


@pytest.mark.parametrize("seed", range(5))
def test_variance_is_not_above_that_of_other_samplings(seed):
    left, right = rows_of_a_product(seed)
    sizes = left.norm(dim=1) * right.norm(dim=1)
    shares, uniform = sizes / sizes.sum(), torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    ours = variance(left, right, shares, best_winners(shares, COUNT), COUNT)
    assert ours < variance(left, right, shares, 0, COUNT)  # column-row sampling
    assert ours < variance(left, right, uniform, 0, COUNT)


def test_winners_are_kept_and_counted_by_the_rule():
    shares = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    generator = torch.Generator().manual_seed(0)
    for count, _ in itertools.product((1, 2, 3, 4, 5), range(20)):
        kept, winners = choose_rows(shares, count, generator), best_winners(shares.double(), count)
        assert kept.rows[:winners].tolist() == list(range(winners))
        assert (kept.scales[:winners] == 1).all()
        assert all(row >= winners for row in kept.rows[winners:].tolist())
    # A product with fewer rows than are kept is exact, and rows of nothing are kept by nothing.
    kept = choose_rows(torch.tensor([0.0, 2.0, 1.0, 0.0]), 3, generator)
    exact = torch.zeros(4).index_add_(0, kept.rows, kept.scales)
    assert exact[1:3].tolist() == [1.0, 1.0]
    assert choose_rows(torch.zeros(4), 2, generator).scales.isfinite().all()


def test_a_sample_has_one_place_however_it_is_padded():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 7, 6, 0, 0], [5, 6, 7, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    left, right, turned, longer = sample_places(ids, mask, 1 << 20).tolist()
    assert left == right
    assert len({left, turned, longer}) == 3
    many = torch.randint(0, 1000, (5000, 12), generator=torch.Generator().manual_seed(0))
    assert len(set(sample_places(many, None, 1 << 40).tolist())) == 5000


def test_norms_are_those_of_the_last_time_and_never_zero():
    cache, places = NormCache(2, 100), torch.tensor([3, 4, 5])
    assert cache.get([0], places).tolist() == [1, 1, 1]
    cache.put(0, places, torch.tensor([2.0, 0.0, float("nan")]))
    cache.put(1, places, torch.tensor([1.5, 0.0, 0.0]))
    assert cache.get([0], places).tolist() == [2, 2, 2]  # unknown and zero ones get the mean
    assert cache.get([0, 1], places)[0] == 2.5
    cache.put(0, places, torch.tensor([2.0, 1e-6, 1.0]))
    found = cache.get([0], places)
    assert found[1] == pytest.approx(0.01)
    assert found[0] == 2


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance relative to the norm; biases of keys have no gradient but rounding errors."""
    return float((found - expected).norm() / expected.norm())


def linear_of(model) -> nn.Linear:
    return model.bert.encoder.layer[0].intermediate.dense


def test_all_but_the_weights_gradient_is_exact():
    model, batch = make("bert"), batch_of("bert")
    expected = gradients(model, batch)
    with sampled_gradients(model, keep=0.3) as wta:
        found = gradients(model, batch)
    sampled = {f"{name}.weight" for name in wta.modules}
    assert len(sampled) == 4 * 6
    for name, gradient in expected.items():
        if name not in sampled:
            assert apart(found[name], gradient) <= 1e-4 or ".key." in name, name
        else:
            assert apart(found[name], gradient) > 1e-2, name
    assert torch.equal(found["loss"], expected["loss"])
    with sampled_gradients(model, keep=1.0):
        assert all(map(torch.equal, gradients(model, batch).values(), expected.values()))


def test_gradients_of_a_model_are_unbiased_with_cached_norms():
    model, batch = make("bert", 1).eval(), make_batch(0)
    expected = gradients(model, batch)
    with sampled_gradients(model, keep=0.4) as wta:
        gradients(model, batch)  # norms for the second time
        draws = {f"{name}.weight": [] for name in wta.modules}
        for _ in range(120):
            found = gradients(model, batch)
            for name, made in draws.items():
                made.append(found[name])
    for name, made in draws.items():
        stacked = torch.stack(made).double()
        error = stacked.std(0) / len(made) ** 0.5
        distance = (stacked.mean(0) - expected[name]).abs()
        # Of a few hundred entries none is beyond 6 standard errors by chance.
        assert (distance <= 6 * error + 1e-6).all(), name


def test_layers_that_read_the_same_rows_share_them():
    model, batch = make("bert"), batch_of("bert")
    saved: dict[int, torch.Size] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with sampled_gradients(model, keep=0.25), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
        rows = batch["input_ids"].numel()
        kept = [shape for shape in saved.values() if len(shape) == 2 and shape[0] == int(rows * 0.25 + 0.5)]
        loss.backward()
    # A layer has three inputs of width H (one for query, key and value) and one of the MLP's.
    widths = sorted(shape[1] for shape in kept)
    assert widths == [8] * 3 * 4 + [12] * 4


def test_dropout_draws_as_without_sampling_and_the_block_leaves_no_trace():
    model = make("bert")
    before, attributes = state_of(model), {name: set(vars(m)) for name, m in model.named_modules()}
    wta = make_sampled(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for copied in (twin, again):
        gradients(copied, batch_of("bert"))
    assert linear_of(model).weight.grad is None
    with pytest.raises(UsageError, match="sampled already"):
        make_sampled(model)
    wta.restore()
    wta.restore()
    assert_same_state(model.state_dict(), before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize("family", ["roberta", "bart", "opt", "llama", "qwen3"])
def test_families_with_accumulation_and_autocast(family):
    model = make(family)
    with sampled_gradients(model, keep=0.5) as wta:
        for step in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(**batch_of(family, step)).loss.backward()
        weights = [module.weight for module in wta.modules.values()]
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)
        assert all(weight.grad.dtype == torch.float32 for weight in weights)


def test_lora_keeps_a_part_of_its_inputs():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(make("llama"), lora)
    with sampled_gradients(model, keep=0.3) as wta:
        assert any("lora_A" in name for name in wta.modules)
        assert not any("lora_B" in name for name in wta.modules)
        found = gradients(model, batch_of("llama"))
    expected = gradients(model, batch_of("llama"))
    for name, gradient in expected.items():
        if "lora_B" in name:
            assert torch.equal(found[name], gradient)


def test_with_reversible_layers_and_a_partial_vocab():
    model, batch = make("bert"), batch_of("bert")
    with partial_vocab(model, VOCAB) as compact, reversible(model, rank=3, freeze=False) as meft:
        use_adapters(meft)
        compact_batch = compact.remap(batch)
        with sampled_gradients(model, keep=0.3) as wta:
            found = gradients(model, compact_batch)
        expected = gradients(model, compact_batch)
        assert torch.equal(found["loss"], expected["loss"])
        sampled = {f"{name}.weight" for name in wta.modules}
        assert any(".adapters." in name for name in sampled)
        for name in expected.keys() - sampled:
            assert apart(found[name], expected[name]) <= 1e-4 or ".key." in name, name
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        assert apart(found[name], expected[name]) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"modules": ["qury"]}, "no Linear layer .* called qury"),
        ({"kep": 1}, "keep"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_sampled(make_model("bert"), **arguments)


def test_chosen_modules():
    with sampled_gradients(make("bert"), modules=["query", "output.dense"]) as wta:
        assert {name.rpartition(".")[2] for name in wta.modules} == {"query", "dense"}
        assert len(wta.modules) == 4 * 3
    with pytest.raises(UsageError, match="takes a transformers model but got a Linear"):
        make_sampled(nn.Linear(2, 2))
