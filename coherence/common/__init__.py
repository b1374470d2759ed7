"""What both commands and backends need, and nothing of the protocol: errors, log, sizes, sockets."""
