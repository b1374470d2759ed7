"""SETXATTR, GETXATTR, LISTXATTR and REMOVEXATTR."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from coherent_vfs.server.fuse.protocol import GETXATTR_IN, GETXATTR_OUT, ROOT_ID, SETXATTR_IN_SHORT, Opcode
from coherent_vfs.server.operations.xattr import ACLS, PROOF
from tests.unit.server.share import Change, Share

Fails = Callable[[int], AbstractContextManager[None]]
NAME = b"user.colour"


@pytest.fixture
def nodeid(share: Share) -> int:
    path = share.root / "f"
    path.touch()
    try:
        os.setxattr(path, NAME, b"grey")
    except OSError:
        pytest.skip("no extended attributes on this file system")
    return share.nodeid("f")


def set_(share: Share, nodeid: int, name: bytes, value: bytes, flags: int = 0) -> bytes:
    body = SETXATTR_IN_SHORT.pack(len(value), flags) + name + b"\0" + value
    return share.call(Opcode.SETXATTR, nodeid, body)


def get(share: Share, nodeid: int, name: bytes, size: int) -> bytes:
    return share.call(Opcode.GETXATTR, nodeid, GETXATTR_IN.pack(size) + name + b"\0")


def list_(share: Share, nodeid: int, size: int, **caller: int) -> bytes:
    return share.call(Opcode.LISTXATTR, nodeid, GETXATTR_IN.pack(size), **caller)


def test_set_get_list_remove(share: Share, nodeid: int, fails: Fails) -> None:
    value = b"red\0and blue"
    assert set_(share, nodeid, NAME, value) == b""
    assert os.getxattr(share.root / "f", NAME) == value
    assert get(share, nodeid, NAME, 0) == GETXATTR_OUT.pack(len(value))
    assert get(share, nodeid, NAME, len(value)) == value
    with fails(errno.ERANGE):
        get(share, nodeid, NAME, len(value) - 1)
    names = list_(share, nodeid, 4096)
    assert NAME + b"\0" in names
    assert list_(share, nodeid, 0) == GETXATTR_OUT.pack(len(names))
    with fails(errno.ERANGE):
        list_(share, nodeid, len(names) - 1)
    assert share.call(Opcode.REMOVEXATTR, nodeid, NAME + b"\0") == b""
    with fails(errno.ENODATA):
        get(share, nodeid, NAME, 0)
    assert share.changes == [Change(frozenset({nodeid}), frozenset())] * 2


def test_create_and_replace(share: Share, nodeid: int, fails: Fails) -> None:
    with fails(errno.EEXIST):
        set_(share, nodeid, NAME, b"", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        set_(share, nodeid, b"user.none", b"", os.XATTR_REPLACE)
    with fails(errno.EINVAL):
        set_(share, nodeid, NAME, b"", 1 << 31)


@pytest.mark.skipif(os.getuid() != 0, reason="only root sets trusted.*")
def test_who_may_not_read_trusted_attributes_is_not_told_of_them(share: Share, nodeid: int) -> None:
    for name in ("trusted.overlay.origin", "security.colour"):
        os.setxattr(share.root / "f", name, b"1")
    everybody = {NAME, b"security.colour"}
    for uid, wanted in ((0, everybody | {b"trusted.overlay.origin"}), (1000, everybody)):
        names = list_(share, nodeid, 4096, uid=uid)
        assert set(names.split(b"\0")) - {b"security.selinux"} == wanted | {b""}
        assert list_(share, nodeid, 0, uid=uid) == GETXATTR_OUT.pack(len(names))


def test_of_a_symbolic_link_itself(share: Share, nodeid: int, fails: Fails) -> None:
    (share.root / "l").symlink_to("f")
    link = share.nodeid("l")
    assert NAME not in list_(share, link, 4096)
    with fails(errno.EPERM):
        set_(share, link, NAME, b"")


def test_malformed(share: Share, nodeid: int, fails: Fails) -> None:
    for body in (
        SETXATTR_IN_SHORT.pack(3, 0) + NAME,
        SETXATTR_IN_SHORT.pack(3, 0) + NAME + b"\0ab",
        SETXATTR_IN_SHORT.pack(3, 0) + NAME + b"\0abcd",
    ):
        with fails(errno.EINVAL):
            share.call(Opcode.SETXATTR, nodeid, body)
    for name in (b"", b"user." + b"n" * 251):
        with fails(errno.ERANGE):
            set_(share, nodeid, name, b"")
    with fails(errno.E2BIG):
        set_(share, nodeid, NAME, bytes(65537))


def test_acls_are_not_served(share: Share, nodeid: int, fails: Fails) -> None:
    for name in ACLS:
        with fails(errno.EOPNOTSUPP):
            set_(share, nodeid, name, b"")
        with fails(errno.EOPNOTSUPP):
            get(share, nodeid, name, 0)


def test_switched_off(share: Share, nodeid: int, fails: Fails) -> None:
    share.xattr = False
    with fails(errno.ENOSYS):
        set_(share, nodeid, NAME, b"")
    with fails(errno.ENOSYS):
        get(share, nodeid, NAME, 0)
    with fails(errno.ENOSYS):
        list_(share, nodeid, 0)
    with fails(errno.ENOSYS):
        share.call(Opcode.REMOVEXATTR, nodeid, NAME + b"\0")


def test_readonly(share: Share, nodeid: int, fails: Fails) -> None:
    share.readonly = True
    with fails(errno.EROFS):
        set_(share, nodeid, NAME, b"")
    with fails(errno.EROFS):
        share.call(Opcode.REMOVEXATTR, nodeid, NAME + b"\0")
    assert get(share, nodeid, NAME, 9) == b"grey"


def test_proof_of_awareness_is_taken_and_not_stored(share: Share, fails: Fails) -> None:
    share.xattr = False
    share.readonly = True
    assert set_(share, ROOT_ID, PROOF, b"right") == b""
    assert share.proofs == [b"right"]
    with fails(errno.EPERM):
        set_(share, ROOT_ID, PROOF, b"wrong")
    share.xattr = True
    share.readonly = False
    (share.root / "f").touch()
    with fails(errno.EOPNOTSUPP):
        set_(share, share.nodeid("f"), PROOF, b"right")
    assert PROOF not in list_(share, ROOT_ID, 4096)
