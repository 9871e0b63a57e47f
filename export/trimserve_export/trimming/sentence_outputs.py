"""Graphs with sentence-transformers' modules in them, as optimum exports such a folder by default.

They give `token_embeddings` and `sentence_embedding`, where other encoders give `last_hidden_state`.
"""

import onnx_ir as ir

from trimserve.folder.sentence import SENTENCE, TOKENS

HIDDEN_STATES = "last_hidden_state"


def gives_embeddings(graph: ir.Graph) -> bool:
    """Whether a graph gives one embedding a text."""
    return any(value.name == SENTENCE for value in graph.outputs)


def name_hidden_states(graph: ir.Graph) -> None:
    """Call the token vectors of such a graph as every other encoder's are called, in place."""
    named = {value.name: value for value in graph.outputs}
    if SENTENCE in named and TOKENS in named and HIDDEN_STATES not in named:
        named[TOKENS].name = HIDDEN_STATES
