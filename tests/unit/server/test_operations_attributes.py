"""SETATTR, ACCESS and STATFS."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from coherent_vfs.server.fuse.protocol import (
    ACCESS_IN,
    KSTATFS,
    ROOT_ID,
    SETATTR_IN,
    Attr,
    FattrFlag,
    Kstatfs,
    Opcode,
    SetattrIn,
)
from tests.unit.server.share import Change, Share, attr

Fails = Callable[[int], AbstractContextManager[None]]
ZERO = SetattrIn(*(0,) * 13)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def change(share: Share, name: str, valid: FattrFlag, **values: int) -> Attr:
    return attr(
        share.call(Opcode.SETATTR, share.nodeid(name), SETATTR_IN.pack(*ZERO._replace(valid=int(valid), **values)))
    )


def test_chmod(share: Share) -> None:
    (share.root / "f").touch(0o600)
    reply = change(share, "f", FattrFlag.MODE, mode=stat.S_IFREG | 0o4751)
    assert reply.mode == stat.S_IFREG | 0o4751
    assert (share.root / "f").stat().st_mode == reply.mode
    assert share.changes == [Change(frozenset({share.nodeid("f")}), frozenset())]


def test_chmod_of_a_symbolic_link_leaves_its_target(share: Share, fails: Fails) -> None:
    (share.root / "f").touch(0o600)
    (share.root / "l").symlink_to("f")
    with fails(errno.EOPNOTSUPP):
        change(share, "l", FattrFlag.MODE, mode=0o777)
    assert stat.S_IMODE((share.root / "f").stat().st_mode) == 0o600


@needs_root
def test_chown_one_id_and_of_the_link_itself(share: Share) -> None:
    (share.root / "f").touch()
    (share.root / "l").symlink_to("f")
    reply = change(share, "f", FattrFlag.UID, uid=0xFFFFFFFE, gid=77)
    assert (reply.uid, reply.gid) == (0xFFFFFFFE, 0)
    reply = change(share, "l", FattrFlag.UID | FattrFlag.GID, uid=5, gid=6)
    assert (reply.uid, reply.gid) == (5, 6)
    assert (share.root / "f").stat().st_gid == 0
    assert change(share, "f", FattrFlag.UID, uid=0xFFFFFFFF).uid == 0xFFFFFFFE


@needs_root
def test_chmod_comes_before_chown_which_clears_set_user_id(share: Share) -> None:
    (share.root / "f").touch(0o755)
    reply = change(share, "f", FattrFlag.MODE | FattrFlag.UID, mode=0o4755, uid=9)
    assert stat.S_IMODE(reply.mode) == 0o755


def test_truncate_by_path_and_by_handle(share: Share, fails: Fails) -> None:
    (share.root / "f").write_bytes(b"abcdef")
    assert change(share, "f", FattrFlag.SIZE, size=3).size == 3
    _, fh = share.open("f")
    (share.root / "f").chmod(0)
    assert change(share, "f", FattrFlag.SIZE | FattrFlag.FH, size=5, fh=fh).size == 5
    with fails(errno.EBADF):
        change(share, "f", FattrFlag.SIZE | FattrFlag.FH, size=5, fh=fh + 1)
    with fails(errno.EFBIG):
        change(share, "f", FattrFlag.SIZE, size=1 << 63)


@needs_root
def test_truncate_kills_set_user_id_where_the_guest_asks(share: Share) -> None:
    (share.root / "f").touch()
    (share.root / "f").chmod(0o6755)
    assert stat.S_IMODE(change(share, "f", FattrFlag.SIZE, size=3).mode) == 0o6755
    reply = change(share, "f", FattrFlag.SIZE | FattrFlag.KILL_SUIDGID, size=4)
    assert stat.S_IMODE(reply.mode) == 0o755


def test_truncate_opens_no_device_or_fifo(share: Share, fails: Fails) -> None:
    os.mkfifo(share.root / "p")
    with fails(errno.EINVAL):
        change(share, "p", FattrFlag.SIZE)
    (share.root / "d").mkdir()
    with fails(errno.EISDIR):
        change(share, "d", FattrFlag.SIZE)


def test_times(share: Share, fails: Fails) -> None:
    path = share.root / "f"
    path.touch()
    os.utime(path, ns=(1, 2))
    reply = change(share, "f", FattrFlag.MTIME, mtime=-5, mtimensec=7)
    assert (reply.mtime, reply.mtimensec) == (-5, 7)
    assert path.stat().st_atime_ns == 1
    reply = change(share, "f", FattrFlag.ATIME | FattrFlag.ATIME_NOW, atime=3)
    assert reply.atime > 1_000_000_000
    assert reply.mtime == -5
    with fails(errno.EINVAL):
        change(share, "f", FattrFlag.ATIME, atimensec=0x3FFFFFFF)


def test_times_of_a_symbolic_link_itself(share: Share) -> None:
    (share.root / "l").symlink_to("nowhere")
    assert change(share, "l", FattrFlag.MTIME, mtime=11).mtime == 11


def test_unknown_inode(share: Share, fails: Fails) -> None:
    with fails(errno.ESTALE):
        share.call(Opcode.SETATTR, 99, SETATTR_IN.pack(*ZERO))


def test_readonly(share: Share, fails: Fails) -> None:
    share.readonly = True
    with fails(errno.EROFS):
        share.call(Opcode.ACCESS, ROOT_ID, ACCESS_IN.pack(os.W_OK))


@pytest.mark.parametrize(
    ("uid", "gid", "granted"),
    [
        (0, 0, os.R_OK | os.W_OK | os.X_OK),
        (10, 20, os.X_OK),
        (11, 20, os.R_OK | os.X_OK),
        (11, 21, os.W_OK),
    ],
)
def test_access_by_the_first_class_that_fits(share: Share, fails: Fails, uid: int, gid: int, granted: int) -> None:
    path = share.root / "f"
    path.touch()
    try:
        os.chown(path, 10, 20)
    except PermissionError:
        pytest.skip("needs root")
    path.chmod(0o152)
    nodeid = share.nodeid("f")
    for mask in (os.F_OK, os.R_OK, os.W_OK, os.X_OK):
        if granted & mask == mask:
            assert share.call(Opcode.ACCESS, nodeid, ACCESS_IN.pack(mask), uid=uid, gid=gid) == b""
        else:
            with fails(errno.EACCES):
                share.call(Opcode.ACCESS, nodeid, ACCESS_IN.pack(mask), uid=uid, gid=gid)


def test_access_of_root_to_what_nobody_may_execute(share: Share, fails: Fails) -> None:
    (share.root / "f").touch(0o600)
    with fails(errno.EACCES):
        share.call(Opcode.ACCESS, share.nodeid("f"), ACCESS_IN.pack(os.X_OK), uid=0, gid=0)
    assert share.call(Opcode.ACCESS, ROOT_ID, ACCESS_IN.pack(os.X_OK), uid=0, gid=0) == b""
    with fails(errno.EINVAL):
        share.call(Opcode.ACCESS, ROOT_ID, ACCESS_IN.pack(8))


def test_statfs(share: Share) -> None:
    reply = Kstatfs._make(KSTATFS.unpack(share.call(Opcode.STATFS, ROOT_ID)))
    host = os.statvfs(share.root)
    assert (reply.blocks, reply.bsize, reply.frsize) == (host.f_blocks, host.f_bsize, host.f_frsize)
    assert reply.namelen == host.f_namemax
