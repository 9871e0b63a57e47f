"""Encoder-decoders behind the decoding loop: the encoder runs once a request, the decoder drafts as usual.

The encoder's graph also makes the keys and values of the decoder's cross-attention, so that a step of the
decoder reads nothing of the source but those. Sequences of a batch have decoders of one length (there is no
mask for the decoder's own tokens), so their blocks are cut alike (`InStep`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimserve.arrays import Ids, Mask
from trimserve.errors import UnsupportedModelError
from trimserve.runtime.cold_rows import ColdRows, cold_widths
from trimserve.runtime.decoder import Decoder
from trimserve.runtime.kv_cache import GrowingCache, KVLayout
from trimserve.runtime.session import Session
from trimserve.text.codec import Codec

if TYPE_CHECKING:
    import onnxruntime as ort


class CrossCache(GrowingCache):
    """A `GrowingCache` with the cross-attention's keys and values of each sequence's source beside it."""

    def __init__(
        self,
        layout: KVLayout,
        names: Sequence[str],
        values: "Sequence[ort.OrtValue]",
        source_mask: Mask,
    ) -> None:
        """Start with nothing but the sources.

        Args:
            layout: of the decoder's own keys and values.
            names: the decoder's inputs for the cross-attention.
            values: one for each of them, (B, heads, source positions, head size).
            source_mask: int64 (B, source positions), 1 where there is a token.
        """
        super().__init__(layout, source_mask.shape[0])
        self._cross_names = list(names)
        self._cross = list(values)
        self._source_mask = source_mask

    def inputs(self, new: int) -> "dict[str, ort.OrtValue]":
        """The sources and the past."""
        source = dict(zip(self._cross_names, self._cross, strict=True))
        source[Seq2seqDecoder.SOURCE_MASK] = self._layout.on_cpu(self._source_mask)
        return super().inputs(new) | source

    def select(self, rows: Sequence[int]) -> None:
        """Copy the chosen sequences with their sources; a row may come more than once."""
        super().select(rows)
        if list(rows) == list(range(self._source_mask.shape[0])):
            return
        self._source_mask = np.ascontiguousarray(self._source_mask[list(rows)])
        self._cross = [
            self._layout.to_device(np.ascontiguousarray(value.numpy()[list(rows)])) for value in self._cross
        ]


class Seq2seqDecoder(Decoder):
    """The decoder of an encoder-decoder, with its encoder."""

    SOURCE_MASK = "encoder_attention_mask"
    _MASK = SOURCE_MASK
    takes_batches = True

    def __init__(
        self,
        encoder: Session,
        session: Session,
        codec: Codec,
        cold: ColdRows,
        *,
        device: str = "cpu",
    ) -> None:
        """Join the two graphs.

        Args:
            encoder: `encoder_model.onnx`, which also makes the cross-attention's keys and values.
            session: `decoder_model.onnx`.
            codec: pads sources and gives their cold ids slots.
            cold: rows of the cold ids.
            device: where both sessions run.

        Raises:
            UnsupportedModelError: the graphs were not made for serving, or not for each other.
        """
        super().__init__(session, device=device)
        self._encoder = encoder
        self._codec = codec
        self._cold = cold
        inputs = [value.name for value in session.get_inputs()]
        self._cross = [name for name in inputs if ".encoder." in name]
        self._made = [name.replace("past_key_values.", "present.") for name in self._cross]
        missing = sorted({*self._made} - {value.name for value in encoder.get_outputs()})
        if missing or not self._cross:
            raise UnsupportedModelError(
                f"the encoder graph lacks {', '.join(missing) or 'the cross-attention'}: it was not made for "
                "this decoder. Export the model again with `trimserve export`."
            )

    @property
    def no_several_because(self) -> str | None:
        """Its output repeats nothing but itself: see `Decoder`."""
        return "an encoder-decoder continues none"

    def start(self, sources: Sequence[Ids | None]) -> CrossCache:
        """Read sources of any lengths, int32 (T,) each, for sequences that hold nothing yet."""
        texts = [source for source in sources if source is not None]
        if len(texts) != len(sources):
            raise ValueError("every sequence of an encoder-decoder needs a source")
        batch = self._codec.slots(texts)
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("input_ids", batch.ids)
        binding.bind_cpu_input("attention_mask", batch.attention_mask)
        rows = self._cold.embeddings(batch.cold_ids)
        for name, of_table in zip(cold_widths(self._encoder), rows, strict=True):
            binding.bind_cpu_input(name, of_table)
        for name in self._made:
            binding.bind_output(name, self.device)
        self._encoder.run_with_iobinding(binding)
        return CrossCache(self._layout, self._cross, binding.get_outputs(), batch.attention_mask)
