"""The border to transformers: silence."""

import logging

import pytest

pytest.importorskip("transformers")

from trimserve_export.checkpoint.library import quiet

pytestmark = pytest.mark.export


def test_nothing_that_libraries_say_reaches_the_user(caplog, capfd):
    """transformers' exporters log under the names of their files, beyond its verbosity."""
    logger = logging.getLogger("/site-packages/transformers/exporters/exporter_dynamo.py")
    with quiet():
        with quiet():
            print("a line")
        logger.warning("a notice")
    logger.warning("after it")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == ["after it"]
    assert capfd.readouterr().out == ""
