"""Extended attributes: SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR.

Where they are switched off the answer is ENOSYS, after which a guest does not ask again. The guest's ACLs
are not among them: a Linux guest would store them but, without FUSE_POSIX_ACL, not obey them.
"""

import errno
import os
from typing import Final

from coherent_vfs.server.fuse.protocol import (
    GETXATTR_IN,
    GETXATTR_OUT,
    ROOT_ID,
    SETXATTR_IN_SHORT,
    XATTR_NAME_MAX,
)
from coherent_vfs.server.host.errors import error
from coherent_vfs.server.operations.body import proc_path, strings, unpack
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request

PROOF: Final = b"trusted.coherence.domain"
"""Set on the root by a guest that checks the version table, to prove it; never stored."""
ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")


def setxattr(fs: FileSystem, request: Request) -> bytes:
    """Set an attribute. FUSE_SETXATTR_EXT, which only ACLs need, is not negotiated: the short body."""
    size, flags = unpack(SETXATTR_IN_SHORT, request.body)
    name, separator, value = request.body[SETXATTR_IN_SHORT.size :].partition(b"\0")
    if not separator or len(value) != size or flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
        raise error(errno.EINVAL)
    if name == PROOF and request.nodeid == ROOT_ID:
        fs.prove_aware(value)
        return b""
    _check(fs, name)
    if fs.readonly:
        raise error(errno.EROFS)
    path = proc_path(fs.fd(request.nodeid))
    with fs.changing(inodes=(request.nodeid,)):
        os.setxattr(path, name, value, flags)
    return b""


def getxattr(fs: FileSystem, request: Request) -> bytes:
    """The value of an attribute, or its size where the guest gives no room."""
    (size,) = unpack(GETXATTR_IN, request.body)
    (name,) = strings(request.body, GETXATTR_IN.size, 1)
    _check(fs, name)
    return _sized(os.getxattr(proc_path(fs.fd(request.nodeid)), name), size)


def listxattr(fs: FileSystem, request: Request) -> bytes:
    """The names of all attributes, each with a NUL, or their size where the guest gives no room.

    trusted.* is for root alone: the kernel lists it to those with CAP_SYS_ADMIN only, who alone can read it
    (xattr(7)), and a request tells of no capabilities. security.* is listed to everybody and read by everybody.
    """
    (size,) = unpack(GETXATTR_IN, request.body)
    if not fs.xattr:
        raise error(errno.ENOSYS)
    names = map(os.fsencode, os.listxattr(proc_path(fs.fd(request.nodeid))))
    return _sized(b"".join(name + b"\0" for name in names if _listed(name, request.uid)), size)


def _listed(name: bytes, uid: int) -> bool:
    """Whether a user is told that an attribute is there."""
    return name not in ACLS and (uid == 0 or not name.startswith(b"trusted."))


def removexattr(fs: FileSystem, request: Request) -> bytes:
    (name,) = strings(request.body, 0, 1)
    _check(fs, name)
    if fs.readonly:
        raise error(errno.EROFS)
    path = proc_path(fs.fd(request.nodeid))
    with fs.changing(inodes=(request.nodeid,)):
        os.removexattr(path, name)
    return b""


def _check(fs: FileSystem, name: bytes) -> None:
    """Refuse the attributes that are not served."""
    if not fs.xattr:
        raise error(errno.ENOSYS)
    if not 0 < len(name) <= XATTR_NAME_MAX:
        raise error(errno.ERANGE)
    if name in ACLS or name == PROOF:
        raise error(errno.EOPNOTSUPP)


def _sized(value: bytes, size: int) -> bytes:
    """The reply to a request that gives room for `size` bytes; 0 asks how many there are."""
    if size == 0:
        return GETXATTR_OUT.pack(len(value))
    if len(value) > size:
        raise error(errno.ERANGE)
    return value
