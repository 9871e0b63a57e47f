"""What the tests of reversible fine-tuning share: small models of several layers, and their gradients.

Needs torch and transformers: call `pytest.importorskip("torch")` before importing this module.
"""

import torch
import transformers

from tests.support.finetuning import H, V, make_batch, make_model
from tests.support.models import with_random_weights

LAYERS = 4
_OPT = {"vocab_size": V, "hidden_size": H, "word_embed_proj_dim": H, "num_attention_heads": 2, "ffn_dim": 12}
# OPT has its norms before (125m) or after (350m) what they belong to.
OPT = {"opt": {"do_layer_norm_before": True}, "opt-350m": {"do_layer_norm_before": False}}
FAMILIES = ("bert", "roberta", "xlm-roberta", "bart", "llama", "qwen3", *OPT)


def make(family: str, layers: int = LAYERS, **config) -> transformers.PreTrainedModel:
    """A model of several layers in training mode, dropout on."""
    if family == "bart":
        return make_model(family, encoder_layers=layers, decoder_layers=layers, **config)
    if family in OPT:
        settings = _OPT | OPT[family] | {"num_hidden_layers": layers, "max_position_embeddings": 40}
        made = transformers.OPTForCausalLM(transformers.OPTConfig(**settings | config))
        return with_random_weights(made, 0).train()
    return make_model(family, num_hidden_layers=layers, **config)


def batch_of(family: str, step: int = 0) -> dict[str, torch.Tensor]:
    """A batch with labels that the family's head takes."""
    classes = family in ("bert", "roberta", "xlm-roberta")
    return make_batch(step, labels="class" if classes else "token")


def use_adapters(meft, seed: int = 0) -> None:
    """Give the adapters weights as if they were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stack in meft.stacks:
            for adapter in stack.adapters:
                adapter.up.weight.normal_(std=0.1, generator=generator)


def gradients(model, batch, seed: int = 0) -> dict[str, torch.Tensor]:
    """The gradients of a step, and the loss among them."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def assert_same_gradients(found, expected, share: float = 1e-4) -> None:
    """The same to a share of each gradient's norm.

    Biases of keys have no gradient but rounding errors, because softmax does not see them; so a millionth of
    the largest norm is allowed too.
    """
    assert found.keys() == expected.keys()
    least = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).norm())
        assert difference <= share * float(gradient.norm()) + least, (name, difference)
