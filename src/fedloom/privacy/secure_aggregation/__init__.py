"""Secure aggregation: the sum of many vectors, of which a server sees nothing else. Pure."""
