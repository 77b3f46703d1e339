"""Exchanges between machines, carried by Flower."""
