"""A corpus: files, tables and conversations, read as documents."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.corpus.corpus import Corpus as Corpus
    from trimserve.corpus.corpus import can_read as can_read
    from trimserve.corpus.corpus import iter_documents as iter_documents
    from trimserve.corpus.documents import Document as Document
    from trimserve.corpus.documents import Faults as Faults
    from trimserve.corpus.documents import Reading as Reading
    from trimserve.corpus.documents import Unit as Unit
    from trimserve.corpus.files import HUB as HUB
    from trimserve.corpus.files import JSONL_SUFFIXES as JSONL_SUFFIXES
    from trimserve.corpus.files import STDIN as STDIN
    from trimserve.corpus.files import CorpusFile as CorpusFile
    from trimserve.corpus.files import CorpusSource as CorpusSource
    from trimserve.corpus.slices import Slice as Slice

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Corpus": "trimserve.corpus.corpus",
        "CorpusFile": "trimserve.corpus.files",
        "CorpusSource": "trimserve.corpus.files",
        "Document": "trimserve.corpus.documents",
        "Faults": "trimserve.corpus.documents",
        "HUB": "trimserve.corpus.files",
        "JSONL_SUFFIXES": "trimserve.corpus.files",
        "Reading": "trimserve.corpus.documents",
        "STDIN": "trimserve.corpus.files",
        "Slice": "trimserve.corpus.slices",
        "Unit": "trimserve.corpus.documents",
        "can_read": "trimserve.corpus.corpus",
        "iter_documents": "trimserve.corpus.corpus",
    },
)
