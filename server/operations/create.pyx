# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""CREATE."""

from libc.errno cimport EEXIST, EINVAL, EISDIR, EPERM, EROFS, ESTALE, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t
from libc.string cimport memset
from posix.fcntl cimport O_ACCMODE, O_CREAT, O_EXCL, O_RDWR, O_TRUNC
from posix.unistd cimport close

from coherent_vfs.server.caching.publishing cimport PARK, change_t
from coherent_vfs.server.fuse.wire cimport *
from coherent_vfs.server.host.credentials cimport become, come_back, drop_fsetid, restore_fsetid
from coherent_vfs.server.host.libc cimport (
    AT_EMPTY_PATH, S_IFDIR, S_IFREG, STATX_WANTED, open_beneath, statx, statx_t,
)
from coherent_vfs.server.operations.io cimport allowed_flags, open_inode, opened
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport name_in, request_t

cdef enum:
    S_ISGID = 0o2000
    S_IXGRP = 0o0010


cdef int create(FileSystem fs, request_t *request) except -100:
    """Create and open a file; where another guest was faster, open that, unless the caller asked for O_EXCL.

    The guest's kernel checked the right to create, not the right to open what is there now. Root needs none; others
    get ESTALE, upon which the kernel looks the name up again and checks (do_filp_open()).
    """
    cdef fuse_create_in *ask = <fuse_create_in *>request.body
    cdef inode_t *parent = fs.inodes.get(request.header.nodeid)
    cdef inode_t *inode = NULL
    cdef fuse_entry_out *entry = <fuse_entry_out *>request.reply
    cdef const char *name = NULL
    cdef size_t length = 0
    cdef change_t change
    cdef statx_t stx
    cdef int fd = -1, path_fd, flags, new_flags, error
    cdef bint kill
    if parent == NULL:
        return ESTALE
    error = name_in(request, sizeof(fuse_create_in), &name, &length)
    if error:
        return error
    if fs.readonly:
        return EROFS
    flags = fs.lookups.host_flags(allowed_flags(fs, ask.flags))
    # An ordinary user does not make a file that runs with a group he is not in. We know one of his groups only.
    kill = (
        not fs.guest_strips_sgid
        and ask.mode & (S_ISGID | S_IXGRP) == S_ISGID | S_IXGRP
        and request.header.uid != 0
    )
    memset(&change, 0, sizeof(change))
    fs.publisher.add_name(&change, parent.slot, name, length)
    fs.publisher.add_known(&change, parent, True)
    if fs.publisher.begin(&change) == PARK:
        return PARK
    error = become(request.header.uid, request.header.gid)
    if error:
        fs.publisher.abort(&change, EPERM)
        return error
    if kill:
        drop_fsetid()
    # What is new can be opened for all, whatever its mode; later that may not be so.
    new_flags = flags & ~O_ACCMODE | O_RDWR if fs.opens_nothing else flags
    fd = open_beneath(parent.fd, name, new_flags | O_CREAT | O_EXCL, ask.mode & 0o7777)
    if fd < 0 and fs.inodes.make_room():
        fd = open_beneath(parent.fd, name, new_flags | O_CREAT | O_EXCL, ask.mode & 0o7777)
    error = errno if fd < 0 else 0
    if kill:
        restore_fsetid()
    come_back()
    if error == 0:
        flags = new_flags
        path_fd = fs.lookups.path_fd(fd)
        error = fs.lookups.adopt(path_fd, &inode, &stx) if path_fd >= 0 else -path_fd
        if inode != NULL:
            fs.publisher.add_inode(&change, inode.hash, True)
        fs.publisher.commit(&change)
        fs.validity.end_change()
    else:
        fs.publisher.abort(&change, error)
        if error == EEXIST and not ask.flags & O_EXCL:
            # What vanished again since is for the guest's kernel to try once more, too.
            if request.header.uid or fs.lookups.look_up(parent, name, &inode, &stx):
                error = ESTALE
            else:
                error = fs.mapped.reach(inode, stx.stx_size)
    if inode != NULL and fd < 0 and error == 0:
        if inode.type != S_IFREG:
            error = EISDIR if inode.type == S_IFDIR else EINVAL
        else:
            error = open_inode(fs, request, inode, flags, ask.open_flags & FUSE_OPEN_KILL_SUIDGID, &fd)
        if error == 0 and flags & O_TRUNC and statx(inode.fd, b"", AT_EMPTY_PATH, STATX_WANTED, &stx) < 0:
            error = errno
    if error:
        if inode != NULL:
            fs.inodes.forget(inode.nodeid, 1)
        if fd >= 0:
            close(fd)
        return error
    error = opened(fs, inode, fd, flags, <fuse_open_out *>(request.reply + sizeof(fuse_entry_out)))
    if error:
        fs.inodes.forget(inode.nodeid, 1)
        return error
    fs.replies.fill_entry(entry, parent, inode, &stx, name, length)
    request.reply_size = sizeof(fuse_entry_out) + sizeof(fuse_open_out)
    return 0
