"""The frozen backbone and what is trained on it."""
