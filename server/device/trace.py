"""What --log-level trace tells of a request and of its answer."""

from __future__ import annotations

import errno
from typing import Final

from coherent_vfs.server.fuse.protocol import OUT_HEADER, READ_IN, WRITE_IN, Opcode

_OPERATIONS: Final = {int(opcode): opcode.name for opcode in Opcode}
_NAMES: Final[dict[int, int]] = {
    Opcode.LOOKUP: 0,
    Opcode.UNLINK: 0,
    Opcode.RMDIR: 0,
    Opcode.SYMLINK: 0,
    Opcode.REMOVEXATTR: 0,
    Opcode.MKDIR: 8,
    Opcode.LINK: 8,
    Opcode.RENAME: 8,
    Opcode.GETXATTR: 8,
    Opcode.MKNOD: 16,
    Opcode.CREATE: 16,
    Opcode.RENAME2: 16,
}
"""Where the first name is in the body, after the fixed part (fuse_mkdir_in and so on, linux/fuse.h)."""
_READS: Final = (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS)


def describe(opcode: int, unique: int, nodeid: int, body: bytes) -> dict[str, object]:
    """What a request asks for, in words.

    Args:
        opcode, unique, nodeid: of its header.
        body: its beginning, without a WRITE's data. It is the guest's: it may be anything.
    """
    told: dict[str, object] = {"op": _OPERATIONS.get(opcode, opcode), "unique": unique, "nodeid": nodeid}
    if opcode in _READS and len(body) >= READ_IN.size:
        told |= _extent(READ_IN.unpack_from(body))
    elif opcode == Opcode.WRITE and len(body) >= WRITE_IN.size:
        told |= _extent(WRITE_IN.unpack_from(body))
    elif opcode in _NAMES:
        name = body[_NAMES[opcode] :].partition(b"\0")[0].decode(errors="backslashreplace")
        # A line break in it would make two lines.
        told["name"] = name if name.isprintable() else ascii(name)
    return told


def answer(error: int, length: int) -> str:
    """What a request got: the errno's name, or how many bytes follow the reply's header.

    Args:
        error: of the reply.
        length: of the reply with its header; 0 for none, as for FORGET.
    """
    if length == 0:
        return "none"
    return errno.errorcode.get(error, str(error)) if error else f"{length - OUT_HEADER.size} bytes"


def _extent(fields: tuple[int, ...]) -> dict[str, object]:
    # Both begin with fh, offset, size.
    return {"offset": fields[1], "size": fields[2]}
