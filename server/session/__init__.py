"""One guest's FUSE session: the file system it sees, what it is told, and what was agreed at INIT."""
