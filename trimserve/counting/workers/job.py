"""What every worker needs to count a slice of the corpus, on this machine or another."""

from dataclasses import dataclass

from trimserve.corpus.documents import Faults, Reading
from trimserve.corpus.reader import SliceReader
from trimserve.corpus.slices import Slice
from trimserve.counting.documents import DocumentCounter
from trimserve.counting.encoding.choosing import make_encoder
from trimserve.counting.encoding.encoders import EncoderName, IdEncoder
from trimserve.counting.slice_counts import OnBytes, SliceCounts, ignore
from trimserve.text.tokenizer import parse_tokenizer, tokenizer_border


@dataclass(frozen=True, slots=True)
class Job:
    """How to count; small enough to send.

    Attributes:
        tokenizer_json: the content of the tokenizer's file.
        engine: which encoder to use.
        rows: length of the counts.
        reading: how rows of files become documents.
    """

    tokenizer_json: bytes
    engine: EncoderName
    rows: int
    reading: Reading

    @tokenizer_border
    def make_encoder(self) -> IdEncoder:
        """Make the encoder, which takes a second for a large vocab."""
        return make_encoder(self.engine, parse_tokenizer(self.tokenizer_json), self.tokenizer_json)

    @tokenizer_border
    def count(self, piece: Slice, encoder: IdEncoder, on_bytes: OnBytes = ignore) -> SliceCounts:
        """Count a slice.

        Args:
            piece: the slice; its file has to lie where the slice says.
            encoder: what `make_encoder` gave.
            on_bytes: called with the bytes read so far, after each batch.

        Raises:
            UsageError: bad rows or bytes, unless they are to be skipped.
        """
        faults = Faults(skip=self.reading.skip_bad)
        reader = SliceReader(piece, self.reading, faults)
        counter = DocumentCounter(encoder, self.rows)
        counter.add_all(reader.documents(), lambda: on_bytes(reader.count))
        block = counter.finish(shared=piece.shared)
        block.skipped = faults.found
        block.sha256 = reader.sha256
        return block
