"""The FUSE operations, by what they do, and table, which says what serves which opcode."""
