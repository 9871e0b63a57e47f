"""Encoders: texts to embeddings, classes and the like."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.encoder.encoder import Encoder as Encoder
    from trimserve.encoder.graph import EncoderStats as EncoderStats
    from trimserve.encoder.sparse import SparseVector as SparseVector

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Encoder": "trimserve.encoder.encoder",
        "EncoderStats": "trimserve.encoder.graph",
        "SparseVector": "trimserve.encoder.sparse",
    },
)
