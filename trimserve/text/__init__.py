"""Text to token ids and back through the original tokenizer, chat templates, streams and stop strings."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.text.chat import ChatTemplate as ChatTemplate
    from trimserve.text.codec import Codec as Codec
    from trimserve.text.codec import shorten as shorten
    from trimserve.text.stops import StopStrings as StopStrings
    from trimserve.text.streaming import StreamDecoder as StreamDecoder
    from trimserve.text.tokenizer import load_tokenizer as load_tokenizer

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "ChatTemplate": "trimserve.text.chat",
        "Codec": "trimserve.text.codec",
        "StopStrings": "trimserve.text.stops",
        "StreamDecoder": "trimserve.text.streaming",
        "load_tokenizer": "trimserve.text.tokenizer",
        "shorten": "trimserve.text.codec",
    },
)
