"""Attacks that measure what updates and adapters reveal of rows: tensors and numbers in, numbers out."""
