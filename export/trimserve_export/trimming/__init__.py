"""Trim an ONNX graph that another tool exported, its quantisation kept.

The vocab axis is followed by data flow, from the token ids to the tables and back from `logits`, never by a
dimension that equals the vocab size. What is cut are rows, or blocks of quantised rows with their scales and
zero points: nothing is rounded again, so logits equal the untrimmed graph's bit for bit. What is not
understood is refused before anything is changed.
"""

from trimserve_export.graphs.reading import load_graph
from trimserve_export.trimming.trim import plan_trim, trim_graph

__all__ = ["load_graph", "plan_trim", "trim_graph"]
