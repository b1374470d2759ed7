"""The compiled operations against a directory, through a real ring."""

from __future__ import annotations

import errno
import gc
import os
import resource
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coherent_vfs.server.fuse.protocol import (
    ATTR,
    BATCH_FORGET_IN,
    COPY_FILE_RANGE_IN,
    CREATE_IN,
    DIRENT,
    ENTRY_OUT,
    ENTRY_OUT_SIZE,
    FLUSH_IN,
    FORGET_IN,
    FORGET_ONE,
    INIT_IN,
    MKDIR_IN,
    OPEN_IN,
    OPEN_KILL_SUIDGID,
    OPEN_OUT,
    READ_IN,
    RELEASE_IN,
    WRITE_IN,
    Attr,
    Opcode,
    OpenFlag,
    WriteFlag,
)
from coherent_vfs.server.operations.table import CHANGES
from tests.unit.server.fake_device import leaked, open_fds
from tests.unit.server.raw_guest import RawGuest, raw_guest

DAY = 86400


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[RawGuest]:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "dir").mkdir()
    with raw_guest(tmp_path, cache="none") as guest:
        yield guest


def lookup(guest: RawGuest, name: bytes, parent: int = 1) -> int:
    error, reply = guest.request(Opcode.LOOKUP, parent, name + b"\0")
    if error:
        raise OSError(error, os.strerror(error))
    return int(ENTRY_OUT.unpack_from(reply)[0])


def attributes(reply: bytes) -> Attr:
    return Attr._make(ATTR.unpack_from(reply, ENTRY_OUT.size))


def open_file(guest: RawGuest, nodeid: int, flags: int = os.O_RDWR) -> tuple[int, int]:
    error, reply = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(flags, 0))
    if error:
        raise OSError(error, os.strerror(error))
    fh, open_flags, _ = OPEN_OUT.unpack(reply)
    return fh, open_flags


def read(guest: RawGuest, nodeid: int, fh: int, size: int, offset: int = 0, *, flags: int = 0) -> tuple[int, bytes]:
    return guest.request(Opcode.READ, nodeid, READ_IN.pack(fh, offset, size, 0, 0, flags), room=size)


def write(guest: RawGuest, nodeid: int, fh: int, data: bytes, offset: int = 0, **header: int) -> tuple[int, bytes]:
    size, flags = header.pop("size", len(data)), header.pop("flags", 0)
    return guest.request(Opcode.WRITE, nodeid, WRITE_IN.pack(fh, offset, size, 0, 0, flags) + data, **header)


def release(guest: RawGuest, nodeid: int, fh: int) -> int:
    return guest.request(Opcode.RELEASE, nodeid, RELEASE_IN.pack(fh, 0, 0, 0))[0]


def test_lookup_gives_the_attributes(guest: RawGuest, tmp_path: Path) -> None:
    error, reply = guest.request(Opcode.LOOKUP, 1, b"file\0")
    assert error == 0
    attr, status = attributes(reply), (tmp_path / "file").stat()
    assert (attr.ino, attr.size, attr.mode, attr.nlink) == (status.st_ino, 7, status.st_mode, 1)
    assert (attr.uid, attr.gid, attr.blocks) == (status.st_uid, status.st_gid, status.st_blocks)
    assert attr.mtime * 10**9 + attr.mtimensec == status.st_mtime_ns
    assert lookup(guest, b"file") == ENTRY_OUT.unpack_from(reply)[0]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (b"missing\0", errno.ENOENT),
        (b"dir/x\0", errno.EINVAL),
        (b"/etc\0", errno.EINVAL),
        (b"\0", errno.EINVAL),
        (b"", errno.EINVAL),
        (b"x" * 256 + b"\0", errno.ENAMETOOLONG),
        (b"x" * 255 + b"\0", errno.ENOENT),
    ],
)
@pytest.mark.parametrize("opcode", [Opcode.LOOKUP, Opcode.UNLINK, Opcode.CREATE])
def test_names_are_single_components(guest: RawGuest, opcode: Opcode, name: bytes, error: int) -> None:
    body = name if opcode != Opcode.CREATE else CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0) + name
    got, _ = guest.request(opcode, 1, body)
    assert got == (0 if opcode == Opcode.CREATE and error == errno.ENOENT else error)


@pytest.mark.parametrize("name", [b".\0", b"..\0"])
@pytest.mark.parametrize("opcode", [Opcode.UNLINK, Opcode.CREATE])
def test_dots_are_no_names(guest: RawGuest, opcode: Opcode, name: bytes) -> None:
    body = name if opcode != Opcode.CREATE else CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0) + name
    assert guest.request(opcode, 1, body)[0] == errno.EINVAL


def test_a_link_out_of_the_share_is_only_a_link(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (share / "link").symlink_to("../secret")
    (share / "dirlink").symlink_to("..")
    with raw_guest(share) as guest:
        link = lookup(guest, b"link")
        with pytest.raises(OSError):
            open_file(guest, link)
        with pytest.raises(OSError):
            lookup(guest, b"secret", parent=lookup(guest, b"dirlink"))
        error, _ = guest.request(Opcode.CREATE, 1, CREATE_IN.pack(os.O_RDWR | os.O_TRUNC, 0o100644, 0, 0) + b"link\0")
        assert error
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_only_node_ids_that_were_given_out_are_good(guest: RawGuest) -> None:
    nodeid = lookup(guest, b"file")
    wrong = [0, 2, nodeid + 1, nodeid + (1 << 28), nodeid ^ (1 << 63), 2**64 - 1]
    for bad in wrong:
        assert guest.request(Opcode.GETATTR, bad, bytes(16))[0] == errno.ESTALE
        assert guest.request(Opcode.LOOKUP, bad, b"x\0")[0] == errno.ESTALE
    guest.request(Opcode.GETATTR, nodeid, bytes(16))


def forget(guest: RawGuest, nodeid: int, nlookup: int) -> None:
    guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(nlookup))


def test_forget_counts_lookups(guest: RawGuest) -> None:
    first = lookup(guest, b"file")
    assert lookup(guest, b"file") == first
    inodes = guest.device.fs.inodes
    assert (inodes.live, inodes.idle) == (1, 0)
    batch = BATCH_FORGET_IN.pack(2) + FORGET_ONE.pack(first, 1) + FORGET_ONE.pack(999, 1)
    guest.tell(Opcode.BATCH_FORGET, 0, batch)
    assert inodes.live == 1
    forget(guest, first, 100)
    assert (inodes.live, inodes.idle) == (0, 1)
    assert guest.request(Opcode.GETATTR, first, bytes(16))[0] == errno.ESTALE
    lookup(guest, b"file")
    assert (inodes.live, inodes.idle) == (1, 0)
    forget(guest, 1, 2**63)
    assert guest.request(Opcode.GETATTR, 1, bytes(16))[0] == 0


def test_an_unlinked_file_that_nobody_knows_is_let_go(guest: RawGuest, tmp_path: Path) -> None:
    nodeid = lookup(guest, b"file")
    forget(guest, nodeid, 1)
    assert guest.request(Opcode.UNLINK, 1, b"file\0")[0] == 0
    assert guest.device.fs.inodes.idle == 0
    held = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert not [path for path in held if path.startswith(str(tmp_path / "file"))]


def test_an_unlinked_file_that_is_known_goes_on(guest: RawGuest) -> None:
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid)
    assert guest.request(Opcode.UNLINK, 1, b"file\0")[0] == 0
    assert read(guest, nodeid, fh, 100) == (0, b"content")
    error, reply = guest.request(Opcode.GETATTR, nodeid, bytes(16))
    assert error == 0
    assert Attr._make(ATTR.unpack_from(reply, 16)).nlink == 0


def test_read_and_write(guest: RawGuest, tmp_path: Path) -> None:
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid)
    data = os.urandom(300_000)
    assert write(guest, nodeid, fh, data, offset=5) == (0, struct.pack("<I4x", len(data)))
    assert (tmp_path / "file").read_bytes() == b"conte" + data
    assert read(guest, nodeid, fh, 400_000, offset=5) == (0, data)
    assert read(guest, nodeid, fh, 10, offset=10**9) == (0, b"")
    assert release(guest, nodeid, fh) == 0
    assert guest.device.fs.handles.live == 0


def test_handles_are_checked(guest: RawGuest) -> None:
    nodeid, directory = lookup(guest, b"file"), lookup(guest, b"dir")
    fh, _ = open_file(guest, nodeid)
    for wrong in (0, fh + 1, fh ^ (1 << 40), 2**64 - 1):
        assert read(guest, nodeid, wrong, 10)[0] == errno.EBADF
        assert write(guest, nodeid, wrong, b"x")[0] == errno.EBADF
        assert release(guest, nodeid, wrong) == errno.EBADF
        assert guest.request(Opcode.FLUSH, nodeid, FLUSH_IN.pack(wrong, 0))[0] == errno.EBADF
    assert read(guest, directory, fh, 10)[0] == errno.EBADF
    assert release(guest, nodeid, fh) == 0
    assert release(guest, nodeid, fh) == errno.EBADF
    again, _ = open_file(guest, nodeid)
    assert again != fh


def test_numbers_out_of_range(guest: RawGuest) -> None:
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid)
    assert read(guest, nodeid, fh, 10, offset=2**63)[0] == errno.EINVAL
    assert write(guest, nodeid, fh, b"x", offset=2**63)[0] == errno.EINVAL
    assert write(guest, nodeid, fh, b"x", size=2)[0] == errno.EINVAL
    assert write(guest, nodeid, fh, b"x", size=2**32 - 1)[0] == errno.EINVAL
    for opcode in (
        Opcode.OPEN,
        Opcode.READ,
        Opcode.WRITE,
        Opcode.RELEASE,
        Opcode.CREATE,
        Opcode.READDIR,
        Opcode.FLUSH,
    ):
        assert guest.request(opcode, nodeid, b"\1\2\3")[0] == errno.EINVAL, opcode.name
    assert guest.request(Opcode.GETATTR, 1, b"", len=10)[0] == errno.EINVAL
    assert guest.request(Opcode.GETATTR, 1, b"", len=2**32 - 1)[0] == errno.EINVAL


@pytest.mark.parametrize("how", ["open", "create", "tmpfile"])
def test_append_is_switched_by_the_flags_of_each_write(guest: RawGuest, how: str) -> None:
    """As fcntl(F_SETFL) of the guest's program did, of which the server is not told."""
    flags = os.O_RDWR | os.O_APPEND
    if how == "open":
        nodeid = lookup(guest, b"file")
        fh, _ = open_file(guest, nodeid, flags | os.O_TRUNC)
    elif how == "create":
        nodeid, fh, _ = create(guest, b"new", flags)
    else:
        body = CREATE_IN.pack(flags | os.O_TMPFILE, stat.S_IFREG | 0o644, 0, 0) + b"/\0"
        error, reply = guest.request(Opcode.TMPFILE, 1, body)
        assert error == 0
        nodeid, fh = ENTRY_OUT.unpack_from(reply)[0], OPEN_OUT.unpack_from(reply, ENTRY_OUT_SIZE)[0]
    assert write(guest, nodeid, fh, b"foo\n", 0, flags=flags)[0] == 0
    for data, offset, switched, content in (
        (b"bar\n", 0, flags, b"foo\nbar\n"),
        (b"X", 0, os.O_RDWR, b"Xoo\nbar\n"),
        (b"Y", 1, os.O_RDWR, b"XYo\nbar\n"),
        (b"!", 0, flags, b"XYo\nbar\n!"),
        (b"Z", 2, os.O_RDWR, b"XYZ\nbar\n!"),
    ):
        assert write(guest, nodeid, fh, data, offset, flags=switched)[0] == 0
        assert read(guest, nodeid, fh, 100, flags=switched) == (0, content)


def test_what_was_opened_to_append_can_be_copied_to_when_that_is_off(guest: RawGuest) -> None:
    """The guest's kernel refuses to copy to what has O_APPEND; by then the file has it no more."""
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid, os.O_RDWR | os.O_APPEND)
    assert write(guest, nodeid, fh, b"!", 0, flags=os.O_RDWR | os.O_APPEND)[0] == 0
    body = COPY_FILE_RANGE_IN.pack(fh, 7, nodeid, fh, 0, 1, 0)
    assert guest.request(Opcode.COPY_FILE_RANGE, nodeid, body)[0] == 0
    assert read(guest, nodeid, fh, 100) == (0, b"!ontent!")
    assert write(guest, nodeid, fh, b"?", 0, flags=os.O_RDWR | os.O_APPEND)[0] == 0
    assert read(guest, nodeid, fh, 100) == (0, b"!ontent!?")


@pytest.mark.parametrize("cache", ["auto", "shared"])
def test_direct_io_is_switched_by_the_flags_of_each_request(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 32)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system knows no O_DIRECT")
    with raw_guest(tmp_path, cache=cache, allow_direct_io=True, init=False) as guest:
        guest.initialize(opens=cache != "shared")
        nodeid, fh = lookup(guest, b"file"), 0
        if cache != "shared":
            fh, _ = open_file(guest, nodeid, os.O_RDWR | os.O_DIRECT)
        direct = os.O_RDWR | os.O_DIRECT
        for flags in (direct, os.O_RDWR, direct):
            # What is not aligned goes through the host's cache only.
            buffered = not flags & os.O_DIRECT
            assert (write(guest, nodeid, fh, b"!", 1, flags=flags)[0] == 0) == buffered
            assert (read(guest, nodeid, fh, 3, 1, flags=flags)[0] == 0) == buffered
    assert path.read_bytes()[:3] == b"\0!\2"


def test_a_file_that_only_grows_is_appended_to_and_nothing_else(guest: RawGuest, tmp_path: Path) -> None:
    """chattr +a: it can be opened for writing with O_APPEND only, and does not lose that."""
    path = tmp_path / "file"
    nodeid = lookup(guest, b"file")
    if subprocess.run(["chattr", "+a", path], capture_output=True, check=False).returncode:
        pytest.skip("the file system has no append-only files")
    try:
        fh, _ = open_file(guest, nodeid, os.O_WRONLY | os.O_APPEND)
        assert write(guest, nodeid, fh, b"!", 0, flags=os.O_WRONLY | os.O_APPEND)[0] == 0
        assert write(guest, nodeid, fh, b"?", 0, flags=os.O_WRONLY)[0] == errno.EPERM
        assert write(guest, nodeid, fh, b"!", 0, flags=os.O_WRONLY | os.O_APPEND)[0] == 0
        assert path.read_bytes() == b"content!!"
    finally:
        subprocess.run(["chattr", "-a", path], check=True)


def test_opening_what_is_no_file_does_nothing(guest: RawGuest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (b"fifo", b"dir"):
        with pytest.raises(OSError):
            open_file(guest, lookup(guest, name), os.O_RDONLY)
    assert guest.request(Opcode.OPENDIR, lookup(guest, b"file"), OPEN_IN.pack(0, 0))[0] == errno.EINVAL


def create(guest: RawGuest, name: bytes, flags: int, mode: int = 0o644, **header: int) -> tuple[int, int, Attr]:
    error, reply = guest.request(
        Opcode.CREATE, 1, CREATE_IN.pack(flags, stat.S_IFREG | mode, 0, 0) + name + b"\0", **header
    )
    if error:
        raise OSError(error, os.strerror(error))
    nodeid = ENTRY_OUT.unpack_from(reply)[0]
    fh, _, _ = OPEN_OUT.unpack_from(reply, ENTRY_OUT_SIZE)
    return nodeid, fh, attributes(reply)


def test_create(guest: RawGuest, tmp_path: Path) -> None:
    nodeid, fh, attr = create(guest, b"new", os.O_RDWR | os.O_EXCL, 0o640, uid=1000, gid=1001)
    status = (tmp_path / "new").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 1001, 0o640)
    assert (attr.uid, attr.gid, attr.size) == (1000, 1001, 0)
    assert write(guest, nodeid, fh, b"abc")[0] == 0
    with pytest.raises(FileExistsError):
        create(guest, b"new", os.O_RDWR | os.O_EXCL)
    again, fh, attr = create(guest, b"new", os.O_RDWR)
    assert (again, attr.size) == (nodeid, 3)
    assert read(guest, nodeid, fh, 10) == (0, b"abc")
    # The right to open it was not checked for anybody but root.
    with pytest.raises(OSError) as raised:
        create(guest, b"new", os.O_RDWR, uid=1000)
    assert raised.value.errno == errno.ESTALE
    again, fh, attr = create(guest, b"new", os.O_RDWR | os.O_TRUNC)
    assert (again, attr.size) == (nodeid, 0)
    # Back to what we were: what root creates is root's.
    create(guest, b"roots", os.O_RDWR)
    assert (tmp_path / "roots").stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="acts for other users")
@pytest.mark.parametrize(("minor", "mode"), [(37, 0o2755), (36, 0o755)])
def test_who_is_in_the_group_of_the_directory_makes_set_group_id_files(tmp_path: Path, minor: int, mode: int) -> None:
    """He may be by a group that the request does not tell of. Since Linux 6.0 (FUSE 7.37 is Linux 6.1) the guest's
    kernel takes the bit from who is not; for older ones we do."""
    os.chown(tmp_path, 0, 500)
    tmp_path.chmod(0o2775)
    with raw_guest(tmp_path, cache="none", init=False) as guest:
        assert guest.request(Opcode.INIT, 0, INIT_IN.pack(7, minor, 131072, 0, 0))[0] == 0
        _, _, attr = create(guest, b"f", os.O_WRONLY, 0o2755, uid=1000, gid=1000)
        assert (attr.uid, attr.gid, stat.S_IMODE(attr.mode)) == (1000, 500, mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts for other users")
def test_create_of_what_is_there_truncates_as_open_does(guest: RawGuest, tmp_path: Path) -> None:
    (tmp_path / "file").chmod(0o6755)
    create(guest, b"file", os.O_RDWR | os.O_TRUNC)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o6755
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "file").chmod(0o6755)
    body = CREATE_IN.pack(os.O_RDWR | os.O_TRUNC, stat.S_IFREG | 0o644, 0, OPEN_KILL_SUIDGID) + b"file\0"
    assert guest.request(Opcode.CREATE, 1, body)[0] == 0
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o755


def test_what_is_idle_does_not_take_the_last_descriptor(guest: RawGuest, tmp_path: Path) -> None:
    file = lookup(guest, b"file")
    fh, _ = open_file(guest, file)
    for i in range(4):
        (tmp_path / f"f{i}").touch()

    def exhaust() -> None:
        for i in range(4):
            forget(guest, lookup(guest, b"f%d" % i), 1)
        while True:
            try:
                taken.append(os.dup(guest.kick))
            except OSError:
                return

    def flush() -> None:
        assert guest.request(Opcode.FLUSH, file, FLUSH_IN.pack(fh, 0))[0] == 0

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    # Else what other tests have left might be closed just when there must be no descriptor.
    gc.collect()
    gc.disable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        for act in (
            flush,
            lambda: open_file(guest, file),
            lambda: lookup(guest, b"dir"),
            lambda: create(guest, b"new", os.O_RDWR | os.O_EXCL),
            lambda: create(guest, b"new", os.O_RDWR),
        ):
            exhaust()
            assert guest.device.fs.inodes.idle == 4
            act()
            assert guest.device.fs.inodes.idle == 0
            while taken:
                os.close(taken.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        gc.enable()
        for fd in taken:
            os.close(fd)


def test_what_nobody_creates_does_not_become_roots(guest: RawGuest, tmp_path: Path) -> None:
    nobody = 0xFFFFFFFF  # as an id that our user namespace does not map, none that setfsuid(2) accepts
    for ids in ({"uid": nobody, "gid": 1000}, {"uid": 1000, "gid": nobody}):
        with pytest.raises(OSError, match="Invalid argument"):
            create(guest, b"new", os.O_RDWR, 0o4755, **ids)
        assert guest.request(Opcode.MKDIR, 1, MKDIR_IN.pack(0o755, 0) + b"new\0", **ids)[0] == errno.EINVAL
        assert not (tmp_path / "new").exists()
    create(guest, b"roots", os.O_RDWR)
    status = (tmp_path / "roots").stat()
    assert (status.st_uid, status.st_gid) == (0, 0)


def test_append_goes_to_the_end(guest: RawGuest, tmp_path: Path) -> None:
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid, os.O_WRONLY | os.O_APPEND)
    (tmp_path / "file").write_bytes(b"longer content")
    assert write(guest, nodeid, fh, b"!", offset=7, flags=os.O_WRONLY | os.O_APPEND)[0] == 0
    assert (tmp_path / "file").read_bytes() == b"longer content!"


def test_pages_of_a_mapping_go_to_their_place_through_a_handle_that_appends(guest: RawGuest, tmp_path: Path) -> None:
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid, os.O_RDWR | os.O_APPEND)
    body = WRITE_IN.pack(fh, 0, 3, WriteFlag.CACHE, 0, 0) + b"CON"
    assert guest.request(Opcode.WRITE, nodeid, body)[0] == 0
    assert (tmp_path / "file").read_bytes() == b"CONtent"
    assert write(guest, nodeid, fh, b"!", offset=0, flags=os.O_RDWR | os.O_APPEND)[0] == 0
    assert (tmp_path / "file").read_bytes() == b"CONtent!"


def test_writes_of_users_clear_set_user_id(guest: RawGuest, tmp_path: Path) -> None:
    (tmp_path / "file").chmod(0o6755)
    nodeid = lookup(guest, b"file")
    fh, _ = open_file(guest, nodeid)
    assert write(guest, nodeid, fh, b"x")[0] == 0
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o6755
    kill_suidgid = 4
    body = WRITE_IN.pack(fh, 0, 1, kill_suidgid, 0, 0) + b"y"
    assert guest.request(Opcode.WRITE, nodeid, body)[0] == 0
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o755


def entries(reply: bytes, plus: bool) -> Iterator[tuple[int, int, bytes]]:
    """(node id, offset, name) of each directory entry of a reply."""
    at = 0
    while at < len(reply):
        nodeid = ENTRY_OUT.unpack_from(reply, at)[0] if plus else 0
        head = at + (ENTRY_OUT_SIZE if plus else 0)
        _ino, offset, length, _type = DIRENT.unpack_from(reply, head)
        yield nodeid, offset, reply[head + DIRENT.size : head + DIRENT.size + length]
        at = head + (DIRENT.size + length + 7) // 8 * 8


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
@pytest.mark.parametrize("room", [400, 4096, 100_000])
def test_readdir(guest: RawGuest, tmp_path: Path, opcode: Opcode, room: int) -> None:
    plus = opcode == Opcode.READDIRPLUS
    names = {f"name-{i}{'x' * (i % 30)}".encode() for i in range(700)}
    for name in names:
        (tmp_path / "dir" / name.decode()).touch()
    directory = lookup(guest, b"dir")
    error, reply = guest.request(Opcode.OPENDIR, directory, OPEN_IN.pack(0, 0))
    fh, _, _ = OPEN_OUT.unpack(reply)
    for _round in range(2):
        seen: list[bytes] = []
        offset = 0
        while True:
            error, reply = guest.request(opcode, directory, READ_IN.pack(fh, offset, room, 0, 0, 0), room=room)
            assert error == 0
            if not reply:
                break
            page = list(entries(reply, plus))
            seen += [name for _, _, name in page]
            offset = page[-1][1]
            for nodeid, _, name in page:
                assert bool(nodeid) == (plus and name not in (b".", b".."))
        assert len(seen) == len(names) + 2
        assert set(seen) == names | {b".", b".."}
    if plus:
        assert guest.device.fs.inodes.live == 1 + len(names)
        # Going back to a place in the middle continues there.
        error, reply = guest.request(Opcode.READDIR, directory, READ_IN.pack(fh, 0, 4096, 0, 0, 0))
        first = list(entries(reply, False))
        error, reply = guest.request(Opcode.READDIR, directory, READ_IN.pack(fh, first[3][1], 4096, 0, 0, 0))
        assert next(entries(reply, False))[2] == first[4][2]


def test_open_directories_take_memory_only_up_to_a_limit(guest: RawGuest, tmp_path: Path) -> None:
    names = {f"name-{i}".encode() for i in range(100)}
    for name in names:
        (tmp_path / "dir" / name.decode()).touch()
    directory = lookup(guest, b"dir")
    limit = 1024
    opened = []
    for _ in range(limit + 3):
        _error, reply = guest.request(Opcode.OPENDIR, directory, OPEN_IN.pack(0, 0))
        opened.append(OPEN_OUT.unpack(reply)[0])
        assert guest.request(Opcode.READDIR, directory, READ_IN.pack(opened[-1], 0, 400, 0, 0, 0), room=400)[1]
    handles = guest.device.fs.handles
    assert handles.buffers == limit
    # One that found no place for its buffer sees every entry once all the same.
    seen: list[bytes] = []
    offset = 0
    while page := list(
        entries(guest.request(Opcode.READDIR, directory, READ_IN.pack(opened[-1], offset, 400, 0, 0, 0))[1], False)
    ):
        seen += [name for _, _, name in page]
        offset = page[-1][1]
    assert sorted(seen) == sorted(names | {b".", b".."})
    for fh in opened:
        assert guest.request(Opcode.RELEASEDIR, directory, RELEASE_IN.pack(fh, 0, 0, 0))[0] == 0
    assert (handles.live, handles.buffers) == (0, 0)


def test_too_little_room_for_one_entry(guest: RawGuest) -> None:
    _error, reply = guest.request(Opcode.OPENDIR, 1, OPEN_IN.pack(0, 0))
    fh, _, _ = OPEN_OUT.unpack(reply)
    assert guest.request(Opcode.READDIRPLUS, 1, READ_IN.pack(fh, 0, 16, 0, 0, 0), room=16) == (0, b"")
    assert guest.request(Opcode.GETATTR, 1, bytes(16), room=8)[0] == errno.EIO


def test_cache_modes_in_what_the_guest_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache, valid, flags in (
        ("none", 0, OpenFlag.DIRECT_IO),
        ("auto", 1, 0),
        ("always", DAY, OpenFlag.KEEP_CACHE),
    ):
        with raw_guest(tmp_path, cache=cache) as guest:
            error, reply = guest.request(Opcode.LOOKUP, 1, b"file\0")
            nodeid, _gen, entry_valid, attr_valid, *_ = ENTRY_OUT.unpack_from(reply)
            assert (error, entry_valid, attr_valid) == (0, valid, valid)
            assert open_file(guest, nodeid, os.O_RDWR)[1] == flags
            assert open_file(guest, nodeid, os.O_RDONLY)[1] == flags | OpenFlag.NOFLUSH


def test_readonly(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with raw_guest(tmp_path, readonly=True) as guest:
        nodeid = lookup(guest, b"file")
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            with pytest.raises(OSError, match="Read-only"):
                open_file(guest, nodeid, flags)
        fh, _ = open_file(guest, nodeid, os.O_RDONLY)
        assert write(guest, nodeid, fh, b"x")[0] == errno.EROFS
        assert guest.request(Opcode.UNLINK, 1, b"file\0")[0] == errno.EROFS
        with pytest.raises(OSError, match="Read-only"):
            create(guest, b"new", os.O_RDWR)
        assert {
            *("SETATTR", "FALLOCATE", "COPY_FILE_RANGE", "COPY_FILE_RANGE_64", "MKNOD", "MKDIR", "TMPFILE", "RMDIR"),
            *("RENAME", "RENAME2", "LINK", "SYMLINK"),
        } == {Opcode(opcode).name for opcode in CHANGES}
        for opcode in CHANGES:
            assert guest.request(opcode, 1, bytes(64))[0] == errno.EROFS
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_session_begins_with_init_and_ends_with_destroy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raw_guest(tmp_path, init=False) as guest:
        assert guest.request(Opcode.GETATTR, 1, bytes(16))[0] == errno.EIO
        guest.initialize()
        nodeid = lookup(guest, b"file")
        open_file(guest, nodeid)
        fs = guest.device.fs
        assert (fs.inodes.live, fs.handles.live) == (1, 1)
        assert guest.request(Opcode.DESTROY, 0)[0] == 0
        assert (fs.inodes.live, fs.handles.live) == (0, 0)
        guest.initialize()
        assert guest.request(Opcode.GETATTR, nodeid, bytes(16))[0] == errno.ESTALE
        lookup(guest, b"file")
        # A guest that crashed begins anew without a word.
        guest.initialize()
        assert fs.inodes.live == 0


def test_old_and_new_protocols(tmp_path: Path) -> None:
    with raw_guest(tmp_path, init=False) as guest:
        assert guest.request(Opcode.INIT, 0, INIT_IN.pack(7, 26, 0, 0, 0))[0] == errno.EPROTO
        assert guest.request(Opcode.INIT, 0, b"short")[0] == errno.EINVAL
        error, reply = guest.request(Opcode.INIT, 0, INIT_IN.pack(8, 0, 0, 0, 0))
        assert (error, reply[:4]) == (0, struct.pack("<I", 7))
        error, reply = guest.request(Opcode.INIT, 0, struct.pack("<IIII", 7, 27, 65536, 0xFFFFFFFF))
        assert (error, struct.unpack_from("<II", reply)) == (0, (7, 27))


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"f{i}").touch()
    before = open_fds()
    for _ in range(3):
        with raw_guest(tmp_path) as guest:
            for i in range(50):
                open_file(guest, lookup(guest, b"f%d" % i))
        del guest
    assert not leaked(before)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    opcode=st.one_of(st.sampled_from(Opcode), st.integers(0, 2**32 - 1)),
    nodeid=st.one_of(st.just(1), st.integers(0, 2**64 - 1)),
    body=st.one_of(st.binary(max_size=200), st.binary(max_size=80).map(lambda b: b + b"file\0")),
    room=st.integers(0, 300),
)
def test_any_request_at_all(tmp_path: Path, opcode: int, nodeid: int, body: bytes, room: int) -> None:
    """Whatever a guest sends to a directory of its own: an answer, and the next request is served."""
    share = tmp_path / "share"
    share.mkdir(exist_ok=True)
    with raw_guest(share) as guest:
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            guest.tell(opcode, nodeid, body)
        else:
            guest.request(opcode, nodeid, body, room)
        guest.initialize()
        assert guest.request(Opcode.GETATTR, 1, bytes(16))[0] == 0
