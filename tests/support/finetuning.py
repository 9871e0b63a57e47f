"""What the tests of fine-tuning share: tiny models without folders, batches of kept ids, training steps.

Needs torch and transformers: call `pytest.importorskip("torch")` before importing this module.
"""

import copy

import numpy as np
import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import with_random_weights
from trimserve.vocab.map import VocabMap

V, K, H = 37, 11, 8
# Ids 0..5 stay in place because positions of RoBERTa's kind are counted from their pad id; 36 moves.
KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
VOCAB: VocabMap = make_vocab(KEPT, V)
COLD = tuple(VOCAB.cold_ids.tolist())

_SIZES = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2}
_ENCODER = _SIZES | {"intermediate_size": 12, "max_position_embeddings": 40, "num_labels": 3}
_DECODER = _SIZES | {"intermediate_size": 12, "num_key_value_heads": 1, "head_dim": 4}
# family -> class, config. Pad ids are awkward on purpose: other than 0, at the end of the vocab.
MODELS = {
    "bert": ("BertForSequenceClassification", _ENCODER | {"pad_token_id": 36}),
    "roberta": ("RobertaForSequenceClassification", _ENCODER | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", _ENCODER | {"pad_token_id": 5}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        _ENCODER | {"pad_token_id": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": V, "dim": H, "hidden_dim": 12, "n_layers": 1, "n_heads": 2, "num_labels": 3}
        | {"max_position_embeddings": 40, "pad_token_id": 36},
    ),
    "bert-mlm": ("BertForMaskedLM", _ENCODER | {"pad_token_id": 36}),  # tied, with a bias
    "llama": ("LlamaForCausalLM", _DECODER | {"tie_word_embeddings": False, "eos_token_id": 30}),
    "qwen3": ("Qwen3ForCausalLM", _DECODER | {"tie_word_embeddings": True, "eos_token_id": [30, 36]}),
    "marian": (  # names its vocab size twice, counts positions of sinusoids
        "MarianMTModel",
        {"vocab_size": V, "d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12}
        | {"decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"max_position_embeddings": 40, "pad_token_id": 5, "eos_token_id": 0, "decoder_start_token_id": 5}
        | {"bos_token_id": None, "forced_eos_token_id": 0},
    ),
    "bart": (  # tied three times, final_logits_bias
        "BartForConditionalGeneration",
        {"vocab_size": V, "d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12}
        | {"decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 30}
        | {"decoder_start_token_id": 30, "forced_eos_token_id": 30},
    ),
}


def make_model(family: str, seed: int = 0, **config) -> transformers.PreTrainedModel:
    """A tiny model with trained-size random weights, in training mode (dropout on)."""
    name, settings = MODELS[family]
    model_class = getattr(transformers, name)
    made = model_class(model_class.config_class(**settings | config))
    if getattr(made, "final_logits_bias", None) is not None:
        made.final_logits_bias.normal_(generator=torch.Generator().manual_seed(seed))
    return with_random_weights(made, seed).train()


def make_batch(step: int, *, labels: str = "class", texts: int = 4) -> dict[str, torch.Tensor]:
    """A batch of token ids, all of them kept, padded with id 36; labels are classes or token ids."""
    random = np.random.default_rng(step)
    ids = random.choice(KEPT[:-1], (texts, 7))
    mask = np.ones_like(ids)
    mask[0, 4:] = 0
    ids[0, 4:] = 36
    targets = np.where(mask == 1, ids, -100) if labels == "token" else random.integers(0, 3, texts)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": targets}
    return {name: torch.tensor(array) for name, array in arrays.items()}


def train_step(model, batch, optimizer, seed: int) -> torch.Tensor:
    """One step with dropout seeded; returns the loss. Gradients stay on the parameters."""
    optimizer.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def state_of(model) -> dict[str, torch.Tensor]:
    """A copy of the model's weights."""
    return copy.deepcopy(model.state_dict())


def assert_same_state(found, expected) -> None:
    """Every tensor the same, bit for bit."""
    assert found.keys() == expected.keys()
    differing = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert differing == []


def rows_of(model, name: str = "embedding") -> torch.Tensor:
    """The embedding's or head's weight."""
    module = model.get_input_embeddings() if name == "embedding" else model.get_output_embeddings()
    return module.weight
