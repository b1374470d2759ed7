"""Prometheus metrics of coherenced, off by default (docs/reference/metrics.md)."""
