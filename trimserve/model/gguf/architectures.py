"""The architectures of GGUF files that are read: their configs and tensors in the words of transformers."""

from dataclasses import dataclass
from typing import Any, Final

from trimserve.errors import UnsupportedModelError
from trimserve.files.gguf import GgufFile

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
# Frequencies of rotary embeddings, which a config says in another way.
ROPE_TENSORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_OUTSIDE: Final = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_ATTENTION: Final = {f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")}
_OUTPUT: Final = {"attn_output": "self_attn.o_proj"}
_GATED: Final = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS: Final = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SPLIT: Final = {**_ATTENTION, **_OUTPUT, **_GATED}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        model_type: of the config in transformers.
        model_class: of transformers.
        parts: what a layer has: part of a tensor's name -> module of transformers.
        biases: parts that have a bias in every file.
        may_have_biases: parts may have a bias, which the config then says.
        interleaved: rows of query and key stand as pairs that are turned together.
        shifted_norms: weights of norms are stored with 1 added.
        settings: further settings of the config.
    """

    model_type: str
    model_class: str
    parts: dict[str, str]
    biases: tuple[str, ...] = ()
    may_have_biases: bool = False
    interleaved: bool = False
    shifted_norms: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def stored_names(self, layers: int, *, head: bool, biases: tuple[str, ...] = ()) -> dict[str, str]:
        """The tensors of a file -> the parameters of transformers that they are.

        Args:
            layers: of the model.
            head: it has one of its own.
            biases: beginnings of parts that have a bias although not every file has it.
        """
        found = {name: target for name, target in _OUTSIDE.items() if head or name != HEAD}
        linear = [part for part in self.parts if not part.endswith("norm")]
        with_bias = [part for part in linear if part in self.biases or part.startswith(biases)]
        for layer in range(layers):
            for part, module in self.parts.items():
                found[f"blk.{layer}.{part}.weight"] = f"model.layers.{layer}.{module}.weight"
            for part in with_bias:
                found[f"blk.{layer}.{part}.bias"] = f"model.layers.{layer}.{self.parts[part]}.bias"
        return found


_GELU: Final = (("hidden_activation", "gelu_pytorch_tanh"), ("hidden_act", "gelu_pytorch_tanh"))
_SILU: Final = (("hidden_act", "silu"),)
ARCHITECTURES: Final = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        {**_SPLIT, **_NORMS},
        may_have_biases=True,
        interleaved=True,
        settings=_SILU,
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        {**_SPLIT, **_NORMS},
        biases=("attn_q", "attn_k", "attn_v"),
        settings=(*_SILU, ("use_sliding_window", False)),
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_SPLIT, **_NORMS, **_HEAD_NORMS},
        settings=(*_SILU, ("use_sliding_window", False), ("attention_bias", False)),
    ),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM", {**_SPLIT, **_NORMS}, shifted_norms=True, settings=_GELU
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", {**_SPLIT, **_FOUR_NORMS}, shifted_norms=True, settings=_GELU
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_SPLIT, **_FOUR_NORMS, **_HEAD_NORMS},
        shifted_norms=True,
        settings=_GELU,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_qkv": "self_attn.qkv_proj",
            **_OUTPUT,
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORMS,
        },
        settings=_SILU,
    ),
}


def architecture_of(file: GgufFile) -> tuple[str, Architecture]:
    """The name of a file's architecture, and what it is.

    Raises:
        UnsupportedModelError: it is not one of `ARCHITECTURES`, or is a part of a model, no language model,
            or a mixture of experts.
    """
    kind = file.text("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} holds {kind[:60]!r} and no model by itself: pass the file of the language model."
        )
    if (parts := file.integer("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"{file.path} is one of {parts:,} parts of a model: put them together with llama.cpp's "
            "`llama-gguf-split --merge FIRST WHOLE.gguf`, and pass that file."
        )
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} is of the architecture {name[:60]!r}, and trimserve reads GGUF files of "
            f"{', '.join(ARCHITECTURES)}: pass the model that it was made from."
        )
    if file.integer(f"{name}.expert_count", 0):
        raise UnsupportedModelError(
            f"{file.path} is a mixture of experts, which trimserve does not read from GGUF: pass the model "
            "that it was made from."
        )
    return name, ARCHITECTURES[name]
