"""What fusing a decoder's graph came to, in words: `Manifest.fusion`."""

from collections.abc import Mapping
from typing import Any


def describe_fusion(fusion: Mapping[str, Any]) -> str:
    """Say whether a graph's attention is fused, and why not.

    Args:
        fusion: keys `fused`, `nodes`, `nodes_before` and `reason`, as a manifest has them.
    """
    nodes = f"{fusion.get('nodes', 0):,} nodes"
    if not fusion.get("fused"):
        return f"not fused ({nodes}): {fusion.get('reason')}"
    before = fusion.get("nodes_before", 0)
    return f"fused ({nodes}{'' if before == fusion.get('nodes') else f', {before:,} as exported'})"
