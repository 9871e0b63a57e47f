"""Print a command's result: one JSON document, or text for people."""

import argparse
import json
from typing import Any


def emit(args: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    """Write the result to stdout in the format that `args.format` asks for."""
    print(json.dumps(document, ensure_ascii=False) if args.format == "json" else text)
