"""The face of a package: its public names, each imported from its module when it is first used (PEP 562).

An eager face would load all of a package, and what that imports, with any module of it.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_face(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: its ``__name__``.
        names: public name -> the module that defines it.

    Example:
        >>> load, names, public = lazy_face("trimserve.vocab.map", {"VocabMap": "trimserve.vocab.map"})
        >>> load("VocabMap").__name__, public
        ('VocabMap', ['VocabMap'])
    """

    def load(name: str) -> Any:  # noqa: ANN401 - any public object
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(names[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return load, listing, sorted(names)
