"""Uncertainty of a figure: intervals and tests."""
