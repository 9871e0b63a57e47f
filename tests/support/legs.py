"""Which tests run beside optimum-onnx alone, though they are not about it (`make test-optimum`).

The graphs of these modules come from whatever exports in the environment. With transformers 5 not all of
their tests have been seen to pass: a line that is taken out moves a module to `make test`. What has no mark
`export` runs there anyhow, and a test with a mark `optimum` of its own runs in both environments.
"""

from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
BESIDE_OPTIMUM = frozenset(
    f"{name}.py"
    for name in (
        "bench/test_quantize",
        "benchmark/test_compare",
        "cli/test_export",
        "cli/test_run",
        "cli/test_run_sentence",
        "decoding/test_beam",
        "decoding/test_token_rules",
        "encoder/test_encoder",
        "encoder/test_sentence_transformers",
        "encoder/test_sparse_encoder",
        "exact/test_checker",
        "exact/test_checker_realdata",
        "exact/test_sketch",
        "export/from_graph/test_folders",
        "export/from_graph/test_generate",
        "export/from_graph/test_realdata",
        "export/layouts/test_layouts",
        "export/serving/test_quantize",
        "export/serving/test_servable",
        "export/serving/test_tables",
        "export/test_export",
        "export/test_families",
        "export/test_more_families",
        "export/verify/test_of_graphs",
        "export/verify/test_recording",
        "export/verify/test_source",
        "export/verify/test_verify",
        "files/test_space",
        "finetune/test_example",
        "finetune/test_frameworks",
        "generation/test_separate_head",
        "generation/test_seq2seq",
        "hardening/test_arguments",
        "hardening/test_damaged_folders",
        "hardening/test_damaged_models",
        "hardening/test_fork",
        "hardening/test_full_disk",
        "hardening/test_kills",
        "hardening/test_linked_folders",
        "hardening/test_replaced_folders",
        "hardening/test_threads",
        "runtime/test_cold_head",
        "runtime/test_kv_cache",
        "test_loading",
        "test_whole_way",
    )
)


def mark(item: pytest.Item) -> None:
    """Give a test of these modules the mark that says so."""
    by_itself = any(mark.name == "optimum" for mark in item.own_markers)
    if by_itself or item.get_closest_marker("export") is None or not item.path.is_relative_to(_TESTS):
        return
    if item.path.relative_to(_TESTS).as_posix() in BESIDE_OPTIMUM:
        item.add_marker(pytest.mark.optimum(only=True))
