# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The operations that a guest sends all the time, and where every request is sent to its operation.

Each takes a request and gives 0 with the reply's body in place, or an errno.
"""

from libc.errno cimport EBADF, EEXIST, EINVAL, EIO, EISDIR, ENOENT, ENOSYS, EPERM, EROFS, ESTALE, errno
from libc.stddef cimport size_t
from libc.stdint cimport INT64_MAX, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.fcntl cimport (
    O_ACCMODE, O_APPEND, O_CREAT, O_DSYNC, O_EXCL, O_RDONLY, O_RDWR, O_SYNC, O_TRUNC,
)
from posix.unistd cimport close, dup
from posix.uio cimport iovec

from coherent_vfs.server.host.credentials cimport become, come_back, drop_fsetid, restore_fsetid
from coherent_vfs.server.caching.publishing cimport PARK, change_t
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.fuse.wire cimport *
from coherent_vfs.server.passthrough.handle_table cimport handle_t
from coherent_vfs.server.operations.readdir cimport readdir
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport (
    AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, O_DIRECT, O_DIRECTORY, RWF_DSYNC, RWF_SYNC, STATX_BASIC_STATS,
    STATX_MNT_ID, open_beneath, preadv, pwritev2, statx, statx_t, strnlen, unlinkat,
)
from coherent_vfs.server.host.names cimport name_error
from coherent_vfs.server.fuse.request cimport request_t

from coherent_vfs.server.fuse.protocol import OpenFlag

cdef enum:
    STATX_WANTED = STATX_BASIC_STATS | STATX_MNT_ID
    S_IFMT = 0o170000
    S_IFREG = 0o100000
    S_IFDIR = 0o040000
    S_ISUID = 0o4000
    S_ISGID = 0o2000
    S_IXGRP = 0o0010
    # What a guest's open flags may ask of the host; O_DIRECT besides, where it is allowed.
    OPEN_FLAGS = O_ACCMODE | O_APPEND | O_TRUNC | O_SYNC | O_DSYNC

cdef uint32_t FOPEN_NOFLUSH = int(OpenFlag.NOFLUSH)


cdef uint64_t COMPILED = 0
for _opcode in (
    FUSE_LOOKUP, FUSE_FORGET, FUSE_GETATTR, FUSE_UNLINK, FUSE_OPEN, FUSE_READ, FUSE_WRITE, FUSE_RELEASE,
    FUSE_FLUSH, FUSE_OPENDIR, FUSE_READDIR, FUSE_RELEASEDIR, FUSE_CREATE, FUSE_INTERRUPT, FUSE_BATCH_FORGET,
    FUSE_READDIRPLUS,
):
    COMPILED |= <uint64_t>1 << <int>_opcode


cdef bint is_compiled(unsigned opcode) noexcept:
    """Whether an operation is one of these here, and so done in microseconds."""
    return opcode < 64 and COMPILED >> opcode & 1


cdef int serve(FileSystem fs, request_t *request):
    """Serve a request: 0, an errno, NO_REPLY, or PARK."""
    cdef uint32_t opcode = request.header.opcode
    if opcode < 64:
        fs.counters[opcode] += 1
    fs.inodes.begin_request()
    fs.validity.begin_request()
    if not fs.initialized and opcode != FUSE_INIT:
        return NO_REPLY if opcode in (FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT) else EIO
    if opcode == FUSE_LOOKUP:
        if request.body[0] == c"." and request.body_size:
            if request.body_size == 2 and request.body[1] == 0:
                return look_up_handle(fs, request, False)
            if request.body_size == 3 and request.body[1] == c"." and request.body[2] == 0:
                return look_up_handle(fs, request, True)
        return look_up(fs, request)
    if opcode == FUSE_GETATTR:
        return getattr_(fs, request)
    if opcode == FUSE_READ:
        return read(fs, request)
    if opcode == FUSE_WRITE:
        return write(fs, request)
    if opcode == FUSE_FORGET:
        return forget(fs, request)
    if opcode == FUSE_OPEN:
        return open_(fs, request, S_IFREG)
    if opcode == FUSE_OPENDIR:
        return open_(fs, request, S_IFDIR)
    if opcode in (FUSE_RELEASE, FUSE_RELEASEDIR):
        return release(fs, request)
    if opcode == FUSE_FLUSH:
        return flush(fs, request)
    if opcode in (FUSE_READDIR, FUSE_READDIRPLUS):
        return readdir(fs, request)
    if opcode == FUSE_CREATE:
        return create(fs, request)
    if opcode == FUSE_UNLINK:
        return unlink(fs, request)
    if opcode == FUSE_BATCH_FORGET:
        return batch_forget(fs, request)
    if opcode == FUSE_INTERRUPT:
        # Requests are served one after the other: unless it is parked, what it means is over already.
        if request.body_size >= sizeof(fuse_interrupt_in):
            fs.interrupt((<fuse_interrupt_in *>request.body).unique)
        return NO_REPLY
    if opcode in (FUSE_INIT, FUSE_DESTROY):
        return begin_or_end(fs, request)
    return fs.serve_in_python(request)


cdef int begin_or_end(FileSystem fs, request_t *request):
    cdef bytes reply
    if request.header.opcode == FUSE_DESTROY:
        return fs.end(request.header.unique)
    try:
        reply = fs.initialize(request.body[:request.body_size])
    except OSError as error:
        return error.errno
    # Guests before 7.23 take a shorter reply.
    request.reply_size = min(<size_t>len(reply), request.reply_capacity)
    memcpy(request.reply, <char *>reply, request.reply_size)
    return 0


cdef int named(request_t *request, size_t offset, const char **name, size_t *length) noexcept:
    """The name in a request's body: 0 or an errno. The body always ends in a NUL."""
    if request.body_size <= offset:
        return EINVAL
    name[0] = request.body + offset
    length[0] = strnlen(name[0], request.body_size - offset)
    return name_error(name[0], length[0])


cdef int look_up_handle(FileSystem fs, request_t *request, bint parent):
    """LOOKUP of "." and "..": a program in the guest has a file handle, from which its kernel has a node id, and looks
    for the inode, and for what it is in (FUSE_EXPORT_SUPPORT; fuse_get_dentry() and fuse_get_parent())."""
    cdef fuse_entry_out *out = <fuse_entry_out *>request.reply
    cdef inode_t *inode = NULL
    cdef statx_t stx
    cdef int error
    if parent:
        error = fs.lookups.look_up_parent(request.header.nodeid, &inode, &stx)
    else:
        error = fs.lookups.look_up_itself(request.header.nodeid, &inode, &stx)
    if error:
        return error
    error = fs.mapped.reach(inode, stx.stx_size)
    if error:
        fs.inodes.forget(inode.nodeid, 1)
        return error
    fs.replies.fill_entry(out, NULL, inode, &stx, b"", 0)
    request.reply_size = sizeof(fuse_entry_out)
    return 0


cdef int look_up(FileSystem fs, request_t *request):
    cdef inode_t *parent = fs.inodes.get(request.header.nodeid)
    cdef fuse_entry_out *out = <fuse_entry_out *>request.reply
    cdef inode_t *inode = NULL
    cdef const char *name = NULL
    cdef size_t length = 0
    cdef statx_t stx
    cdef int error
    if parent == NULL:
        return ESTALE
    error = named(request, 0, &name, &length)
    if error == 0:
        fs.validity.ask_watch(parent)
        if fs.awaits_watch(parent):
            return PARK
        error = fs.lookups.look_up(parent, name, &inode, &stx)
    if error == 0:
        error = fs.mapped.reach(inode, stx.stx_size)
        if error:
            fs.inodes.forget(inode.nodeid, 1)
            return error
    if error == ENOENT:
        error = fs.replies.fill_negative(out, parent, name, length)
    elif error == 0:
        fs.listings.looked_up(parent, inode)
        fs.replies.fill_entry(out, parent, inode, &stx, name, length)
    if error:
        return error
    request.reply_size = sizeof(fuse_entry_out)
    return 0


cdef int forget(FileSystem fs, request_t *request) noexcept:
    if request.body_size >= sizeof(fuse_forget_in):
        fs.inodes.forget(request.header.nodeid, (<fuse_forget_in *>request.body).nlookup)
    return NO_REPLY


cdef int batch_forget(FileSystem fs, request_t *request) noexcept:
    cdef uint32_t count, i
    cdef fuse_forget_one *one
    if request.body_size >= sizeof(fuse_batch_forget_in):
        count = (<fuse_batch_forget_in *>request.body).count
        one = <fuse_forget_one *>(request.body + sizeof(fuse_batch_forget_in))
        for i in range(min(count, (request.body_size - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one))):
            fs.inodes.forget(one[i].nodeid, one[i].nlookup)
    return NO_REPLY


cdef int getattr_(FileSystem fs, request_t *request):
    cdef inode_t *inode = fs.inodes.get(request.header.nodeid)
    if inode == NULL:
        return ESTALE
    request.reply_size = sizeof(fuse_attr_out)
    return fs.replies.fill_attr_out(<fuse_attr_out *>request.reply, inode, True)


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


cdef int release(FileSystem fs, request_t *request) noexcept:
    cdef handle_t *handle
    if request.body_size < sizeof(fuse_release_in):
        return EINVAL
    handle = fs.handles.get(request.header.nodeid, (<fuse_release_in *>request.body).fh)
    if handle != NULL:
        fs.handles.close(handle)
    elif not fs.opens_nothing:
        return EBADF
    return 0


cdef int flush(FileSystem fs, request_t *request) noexcept:
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


cdef int read(FileSystem fs, request_t *request) noexcept:
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


cdef int write(FileSystem fs, request_t *request):
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


cdef int create(FileSystem fs, request_t *request):
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
    error = named(request, sizeof(fuse_create_in), &name, &length)
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


cdef int unlink(FileSystem fs, request_t *request) noexcept:
    cdef inode_t *parent = fs.inodes.get(request.header.nodeid)
    cdef const char *name = NULL
    cdef size_t length = 0
    cdef change_t change
    cdef statx_t stx
    cdef int error
    cdef bint known
    if parent == NULL:
        return ESTALE
    error = named(request, 0, &name, &length)
    if error:
        return error
    if fs.readonly:
        return EROFS
    memset(&change, 0, sizeof(change))
    fs.publisher.add_name(&change, parent.slot, name, length)
    fs.publisher.add_known(&change, parent, True)
    # The victim's link count changes; and if it is only held open as idle here, its blocks are to be freed.
    known = (fs.table is not None or fs.inodes.idle_ones.count) and statx(
        parent.fd, name, AT_SYMLINK_NOFOLLOW, STATX_WANTED, &stx
    ) == 0
    if known:
        fs.publisher.add_inode(&change, fs.inodes.hash_of(&stx), False)
        fs.lookups.hold(&stx)
    if fs.publisher.begin(&change) == PARK:
        return PARK
    error = errno if unlinkat(parent.fd, name, 0) < 0 else 0
    if error:
        fs.publisher.abort(&change, error)
    else:
        fs.publisher.commit(&change)
    if known and error == 0:
        fs.name_removed(&stx)
    return error
