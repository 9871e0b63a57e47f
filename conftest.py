"""What an install without optional packages does not collect: the modules that import them."""

from importlib.util import find_spec


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a test hides it
        return False


_NEEDS = {
    "starlette": ["trimserve/serving/*"],
    "langchain_core": ["trimserve/integrations/langchain.py"],
    "llama_index": ["trimserve/integrations/llama_index.py"],
    "jinja2": ["trimserve/text/counted_code.py", "trimserve/text/sandbox.py"],
}
collect_ignore_glob = [path for package, paths in _NEEDS.items() if not _is_there(package) for path in paths]
