"""Litmus tests: small programs for several parties, and the outcomes that each cache mode allows.

docs/development/litmus.md says how to read them.
"""
