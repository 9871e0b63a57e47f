"""Generators: what `generate`, `stream` and `chat` accept and give."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.generation.generator import Generator as Generator
    from trimserve.generation.options import GenerationOptions as GenerationOptions
    from trimserve.generation.output import Generation as Generation
    from trimserve.generation.text2text import Text2TextGenerator as Text2TextGenerator

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Generation": "trimserve.generation.output",
        "GenerationOptions": "trimserve.generation.options",
        "Generator": "trimserve.generation.generator",
        "Text2TextGenerator": "trimserve.generation.text2text",
    },
)
