"""A run from experiment to folder, and what is made of several."""
