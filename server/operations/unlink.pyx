# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""UNLINK."""

from libc.errno cimport EROFS, ESTALE, errno
from libc.stddef cimport size_t
from libc.string cimport memset

from coherent_vfs.server.caching.publishing cimport PARK, change_t
from coherent_vfs.server.host.libc cimport (
    AT_SYMLINK_NOFOLLOW, STATX_WANTED, statx, statx_t, unlinkat,
)
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport name_in, request_t

cdef int unlink(FileSystem fs, request_t *request) except -100:
    cdef inode_t *parent = fs.inodes.get(request.header.nodeid)
    cdef const char *name = NULL
    cdef size_t length = 0
    cdef change_t change
    cdef statx_t stx
    cdef int error
    cdef bint known
    if parent == NULL:
        return ESTALE
    error = name_in(request, 0, &name, &length)
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
