"""The vhost-user protocol, back-end side: messages, connection and handler."""
