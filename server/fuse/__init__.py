"""The FUSE protocol and the passthrough file system behind it."""
