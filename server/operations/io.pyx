# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""OPEN, OPENDIR, RELEASE, RELEASEDIR, FLUSH, READ and WRITE."""

from libc.errno cimport EBADF, EINVAL, EISDIR, ENOENT, ENOSYS, EROFS, ESTALE, errno
from libc.stddef cimport size_t
from libc.stdint cimport INT64_MAX, uint32_t, uint64_t
from libc.string cimport memset
from posix.fcntl cimport O_ACCMODE, O_APPEND, O_DSYNC, O_RDONLY, O_SYNC, O_TRUNC
from posix.unistd cimport close, dup
from posix.uio cimport iovec

from coherent_vfs.server.caching.publishing cimport PARK, change_t
from coherent_vfs.server.fuse.wire cimport *
from coherent_vfs.server.host.credentials cimport drop_fsetid, restore_fsetid
from coherent_vfs.server.host.libc cimport (
    AT_EMPTY_PATH, O_DIRECT, O_DIRECTORY, RWF_DSYNC, RWF_SYNC, S_IFDIR, S_IFREG, STATX_WANTED, preadv, pwritev2, statx,
    statx_t,
)
from coherent_vfs.server.passthrough.handle_table cimport handle_t
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport request_t

from coherent_vfs.server.fuse.protocol import OpenFlag

cdef enum:
    S_ISUID = 0o4000
    S_ISGID = 0o2000
    # What a guest's open flags may ask of the host; O_DIRECT besides, where it is allowed.
    OPEN_FLAGS = O_ACCMODE | O_APPEND | O_TRUNC | O_SYNC | O_DSYNC

cdef uint32_t FOPEN_NOFLUSH = int(OpenFlag.NOFLUSH)


cdef int opened(FileSystem fs, inode_t *inode, int fd, int flags, fuse_open_out *out) noexcept:
    """Make a handle of a descriptor, which it takes and which is open with these flags, and tell the guest what it
    may do with it."""
    cdef int error
    memset(out, 0, sizeof(fuse_open_out))
    error = fs.hand_out(inode, fd, flags, &out.fh)
    if error:
        return error
    out.open_flags = fs.flags_of(inode)
    if inode.type != S_IFDIR and flags & O_ACCMODE == O_RDONLY:
        # Closing what was only read has nothing to report.
        out.open_flags |= FOPEN_NOFLUSH
    return 0


cdef int allowed_flags(FileSystem fs, uint32_t flags) noexcept:
    return flags & (OPEN_FLAGS | (O_DIRECT if fs.allow_direct_io else 0))


cdef int open_inode(FileSystem fs, request_t *request, inode_t *inode, int flags, bint kill, int *fd):
    """Open an inode: 0, with *fd, an errno, or PARK. kill: O_TRUNC clears set-user-id and set-group-id bits."""
    cdef change_t change
    cdef bint truncate = flags & O_TRUNC
    cdef int error
    if truncate:
        error = fs.mapped.begin_truncation(request.header.unique, inode, 0)
        if error:
            return error
        memset(&change, 0, sizeof(change))
        fs.publisher.add_known(&change, inode, True)
        if fs.publisher.begin(&change) == PARK:
            return PARK
        error = fs.mapped.confirm_truncation(request.header.unique)
        if error:
            fs.publisher.abort(&change, ENOENT)
            return error
        if kill:
            drop_fsetid()
    fd[0] = fs.lookups.reopen_fd(inode, flags)
    if truncate:
        if kill:
            restore_fsetid()
        fs.publisher.commit(&change)
        fs.mapped.end_truncation(request.header.unique)
        if fd[0] >= 0:
            inode.reached = 0
    return -fd[0] if fd[0] < 0 else 0


cdef int open_(FileSystem fs, request_t *request, uint32_t type):
    cdef inode_t *inode = fs.inodes.get(request.header.nodeid)
    cdef fuse_open_in *ask = <fuse_open_in *>request.body
    cdef fuse_open_out *out = <fuse_open_out *>request.reply
    cdef int fd = -1, flags, error
    if inode == NULL:
        return ESTALE
    if request.body_size < sizeof(fuse_open_in):
        return EINVAL
    if type == S_IFDIR:
        fs.validity.ask_watch(inode)
    elif fs.opens_nothing:
        return ENOSYS
    # Opening a device or a FIFO does something by itself; the guest's kernel never asks for it.
    if inode.type != type:
        return EISDIR if inode.type == S_IFDIR else EINVAL
    flags = fs.lookups.host_flags(allowed_flags(fs, ask.flags)) if type == S_IFREG else O_RDONLY | O_DIRECTORY
    if fs.readonly and (flags & O_TRUNC or flags & O_ACCMODE != O_RDONLY):
        return EROFS
    error = open_inode(fs, request, inode, flags, ask.open_flags & FUSE_OPEN_KILL_SUIDGID, &fd)
    if error:
        return error
    request.reply_size = sizeof(fuse_open_out)
    error = opened(fs, inode, fd, flags, out)
    if type == S_IFDIR:
        out.open_flags = fs.listings.open(inode, out.open_flags)
    return error


cdef int open_file(FileSystem fs, request_t *request) except -100:
    return open_(fs, request, S_IFREG)


cdef int open_directory(FileSystem fs, request_t *request) except -100:
    return open_(fs, request, S_IFDIR)


cdef int release(FileSystem fs, request_t *request) except -100:
    cdef handle_t *handle
    if request.body_size < sizeof(fuse_release_in):
        return EINVAL
    handle = fs.handles.get(request.header.nodeid, (<fuse_release_in *>request.body).fh)
    if handle != NULL:
        fs.handles.close(handle)
    elif not fs.opens_nothing:
        return EBADF
    return 0


cdef int flush(FileSystem fs, request_t *request) except -100:
    """Close a copy of the descriptor, for what close(2) may have to say, as of a full disk behind NFS."""
    cdef handle_t *handle
    cdef int copy
    if fs.opens_nothing:
        return ENOSYS
    if request.body_size < sizeof(fuse_flush_in):
        return EINVAL
    handle = fs.handles.get(request.header.nodeid, (<fuse_flush_in *>request.body).fh)
    if handle == NULL:
        return EBADF
    copy = dup(handle.fd)
    if copy < 0 and fs.inodes.make_room():
        copy = dup(handle.fd)
    if copy < 0 or close(copy) < 0:
        return errno
    return 0


cdef int clip(iovec *iov, int *count, size_t size) noexcept:
    """Shorten a list of buffers to size bytes, which it has."""
    cdef int i = 0
    while size > iov[i].iov_len:
        size -= iov[i].iov_len
        i += 1
    iov[i].iov_len = size
    count[0] = i + 1
    return 0


cdef int read(FileSystem fs, request_t *request) except -100:
    cdef fuse_read_in *ask = <fuse_read_in *>request.body
    cdef handle_t *handle = NULL
    cdef size_t size
    cdef ssize_t done
    cdef int error
    if request.body_size < sizeof(fuse_read_in):
        return EINVAL
    error = fs.open_file(request.header.nodeid, ask.fh, False, &handle)
    if error == 0 and fs.allow_direct_io:
        error = fs.handles.set_flags(handle, handle.flags & O_APPEND | ask.flags & O_DIRECT)
    if error:
        return error
    size = min(<size_t>ask.size, request.reply_capacity)
    if size == 0:
        return 0
    if ask.offset > <uint64_t>INT64_MAX - size:
        return EINVAL
    clip(request.reply_buffers, &request.reply_buffer_count, size)
    done = preadv(handle.fd, request.reply_buffers, request.reply_buffer_count, ask.offset)
    if done < 0:
        return errno
    request.reply_size = done
    return 0


cdef bint runs_as_another(int fd) noexcept:
    """Whether a file has a set-user-id or set-group-id bit to be cleared. Hardly any has, and all writes of ordinary
    users ask for it: to drop and restore a capability takes longer than to write a page."""
    cdef statx_t stx
    return statx(fd, b"", AT_EMPTY_PATH, STATX_WANTED, &stx) < 0 or stx.stx_mode & (S_ISUID | S_ISGID)


cdef int settable_flags(FileSystem fs, const fuse_write_in *ask) noexcept:
    """Which of O_APPEND and O_DIRECT a WRITE is to be done with.

    Pages of the guest's cache have their place, through whichever handle its kernel sends them; a guest that delays
    writes places all data.
    """
    if ask.write_flags & FUSE_WRITE_CACHE:
        return 0
    return ask.flags & ((0 if fs.writeback else O_APPEND) | (O_DIRECT if fs.allow_direct_io else 0))


cdef int sync_flags(uint32_t flags) noexcept:
    """For pwritev2(2), what a descriptor that was opened with these flags would do by itself. The guest's kernel
    says so, too, of a single write that was asked for with RWF_DSYNC."""
    return RWF_SYNC if flags & O_SYNC == O_SYNC else RWF_DSYNC if flags & O_DSYNC else 0


cdef int write(FileSystem fs, request_t *request) except -100:
    cdef fuse_write_in *ask = <fuse_write_in *>request.body
    cdef inode_t *inode = fs.inodes.get(request.header.nodeid)
    cdef fuse_write_out *out = <fuse_write_out *>request.reply
    cdef change_t change
    cdef handle_t *handle = NULL
    cdef ssize_t done
    cdef int fd, error = 0
    cdef bint kill
    if inode == NULL:
        return ESTALE
    if request.body_size < sizeof(fuse_write_in) or ask.size > request.data_size:
        return EINVAL
    if fs.readonly:
        return EROFS
    error = fs.open_file(request.header.nodeid, ask.fh, True, &handle)
    if error:
        return error
    fd = handle.fd
    if ask.offset > <uint64_t>INT64_MAX - ask.size:
        return EINVAL
    error = fs.mapped.reach(inode, ask.offset + ask.size)
    if error == 0:
        error = fs.handles.set_flags(handle, settable_flags(fs, ask))
    if error:
        return error
    kill = ask.write_flags & FUSE_WRITE_KILL_SUIDGID and runs_as_another(fd)
    memset(&change, 0, sizeof(change))
    fs.publisher.add_known(&change, inode, True)
    if fs.publisher.begin(&change) == PARK:
        return PARK
    if kill:
        drop_fsetid()
    done = 0
    if ask.size:
        clip(request.data, &request.data_count, ask.size)
        done = pwritev2(fd, request.data, request.data_count, ask.offset, sync_flags(ask.flags))
        if done < 0:
            error = errno
    if kill:
        restore_fsetid()
    fs.publisher.commit(&change)
    if error:
        return error
    memset(out, 0, sizeof(fuse_write_out))
    out.size = done
    request.reply_size = sizeof(fuse_write_out)
    return 0
