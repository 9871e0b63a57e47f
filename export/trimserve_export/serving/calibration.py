"""What the texts of a domain say of a quantised graph: how to round its weights, and what the rounding cost.

The float graph runs once over a sample. Beside its own outputs it gives, for each product's input, the sum of
squares a column: weights that meet large inputs are rounded with more care (`block_search.py`). Then both
graphs run over texts that were held out of that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.console import progress as progress_bar
from trimserve.errors import MismatchError
from trimserve.files.held import HeldFile
from trimserve.files.quantized import Quantization
from trimserve.files.tensors import ArrayTensor, exhaust, map_tensor, read_header, write_tensors
from trimserve.runtime.contract import empty_shape
from trimserve.runtime.session import Session, open_session
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.graphs.products import products_of
from trimserve_export.serving.quality import Quality, measure_quality
from trimserve_export.serving.quantize import quantize_graph
from trimserve_export.serving.stored_rows import StoredRows

# Texts to calibrate with and to hold out, tokens of each, and what is read of the files for them.
TEXTS, HELD_OUT, TOKENS = 64, 32, 128
MAX_CHARACTERS = 8_000_000
_CHUNK_CHARACTERS = 600
# A text gives something to predict.
_LEAST_TOKENS = 8
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
Sequences = Sequence[npt.NDArray[np.int64]]


@dataclass
class Calibration:
    """Compact ids of texts, and what graphs that were run over them gave.

    Attributes:
        texts: to round with, (T,) each.
        held_out: to compare with.
        moments: second moments of the inputs of the body's products, by the name of the matrix; measured
            unless they are given.
        quality: what rounding cost, once a graph was quantised.
        progress: show a bar on a terminal.
    """

    texts: Sequences = ()
    held_out: Sequences = ()
    moments: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    quality: Quality | None = None
    progress: bool = False

    @classmethod
    def of_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        vocab: VocabMap,
        *,
        longest: int | None = None,
        progress: bool = False,
    ) -> "Calibration":
        """Choose from texts: evenly over the first `MAX_CHARACTERS`, every third to be held out.

        Ids that are not kept are left out of the texts: the graphs have no rows for them. No text is longer
        than `longest` tokens.
        """
        chunks = list(_chunks(texts))
        wanted = min(len(chunks), TEXTS + HELD_OUT)
        chosen = [chunks[place] for place in np.linspace(0, len(chunks) - 1, wanted).astype(int)]
        encoded = [np.array(found.ids, np.int32) for found in tokenizer.encode_batch(chosen)]
        kept = [_compact(ids, vocab)[: min(TOKENS, longest or TOKENS)] for ids in encoded]
        usable = [ids for ids in kept if len(ids) >= _LEAST_TOKENS]
        share = TEXTS // HELD_OUT + 1
        held_out = usable[share - 1 :: share]
        rest = [ids for place, ids in enumerate(usable) if place % share != share - 1]
        return cls(rest, held_out, progress=progress)

    @classmethod
    def stored(cls, file: HeldFile) -> "Calibration":
        """The moments that a folder was made with.

        Raises:
            MismatchError: the file holds anything else.
        """
        specs, _ = read_header(file)
        for name, spec in specs.items():
            if spec.dtype != "F32" or len(spec.shape) != 1:
                raise MismatchError(
                    f"{file.path} has {spec.dtype} of shape {spec.shape} for {name[:100]!r}, expected a "
                    "row of F32: export the folder again."
                )
        return cls(moments={name: np.array(map_tensor(spec)) for name, spec in specs.items()})

    def save(self, path: Path) -> None:
        """Write the moments, with which the untrimmed model is quantised alike."""
        exhaust(write_tensors(path, {name: ArrayTensor(array) for name, array in self.moments.items()}))


def quantize_calibrated(
    source: Path,
    output: Path,
    scheme: Quantization,
    *,
    has_head: bool,
    calibration: Calibration | None,
    shares: bool = False,
    stored: StoredRows | None = None,
) -> Path:
    """Quantise a graph, see `quantize_graph`; with texts, by what they say, and say what it cost.

    Args:
        source: the graph.
        output: see `quantize_graph`.
        scheme: see `quantize_graph`.
        has_head: see `quantize_graph`.
        shares: see `quantize_graph`.
        stored: see `quantize_graph`.
        calibration: its moments are measured if it has texts and none, and its quality.
    """
    if calibration is None:
        return quantize_graph(source, output, scheme, has_head=has_head, shares=shares, stored=stored)
    if scheme.body.scales == "error" and calibration.texts and not calibration.moments:
        calibration.moments = _moments(source, calibration, has_head=has_head)
    moments = calibration.moments
    path = quantize_graph(
        source, output, scheme, has_head=has_head, moments=moments, shares=shares, stored=stored
    )
    if calibration.held_out:
        calibration.quality = _quality(source, path, calibration, has_head=has_head)
    return path


def _chunks(texts: Iterable[str]) -> Iterable[str]:
    """Passages of some sentences: lines are joined up to that."""
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    read, waiting = 0, ""
    for line in lines:
        waiting = f"{waiting}\n{line}" if waiting else line
        if len(waiting) >= _CHUNK_CHARACTERS:
            yield waiting
            read, waiting = read + len(waiting), ""
            if read > MAX_CHARACTERS:
                return
    if waiting:
        yield waiting


def _compact(ids: Ids, vocab: VocabMap) -> npt.NDArray[np.int64]:
    inside = ids[ids < vocab.vocab_size]
    return vocab.to_compact(inside[vocab.is_kept(inside)])


def _moments(source: Path, calibration: Calibration, *, has_head: bool) -> dict[str, npt.NDArray[np.float32]]:
    """Run the graph over the texts, and give the mean of squares a column of each product's input."""
    model = ir.load(source.resolve())
    products, head = products_of(model.graph, has_head=has_head)
    names: dict[str, str] = {}
    outputs: dict[ir.Value, str] = {}
    for node, product in products.items():
        fed = node.inputs[0]
        if fed is not None and node is not head:
            if fed not in outputs:
                outputs[fed] = _add_squares(model.graph, node, fed, product.rows.shape[1])
            names[str(product.weight.name)] = outputs[fed]
    path = source.with_name(f"{source.stem}.moments.onnx")
    ir.save(model, path)
    session = open_session(path)
    wanted = list(outputs.values())
    sums = [np.zeros(1)] * len(wanted)
    with progress_bar(len(calibration.texts), "calibrating", "text") as bar:
        for ids in calibration.texts:
            found = session.run(wanted, plain_feeds(session, ids))
            sums = [total + one.astype(np.float64) for total, one in zip(sums, found, strict=True)]
            if calibration.progress:
                bar.update()
    path.unlink()
    tokens = sum(map(len, calibration.texts))
    means = {name: (total / tokens).astype(np.float32) for name, total in zip(wanted, sums, strict=True)}
    return {weight: means[output] for weight, output in names.items()}


def _add_squares(graph: ir.Graph, node: ir.Node, fed: ir.Value, width: int) -> str:
    """Add the output: the sum of squares of each column of a product's input."""
    writer = NodeWriter(graph, f"moments/{node.name}")
    floats = writer.op("Cast", [fed], to=int(ir.DataType.FLOAT))
    rows = writer.op("Reshape", [floats, writer.constant([-1, width])])
    squares = writer.op("Mul", [rows, rows])
    total = writer.op("ReduceSum", [squares, writer.constant([0])], keepdims=0)
    total.type, total.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([width])
    writer.insert_before(node)
    graph.outputs.append(total)
    return str(total.name)


def _quality(before: Path, after: Path, calibration: Calibration, *, has_head: bool) -> Quality:
    sessions = [open_session(before), open_session(after)]
    with progress_bar(len(calibration.held_out), "measuring", "text") as bar:

        def outputs(ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
            found = [_output(session, ids) for session in sessions]
            if calibration.progress:
                bar.update()
            return found

        causal = any(value.name.startswith("past_key_values.") for value in sessions[0].get_inputs())
        return measure_quality(calibration.held_out, outputs, has_head=has_head, causal=causal)


def _output(session: Session, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """What a model says of a text: its logits, or its first output."""
    names = [value.name for value in session.get_outputs()]
    name = "logits" if "logits" in names else names[0]
    (found,) = session.run([name], plain_feeds(session, ids))
    return np.asarray(found[0], np.float32)


def plain_feeds(session: Session, ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a graph for one text: nothing cached, no cold rows, all positions.

    Args:
        session: the graph of a model that is no encoder-decoder.
        ids: compact ids (T,).
    """
    count = len(ids)
    feeds: dict[str, npt.NDArray[Any]] = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, count), np.int64),
        "token_type_ids": np.zeros((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "logits_to_keep": np.array(0, np.int64),
    }
    inputs = {value.name: value for value in session.get_inputs()}
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            feeds[name] = np.zeros(empty_shape(name, value.shape, 1), _DTYPES[value.type])
        elif name.startswith("cold_rows"):
            feeds[name] = np.zeros((1, value.shape[1]), _DTYPES[value.type])
    return {name: feeds[name] for name in inputs}
