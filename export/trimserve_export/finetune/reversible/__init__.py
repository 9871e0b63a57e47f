"""Reversible fine-tuning (MEFT): layers coupled so that backward recomputes what forward did not keep."""
