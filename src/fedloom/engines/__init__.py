"""Where clients run. Engines see messages, not algorithms."""
