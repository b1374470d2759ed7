"""Guests' DAX windows: what is mapped where in a domain (docs/concepts/dax.md)."""
