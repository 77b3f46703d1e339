"""``fedloom audit privacy``: attacks on what a run really sends and releases."""
