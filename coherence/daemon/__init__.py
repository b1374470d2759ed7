"""coherenced: owns a domain's version table, watches the host, gives out DAX windows, recovers whatever died."""
