"""How fast corpora are profiled, and in how much memory."""
