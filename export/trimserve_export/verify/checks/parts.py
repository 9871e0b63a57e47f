"""Checks of folders with several graphs: each trimmed graph against the untrimmed one, on the same feeds."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trimserve.folder.manifest import Manifest
from trimserve.runtime.session import open_session
from trimserve.vocab.map import VocabMap
from trimserve_export.from_graph.trimmed import save_untrimmed
from trimserve_export.graphs.writing import GRAPH_NAME
from trimserve_export.verify.checks.numbers import where_it_holds
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check
from trimserve_export.verify.sweep import Differences

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
# Positions fed, positions in the cache, positions of a source text.
_FED, _CACHED, _SOURCE = 4, 3, 5
# Kernels for other numbers of columns may add in another order: a share of the largest logit.
_ROUNDING = 1e-5


def has_parts(manifest: Manifest) -> bool:
    """Whether a folder for other runtimes has other graphs than the one that the other checks know."""
    return manifest.layout != "runtime" and any(name != GRAPH_NAME for name in manifest.graphs.values())


def check_part_outputs(context: Context) -> Check:
    """Compare all outputs of each graph with those of the graph that it was cut from."""
    folder, differences = context.folder, Differences()
    for role, name in folder.manifest.graphs.items():
        scratch = _scratch(context) / role
        scratch.mkdir()
        full = open_session(save_untrimmed(context.source, scratch, role))
        trimmed = open_session(folder.file(name))
        for feeds in _all_feeds(full, folder.vocab):
            _compare(context, differences, _run(full, feeds), _run(trimmed, _as_fed(context, feeds)))
    ok = differences.values > 0 and differences.beyond_bound == 0
    here = where_it_holds(differences)
    what = f"outputs of {len(folder.manifest.graphs)} graphs on drawn ids"
    if ok and differences.unequal == 0:
        detail = f"{differences.values:,} numbers bit for bit equal{here}: {what}"
        return Check("layout-outputs", True, 0.0, detail)
    within = f" within {_ROUNDING:g} of the largest logit" if ok else ""
    detail = f"{differences.unequal:,} of {differences.values:,} numbers differ{within}{here}: {what}"
    return Check("layout-outputs", ok, differences.max_abs_diff, detail)


def _scratch(context: Context) -> Path:
    if context.full_folder is None:
        raise ValueError("verify gives a folder for the untrimmed graphs")
    return context.full_folder


def _run(session: "ort.InferenceSession", feeds: Feeds) -> Feeds:
    names = [value.name for value in session.get_outputs()]
    wanted = [value.name for value in session.get_inputs()]
    return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))


def _as_fed(context: Context, feeds: Feeds) -> Feeds:
    if context.folder.manifest.layout != "tokenizer" or "input_ids" not in feeds:
        return feeds
    ids = feeds["input_ids"]
    return feeds | {"input_ids": context.folder.vocab.to_compact(ids).astype(ids.dtype)}


def _compare(context: Context, differences: Differences, full: Feeds, found: Feeds) -> None:
    vocab = context.folder.vocab
    for name, expected in full.items():
        if name != "logits" or expected.shape[-1] != vocab.vocab_size:
            differences.add(expected, found[name])
            continue
        logits = found[name]
        if context.folder.manifest.layout == "graph":
            rest = logits[..., vocab.cold_ids]
            differences.add(np.full_like(rest, -np.inf), rest)
            logits = logits[..., vocab.kept_ids]
        bound = _ROUNDING * float(np.abs(expected).max())
        differences.add(expected[..., vocab.kept_ids], logits, bound)


def _all_feeds(session: "ort.InferenceSession", vocab: VocabMap) -> Iterator[Feeds]:
    """Feeds for a graph; of a merged decoder both branches."""
    merged = any(value.name == "use_cache_branch" for value in session.get_inputs())
    for cached in (False, True) if merged else (True,):
        random = np.random.default_rng(0)
        inputs = session.get_inputs()
        past = any(_is_past(value.name) for value in inputs)
        crossed = any(".encoder." in value.name for value in inputs)
        # A decoder with cross-attention is given one token at a time behind a cache.
        fed = 1 if crossed and cached else _FED
        yield {
            value.name: _feed(value, random, vocab, fed, _CACHED if past and cached else 0, cached=cached)
            for value in inputs
        }


def _is_past(name: str) -> bool:
    return name.startswith("past") and ".encoder." not in name


def _feed(
    value: Any,  # noqa: ANN401 - onnxruntime has no types
    random: np.random.Generator,
    vocab: VocabMap,
    fed: int,
    before: int,
    *,
    cached: bool,
) -> Array:
    name, dtype = value.name, _DTYPES[value.type]
    if name == "use_cache_branch":
        return np.array([cached])
    if name in ("input_ids", "decoder_input_ids"):
        return random.choice(vocab.kept_ids, (1, fed)).astype(dtype)
    if name == "position_ids":
        return np.arange(before, before + fed, dtype=dtype)[None]
    positions = _SOURCE if name.startswith("encoder") or ".encoder." in name else fed
    if "mask" in name:
        return np.ones((1, positions if name.startswith("encoder") else before + fed), dtype)
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    if name.startswith("past"):
        positions = _SOURCE if ".encoder." in name else (before or 1)
    # The batch comes first; every other axis of unknown size counts positions.
    shape = [1, *(positions if size is None else size for size in sizes[1:])] if sizes else []
    if dtype in (np.float32, np.float16):
        return random.standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)
