"""The file API of a guest: the functions of os on a mounted share, through the guest's cache.

Paths are relative to the share, whether they begin with a slash or not; so are absolute symbolic links, as
if the share were the guest's root. There are no permission checks here: like a Linux guest's file system
below its VFS, this sends what it is asked on behalf of the caller, who is set by FileSystem.caller().
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from coherent_vfs.guest.cache import encode_device
from coherent_vfs.guest.cached import Node, Rule
from coherent_vfs.guest.dax import Dax
from coherent_vfs.guest.file import File
from coherent_vfs.guest.fuse_client import CALLER, Caller, DirectoryEntry, Entry, FuseClient, Opened
from coherent_vfs.guest.tree import Naming, Path, Place, Tree, named
from coherent_vfs.server.fuse.protocol import InitFlag

SPECIAL: Final = (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


class DirEntry:
    """As os.DirEntry, except that stat() is always as fresh as FileSystem.stat()."""

    def __init__(self, file_system: FileSystem, directory: str, entry: DirectoryEntry) -> None:
        self.name = os.fsdecode(entry.name)
        self.path = f"{directory.rstrip('/')}/{self.name}"
        self._fs = file_system
        self._entry = entry

    def inode(self) -> int:
        """The inode number."""
        return self._entry.ino

    def is_dir(self) -> bool:
        """Whether it is a directory; links are not followed."""
        return self._entry.kind == stat.S_IFDIR >> 12

    def is_file(self) -> bool:
        """Whether it is a regular file; links are not followed."""
        return self._entry.kind == stat.S_IFREG >> 12

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self._entry.kind == stat.S_IFLNK >> 12

    def stat(self) -> os.stat_result:
        """Its attributes; links are not followed."""
        return self._fs.lstat(self.path)


class FileSystem:
    """A share, as one guest sees it. Several threads may use it.

    Every method raises OSError as the function of os with its name does, with the path.

    Args:
        client: the FUSE session.
        rule: what says how long things are good.
        max_names: names to keep at most.
        max_pages: pages of 4 KiB to keep at most.
        dax: the files in the guest's window; None for a guest that has none.
    """

    def __init__(
        self,
        client: FuseClient,
        rule: Rule,
        *,
        max_names: int = 65536,
        max_pages: int = 16384,
        dax: Dax | None = None,
    ) -> None:
        self.client = client
        self.tree = Tree(client, rule, max_names=max_names, max_pages=max_pages, dax=dax)

    @contextmanager
    def caller(self, uid: int = 0, gid: int = 0, umask: int = 0o022) -> Iterator[None]:
        """Send this thread's requests on behalf of another user, for a with block."""
        token = CALLER.set(Caller(uid, gid, umask))
        try:
            yield
        finally:
            CALLER.reset(token)

    def drop_caches(self) -> None:
        """Drop all that is kept, and tell the server what is no longer in use."""
        self.tree.cache.drop()
        while self.client.forgotten:
            self.client.send_forgets()

    # --- attributes ------------------------------------------------------------------------------

    def stat(self, path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        """As os.stat(); st_dev is 0."""
        # Not Naming: this is the one call that must cost next to nothing.
        try:
            node, fetched = self.tree.find(path, follow=follow_symlinks)
            return (fetched or self.tree.attributes(node)).stat
        except OSError as error:
            raise named(error, path) from error

    def lstat(self, path: Path) -> os.stat_result:
        """As os.lstat()."""
        return self.stat(path, follow_symlinks=False)

    def exists(self, path: Path) -> bool:
        """Whether stat() would find something."""
        try:
            self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def access(self, path: Path, mode: int) -> bool:
        """Whether the server grants os.R_OK, os.W_OK, os.X_OK (ACCESS)."""
        with Naming(path):
            node = self._node(path)
            try:
                self.client.access(node.nodeid, mode)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS):
                    raise
                return False
            return True

    def chmod(self, path: Path, mode: int, *, follow_symlinks: bool = True) -> None:
        """As os.chmod()."""
        with Naming(path):
            node = self._node(path, follow_symlinks)
            self.tree.set_attributes(node, mode=node.kind | stat.S_IMODE(mode))

    def chown(self, path: Path, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """As os.chown(); -1 leaves an id as it is."""
        with Naming(path):
            self.tree.set_attributes(
                self._node(path, follow_symlinks),
                uid=None if uid == -1 else uid,
                gid=None if gid == -1 else gid,
            )

    def utime(
        self,
        path: Path,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """As os.utime(): access and modification time in seconds or nanoseconds, or now."""
        if times is not None:
            ns = (round(times[0] * 1e9), round(times[1] * 1e9))
        with Naming(path):
            self.tree.set_attributes(self._node(path, follow_symlinks), times_ns=ns or (None, None))

    def truncate(self, path: Path, size: int) -> None:
        """As os.truncate()."""
        with Naming(path):
            self.tree.set_attributes(self._node(path), size=size)

    def statvfs(self, path: Path = "/") -> os.statvfs_result:
        """As os.statvfs()."""
        with Naming(path):
            node = self._node(path)
            values = self.client.statfs(node.nodeid)
        return os.statvfs_result(
            (
                values.bsize,
                values.frsize,
                values.blocks,
                values.bfree,
                values.bavail,
                values.files,
                values.ffree,
                values.ffree,
                0,
                values.namelen,
            )
        )

    # --- names -----------------------------------------------------------------------------------

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        """As os.mkdir()."""
        self._make(path, lambda directory, name: self.client.mkdir(directory, name, mode))

    def mknod(self, path: Path, mode: int = 0o600, device: int = 0) -> None:
        """As os.mknod()."""
        rdev = encode_device(device)
        kind = mode if stat.S_IFMT(mode) else mode | stat.S_IFREG
        self._make(path, lambda directory, name: self.client.mknod(directory, name, kind, rdev))

    def symlink(self, target: str | bytes, path: Path) -> None:
        """As os.symlink()."""
        self._make(path, lambda directory, name: self.client.symlink(directory, name, os.fsencode(target)))

    def link(self, source: Path | File, path: Path) -> None:
        """As os.link(), links not followed. The source may be an open file, such as one without a name."""
        with Naming(path):
            node = source.node if isinstance(source, File) else self._node(source, follow=False)
        self._make(path, lambda directory, name: self.client.link(node.nodeid, directory, name), node)

    def readlink(self, path: Path) -> str:
        """As os.readlink()."""
        with Naming(path):
            node = self._node(path, follow=False)
            if node.kind != stat.S_IFLNK:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return os.fsdecode(self.tree.target(node))

    def unlink(self, path: Path) -> None:
        """As os.unlink()."""
        with Naming(path):
            place = self._removable(path)
            if place.node is not None and place.node.kind == stat.S_IFDIR:
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            try:
                self.client.unlink(place.directory.nodeid, place.name)
            finally:
                self._removed(place)

    def rmdir(self, path: Path) -> None:
        """As os.rmdir()."""
        with Naming(path):
            place = self._removable(path)
            if place.node is not None and place.node.kind != stat.S_IFDIR:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            try:
                self.client.rmdir(place.directory.nodeid, place.name)
            finally:
                self._removed(place)

    def rename(self, source: Path, path: Path, *, flags: int = 0) -> None:
        """As os.rename(), or renameat2(2) with its RENAME_* flags."""
        with Naming(source, path):
            old = self._removable(source)
            new = self.tree.walk(path, follow=False)
            if not new.name:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            try:
                self.client.rename(old.directory.nodeid, old.name, new.directory.nodeid, new.name, flags)
            finally:
                self._removed(old)
                self._removed(new)

    # --- directories -----------------------------------------------------------------------------

    def listdir(self, path: Path = "/") -> list[str]:
        """As os.listdir()."""
        with Naming(path):
            entries = self.tree.entries(self._node(path), plus=False)
        return [os.fsdecode(entry.name) for entry in entries if entry.name not in (b".", b"..")]

    def scandir(self, path: Path = "/") -> list[DirEntry]:
        """As os.scandir(): one pass of READDIRPLUS brings names and attributes."""
        with Naming(path):
            plus = InitFlag.DO_READDIRPLUS in self.client.flags
            entries = self.tree.entries(self._node(path), plus=plus)
        directory = os.fsdecode(path)
        return [DirEntry(self, directory, entry) for entry in entries if entry.name not in (b".", b"..")]

    def fsync_directory(self, path: Path, *, datasync: bool = False) -> None:
        """As os.fsync() of an open directory."""
        with Naming(path):
            node = self._node(path)
            opened = self.client.opendir(node.nodeid)
            try:
                self.client.fsyncdir(node.nodeid, opened.fh, datasync=datasync)
            finally:
                self.client.releasedir(node.nodeid, opened.fh)

    def sync(self) -> None:
        """Have the server bring the whole share to its disk, as syncfs(2)."""
        self.client.syncfs()

    # --- files -----------------------------------------------------------------------------------

    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> File:
        """As os.open(), for regular files; O_TMPFILE too. `mode` is subject to the caller's umask."""
        with Naming(path):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                return self._open_nameless(path, flags, mode)
            follow = not flags & os.O_NOFOLLOW and not _exclusive(flags)
            place = self.tree.walk(path, follow=follow)
            try:
                return self._open_place(path, place, flags, mode)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            # The name has come or gone meanwhile: as Linux does, look it up again, once (LOOKUP_REVAL).
            self.tree.cache.keep_name(place.directory, place.name, None, 0, 0)
            return self._open_place(path, self.tree.walk(path, follow=follow), flags, mode)

    def read_bytes(self, path: Path) -> bytes:
        """The content of a file."""
        with self.open(path) as file:
            return file.read()

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Make a file have this content."""
        with self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            file.write(data)

    def copy_file_range(self, source: File, target: File, count: int, source_offset: int, target_offset: int) -> int:
        """As os.copy_file_range(), with both offsets: how many bytes were copied."""
        with Naming(source.path, target.path):
            try:
                return self.client.copy_file_range(
                    source.node.nodeid,
                    source.fh,
                    source_offset,
                    target.node.nodeid,
                    target.fh,
                    target_offset,
                    count,
                )
            finally:
                self.tree.rule.changed(target.node.slot)

    # --- extended attributes ---------------------------------------------------------------------

    def getxattr(self, path: Path, name: str, *, follow_symlinks: bool = True) -> bytes:
        """As os.getxattr()."""
        with Naming(path):
            node = self._node(path, follow_symlinks)
            return self.client.getxattr(node.nodeid, os.fsencode(name))

    def listxattr(self, path: Path, *, follow_symlinks: bool = True) -> list[str]:
        """As os.listxattr()."""
        with Naming(path):
            node = self._node(path, follow_symlinks)
            names = self.client.listxattr(node.nodeid)
        return [os.fsdecode(name) for name in names]

    def setxattr(self, path: Path, name: str, value: bytes, flags: int = 0, *, follow_symlinks: bool = True) -> None:
        """As os.setxattr()."""
        with Naming(path):
            node = self._node(path, follow_symlinks)
            try:
                self.client.setxattr(node.nodeid, os.fsencode(name), value, flags)
            finally:
                self.tree.rule.changed(node.slot)

    def removexattr(self, path: Path, name: str, *, follow_symlinks: bool = True) -> None:
        """As os.removexattr()."""
        with Naming(path):
            node = self._node(path, follow_symlinks)
            try:
                self.client.removexattr(node.nodeid, os.fsencode(name))
            finally:
                self.tree.rule.changed(node.slot)

    # --- what the above is made of ---------------------------------------------------------------

    def _node(self, path: Path, follow: bool = True) -> Node:
        return self.tree.find(path, follow=follow)[0]

    def _make(self, path: Path, request: Callable[[int, bytes], Entry], *others: Node) -> None:
        with Naming(path):
            place = self.tree.walk(os.fsencode(path).rstrip(b"/") or b"/", follow=False)
            if place.node is not None:
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            stamp = self.tree.rule.stamp()
            try:
                entry = request(place.directory.nodeid, place.name)
            finally:
                self.tree.changed_name(place.directory, place.name, *others)
            self.tree.keep_entry(place.directory, place.name, entry, stamp)

    def _removable(self, path: Path) -> Place:
        place = self.tree.walk(path, follow=False)
        if place.node is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not place.name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return place

    def _removed(self, place: Place) -> None:
        self.tree.changed_name(place.directory, place.name, place.node)
        self.tree.cache.keep_name(place.directory, place.name, None, 0, 0)

    def _open_place(self, path: Path, place: Place, flags: int, mode: int) -> File:
        if place.node is None:
            if not flags & os.O_CREAT:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self._create(path, place, flags, mode)
        if _exclusive(flags):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return self._open(path, place.node, flags & ~os.O_CREAT)

    def _open(self, path: Path, node: Node, flags: int) -> File:
        if node.kind == stat.S_IFLNK:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if node.kind == stat.S_IFDIR:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if flags & os.O_DIRECTORY:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if node.kind in SPECIAL:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        truncate = flags & os.O_TRUNC
        atomic = InitFlag.ATOMIC_O_TRUNC in self.client.flags
        try:
            opened = self.client.open(node.nodeid, flags if atomic else flags & ~os.O_TRUNC)
        finally:
            if truncate:
                self.tree.rule.changed(node.slot)
        file = File(self.tree, os.fsdecode(path), node, opened, flags)
        if truncate and not atomic:
            self.tree.set_attributes(node, size=0, fh=opened.fh)
        return file

    def _create(self, path: Path, place: Place, flags: int, mode: int) -> File:
        stamp = self.tree.rule.stamp()
        kind = stat.S_IFREG | stat.S_IMODE(mode)
        node = None
        try:
            entry, opened = self.client.create(place.directory.nodeid, place.name, flags, kind)
            node, _ = self.tree.keep_entry(place.directory, place.name, entry, stamp)
        finally:
            # The file may be one that another guest has just made, truncated by this.
            self.tree.changed_name(place.directory, place.name, node)
        return self._opened(path, node, opened, flags)

    def _open_nameless(self, path: Path, flags: int, mode: int) -> File:
        directory = self._node(path)
        stamp = self.tree.rule.stamp()
        try:
            entry, opened = self.client.tmpfile(directory.nodeid, flags, stat.S_IFREG | stat.S_IMODE(mode))
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
        node = self.tree.cache.found(entry, stamp)[0] if entry.nodeid else None
        return self._opened(path, node, opened, flags)

    def _opened(self, path: Path, node: Node | None, opened: Opened, flags: int) -> File:
        if node is None:
            raise OSError(errno.EIO, "the server opened nothing")
        return File(self.tree, os.fsdecode(path), node, opened, flags)


def _exclusive(flags: int) -> bool:
    return flags & os.O_CREAT != 0 and flags & os.O_EXCL != 0
