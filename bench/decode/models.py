"""The models of the decode benchmark: random weights in real shapes, exported full and trimmed, and prompts.

A model with random weights generates, greedily, a token that is nearly uniform over its vocab, and a
different one every step, if the embedding is small beside what the layers add to it (then no token repeats
itself) and the rows are independent. Drafts would hardly ever stand for K kept ids of V. So the kept ids
are made what the model generates: the rows of all other ids are multiplied by c < 1. Given a hidden state,
logits are independent normal numbers, and c is chosen such that the largest of V - K of them times c is
above the largest of K in the wanted share of steps. Nothing in the runtime knows of it: drafts are rejected
where the full model's argmax is another id, and the share that stood is measured and reported.

Run as a module it makes one model and prints where it lies; the exporter's memory is gone with the process.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import IO, Any

import ml_dtypes
import numpy as np

from bench import harness
from trimserve.arrays import Ids
from trimserve.files.tensors import (
    ArrayTensor,
    TensorSource,
    exhaust,
    map_tensor,
    read_header,
    to_float32,
    write_tensors,
)
from trimserve.vocab.map import Reason, VocabMap

KEPT = 16_384
PROMPTS = 12
_SEED = 7
_ROWS_AT_ONCE = 4096
# With random weights attention gives the mean of all past values, which hardly changes from step to step:
# at full size it would make every token the same.
_ATTENTION_GAIN = 0.2
_COMMON = {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's config, and how large the entries of its embedding are."""

    config: dict[str, Any]
    embedding_std: float = 0.02

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config["vocab_size"])

    @property
    def width(self) -> int:
        """H."""
        return int(self.config["hidden_size"])


SHAPES = {
    "gemma-3-270m": Shape(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 262_144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
        },
        embedding_std=0.005,  # the model multiplies it by sqrt(H)
    ),
    "qwen3-0.6b": Shape(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        }
    ),
    "llama-3.2-1b": Shape(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rope_theta": 500_000.0,
        }
    ),
    "tiny": Shape(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    ),
}


@dataclass(frozen=True, slots=True)
class NormalTensor:
    """Independent normal numbers, F32 or BF16, made a few rows at a time; `row_scales` multiplies rows."""

    shape: tuple[int, ...]
    std: float
    seed: int
    row_scales: np.ndarray | None = None
    dtype: str = "F32"

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the bytes."""
        random = np.random.default_rng(self.seed)
        for start in range(0, self.shape[0], _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, self.shape[0] - start)
            rows = random.standard_normal((count, *self.shape[1:]), np.float32) * np.float32(self.std)
            if self.row_scales is not None:
                rows *= self.row_scales[start : start + count, None]
            data = (rows.astype(ml_dtypes.bfloat16) if self.dtype == "BF16" else rows).tobytes()
            count = len(data)
            while data:
                data = data[file.write(data) :]
            yield count


@dataclass(frozen=True, slots=True)
class ConstantTensor:
    """A float32 vector of one number."""

    shape: tuple[int, ...]
    value: float
    dtype: str = "F32"

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the bytes."""
        yield file.write(np.full(self.shape, self.value, np.float32).tobytes())


def cold_scale(kept: int, cold: int, stand: float) -> float:
    """The factor for cold rows at which `stand` of all steps have their largest logit among the kept ids.

    The largest of n independent normal numbers is Phi^-1(U^(1/n)) with U uniform.
    """
    random = np.random.default_rng(_SEED)
    ratios = _maxima(kept, random) / _maxima(cold, random)
    return float(np.quantile(ratios, 1 - stand))


def _maxima(count: int, random: np.random.Generator) -> np.ndarray:
    upper_tails = -np.expm1(np.log(random.random(20_000)) / count)
    return np.array([-NormalDist().inv_cdf(tail) for tail in upper_tails.tolist()])


def kept_ids(shape: Shape) -> Ids:
    """K ids all over the vocab, the special ones among them."""
    count = min(KEPT, shape.vocab_size // 4)
    others = np.arange(3, shape.vocab_size, dtype=np.int32)
    chosen = np.random.default_rng(_SEED).choice(others, count - 3, replace=False)
    return np.sort(np.concatenate([np.arange(3, dtype=np.int32), chosen]))


def make_checkpoint(folder: Path, shape: Shape, stand: float) -> None:
    """Write a checkpoint whose drafts stand in about that share of steps; its tokenizer has a word an id."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimserve_export.checkpoint.axes import build_on_meta

    (folder / "config.json").write_text(json.dumps(_COMMON | shape.config), "utf-8")
    _write_tokenizer(folder / "tokenizer.json", shape.vocab_size)
    model = build_on_meta(AutoConfig.from_pretrained(folder), AutoModelForCausalLM)
    kept = kept_ids(shape)
    scales = np.full(shape.vocab_size, cold_scale(len(kept), shape.vocab_size - len(kept), stand), np.float32)
    scales[kept] = 1
    gemma = shape.config["model_type"].startswith("gemma")
    tensors: dict[str, TensorSource] = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        size = tuple(parameter.shape)
        if len(size) == 1:
            tensors[name] = ConstantTensor(size, _gemma_norm(name) if gemma else 1.0)
        elif size[0] == shape.vocab_size:
            tensors[name] = NormalTensor(size, shape.embedding_std, seed, scales)
        else:
            gain = _ATTENTION_GAIN if "o_proj" in name else 1.0
            tensors[name] = NormalTensor(size, gain / math.sqrt(size[1]), seed)
    exhaust(write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}))


def _gemma_norm(name: str) -> float:
    """A norm's weight less one, as Gemma stores it; the one after attention undoes what `o_proj` scales."""
    return _ATTENTION_GAIN - 1 if "post_attention" in name else 0.0


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{id_}": id_ for id_ in range(vocab_size)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path), pretty=False)


def random_prompts(shape: Shape, tokens: int) -> list[str]:
    """Texts of kept ids."""
    random = np.random.default_rng(_SEED)
    kept = kept_ids(shape)[3:]
    return [" ".join(f"t{id_}" for id_ in random.choice(kept, tokens)) for _ in range(PROMPTS)]


def questions(corpus: Path) -> list[str]:
    """gsm8k's questions, spread over the corpus: a question follows the line with the last one's result."""
    lines = corpus.read_text("utf-8").split("\n")
    found = [line for before, line in zip(["####", *lines], lines, strict=False) if before.startswith("####")]
    return [f"{line}\n" for line in found[:: max(1, len(found) // PROMPTS)] if line][:PROMPTS]


def float32_copy(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint with its tensors in float32; returns the folder."""
    if not folder.exists():
        folder.mkdir()
        for path in model.iterdir():
            if path.suffix == ".json":
                (folder / path.name).write_bytes(path.read_bytes())
        specs, metadata = read_header(model / "model.safetensors")
        tensors = {
            name: ArrayTensor(to_float32(np.array(map_tensor(spec)), spec.dtype))
            for name, spec in specs.items()
        }
        exhaust(write_tensors(folder / "model.safetensors", tensors, metadata))
    return folder


def export_both(model: Path, vocab: VocabMap, work: Path, quantize: str | None) -> dict[str, Path]:
    """Export a model with every id and with the vocab's."""
    from trimserve_export import export

    folders = {name: work / f"{name}-{quantize or 'fp32'}" for name in ("full", "trimmed")}
    if not folders["full"].exists():
        full = VocabMap.everything(vocab.vocab_size)
        export(model, full, folders["full"], cold=False, quantize=quantize, progress=False)
    if not folders["trimmed"].exists():
        export(model, vocab, folders["trimmed"], quantize=quantize, progress=False)
    return folders


def select_for(model: Path, corpus: Path, coverage: float) -> VocabMap:
    """The ids that a corpus needs."""
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select

    return select(profile([corpus], model, progress=False), coverage=coverage)


def main(argv: Sequence[str] | None = None) -> int:
    """Make one model; the last line of stdout is JSON: full, trimmed, prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=(*SHAPES, "multidomain-qwen2"))
    parser.add_argument(
        "--work", type=Path, required=True, help="an existing folder; what lies there is used again"
    )
    parser.add_argument("--stand", type=float, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--quantize", choices=("int4", "int8"))
    parser.add_argument("--float32", action="store_true", help="store the trained model's rows in float32")
    args = parser.parse_args(argv)
    if args.shape in SHAPES:
        shape = SHAPES[args.shape]
        if args.layers:
            shape = Shape(shape.config | {"num_hidden_layers": args.layers}, shape.embedding_std)
        model = args.work / "model"
        if not model.exists():
            model.mkdir()
            make_checkpoint(model, shape, args.stand)
        kept = kept_ids(shape)
        vocab = VocabMap(kept, np.full(len(kept), Reason.EXPLICIT, np.uint8), shape.vocab_size)
        prompts = random_prompts(shape, args.prompt_tokens)
    else:
        data = harness.data_folder()
        model = data / "models" / args.shape
        if args.float32:
            model = float32_copy(model, args.work / "model")
        corpus = data / "corpora" / "gsm8k-en" / "text.txt"
        vocab, prompts = select_for(model, corpus, args.stand), questions(corpus)
    folders = export_both(model, vocab, args.work, args.quantize)
    print(json.dumps({name: str(path) for name, path in folders.items()} | {"prompts": prompts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
