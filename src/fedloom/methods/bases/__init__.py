"""Shared by several methods: one file per way of storing, adding or sending parameters."""
