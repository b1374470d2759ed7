"""Hard and symbolic links: LINK, SYMLINK, READLINK."""

import os

from coherent_vfs.server.fuse.protocol import LINK_IN
from coherent_vfs.server.host.names import checked_name
from coherent_vfs.server.operations.body import proc_path, strings, unpack
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request


def link(fs: FileSystem, request: Request) -> bytes:
    """Another name in this directory for an inode that the guest knows."""
    (inode,) = unpack(LINK_IN, request.body)
    name = checked_name(*strings(request.body, LINK_IN.size, 1))
    fd, parent = fs.fd(inode), fs.fd(request.nodeid)
    fs.reaches(inode, os.fstat(fd).st_size)
    with fs.changing(inodes={request.nodeid, inode}, names=((request.nodeid, name),)):
        os.link(proc_path(fd), name, dst_dir_fd=parent, follow_symlinks=True)
    return fs.entry_fd(fd, request.nodeid, name)


def symlink(fs: FileSystem, request: Request) -> bytes:
    """A symbolic link; its target is the guest's affair and is followed there only."""
    name, target = strings(request.body, 0, 2)
    checked_name(name)
    parent = fs.fd(request.nodeid)
    with (
        fs.changing(inodes=(request.nodeid,), names=((request.nodeid, name),)),
        fs.credentials(request.uid, request.gid),
    ):
        os.symlink(target, name, dir_fd=parent)
    return fs.entry(request.nodeid, name)


def readlink(fs: FileSystem, request: Request) -> bytes:
    return os.readlink(b"", dir_fd=fs.fd(request.nodeid))
