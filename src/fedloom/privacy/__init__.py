"""Mechanisms that hide rows, pure."""
