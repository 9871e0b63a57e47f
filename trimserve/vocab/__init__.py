"""The vocab map: which token id is which compact id, and why it is kept."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.vocab.file import load_vocab as load_vocab
    from trimserve.vocab.file import save_vocab as save_vocab
    from trimserve.vocab.map import Reason as Reason
    from trimserve.vocab.map import Slotted as Slotted
    from trimserve.vocab.map import VocabMap as VocabMap

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Reason": "trimserve.vocab.map",
        "Slotted": "trimserve.vocab.map",
        "VocabMap": "trimserve.vocab.map",
        "load_vocab": "trimserve.vocab.file",
        "save_vocab": "trimserve.vocab.file",
    },
)
