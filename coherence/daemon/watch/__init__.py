"""Host watch: what changes on the host without a backend is bumped by coherenced (docs/concepts/host-watch.md)."""
