"""The view process: serves a FUSE file system whose files are other files, under a size that is large enough.

`server.dax.view` starts it and says what it is for. One thread, which never opens anything on its own mount:
so the kernel waits for it nowhere, and ends every request that waits for it as soon as it dies.

Follows Linux Documentation/filesystems/fuse/fuse-passthrough.rst, fs/fuse/backing.c and fs/fuse/dev.c.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import sys
from typing import Final

from coherent_vfs.server.dax.view_messages import Mounted, Shown, receive, send
from coherent_vfs.server.fuse import protocol as p
from coherent_vfs.server.fuse.protocol import InitFlag, Opcode, OpenFlag
from coherent_vfs.server.host import mount_api

SIZE: Final = 1 << 62
"""Bytes that every view seems to have; a multiple of every chunk, and far below the kernel's limit."""

FOREVER: Final = 1_000_000
"""Seconds that attributes are good."""
BUFFER: Final = 64 * 1024
"""Bytes to read requests into."""
MAX_WRITE: Final = 4096
"""Bytes of the largest WRITE. None comes: data goes past us."""
STACK_DEPTH: Final = 2
"""FILESYSTEM_MAX_STACK_DEPTH: a view may be of a file on overlayfs."""
REQUEST_TIMEOUT: Final = 30
"""Seconds until the kernel ends the mount if a request is not answered (Linux >= 6.15)."""

# struct fuse_backing_map: fd, flags, padding
_BACKING_MAP: Final = struct.Struct("=iIQ")
_BACKING_OPEN: Final = 0x4010E501
_BACKING_CLOSE: Final = 0x4004E502


class ViewServer:
    """The file system: node ids from 2 on are views, which have their numbers as names.

    Args:
        device_fd: /dev/fuse, mounted, non-blocking.
    """

    def __init__(self, device_fd: int) -> None:
        self._device_fd = device_fd
        self._backing: dict[int, int] = {}
        self._last = p.ROOT_ID
        self._opened = True

    def fileno(self) -> int:
        """The descriptor to wait for requests on."""
        return self._device_fd

    def show(self, fd: int) -> str:
        """Make a view of the file that is open at `fd`; its name.

        Raises:
            OSError: EINVAL, no regular file; EBADF, not open for reading and writing; ELOOP, on a stacked file
                system; EPERM, this process may not.
        """
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise OSError(errno.EBADF, "not open for reading and writing")
        if not self._opened:
            # Views are opened one at a time: the opening of the last one failed before it came to us.
            self._close(self._last)
        request = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        backing_id = fcntl.ioctl(self._device_fd, _BACKING_OPEN, request)
        self._last += 1
        self._opened = False
        self._backing[self._last] = backing_id
        return str(self._last)

    def serve(self) -> bool:
        """Answer a FUSE request, if there is one; False when the mount is gone."""
        try:
            request = os.read(self._device_fd, BUFFER)
        except OSError as error:
            # ENOENT: the request was withdrawn while we read it.
            return error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT)
        header = p.InHeader._make(p.IN_HEADER.unpack_from(request))
        body = request[p.IN_HEADER.size : header.len]
        if header.opcode == Opcode.FORGET:
            self._close(header.nodeid)
            return True
        if header.opcode == Opcode.BATCH_FORGET:
            for nodeid, _ in p.FORGET_ONE.iter_unpack(body[p.BATCH_FORGET_IN.size :]):
                self._close(nodeid)
            return True
        try:
            self._reply(header.unique, 0, self._answer(header, body))
        except OSError as error:
            self._reply(header.unique, -(error.errno or errno.EIO))
        return True

    def begin(self) -> None:
        """Answer INIT, the first request.

        Raises:
            OSError: the kernel has no passthrough of files.
        """
        request = os.read(self._device_fd, BUFFER)
        header = p.InHeader._make(p.IN_HEADER.unpack_from(request))
        init = p.InitIn._make(p.INIT_IN.unpack_from(request, p.IN_HEADER.size))
        offered = InitFlag(init.flags | init.flags2 << 32)
        if header.opcode != Opcode.INIT or InitFlag.PASSTHROUGH not in offered:
            raise OSError(errno.EOPNOTSUPP, "this kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)")
        agreed = offered & (InitFlag.INIT_EXT | InitFlag.PASSTHROUGH | InitFlag.REQUEST_TIMEOUT)
        reply = p.InitOut(
            major=p.KERNEL_VERSION,
            minor=min(init.minor, p.KERNEL_MINOR_VERSION),
            max_readahead=init.max_readahead,
            flags=agreed & 0xFFFFFFFF,
            max_background=0,
            congestion_threshold=0,
            max_write=MAX_WRITE,
            time_gran=1,
            max_pages=0,
            map_alignment=0,
            flags2=agreed >> 32,
            max_stack_depth=STACK_DEPTH,
            request_timeout=REQUEST_TIMEOUT if InitFlag.REQUEST_TIMEOUT in agreed else 0,
        )
        self._reply(header.unique, 0, p.INIT_OUT.pack(*reply))

    def _answer(self, header: p.InHeader, body: bytes) -> bytes:
        """What follows the header of the reply; OSError for a reply that is an error."""
        match header.opcode:
            case Opcode.LOOKUP:
                # Not to be kept: the kernel forgets the view as soon as it is closed.
                return p.ENTRY_OUT.pack(self._named(body), 0, 0, FOREVER, 0, 0) + _attributes(self._last)
            case Opcode.GETATTR:
                return p.ATTR_OUT.pack(FOREVER, 0) + _attributes(header.nodeid)
            case Opcode.OPEN:
                return self._open(header.nodeid)
            case Opcode.RELEASE:
                self._close(header.nodeid)
                return b""
            case Opcode.SETATTR:
                raise OSError(errno.EPERM, "a view is not to be changed")
        raise OSError(errno.ENOSYS, "not served")

    def _named(self, name: bytes) -> int:
        if name != b"%d\0" % self._last or self._last not in self._backing:
            raise OSError(errno.ENOENT, "no such view")
        return self._last

    def _open(self, nodeid: int) -> bytes:
        if nodeid != self._last or self._opened:
            raise OSError(errno.EPERM, "a view is opened once")
        self._opened = True
        # Without NOFLUSH a process that dies with views open waits for us.
        return p.OPEN_OUT.pack(nodeid, OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH, self._backing[nodeid])

    def _close(self, nodeid: int) -> None:
        backing_id = self._backing.pop(nodeid, None)
        if backing_id is not None:
            fcntl.ioctl(self._device_fd, _BACKING_CLOSE, struct.pack("=I", backing_id))

    def _reply(self, unique: int, error: int, body: bytes = b"") -> None:
        # ENOENT: whoever asked does not wait any more. ENODEV: the mount is gone, as the next read will tell.
        with contextlib.suppress(OSError):
            os.write(self._device_fd, p.OUT_HEADER.pack(p.OUT_HEADER.size + len(body), error, unique) + body)


def _attributes(nodeid: int) -> bytes:
    directory = nodeid == p.ROOT_ID
    attr = p.Attr(
        ino=nodeid,
        size=0 if directory else SIZE,
        blocks=0,
        atime=0,
        mtime=0,
        ctime=0,
        atimensec=0,
        mtimensec=0,
        ctimensec=0,
        mode=stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o600,
        nlink=1,
        uid=0,
        gid=0,
        rdev=0,
        blksize=4096,
        flags=0,
    )
    return p.ATTR.pack(*attr)


def main(argv: list[str]) -> int:
    """Serve the backend that holds the other end of the socket, whose number is the only argument, until it goes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The backend ends us, also when a terminal or a service manager tells all of its processes to stop.
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(argv[0])) as backend:
        try:
            server = _mount(backend)
        except OSError as error:
            with contextlib.suppress(OSError):
                send(backend, Mounted(reason=error.strerror))
            return 1
        _serve(server, backend)
    return 0


def _mount(backend: socket.socket) -> ViewServer:
    try:
        device_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, f"/dev/fuse: {error.strerror}") from None
    try:
        mount_api.keep_only(mount_api.CAP_SYS_ADMIN)
        mount_fd = mount_api.mount_fuse(device_fd, "coherent-vfs-view")
    except PermissionError:
        raise OSError(errno.EPERM, "it takes the capability CAP_SYS_ADMIN") from None
    server = ViewServer(device_fd)
    server.begin()
    os.set_blocking(device_fd, False)
    send(backend, Mounted(), mount_fd)
    # The last user of the mount must be another process: unmounting waits for us.
    os.close(mount_fd)
    return server


def _serve(server: ViewServer, backend: socket.socket) -> None:
    poll = select.poll()
    poll.register(backend, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if server.fileno() in ready and not server.serve():
            return
        if backend.fileno() in ready and not _show(server, backend):
            return


def _show(server: ViewServer, backend: socket.socket) -> bool:
    """Answer a Show; False when the backend is gone."""
    try:
        request, fds = receive(backend)
        if not request:
            return False
        try:
            answer = Shown(name=server.show(fds[0])) if fds else Shown(error=errno.EMFILE)
        except OSError as error:
            answer = Shown(error=error.errno or errno.EIO)
        finally:
            for fd in fds:
                os.close(fd)
        send(backend, answer)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
