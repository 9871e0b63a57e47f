"""The original folder in the library that it was made for: transformers or sentence-transformers, in fp32."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer, PreTrainedModel

from trimserve.errors import MissingExtraError
from trimserve.files.checked_json import read_json
from trimserve.folder.tasks import GENERATION_TASK, TEXT2TEXT_TASK
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.rounding import relative_rounding
from trimserve_export.checkpoint.tasks import load_model
from trimserve_export.exporters import tracing

Floats = npt.NDArray[np.float32]
_SENTENCE_LIBRARY = "sentence-transformers"
_MODULES_NAME = "modules.json"


def check_library(source: ModelSource) -> None:
    """Refuse to verify a sentence-transformers folder without that library.

    Raises:
        MissingExtraError: see above; the message names pip.
    """
    if source.graph is None and (source.root / _MODULES_NAME).is_file() and not _has_sentence_library():
        raise MissingExtraError(
            f"{source.name} is a {_SENTENCE_LIBRARY} model (it has a {_MODULES_NAME}), and verify compares "
            f"with that library, which is not installed. Install it with: pip install {_SENTENCE_LIBRARY}"
        )


def _has_sentence_library() -> bool:
    try:
        return find_spec("sentence_transformers") is not None
    except ValueError:  # a module that has no spec
        return False


@dataclass(frozen=True)  # no slots: models are loaded when the first comparison asks for them
class Original:
    """A checkpoint folder, loaded as its library loads it.

    Attributes:
        path: the folder.
        task: the trimmed folder's task.
    """

    path: Path
    task: str

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers' tokenizers have no common type
        """What AutoTokenizer makes of the folder; sentence-transformers may let it lower-case texts first."""
        if self._modules():
            return self.sentence_model.tokenizer
        with tracing.quiet():
            return AutoTokenizer.from_pretrained(self._transformer)  # type: ignore[no-untyped-call, unused-ignore]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The class of the task, in fp32, on the CPU."""
        with tracing.quiet():
            return load_model(self._transformer, self.task, "fp32")

    @property
    def _transformer(self) -> Path:
        """Where the transformer is: some sentence-transformers folders have it in a folder of its own."""
        named = next((module.get("path", "") for module in self._modules()), "")
        inner = self.path / named
        return inner if (inner / "config.json").is_file() else self.path

    @property
    def has_tokenizer(self) -> bool:
        """Whether AutoTokenizer reads texts for the model; a static embedding has a tokenizer of its own."""
        return "StaticEmbedding" not in self._types()

    @property
    def library(self) -> str:
        """Name and version of what is compared with."""
        name = _SENTENCE_LIBRARY if self.sentence_kind is not None else "transformers"
        return f"{name} {version(name)}"

    @cached_property
    def sentence_kind(self) -> str | None:
        """The class of sentence-transformers that loads the folder, or None."""
        modules, types = self._modules(), self._types()
        named = self._json("config_sentence_transformers.json").get("model_type")
        if isinstance(named, str) and modules:
            return named
        if "Splade" in types or "SparseStatic" in types or "sparse_encoder" in types:
            return "SparseEncoder"
        if modules:
            return "SentenceTransformer"
        config = self._json("config.json")
        is_cross = "sentence_transformers" in config or len(config.get("id2label") or "ab") == 1
        with_library = self.task == "text-classification" and _has_sentence_library()
        return "CrossEncoder" if is_cross and with_library else None

    @cached_property
    def sentence_model(self) -> Any:  # noqa: ANN401 - one of three classes
        """The folder in sentence-transformers, in fp32 on the CPU."""
        import sentence_transformers

        model_class = getattr(sentence_transformers, self.sentence_kind or "SentenceTransformer")
        with tracing.quiet():
            model = model_class(str(self.path), device="cpu")
            with contextlib.suppress(AttributeError):
                model.float()
            return model

    @property
    def is_sentence_encoder(self) -> bool:
        """Whether it gives embeddings of whole texts."""
        return self.sentence_kind in ("SentenceTransformer", "SparseEncoder")

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        model = self.model if self.sentence_kind is None else self.sentence_model
        return sum(tensor.numel() for tensor in model.parameters())

    def embeddings(self, texts: Sequence[str], **options: str) -> Floats:
        """What `encode` gives, one text at a time: padding is rounded otherwise. float32 (n, D)."""
        dense = self.sentence_kind != "SparseEncoder"
        kind = {"convert_to_numpy": True} if dense else {"convert_to_tensor": True}
        made = self.sentence_model.encode(
            list(texts), batch_size=1, show_progress_bar=False, **kind, **options
        )
        return np.asarray(made if dense else made.to_dense().cpu(), np.float32)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Floats:
        """What `predict` gives for pairs of texts, float32 (n,) or (n, labels)."""
        made = self.sentence_model.predict(list(pairs), batch_size=1, show_progress_bar=False)
        return np.asarray(made, np.float32)

    def token_ids(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a text, special tokens included; cut to `limit` tokens as the tokenizer cuts."""
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        with tracing.quiet():
            ids: list[int] = self.tokenizer(text, **cut)["input_ids"]
        return ids

    def outputs(self, ids: Sequence[int], *, last: int = 0, start_id: int | None = None) -> Floats:
        """What the model gives for token ids: logits, or hidden states without a head.

        Args:
            ids: one sequence (T,).
            last: for a decoder, give so many of the last positions; 0 for all.
            start_id: for an encoder-decoder, which decodes the same ids after it.

        Returns:
            float32 (T, n), (last, n), or (labels,) where there is one result a text.
        """
        row = torch.tensor([list(ids)], dtype=torch.int64)
        inputs: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if start_id is not None:
            inputs["decoder_input_ids"] = torch.cat([torch.tensor([[start_id]]), row[:, :-1]], dim=1)
        if last and self.task == GENERATION_TASK:
            inputs["logits_to_keep"] = last
        self._forget_length()
        try:
            found = self._run(inputs)
        except TypeError:  # an older class without `logits_to_keep`
            inputs.pop("logits_to_keep", None)
            found = self._run(inputs)
        values: Floats = found[0].numpy()
        return values[-last:] if last and values.ndim == 2 else values

    @contextlib.contextmanager
    def rounded_input(self) -> Iterator[None]:
        """Run the model with as large errors in its input embeddings as all of its roundings add up to."""
        size, signs = relative_rounding(self.model.config), torch.Generator().manual_seed(0)

        def changed(_: torch.nn.Module, __: object, rows: torch.Tensor) -> torch.Tensor:
            return rows * (1 + size * (2 * torch.randint(0, 2, rows.shape, generator=signs) - 1))

        hook = self.model.get_input_embeddings().register_forward_hook(changed)
        try:
            yield
        finally:
            hook.remove()

    def _run(self, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), tracing.quiet():
            made = self.model(**inputs)
        if "start_logits" in made:  # of an answer's first token, and of its last
            return torch.stack([made["start_logits"], made["end_logits"]], dim=-1)
        names = (
            ("last_hidden_state",) if self.task == "feature-extraction" else ("logits", "prediction_logits")
        )
        result: torch.Tensor = next(made[name] for name in names if name in made)
        return result

    def steps(self, parts: Sequence[Sequence[int]]) -> list[Floats]:
        """Logits of a decoder that is fed parts of one text after another, with its cache."""
        self._forget_length()
        cache, found = None, []
        for part in parts:
            row = torch.tensor([list(part)], dtype=torch.int64)
            with torch.no_grad(), tracing.quiet():
                made = self.model(input_ids=row, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            found.append(made.logits[0].numpy())
        return found

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """What `model.generate()` adds with the folder's own settings, without drawing at random."""
        row = torch.tensor([list(ids)], dtype=torch.int64)
        self._forget_length()
        options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
        if getattr(self.model.generation_config, "stop_strings", None):
            options["tokenizer"] = self.tokenizer
        with torch.no_grad(), tracing.quiet():
            out = self.model.generate(  # type: ignore[operator]
                row, attention_mask=torch.ones_like(row), **options
            )
        # An encoder-decoder's output begins with its start id.
        skipped = 1 if self.task == TEXT2TEXT_TASK else row.shape[1]
        made: list[int] = out[0, skipped:].tolist()
        return made

    def _forget_length(self) -> None:
        """Have dynamic frequencies begin anew: in transformers they stay those of the longest text so far."""
        for module in self.model.modules():
            kinds = getattr(module, "rope_type", None)
            named = kinds.items() if isinstance(kinds, dict) else [(None, kinds)]
            for layer_type, kind in named:
                if "dynamic" in str(kind):
                    prefix = "" if layer_type is None else f"{layer_type}_"
                    original = getattr(module, f"{prefix}original_inv_freq")
                    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
                    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    def _types(self) -> str:
        return " ".join(str(module.get("type")) for module in self._modules())

    def _modules(self) -> list[dict[str, Any]]:
        found = self._json(_MODULES_NAME)
        return found if isinstance(found, list) else []

    def _json(self, name: str) -> Any:  # noqa: ANN401 - any JSON
        path = self.path / name
        return read_json(path, finite=False) if path.is_file() else {}
