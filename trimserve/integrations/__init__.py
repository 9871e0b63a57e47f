"""Trimmed folders in the interfaces of other libraries: `langchain` and `llama_index`, each imported by name.

Each module needs its library: ``pip install 'trimserve[langchain]'`` or ``'trimserve[llama-index]'``.
"""
