"""Trimmed graphs for other runtimes: every part of a folder, laid out as the source's are."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import CutTensor
from trimserve.folder.names import COLD_NAME
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.embeddings import find_embeddings
from trimserve_export.graphs.reading import GraphFiles
from trimserve_export.graphs.writing import LinkingWriter, Writer, write_copy, write_whole
from trimserve_export.layouts.drop_in import write_drop_in
from trimserve_export.trimming.cold_rows import FullGraph, write_cold_rows
from trimserve_export.trimming.facts import has_external_data
from trimserve_export.trimming.parts import Part
from trimserve_export.trimming.stored import trim_stored
from trimserve_export.trimming.trim import IDS, LOGITS


@dataclass(frozen=True, slots=True)
class PartJob:
    """What is done to each part.

    Attributes:
        files: the graphs of the source.
        vocab: the kept ids.
        folder: the trimmed folder.
        vocab_logits: the task's logits are over the vocab.
        drop_in: token ids in and V logits out; else compact ids.
        cold: a drop-in feeds cold ids.
        link: write beside links to the untouched weights.
    """

    files: GraphFiles
    vocab: VocabMap
    folder: Path
    vocab_logits: bool
    drop_in: bool
    cold: bool
    link: bool

    def write(self, part: Part, name: str) -> tuple[CutTensor, ...]:
        """Trim a part into a file; one that neither takes token ids nor makes logits is copied.

        Args:
            part: the graph.
            name: its path in the folder.

        Returns:
            What was cut.

        Raises:
            UnsupportedModelError: the graph, or a part of it, is not understood.
        """
        trimmed = self.files.copy(part.path, turned=False)
        path = self.folder / name
        writer = self._writer(part, trimmed)
        has_head = self.vocab_logits and has_output(trimmed.graph, LOGITS)
        if not has_head and not any(value.name in IDS for value in trimmed.graph.inputs):
            writer(trimmed, path)
            return ()
        cut = trim_stored(trimmed, self.vocab, has_head=has_head)
        if self.drop_in:
            if any(node.op_type == "If" for node in trimmed.graph):
                raise UnsupportedModelError(
                    f"{part.path.name} chooses between two decoders by an If, inside of which ids are looked "
                    "up: a drop-in is not built for it. Leave that file out, or use another layout."
                )
            self._write_drop_in(part, trimmed, path, writer, has_head=has_head)
        else:
            writer(trimmed, path)
        return cut

    def _writer(self, part: Part, model: ir.Model) -> Writer:
        if self.link:
            return LinkingWriter()
        return write_copy if not part.folder or has_external_data(model) else write_whole

    def _write_drop_in(
        self, part: Part, trimmed: ir.Model, path: Path, writer: Writer, *, has_head: bool
    ) -> None:
        takes_ids = any(value.name == "input_ids" for value in trimmed.graph.inputs)
        cold_path = None
        if self.cold and takes_ids:
            cold_path = self._cold_path(path, writer)
            cold_path.parent.mkdir(exist_ok=True)
            untrimmed = self.files.copy(part.path)
            tables = find_embeddings(untrimmed.graph)
            write_cold_rows(FullGraph(untrimmed, tables, None), self.vocab, cold_path)
        write_drop_in(
            trimmed,
            path,
            self.vocab,
            has_head=has_head,
            cold_path=cold_path,
            write=writer,
            takes_ids=takes_ids,
        )

    def _cold_path(self, path: Path, writer: Writer) -> Path:
        """Beside the graph; transformers.js looks for data by the graph's name and a number."""
        if path.parent == self.folder:
            return self.folder / (COLD_NAME if path.stem == "model" else f"{path.stem}.{COLD_NAME}")
        return path.with_name(f"{path.name}_data" if writer is write_whole else f"{path.name}_data_1")


def has_output(graph: ir.Graph, name: str) -> bool:
    """Whether a graph has an output of a name."""
    return any(value.name == name for value in graph.outputs)
