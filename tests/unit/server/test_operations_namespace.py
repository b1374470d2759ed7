"""MKNOD, MKDIR, TMPFILE, RMDIR, RENAME, RENAME2, LINK, SYMLINK and READLINK."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    ENTRY_OUT_SIZE,
    LINK_IN,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_OUT,
    RENAME2_IN,
    RENAME_IN,
    ROOT_ID,
    Opcode,
)
from tests.unit.server.share import Change, Share, entry

Fails = Callable[[int], AbstractContextManager[None]]
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def changed(share: Share) -> Change:
    """The only change that was announced."""
    (change,) = share.changes
    return change


def in_root(*names: bytes) -> frozenset[tuple[int, bytes]]:
    return frozenset((ROOT_ID, name) for name in names)


def test_mknod(share: Share) -> None:
    body = MKNOD_IN.pack(stat.S_IFIFO | 0o4712, 0, 0) + b"pipe\0"
    found, attributes = entry(share.call(Opcode.MKNOD, ROOT_ID, body))
    assert attributes.mode == stat.S_IFIFO | 0o4712
    assert found.nodeid == share.nodeid("pipe")
    assert changed(share) == Change(frozenset({ROOT_ID}), in_root(b"pipe"))


@needs_root
def test_mknod_of_a_device(share: Share) -> None:
    rdev = os.makedev(259, 70000) & 0xFFFFFFFF
    share.call(Opcode.MKNOD, ROOT_ID, MKNOD_IN.pack(stat.S_IFCHR | 0o600, rdev, 0) + b"device\0")
    assert (share.root / "device").stat().st_rdev == os.makedev(259, 70000)


def test_mknod_makes_no_directory(share: Share, fails: Fails) -> None:
    with fails(errno.EPERM):
        share.call(Opcode.MKNOD, ROOT_ID, MKNOD_IN.pack(stat.S_IFDIR | 0o700, 0, 0) + b"d\0")


@needs_root
def test_what_is_made_belongs_to_the_caller(share: Share) -> None:
    # Only the last directory is the caller's: the share is reached by its descriptor.
    share.root.chmod(0o777)
    share.call(Opcode.MKDIR, ROOT_ID, MKDIR_IN.pack(0o751, 0o22) + b"d\0", uid=1234, gid=1234)
    share.call(Opcode.SYMLINK, ROOT_ID, b"l\0d\0", uid=1234, gid=1234)
    share.call(Opcode.MKNOD, ROOT_ID, MKNOD_IN.pack(stat.S_IFREG | 0o600, 0, 0) + b"f\0", uid=1234, gid=1234)
    for name in ("d", "l", "f"):
        st = (share.root / name).lstat()
        assert (st.st_uid, st.st_gid) == (1234, 1234)
    assert stat.S_IMODE((share.root / "d").stat().st_mode) == 0o751
    assert os.geteuid() == 0


def test_mkdir_and_rmdir(share: Share, fails: Fails) -> None:
    made, attributes = entry(share.call(Opcode.MKDIR, ROOT_ID, MKDIR_IN.pack(0o1750, 0) + b"d\0"))
    assert attributes.mode == stat.S_IFDIR | 0o1750
    assert changed(share) == Change(frozenset({ROOT_ID}), in_root(b"d"))
    share.changes.clear()
    with fails(errno.EEXIST):
        share.call(Opcode.MKDIR, ROOT_ID, MKDIR_IN.pack(0o700, 0) + b"d\0")
    share.changes.clear()
    assert share.call(Opcode.RMDIR, ROOT_ID, b"d\0") == b""
    assert changed(share) == Change(frozenset({ROOT_ID}), in_root(b"d"))
    with fails(errno.ENOENT):
        share.call(Opcode.RMDIR, ROOT_ID, b"d\0")
    with fails(errno.ENOENT):
        share.call(Opcode.MKDIR, made.nodeid, MKDIR_IN.pack(0o700, 0) + b"in a removed directory\0")


def test_rename_announces_both_names_and_both_directories(share: Share) -> None:
    (share.root / "sub").mkdir()
    moved, victim = share.root / "a", share.root / "sub" / "b"
    moved.write_text("moved")
    victim.write_text("victim")
    sub = share.nodeid("sub")
    assert share.call(Opcode.RENAME, ROOT_ID, RENAME_IN.pack(sub) + b"a\0b\0") == b""
    assert victim.read_text() == "moved"
    assert changed(share) == Change(frozenset({ROOT_ID, sub}), frozenset({(ROOT_ID, b"a"), (sub, b"b")}))


def test_rename_of_what_is_not_there(share: Share, fails: Fails) -> None:
    with fails(errno.ENOENT):
        share.call(Opcode.RENAME, ROOT_ID, RENAME_IN.pack(ROOT_ID) + b"a\0b\0")
    with fails(errno.ESTALE):
        share.call(Opcode.RENAME, ROOT_ID, RENAME_IN.pack(77) + b"a\0b\0")


def test_rename2(share: Share, fails: Fails) -> None:
    (share.root / "a").write_text("a")
    (share.root / "b").write_text("b")
    with fails(errno.EEXIST):
        share.call(Opcode.RENAME2, ROOT_ID, RENAME2_IN.pack(ROOT_ID, NOREPLACE) + b"a\0b\0")
    share.call(Opcode.RENAME2, ROOT_ID, RENAME2_IN.pack(ROOT_ID, EXCHANGE) + b"a\0b\0")
    assert ((share.root / "a").read_text(), (share.root / "b").read_text()) == ("b", "a")
    with fails(errno.EINVAL):
        share.call(Opcode.RENAME2, ROOT_ID, RENAME2_IN.pack(ROOT_ID, 8) + b"a\0b\0")


@needs_root
def test_rename2_leaves_a_whiteout(share: Share) -> None:
    (share.root / "a").touch()
    try:
        share.call(Opcode.RENAME2, ROOT_ID, RENAME2_IN.pack(ROOT_ID, WHITEOUT) + b"a\0b\0")
    except OSError as refused:
        if refused.errno == errno.EINVAL:
            pytest.skip("no whiteouts on this file system")
        raise
    st = (share.root / "a").stat()
    assert stat.S_ISCHR(st.st_mode)
    assert st.st_rdev == 0


def test_link(share: Share) -> None:
    (share.root / "f").touch()
    nodeid = share.nodeid("f")
    found, attributes = entry(share.call(Opcode.LINK, ROOT_ID, LINK_IN.pack(nodeid) + b"g\0"))
    assert found.nodeid == nodeid
    assert attributes.nlink == 2
    assert (share.root / "g").samefile(share.root / "f")
    assert changed(share) == Change(frozenset({ROOT_ID, nodeid}), in_root(b"g"))


def test_link_to_a_symbolic_link_itself(share: Share) -> None:
    (share.root / "f").touch()
    (share.root / "l").symlink_to("f")
    share.call(Opcode.LINK, ROOT_ID, LINK_IN.pack(share.nodeid("l")) + b"m\0")
    assert (share.root / "m").is_symlink()


def test_symlink_and_readlink(share: Share, fails: Fails) -> None:
    target = b"../../any/" + b"x" * 4000
    found, _ = entry(share.call(Opcode.SYMLINK, ROOT_ID, b"l\0" + target + b"\0"))
    assert share.call(Opcode.READLINK, found.nodeid) == target
    assert changed(share) == Change(frozenset({ROOT_ID}), in_root(b"l"))
    with fails(errno.ENOENT):
        share.call(Opcode.SYMLINK, ROOT_ID, b"m\0\0")
    (share.root / "f").touch()
    with pytest.raises(OSError):
        share.call(Opcode.READLINK, share.nodeid("f"))


def test_tmpfile_can_be_linked(share: Share) -> None:
    body = CREATE_IN.pack(os.O_RDWR | os.O_TMPFILE, stat.S_IFREG | 0o640, 0, 0) + b"/\0"
    reply = share.call(Opcode.TMPFILE, ROOT_ID, body)
    made, attributes = entry(reply)
    fh, _, _ = OPEN_OUT.unpack_from(reply, ENTRY_OUT_SIZE)
    assert (attributes.nlink, attributes.mode) == (0, stat.S_IFREG | 0o640)
    os.write(share.handle_fd(made.nodeid, fh), b"data")
    share.call(Opcode.LINK, ROOT_ID, LINK_IN.pack(made.nodeid) + b"f\0")
    assert (share.root / "f").read_bytes() == b"data"


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"../x"])
def test_names_that_lead_elsewhere(share: Share, fails: Fails, name: bytes) -> None:
    for opcode, body in bodies_with(name):
        with fails(errno.EINVAL):
            share.call(opcode, ROOT_ID, body)
    assert not share.changes


def test_long_names(share: Share, fails: Fails) -> None:
    for opcode, body in bodies_with(b"n" * 256):
        with fails(errno.ENAMETOOLONG):
            share.call(opcode, ROOT_ID, body)
    share.call(Opcode.MKDIR, ROOT_ID, MKDIR_IN.pack(0o700, 0) + b"n" * 255 + b"\0")


def bodies_with(name: bytes) -> list[tuple[Opcode, bytes]]:
    """A request of every operation that takes a name."""
    return [
        (Opcode.MKNOD, MKNOD_IN.pack(stat.S_IFREG | 0o600, 0, 0) + name + b"\0"),
        (Opcode.MKDIR, MKDIR_IN.pack(0o700, 0) + name + b"\0"),
        (Opcode.RMDIR, name + b"\0"),
        (Opcode.SYMLINK, name + b"\0target\0"),
        (Opcode.LINK, LINK_IN.pack(ROOT_ID) + name + b"\0"),
        (Opcode.RENAME, RENAME_IN.pack(ROOT_ID) + b"a\0" + name + b"\0"),
        (Opcode.RENAME, RENAME_IN.pack(ROOT_ID) + name + b"\0a\0"),
        (Opcode.RENAME2, RENAME2_IN.pack(ROOT_ID, 0) + b"a\0" + name + b"\0"),
    ]
