"""Checks of the layouts for other runtimes: the cut tokenizer, and the graph fed as they feed it."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UsageError
from trimserve.folder.names import TOKENIZER_NAME
from trimserve.runtime.contract import empty_shape
from trimserve.runtime.session import open_session
from trimserve.text.tokenizer import load_tokenizer
from trimserve_export.from_graph.trimmed import save_untrimmed
from trimserve_export.layouts.drop_in import id_table
from trimserve_export.layouts.segmentation import unknown_id
from trimserve_export.to_gguf.model import GGUF_NAME
from trimserve_export.verify.checks.gguf import check_gguf_tokenizer, check_gguf_weights
from trimserve_export.verify.checks.numbers import check_differences
from trimserve_export.verify.checks.parts import check_part_outputs, has_parts
from trimserve_export.verify.checks.quantized import quantized_checks
from trimserve_export.verify.checks.retrimmed import check_retrimmed
from trimserve_export.verify.checks.rows import check_files, check_kept_rows, check_tokenizer
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check
from trimserve_export.verify.sweep import Differences

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[Any]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Sequences of kept ids drawn with a fixed seed, beside the texts.
_DRAWN = 16


def layout_checks(context: Context) -> Iterator[tuple[str, Callable[[Context], Check]]]:
    """The checks of a folder whose layout is not the runtime's."""
    manifest = context.folder.manifest
    cut = manifest.layout == "tokenizer"
    yield "files", check_files
    yield "tokenizer", check_cut_tokenizer if cut else check_tokenizer
    if GGUF_NAME in manifest.files:
        yield "kept-rows", check_gguf_weights
        yield "gguf-tokenizer", check_gguf_tokenizer
        return
    yield "kept-rows", check_kept_rows if context.source.graph is None else check_retrimmed
    if has_parts(manifest):
        yield "layout-outputs", check_part_outputs
    elif manifest.graphs:
        yield from quantized_checks(context)
        if not cut:
            yield "id-tables", check_id_tables
        yield "layout-outputs", check_layout_outputs


def check_cut_tokenizer(context: Context) -> Check:
    """Compare every token's compact id, and the segmentation of texts whose tokens are all kept."""
    vocab = context.folder.vocab
    original = context.source.tokenizer()
    cut = load_tokenizer(context.folder.file(TOKENIZER_NAME))
    expected = {original.id_to_token(id_): compact for compact, id_ in enumerate(vocab.kept_ids.tolist())}
    if wrong := expected.items() ^ cut.get_vocab(with_added_tokens=True).items():
        token = min(str(token) for token, _ in wrong)
        return Check("tokenizer", False, None, f"{token!r} is missing or has another id than its compact one")
    identical = 0
    for text in context.texts:
        ids = np.array(original.encode(text).ids, np.int64)
        found = vocab.to_original(np.array(cut.encode(text).ids, np.int64))
        same = np.array_equal(ids, found)
        identical += same
        fits = ids.max(initial=0) < vocab.vocab_size and bool(vocab.is_kept(ids).all())
        if fits and not same and unknown_id(original) not in ids:
            return Check(
                "tokenizer", False, None, f"{text[:40]!r} is segmented differently, though all is kept"
            )
    detail = (
        f"{len(vocab):,} tokens have their compact ids; {identical} of {len(context.texts)} texts are "
        "segmented as before, every one whose tokens are all kept among them"
    )
    return Check("tokenizer", True, None, detail)


def check_id_tables(context: Context) -> Check:
    """Compare the graph's tables from token id to row, and from row to token id, with the vocab."""
    folder = context.folder
    constants = ir.load(folder.file(folder.manifest.graphs["model"])).graph.initializers
    slots = folder.has_cold and bool(folder.vocab.cold_ids.size)
    expected = {"trimserve/input_ids/compact_ids": id_table(folder.vocab, slots=slots)}
    if context.full.has_vocab_head:
        expected["trimserve/logits/columns"] = id_table(folder.vocab, slots=False)
    for name, table in expected.items():
        found = constants[name].const_value if name in constants else None
        if found is None or not np.array_equal(found.numpy(), table):
            return Check("id-tables", False, None, f"the graph's {name} is not that of the vocab")
    return Check("id-tables", True, None, f"{' and '.join(expected)} are those of the vocab")


def check_layout_outputs(context: Context) -> Check:
    """Compare all outputs with the full graph's, on texts and on kept ids; what is not kept must be -inf."""
    folder, differences = context.folder, Differences()
    session = open_session(folder.file(folder.manifest.graphs["model"]))
    # A graph that was cut and no more is compared with what it was cut from: on a CPU fp16 is rounded where
    # ONNX Runtime casts, which the serving passes move.
    cut_only = folder.manifest.layout == "tokenizer" and context.source.graph is not None
    plain = _open_untrimmed(context) if cut_only else None
    sequences = list(_sequences(context))
    for ids in sequences:
        expected = context.full.run(ids) | ({} if plain is None else _run(plain, ids))
        fed = folder.vocab.to_compact(ids) if folder.manifest.layout == "tokenizer" else ids
        for name, found in _run(session, fed).items():
            if name == "logits" and context.full.has_vocab_head:
                _add_logits(context, differences, expected, found)
            else:
                differences.add(expected[name], found)
    return check_differences(
        "layout-outputs", differences, f"outputs on {len(sequences)} texts and sequences of kept ids"
    )


def _open_untrimmed(context: Context) -> "ort.InferenceSession":
    """The source's own graph, its files beside it: those of a hub's cache are links to other folders."""
    if context.full_folder is None:
        raise UsageError(f"{context.folder.path} holds no graph: there is no full one to compare it with.")
    folder = context.full_folder / "untrimmed"
    folder.mkdir(exist_ok=True)
    return open_session(save_untrimmed(context.source, folder))


def _sequences(context: Context) -> Iterator[Ids]:
    """Token ids of the texts that the layout takes, then drawn ones."""
    vocab, limit = context.folder.vocab, context.max_tokens
    tokenizer = context.source.tokenizer()
    for text in context.texts:
        ids = np.array(tokenizer.encode(text).ids[:limit], np.int64)
        if (
            ids.size
            and ids.max() < vocab.vocab_size
            and (context.folder.has_cold or vocab.is_kept(ids).all())
        ):
            yield ids.astype(np.int32)
    random = np.random.default_rng(0)
    for _ in range(_DRAWN):
        yield random.choice(vocab.kept_ids, min(limit, len(vocab)), replace=False)


def _add_logits(context: Context, differences: Differences, expected: dict[str, Array], found: Array) -> None:
    vocab, full = context.folder.vocab, expected["logits"]
    bound = context.bound.of(expected["hidden_states"])
    if context.folder.manifest.layout == "tokenizer":
        differences.add(full[..., vocab.kept_ids], found, bound)
        return
    differences.add(full[..., vocab.kept_ids], found[..., vocab.kept_ids], bound)
    rest = found[..., vocab.cold_ids]
    differences.add(np.full_like(rest, -np.inf), rest)


def _run(session: "ort.InferenceSession", ids: npt.ArrayLike) -> dict[str, Array]:
    """Feed one sequence of the graph's own ids, without a past."""
    row = np.asarray(ids, np.int64)[None]
    feeds: dict[str, Array] = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "token_type_ids": np.zeros_like(row),
        "position_ids": np.arange(row.size, dtype=np.int64)[None],
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros(empty_shape(value.name, value.shape, 1), _DTYPES[value.type])
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    values = session.run(outputs, {name: feeds[name] for name in names})
    return dict(zip(outputs, values, strict=True))
