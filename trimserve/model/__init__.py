"""The model at `-m`: where it is, what it holds, the ids it needs, and what trimming can win."""
