"""Print a command's result: one JSON document, or text for people."""

import argparse
import json
import math
from typing import Any

from trimserve.stdout import data_stream


def emit(args: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    """Write the result to stdout in the format that `args.format` asks for."""
    print(to_json(document) if args.format == "json" else text, file=data_stream())


def to_json(document: dict[str, Any]) -> str:
    """A document in strict JSON: numbers that JSON has no word for (NaN, infinity) become null."""
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(document), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
