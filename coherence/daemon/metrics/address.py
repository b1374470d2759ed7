"""Where metrics are served: a port, or a Unix socket."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.unix_socket import open_listener

Address = tuple[str, int] | Path

# Whoever may enter the socket's directory may read, as any local user may from a port of 127.0.0.1.
SOCKET_MODE = 0o666


def parse(text: str) -> Address:
    """What a user wrote: IPv4:PORT, [IPv6]:PORT, or a path, which has a slash. ValueError says what to write."""
    if "/" in text:
        return Path(text)
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
    try:
        if parts is None:
            raise ValueError
        host = str(ipaddress.IPv6Address(parts[1]) if parts[1] else ipaddress.IPv4Address(parts[2]))
        port = int(parts[3])
        if port > 65535:
            raise ValueError
    except ValueError:
        raise ValueError("use one such as 127.0.0.1:9999, [::1]:9999 or /run/coherenced/metrics.sock") from None
    return host, port


def listen(address: Address) -> socket.socket:
    """A listening socket that never waits; port 0 lets the kernel choose.

    Raises:
        UserError: in use, or not permitted.
    """
    if isinstance(address, Path):
        return open_listener(address, SOCKET_MODE, None, socket.SOCK_STREAM, "--metrics")
    host, port = address
    sock = None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise UserError(f"metrics at {host} port {port}: {error.strerror}: choose another with --metrics") from None
    return sock
