"""The shared memory of a domain, which is an ABI: version table, leases, journals, liveness, and where they are."""
