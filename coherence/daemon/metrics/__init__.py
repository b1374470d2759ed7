"""Prometheus metrics of coherenced, off by default (docs/coherenced.md)."""
