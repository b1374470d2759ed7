"""Litmus tests: small programs for several parties, and the outcomes that each cache mode allows (docs/litmus.md)."""
