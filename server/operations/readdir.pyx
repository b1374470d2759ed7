# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""READDIR and READDIRPLUS: from getdents64(2) to FUSE's directory entries."""

from libc.errno cimport EBADF, EINVAL, ENOMEM, ESTALE, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport SEEK_SET, lseek

from coherent_vfs.server.caching.publishing cimport PARK
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.fuse.wire cimport FUSE_READDIRPLUS, fuse_dirent, fuse_direntplus, fuse_read_in
from coherent_vfs.server.passthrough.handle_table cimport HandleTable, handle_t
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport dirent64, getdents64, statx_t, strnlen
from coherent_vfs.server.session.request cimport REPLY_CAPACITY, request_t

cdef enum:
    ENTRIES_ROOM = 32 << 10
    BUFFERS_MAX = 1024     # handles that keep what was read ahead; more would take memory without end
    DIRENT_NAME = 19       # offset of d_name in struct linux_dirent64
    DT_DIR = 4


cdef int readdir(FileSystem fs, request_t *request) except -100:
    cdef fuse_read_in *ask = <fuse_read_in *>request.body
    cdef inode_t *parent = fs.inodes.get(request.header.nodeid)
    cdef bint plus = request.header.opcode == FUSE_READDIRPLUS
    cdef handle_t *handle
    cdef dirent64 *entry = NULL
    cdef size_t capacity
    cdef int error
    if parent == NULL:
        return ESTALE
    if request.body_size < sizeof(fuse_read_in):
        return EINVAL
    handle = fs.handles.get(request.header.nodeid, ask.fh)
    if handle == NULL:
        return EBADF
    capacity = min(min(<size_t>ask.size, request.reply_capacity), <size_t>REPLY_CAPACITY)
    if plus and fs.awaits_watch(parent):
        return PARK
    if ask.offset == 0:
        parent.listed_stamp = fs.validity.stamp
        parent.listed_mtime = parent.shown_mtime
    if plus and ask.offset == 0:
        fs.listings.begin(parent)
    error = go_to(handle, ask.offset)
    while error == 0:
        error = next_entry(fs.handles, handle, &entry)
        if error or entry == NULL:
            break
        if plus:
            if not add_plus(fs, request, parent, entry, capacity):
                break
        elif not add(request, entry, capacity):
            break
        handle.entries_at += entry.d_reclen
        handle.entries_offset = entry.d_off
    if plus and fs.validity.too_late():
        give_nothing(request)
    if fs.handles.buffers > BUFFERS_MAX:
        fs.handles.drop_entries(handle)
    # Entries that are in the reply already were counted as looked up: they must reach the guest.
    return error if request.reply_size == 0 else 0


cdef void give_nothing(request_t *request) noexcept:
    """Take back all validity from a reply that took too long: the guest would count it from now."""
    cdef size_t at = 0
    cdef fuse_direntplus *entry
    while at < request.reply_size:
        entry = <fuse_direntplus *>(request.reply + at)
        entry.entry_out.entry_valid = entry.entry_out.attr_valid = 0
        entry.entry_out.entry_valid_nsec = entry.entry_out.attr_valid_nsec = 0
        at += aligned(sizeof(fuse_direntplus) + entry.dirent.namelen)


cdef int go_to(handle_t *handle, int64_t offset) noexcept:
    """Let the next entry be the one at an offset; offset 0 reads the directory anew."""
    if offset == handle.entries_offset and offset != 0:
        return 0
    handle.entries_at = handle.entries_end = 0
    if lseek(handle.fd, offset, SEEK_SET) < 0:
        return errno
    handle.entries_offset = offset
    return 0


cdef int next_entry(HandleTable handles, handle_t *handle, dirent64 **entry) noexcept:
    """The next entry, which is not taken yet, or NULL at the end: 0 or an errno."""
    cdef ssize_t size
    if handle.entries == NULL and not handles.take_buffer(handle, ENTRIES_ROOM):
        return ENOMEM
    if handle.entries_at == handle.entries_end:
        size = getdents64(handle.fd, handle.entries, ENTRIES_ROOM)
        if size < 0:
            return errno
        handle.entries_at = 0
        handle.entries_end = size
    entry[0] = <dirent64 *>(handle.entries + handle.entries_at) if handle.entries_end else NULL
    return 0


cdef inline size_t aligned(size_t size) noexcept:
    """FUSE_DIRENT_ALIGN of the kernel's header."""
    return (size + 7) & ~<size_t>7


cdef size_t fill_dirent(fuse_dirent *dirent, const dirent64 *entry, size_t length) noexcept:
    dirent.ino = entry.d_ino
    dirent.off = entry.d_off
    dirent.namelen = length
    dirent.type = entry.d_type
    memcpy(<char *>dirent + sizeof(fuse_dirent), entry.d_name, length)
    return sizeof(fuse_dirent) + length


cdef bint add(request_t *request, const dirent64 *entry, size_t capacity) noexcept:
    """Append an entry to the reply; false when it does not fit."""
    cdef size_t length = strnlen(entry.d_name, entry.d_reclen - DIRENT_NAME)
    cdef size_t size = aligned(sizeof(fuse_dirent) + length)
    cdef char *at = request.reply + request.reply_size
    if request.reply_size + size > capacity:
        return False
    memset(at + size - 8, 0, 8)
    fill_dirent(<fuse_dirent *>at, entry, length)
    request.reply_size += size
    return True


cdef bint add_plus(
    FileSystem fs, request_t *request, inode_t *parent, const dirent64 *entry, size_t capacity
) noexcept:
    """Append an entry with its attributes, counting a lookup; false when it does not fit.

    '.', '..', what vanished meanwhile, and files in a list that is to have names only go without a node id
    (fuse_direntplus_link() of the kernel).
    """
    cdef size_t length = strnlen(entry.d_name, entry.d_reclen - DIRENT_NAME)
    cdef size_t size = aligned(sizeof(fuse_direntplus) + length)
    cdef char *at = request.reply + request.reply_size
    cdef fuse_direntplus *out = <fuse_direntplus *>at
    cdef inode_t *inode = NULL
    cdef statx_t stx
    cdef bint dots = entry.d_name[0] == c"." and (length == 1 or (length == 2 and entry.d_name[1] == c"."))
    cdef bint bare = dots or (entry.d_type != DT_DIR and not fs.listings.brings(parent))
    if request.reply_size + size > capacity:
        return False
    memset(at + size - 8, 0, 8)
    memset(&out.entry_out, 0, sizeof(out.entry_out))
    if not bare and fs.listings.probes and fs.inodes.find_ino(parent, entry.d_ino) == NULL:
        bare = fs.listings.tries(parent, entry.d_ino, entry.d_type)
    if not bare and fs.lookups.look_up_entry(parent, entry.d_name, entry.d_ino, &inode, &stx) == 0:
        if inode.revoked != 0 and stx.stx_size >= inode.revoked:
            # The guest has to ask for it by itself, as that may have to wait.
            fs.inodes.forget(inode.nodeid, 1)
            inode = NULL
        else:
            fs.replies.fill_entry(&out.entry_out, parent, inode, &stx, entry.d_name, length)
    if inode == NULL:
        out.entry_out.attr.ino = entry.d_ino
        out.entry_out.attr.mode = <unsigned>entry.d_type << 12
    fill_dirent(&out.dirent, entry, length)
    request.reply_size += size
    return True
