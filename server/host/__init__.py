"""System calls of the host, and the few checks that go with them."""
