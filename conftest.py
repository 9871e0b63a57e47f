"""What an install without the server's packages does not collect: the modules that import them."""

from importlib.util import find_spec


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a test hides it
        return False


collect_ignore_glob = [] if _is_there("starlette") else ["trimserve/serving/*"]
