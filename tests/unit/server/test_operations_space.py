"""FSYNC, FSYNCDIR, SYNCFS, LSEEK, FALLOCATE and COPY_FILE_RANGE."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from coherent_vfs.server.fuse.protocol import (
    COPY_FILE_RANGE_IN,
    COPY_FILE_RANGE_OUT,
    FALLOCATE_IN,
    FSYNC_FDATASYNC,
    FSYNC_IN,
    LSEEK_IN,
    LSEEK_OUT,
    ROOT_ID,
    WRITE_OUT,
    Opcode,
)
from coherent_vfs.server.operations import space
from tests.unit.server.share import Change, Share

Fails = Callable[[int], AbstractContextManager[None]]
KEEP_SIZE, PUNCH_HOLE = 1, 2
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize("flags", [0, FSYNC_FDATASYNC])
def test_fsync(share: Share, fails: Fails, flags: int) -> None:
    (share.root / "f").touch()
    nodeid, fh = share.open("f")
    assert share.call(Opcode.FSYNC, nodeid, FSYNC_IN.pack(fh, flags)) == b""
    with fails(errno.EBADF):
        share.call(Opcode.FSYNC, ROOT_ID, FSYNC_IN.pack(fh, flags))


def test_fsyncdir(share: Share) -> None:
    (share.root / "d").mkdir()
    nodeid, fh = share.open("d", os.O_RDONLY)
    assert share.call(Opcode.FSYNCDIR, nodeid, FSYNC_IN.pack(fh, 0)) == b""


def test_syncfs(fails: Fails) -> None:
    # On tmpfs: elsewhere this waits for what the whole machine has written.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        share = Share(Path(directory))
        assert share.call(Opcode.SYNCFS, ROOT_ID, bytes(8)) == b""
        os.mkfifo(share.root / "p")
        with fails(errno.EINVAL):
            share.call(Opcode.SYNCFS, share.nodeid("p"), bytes(8))
        share.close()


def test_lseek_finds_data_and_holes(share: Share, fails: Fails) -> None:
    path = share.root / "f"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(512 << 10)
        file.write(b"x" * 4096)
    nodeid, fh = share.open("f")

    def seek(offset: int, whence: int) -> int:
        reply = share.call(Opcode.LSEEK, nodeid, LSEEK_IN.pack(fh, offset, whence))
        return int(LSEEK_OUT.unpack(reply)[0])

    with path.open("rb") as host:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            assert seek(0, whence) == os.lseek(host.fileno(), 0, whence)
    with fails(errno.ENXIO):
        seek(2 << 20, os.SEEK_DATA)
    with fails(errno.ENXIO):
        seek(-1, os.SEEK_DATA)
    with fails(errno.EINVAL):
        seek(0, os.SEEK_SET)


def test_a_guest_that_delays_writes_finds_no_holes(share: Share, fails: Fails) -> None:
    """It has data where the host still has a hole; a copy by extents would lose it."""
    share.writeback = True
    (share.root / "f").touch()
    nodeid, fh = share.open("f")
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        with fails(errno.ENOSYS):
            share.call(Opcode.LSEEK, nodeid, LSEEK_IN.pack(fh, 0, whence))


def test_fallocate(share: Share, fails: Fails) -> None:
    path = share.root / "f"
    path.write_bytes(b"x" * 8192)
    nodeid, fh = share.open("f")
    share.call(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, 12288, 0))
    assert path.stat().st_size == 12288
    share.call(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, 4096, KEEP_SIZE | PUNCH_HOLE))
    assert path.read_bytes()[:4097] == bytes(4096) + b"x"
    assert share.changes == [Change(frozenset({nodeid}), frozenset())] * 2
    with fails(errno.EINVAL):
        share.call(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 1 << 63, 1, 0))
    with fails(errno.EOPNOTSUPP):
        share.call(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, 1, 1 << 31))


@needs_root
def test_data_changed_by_other_than_root_kills_set_user_id(share: Share) -> None:
    path = share.root / "to"
    (share.root / "from").write_bytes(b"abcdef")
    for uid, mode in ((0, 0o6755), (1000, 0o755)):
        path.touch()
        path.chmod(0o6755)
        nodeid, fh = share.open("to")
        share.call(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, 4096, 0), uid=uid)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.chmod(0o6755)
        assert copy(share, 3, uid=uid) == 3
        assert stat.S_IMODE(path.stat().st_mode) == mode


def copy(share: Share, length: int, flags: int = 0, wide: bool = False, uid: int = 0) -> int:
    source, fh_in = share.open("from", os.O_RDONLY)
    target, fh_out = share.open("to")
    body = COPY_FILE_RANGE_IN.pack(fh_in, 2, target, fh_out, 1, length, flags)
    opcode, layout = (Opcode.COPY_FILE_RANGE_64, COPY_FILE_RANGE_OUT) if wide else (Opcode.COPY_FILE_RANGE, WRITE_OUT)
    return int(layout.unpack(share.call(opcode, source, body, uid=uid))[0])


@pytest.mark.parametrize("wide", [False, True])
def test_copy_file_range(share: Share, fails: Fails, wide: bool) -> None:
    (share.root / "from").write_bytes(b"abcdef")
    (share.root / "to").write_bytes(b"......")
    assert copy(share, 3, wide=wide) == 3
    assert (share.root / "to").read_bytes() == b".cde.."
    assert share.changes == [Change(frozenset({share.nodeid("to")}), frozenset())]
    with fails(errno.EINVAL):
        copy(share, 3, flags=1, wide=wide)


def test_copy_file_range_is_cut_short(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "COPY_MAX", 2)
    (share.root / "from").write_bytes(b"abcdef")
    (share.root / "to").touch()
    assert copy(share, (1 << 64) - 1) == 2
