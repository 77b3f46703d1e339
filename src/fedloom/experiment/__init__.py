"""Experiments: their settings, and contradictions between sections."""
