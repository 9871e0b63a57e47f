"""Commands that die or run out of disk where a test says, for the modules that try them."""

import pytest


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A `Faults` with the commands that write (`writers`) and the process that runs them (`zygote`)."""
    from tests.support.faults import Faults
    from tests.support.writers import MODULES, make_writers
    from tests.support.zygote import Zygote

    root = tmp_path_factory.mktemp("faults")
    with Zygote(root, modules=MODULES) as zygote:
        made = Faults(zygote, root)
        made.writers = make_writers(root / "in")
        made.zygote = zygote
        yield made
