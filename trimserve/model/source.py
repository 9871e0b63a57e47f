"""A model's files in a local folder: its configs, tokenizer, graphs and the headers of its weights."""

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trimserve.errors import MismatchError, UsageError
from trimserve.files.gguf import GgufTensor
from trimserve.files.inner import inner_path
from trimserve.files.model_json import TEXT_SECTIONS, read_model_json, read_modules
from trimserve.files.tensors import TensorSpec, read_header
from trimserve.folder.names import GRAPH_FOLDER, TOKENIZER_NAME, check_plain_name
from trimserve.folder.tokenizer_settings import declared_settings
from trimserve.model.effective_tokenizer import (
    EffectiveTokenizer,
    effective_tokenizer,
    has_tokenizer,
    lone_tokenizer,
    original_tokenizer,
)
from trimserve.model.gguf.model import GgufModel
from trimserve.model.packed.checkpoint import PackedCheckpoint, packed_checkpoint
from trimserve.model.packed.layouts import PackedLinear
from trimserve.model.packed.settings import PACKED_CONFIGS, PackedSettings, packed_settings
from trimserve.model.sentence import MODULES_NAME, lower_cased, lower_cases
from trimserve.model.tensor_names import language_names, unwrapped_names
from trimserve.model.weights import no_weights
from trimserve.text.tokenizer import end_of_ids

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GENAI_NAME = "genai_config.json"
# The last two are those of static embeddings.
_EMBEDDING = re.compile(
    r"(embed_tokens|wte|word_embeddings|tok_embeddings|shared)\.weight$|^embedding\.weight$|^embeddings$"
)
HEAD_MATRIX = re.compile(r"(lm_head|embed_out)\.weight$")
_WIDTH_KEY = re.compile(r"(_size|_dim|_inner|d_model|d_ff|d_kv|n_embd)$")


@dataclass(frozen=True)  # no slots: what is read from disk is cached on the instance
class ModelSource:
    """A local folder with a model's files.

    Attributes:
        name: what the user typed, a path or a hub id.
        revision: the hub revision asked for, if any.
        path: the folder; files of a hub snapshot in it are links, which copying follows.
        named_graph: the ONNX file of the folder that was named itself.
        variant: which precision of its graphs to take, e.g. ``"q4"`` of `onnx/model_q4.onnx`.
        trust_remote_code: allow code that the folder brings, for its tokenizer.
        ask_library: ask transformers for the tokenizer also where no setting can matter.
        made_of: the user's own files, where the folder is a temporary one that was made of them.
        adapter: name of the adapter that was merged into the model, if it was given beside it.
        modules_folder: the folder of sentence-transformers' modules.json, where `path` is that of its
            transformer (`0_Transformer`).
        gguf: the GGUF file that the model is in, where `path` is the temporary folder of its small files. The
            folder has no weights until they are dequantised into it.
        packed: the checkpoint of integers that the floats of `path`, a temporary folder, were made of.
        composite: the folder of a multimodal model, where `path` is a temporary one that gives its language
            model: with a config of that, and links to the other files.
    """

    name: str
    revision: str | None
    path: Path
    named_graph: Path | None = None
    variant: str | None = None
    trust_remote_code: bool = False
    ask_library: bool = False
    made_of: tuple[Path, ...] | None = None
    adapter: str | None = None
    modules_folder: Path | None = None
    gguf: GgufModel | None = None
    composite: Path | None = None
    packed: PackedCheckpoint | None = None

    @property
    def root(self) -> Path:
        """The folder as a whole, of which `path` may be a part."""
        return self.path if self.modules_folder is None else self.modules_folder

    def read_root_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object of `root`; see `read_json`."""
        return ModelSource(self.name, self.revision, self.root).read_json(name)

    @cached_property
    def graph(self) -> Path | None:
        """The ONNX graph to trim: the named one, or the folder's where it has no safetensors weights.

        Naming a variant asks for a graph, whatever else the folder has.

        Raises:
            UsageError: the folder has several graphs and none has a usual name.
        """
        if self.named_graph is not None or (self.has_weights and self.variant is None):
            return self.named_graph
        named = (self.genai_model.get("decoder") or {}).get("filename")
        return find_graph(self.path, named, self.variant)

    @property
    def genai_model(self) -> dict[str, Any]:
        """The section `model` of onnxruntime-genai's config; empty where there is none.

        Raises:
            MismatchError: it names a file outside the folder.
        """
        section: dict[str, Any] = self.read_json(GENAI_NAME).get("model") or {}
        for name in _file_names(section):
            inner_path(self.path, name, str(self.path / GENAI_NAME))
        return section

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty where there is none.

        Raises:
            MismatchError: it is not a JSON object.
        """
        return self.read_json(CONFIG_NAME)

    def read_text(self, name: str) -> str | None:
        """Read a text file of the folder; None where it is absent.

        Raises:
            MismatchError: it is not UTF-8.
        """
        path = self.path / name
        try:
            return path.read_text("utf-8") if path.is_file() else None
        except UnicodeDecodeError as error:
            raise MismatchError(f"{path} is not UTF-8 ({error}): fetch the model again.") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object of the folder, checked; empty where the file is absent.

        Raises:
            MismatchError: see `read_model_json`.
        """
        return read_model_json(self.path / name)

    @cached_property
    def is_static_embedding(self) -> bool:
        """Whether it begins with sentence-transformers' StaticEmbedding, a table of vectors by token id."""
        path = self.root / MODULES_NAME
        modules = read_modules(path) if path.is_file() else ()
        return bool(modules) and modules[0].type.endswith(".StaticEmbedding")

    @cached_property
    def effective(self) -> EffectiveTokenizer:
        """What the folder's texts are tokenized with: tokenizer.json, or what its library makes of it.

        Raises:
            TrimserveError: see `effective_tokenizer`.
        """
        if self.is_static_embedding:
            return lone_tokenizer(self.path, "StaticEmbedding takes the file as it is")
        if self.gguf is not None:
            return original_tokenizer(self.path, {"reason": "made of the GGUF file, with llama.cpp's ids"})
        # Of a multimodal model it is the whole one's: transformers tells the class by the model type, too.
        found = effective_tokenizer(
            self.composite or self.path, trust_remote_code=self.trust_remote_code, always=self.ask_library
        )
        return lower_cased(found) if lower_cases(self.root, self.path) else found

    @property
    def tokenizer_settings(self) -> Mapping[str, Any]:
        """What a tokenizer.json cannot hold: see `declared_settings`; also without a tokenizer."""
        if has_tokenizer(self.path):
            return self.effective.settings
        return declared_settings(*map(self.read_json, ("tokenizer_config.json", "special_tokens_map.json")))

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the effective tokenizer, which profiles, vocabs and folders are bound to."""
        return self.effective.sha256

    def has_tokenizer(self, sha256: str) -> bool:
        """Whether a profile or a vocab that is bound to this hash belongs to the folder's tokenizer.

        Where it is the hash of tokenizer.json as it is, that file is taken and no library is asked: `export`
        compares again.
        """
        path = self.path / TOKENIZER_NAME
        asks = not self.ask_library and not self.is_static_embedding and self.gguf is None
        if "effective" not in self.__dict__ and asks and path.is_file():
            original = original_tokenizer(self.path)
            if original.sha256 == sha256:
                self.__dict__["effective"] = original
        return self.tokenizer_sha256 == sha256

    def tokenizer(self) -> Tokenizer:
        """Load the effective tokenizer, with padding and truncation off.

        Raises:
            MismatchError: it is not one that the tokenizers library can read.
        """
        tokenizer = self.effective.load()
        if "vocab_size" not in self.__dict__ and self._model_rows() is None:
            # Or `vocab_size` would load it again, which for 250,000 pieces takes 250 MB.
            self.__dict__["vocab_size"] = end_of_ids(tokenizer)
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """V, the rows of the token embedding: by the config, else the weights, else the tokenizer.

        It may exceed the tokenizer's ids (padding rows) or fall short of them.
        """
        return self._model_rows() or end_of_ids(self.effective.load())

    def _model_rows(self) -> int | None:
        """V by the config, else by the weights; None where neither tells it."""
        for config in self.text_configs():
            if (size := config.get("vocab_size")) is not None:
                return int(size)
        embeddings = (spec for spec in self._matrices() if _EMBEDDING.search(spec.name))
        spec = next(embeddings, None)
        return None if spec is None else spec.shape[0]

    def text_configs(self) -> Iterator[dict[str, Any]]:
        """Yield the config and the sub-configs that can describe the language model, outermost first."""
        yield self.config or self.genai_model
        for key in TEXT_SECTIONS:
            if isinstance(nested := self.config.get(key), dict):
                yield nested

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files with the weights, sorted by name; or the graph and its external data.

        Raises:
            UnsupportedModelError: the weights are in a format that is not read.
            UsageError: there are no weights, or they are elsewhere; or a file is missing.
            MismatchError: the index names a path outside the folder.
        """
        if self.named_graph is None and (self.path / WEIGHTS_NAME).is_file():
            return (self.path / WEIGHTS_NAME,)
        if self.gguf is not None:
            return (self.gguf.file.path,)
        if self.named_graph is None and (self.path / INDEX_NAME).is_file():
            return self._indexed_files()
        if self.graph is not None:
            return tuple(sorted(self.graph.parent.glob(f"{glob.escape(self.graph.name)}*")))
        raise no_weights(self.path)

    @property
    def recorded_files(self) -> tuple[Path, ...]:
        """The user's files that the weights come from, which manifests record by their hashes.

        Raises:
            TrimserveError: see `weight_files`.
        """
        return self.weight_files if self.made_of is None else self.made_of

    @cached_property
    def headers(self) -> dict[Path, tuple[dict[str, TensorSpec], dict[str, str]]]:
        """What each weight file holds: its tensors, by the names that they have in the model, and metadata.

        Names of `torch.compile`, `DataParallel` and the like are taken off (see `unwrapped_names`); of a
        multimodal model there are the language model's tensors alone (see `language_names`).

        Raises:
            MismatchError: a file is damaged, or two tensors have one name then.
            TrimserveError: see `weight_files`.
        """
        if self.has_quantized_rows and self.gguf is not None:
            return {self.gguf.file.path: (self.gguf.specs, {})}
        stored = {file: read_header(file) for file in self.weight_files}
        names = unwrapped_names([name for specs, _ in stored.values() for name in specs])
        if len(set(names.values())) < len(names):
            raise MismatchError(
                f"{self.path} stores a tensor with and without the name of a wrapper (_orig_mod, module): "
                "save the model again."
            )
        if self.composite is not None:
            inner = language_names(names.values())
            names = {name: inner[plain] for name, plain in names.items() if plain in inner}
        return {
            file: (
                {
                    names[name]: replace(spec, name=names[name])
                    for name, spec in specs.items()
                    if name in names
                },
                metadata,
            )
            for file, (specs, metadata) in stored.items()
        }

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors of all weight files by name, in file order; none where the source is a graph.

        Raises:
            TrimserveError: see `headers`.
        """
        if self.graph is not None:
            return {}
        return {name: spec for specs, _ in self.headers.values() for name, spec in specs.items()}

    @property
    def is_wrapped(self) -> bool:
        """Whether tensors are stored by the names of a wrapper, which no other library loads."""
        if self.has_quantized_rows:
            return False
        stored = (read_header(file)[0] for file in self.headers)
        return self.tensors.keys() != {name for specs in stored for name in specs}

    def _indexed_files(self) -> tuple[Path, ...]:
        index = self.path / INDEX_NAME
        names = sorted(set(self.read_json(INDEX_NAME)["weight_map"].values()))
        for name in names:
            check_plain_name(name, str(index))
            if not inner_path(self.path, name, str(index)).is_file():
                raise UsageError(
                    f"{self.path} lacks {name}, which {INDEX_NAME} lists: fetch the model again."
                )
        return tuple(self.path / name for name in names)

    @property
    def has_weights(self) -> bool:
        """Whether the folder has safetensors weights, or stands for a GGUF file."""
        stored = (self.path / WEIGHTS_NAME).is_file() or (self.path / INDEX_NAME).is_file()
        return stored or self.gguf is not None

    @property
    def has_quantized_rows(self) -> bool:
        """Whether the weights are those of a GGUF file, in its own number formats."""
        return self.gguf is not None and not (self.path / WEIGHTS_NAME).is_file()

    @cached_property
    def packed_settings(self) -> PackedSettings | None:
        """How linear layers are stored as integers, if AWQ, GPTQ or compressed-tensors did it.

        Raises:
            UnsupportedModelError: one of the three with a setting that is not read.
        """
        if self.gguf is not None or self.named_graph is not None or not self.has_weights:
            return None
        sections = (self.config.get("quantization_config"), self.config.get("compression_config"))
        files = (self.read_json(name) for name in PACKED_CONFIGS)
        section = next((found for found in (*sections, *files) if isinstance(found, dict) and found), None)
        return None if section is None else packed_settings(section, self.name)

    def packed_checkpoint(self) -> PackedCheckpoint | None:
        """The checkpoint of integers that the folder holds; None where it holds none.

        Raises:
            TrimserveError: see `packed_settings` and `trimserve.model.packed`.
        """
        settings = self.packed_settings
        return None if settings is None else packed_checkpoint(self.tensors, settings, self.name)

    def packed_matrices(self) -> tuple[GgufTensor | PackedLinear, ...]:
        """The body's matrices that the source stores as integers in blocks, also where `path` has floats."""
        if self.packed is not None:
            return tuple(self.packed.linears.values())
        return () if self.gguf is None else self.gguf.packed_matrices

    def _matrices(self) -> list[TensorSpec]:
        if not self.has_weights:
            return []
        return [spec for specs, _ in self.headers.values() for spec in specs.values() if len(spec.shape) == 2]

    def linear_widths(self) -> frozenset[int]:
        """Widths of the model's linear layers that are not its vocab, from the weights' headers alone.

        Both sides of each matrix count, because GPT-2's Conv1D stores the transposed weight. Without
        weights at hand, the sizes that the config names and the attention widths they imply.
        """
        if self.has_weights:
            sizes = {size for spec in self._matrices() for size in spec.shape}
        else:
            sizes = {size for config in self.text_configs() for size in _config_widths(config)}
        return frozenset(sizes - {self.vocab_size})

    @property
    def tied(self) -> bool:
        """Whether the config says that the head is the embedding."""
        return any(config.get("tie_word_embeddings") is True for config in self.text_configs())

    def row_bytes(self) -> int:
        """Bytes that one vocab id costs over all matrices with V rows, as stored; 0 without weights."""
        rows = [spec for spec in self._matrices() if spec.shape[0] == self.vocab_size]
        # Some checkpoints store the head of a tied model a second time.
        counted = [
            spec for spec in rows if not (self.tied and len(rows) > 1 and HEAD_MATRIX.search(spec.name))
        ]
        return sum(spec.nbytes for spec in counted) // self.vocab_size


def _file_names(section: object) -> Iterator[str]:
    """Every file that a section of genai_config.json names, of a pipeline's parts too."""
    if isinstance(section, list):
        for entry in section:
            yield from _file_names(entry)
    elif isinstance(section, dict):
        for key, value in section.items():
            if key == "filename":
                yield value if isinstance(value, str) else ""  # which is no name
            else:
                yield from _file_names(value)


def _config_widths(config: dict[str, Any]) -> set[int]:
    sizes = {value for key, value in config.items() if _WIDTH_KEY.search(key) and isinstance(value, int)}
    head_dim = config.get("head_dim")
    heads = {config.get("num_attention_heads"), config.get("num_key_value_heads")}
    if isinstance(head_dim, int):
        sizes |= {head_dim * count for count in heads if isinstance(count, int)}
    return sizes


def find_graph(folder: Path, named: str | None = None, variant: str | None = None) -> Path | None:
    """Find the ONNX graph of a folder, laid out as by optimum, onnxruntime-genai or transformers.js.

    Args:
        folder: the folder.
        named: a file that one of its configs names.
        variant: a precision that file names end with, e.g. ``"q4"``.

    Returns:
        The graph of that name, else `model.onnx`, else `onnx/model.onnx`, else an encoder-decoder's decoder,
        else the only one there is, or the first variant of the only one; None where there is none.

    Raises:
        UsageError: there are several, none of them with a usual name.
    """
    endings = ("",) if variant in (None, "", "fp32") else (f"_{variant}", "")
    places = [
        folder / place / f"{name}{ending}.onnx"
        for ending in endings
        for name in ("model", "decoder_model_merged", "decoder_model")
        for place in ("", GRAPH_FOLDER)
    ]
    usual = [*([folder / named] if named else []), *places]
    if found := next((path for path in usual if path.is_file()), None):
        return found
    graphs = sorted([*folder.glob("*.onnx"), *folder.glob(f"{GRAPH_FOLDER}/*.onnx")])
    if len(graphs) > 1 and not all(path.name.startswith("model_") for path in graphs):
        names = ", ".join(str(path.relative_to(folder)) for path in graphs)
        raise UsageError(f"{folder} has several graphs ({names}): pass the file of the one to trim.")
    return graphs[0] if graphs else None
