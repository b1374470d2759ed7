"""Share a host directory with many virtual machines: cached like a local file system, never stale."""
