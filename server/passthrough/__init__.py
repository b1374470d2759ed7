"""From FUSE's node ids and handles to the host's files."""
