"""Trimmed encoder-decoders for tests, and the full models to hold them against.

Needs torch and the exporter: call `pytest.importorskip("torch")` before importing this module.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import PLAIN_EXPORTER, with_random_weights
from tests.support.tiny_tokenizers import KINDS
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.sampling import SamplingParams, choose
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.opening import list_files
from trimserve.generation.text2text import Text2TextGenerator
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve_export.full_model import export_full
from trimserve_export.pipeline import export

V, HIDDEN = 37, 16
# The special tokens of the tiny tokenizer and a few others: 26 of 37 ids are cold.
KEPT = (0, 1, 2, 3, 4, 5, 7, 8, 20, 30, 36)
TASK = "text2text-generation-with-past"

_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64, "d_model": HIDDEN}
_LAYERS |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
_LAYERS |= {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
_BART = _LAYERS | {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
_T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
_T5 |= {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
_LAST_PAD = {"pad_token_id": 36, "decoder_start_token_id": 36, "eos_token_id": 0, "bad_words_ids": [[36]]}

# Random weights that do not repeat one token for ever, and mix kept and cold ids.
SEEDS = {"t5": 12, "mt5": 3, "bart": 4, "mbart": 9, "marian": 3, "m2m_100": 4, "longt5": 6}
# Name -> class, config. The configs have each family's awkward part: T5 scales before a tied head, mT5 has a
# head of its own, BART and its kin a bias after the head, Marian the last id for padding and for the start,
# M2M100 positions counted from the pad id.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": (
        "MT5ForConditionalGeneration",
        _T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "bart": ("BartForConditionalGeneration", _BART | {"forced_eos_token_id": 3}),
    "mbart": (
        "MBartForConditionalGeneration",
        _BART | {"scale_embedding": True, "forced_eos_token_id": None},
    ),
    "marian": ("MarianMTModel", _BART | _LAST_PAD | {"scale_embedding": True, "forced_eos_token_id": 0}),
    "m2m_100": (
        "M2M100ForConditionalGeneration",
        _BART | {"pad_token_id": 1, "scale_embedding": True, "forced_bos_token_id": 20},
    ),
    "pegasus": ("PegasusForConditionalGeneration", _BART | {"forced_eos_token_id": 3}),
    "blenderbot": ("BlenderbotForConditionalGeneration", _BART | {"forced_eos_token_id": None}),
    "longt5": ("LongT5ForConditionalGeneration", _T5 | {"local_radius": 4}),
}
# Those that optimum-onnx is not asked for.
LATER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "umt5": (
        "UMT5ForConditionalGeneration",
        _T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "blenderbot_small": ("BlenderbotSmallForConditionalGeneration", _BART | {"forced_eos_token_id": None}),
    "plbart": ("PLBartForConditionalGeneration", _BART | {"forced_eos_token_id": None}),
}


@dataclass(frozen=True)
class Translator:
    """A tiny encoder-decoder: its folder, its trimmed folder, and the graphs with every row."""

    source: Path
    path: Path
    full: Path

    @cached_property
    def generator(self) -> Text2TextGenerator:
        model = load(self.path)
        assert isinstance(model, Text2TextGenerator)
        return model

    @cached_property
    def onnx(self) -> Path:
        """The model as optimum-onnx exports it: an encoder, two decoders and the two merged."""
        # Here, as the rest of this module is imported beside transformers 5, which optimum-onnx refuses.
        from optimum.exporters.onnx import onnx_export_from_model

        from trimserve_export.exporters.optimum import quiet

        folder = self.source.parent / "onnx"
        with quiet():
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(self.source).eval()  # it is changed
            onnx_export_from_model(model, folder, task=TASK, do_validation=False)
        for name in ("tokenizer.json", "config.json", "generation_config.json"):
            shutil.copy(self.source / name, folder / name)
        return folder

    @cached_property
    def torch_model(self) -> transformers.PreTrainedModel:
        with torch.inference_mode(False):  # weights made in that mode cannot be changed later
            return transformers.AutoModelForSeq2SeqLM.from_pretrained(self.source, dtype=torch.float32).eval()

    def encode(self, text: str) -> np.ndarray:
        return self.generator.codec.encode([text])[0]

    def by_torch(self, text: str, tokens: int, **options: Any) -> list[int]:
        """What `transformers.generate` makes of a text with the full model."""
        ids = torch.tensor(self.encode(text)[None].astype(np.int64))
        config = transformers.GenerationConfig.from_pretrained(self.source)
        with torch.inference_mode():
            made = self.torch_model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                max_new_tokens=tokens,
                **{"do_sample": False, "num_beams": 1, **options},
            )
        return made[0, 1:].tolist()

    def is_cold(self, ids: Sequence[int]) -> np.ndarray:
        return ~self.generator.folder.vocab.is_kept(np.array(ids, np.int32))

    @cached_property
    def full_sampler(self) -> "FullSampler":
        return FullSampler(self.full, self.generator)


class FullSampler:
    """The same sampler on the untrimmed graphs, a token at a time: nothing drafted, nothing checked."""

    def __init__(self, folder: Path, generator: Text2TextGenerator) -> None:
        self._encoder = ort.InferenceSession(str(folder / "encoder_model.onnx"))
        self._decoder = ort.InferenceSession(str(folder / "decoder_model.onnx"))
        self._generator = generator
        self._no_rows = np.zeros((1, HIDDEN), np.float32)
        self._columns = Columns(np.arange(V, dtype=np.int32), V)

    def run(self, source: np.ndarray, tokens: int, **sampling: Any) -> list[int]:
        config = self._generator.config
        params = SamplingParams(**sampling, rules=config.rules(tokens))
        start = config.decoder_start()
        past = self._read(source)
        output: list[int] = []
        while len(output) < tokens and not (output and output[-1] in config.stop_ids):
            made = self._step(np.array([output[-1:] or start], np.int64), past, len(source))
            past |= made
            history = History(start, np.array(output, np.int32))
            output.append(choose(made["logits"][0, -1], self._columns, params, history))
        return output

    def log_probs(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Of every id at every position, float64 (T, V)."""
        logits = self._step(target[None].astype(np.int64), self._read(source), len(source))["logits"][0]
        wide = logits.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))

    def _read(self, source: np.ndarray) -> dict[str, np.ndarray]:
        ids = source[None].astype(np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "cold_rows": self._no_rows}
        return _run(self._encoder, feeds)

    def _step(
        self, ids: np.ndarray, past: Mapping[str, np.ndarray], source_length: int
    ) -> dict[str, np.ndarray]:
        feeds: dict[str, Any] = {
            "input_ids": ids,
            "encoder_attention_mask": np.ones((1, source_length), np.int64),
            "cold_rows": self._no_rows,
            "logits_to_keep": np.array(0),
        }
        for value in self._decoder.get_inputs():
            if value.name.startswith("past"):
                empty = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
                feeds[value.name] = past.get(value.name.replace("past_key_values", "present"), empty)
        return _run(self._decoder, feeds)


def _run(session: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def save_translator(
    family: str,
    path: Path,
    *,
    seed: int | None = None,
    bias: Mapping[int, float] | None = None,
    rows: int = V,
    tokenizer: str = "wordpiece",
    **config: Any,
) -> Path:
    """Make a model folder of a family; entries of the generation config may be among `config`.

    `bias` is added to the random bias of the logits of some ids.
    """
    name, settings = (FAMILIES | LATER_FAMILIES)[family]
    model_class = getattr(transformers, name)
    known = transformers.GenerationConfig().to_dict()
    # Else transformers loads the family's own tokenizer class, which may change this one.
    fixed = {"vocab_size": rows, "tokenizer_class": "PreTrainedTokenizerFast"}
    ours = model_class.config_class(**fixed | settings | config)
    seed = SEEDS.get(family, 0) if seed is None else seed
    model = with_random_weights(model_class(ours), seed)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.randn(1, rows, generator=torch.Generator().manual_seed(seed)))
        for token_id, value in (bias or {}).items():
            model.final_logits_bias[0, token_id] += value
    generation = {key: value for key, value in (settings | config).items() if key in known}
    model.generation_config = transformers.GenerationConfig(**generation)
    model.save_pretrained(path)
    KINDS[tokenizer]().save(str(path / "tokenizer.json"))
    return path


def make_translator(
    root: Path, family: str, *, kept: Sequence[int] = KEPT, cold: bool = True, **options: Any
) -> Translator:
    """Make, trim and export a tiny encoder-decoder."""
    model = save_translator(family, root / "model", **options)
    source = resolve_model(model)
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, root / "trimmed", progress=False, cold=cold)
    (root / "full").mkdir()
    export_full(source, root / "full", TASK, "fp32", exporter=PLAIN_EXPORTER)
    return Translator(model, root / "trimmed", root / "full")


def with_generation_config(made: Translator, root: Path, **entries: Any) -> Translator:
    """The same model with other entries in its generation config; None takes one out."""
    shutil.copytree(made.source, root / "model")
    shutil.copytree(made.path, root / "trimmed")
    for folder in (root / "model", root / "trimmed"):
        file = folder / "generation_config.json"
        config = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    rehash(root / "trimmed")
    return Translator(root / "model", root / "trimmed", made.full)


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files."""
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=list_files(folder)))
