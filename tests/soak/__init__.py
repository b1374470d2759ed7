"""Mapped files under random traffic of many user-space guests, with kills (README.md)."""
