"""Take a servable graph apart: body and vocab head as graphs of their own, and the bytes each reads."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trimserve_export.graphs.values import find_output


@dataclass(frozen=True, slots=True)
class Parts:
    """The two graphs, and the bytes of weights that one token moves through each.

    An embedding that is only looked up moves a row, which is left out.
    """

    body: Path
    head: Path
    body_bytes: int
    head_bytes: int


def take_apart(graph: Path, folder: Path) -> Parts:
    """Write `body.onnx` and `head.onnx` into a folder on the same disk, over the same data.

    The body has `hidden_states` in the place of `logits`, so that the same runtime can run it.
    """
    data = graph.with_name(f"{graph.name}_data")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / data.name).exists():
        os.link(data, folder / data.name)
    body, head = ir.load(graph.resolve()), ir.load(graph.resolve())
    _cut_head_off(body.graph)
    _keep_head(head.graph)
    paths = []
    for name, model in (("body.onnx", body), ("head.onnx", head)):
        RemoveUnusedNodesPass()(model)
        ir.save(model, folder / name)
        paths.append(folder / name)
    return Parts(paths[0], paths[1], _bytes_read(body.graph), _bytes_read(head.graph))


def _cut_head_off(graph: ir.Graph) -> None:
    logits, hidden = find_output(graph, "logits"), find_output(graph, "hidden_states")
    node = ir.Node("", "Identity", [hidden])
    copy = node.outputs[0]
    graph.append(node)
    graph.outputs[graph.outputs.index(logits)] = copy
    logits.name = "cut_off"
    copy.name, copy.type, copy.shape = "logits", hidden.type, hidden.shape


def _keep_head(graph: ir.Graph) -> None:
    logits, hidden = find_output(graph, "logits"), find_output(graph, "hidden_states")
    fed = ir.Value(name="hidden_states", type=hidden.type, shape=hidden.shape)
    hidden.name = "made_by_the_body"
    graph.outputs.clear()
    graph.outputs.append(logits)
    ir.convenience.replace_all_uses_with(hidden, fed)
    graph.inputs.clear()
    graph.inputs.append(fed)


def _bytes_read(graph: ir.Graph) -> int:
    read = {value for node in graph if node.op_type != "Gather" for value in node.inputs}
    tensors = (value.const_value for value in graph.initializers.values() if value in read)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def main() -> int:
    """Take apart ``GRAPH`` into ``FOLDER`` and print where the parts are, as JSON."""
    print(json.dumps(asdict(take_apart(Path(sys.argv[1]), Path(sys.argv[2]))), default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
