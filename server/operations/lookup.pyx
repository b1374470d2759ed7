# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""LOOKUP, FORGET, BATCH_FORGET and GETATTR: how a guest comes to know inodes, what it is told, and how it lets go."""

from libc.errno cimport EINVAL, ENOENT, ESTALE
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t

from coherent_vfs.server.caching.publishing cimport PARK
from coherent_vfs.server.fuse.wire cimport *
from coherent_vfs.server.host.libc cimport statx_t
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport NO_REPLY, name_in, request_t


cdef int look_up(FileSystem fs, request_t *request) except -100:
    cdef inode_t *parent = fs.inodes.get(request.header.nodeid)
    cdef fuse_entry_out *out = <fuse_entry_out *>request.reply
    cdef inode_t *inode = NULL
    cdef const char *name = NULL
    cdef size_t length = 0
    cdef statx_t stx
    cdef int error
    if request.body_size and request.body[0] == c".":
        if request.body_size == 2 and request.body[1] == 0:
            return look_up_handle(fs, request, False)
        if request.body_size == 3 and request.body[1] == c"." and request.body[2] == 0:
            return look_up_handle(fs, request, True)
    if parent == NULL:
        return ESTALE
    error = name_in(request, 0, &name, &length)
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


cdef int forget(FileSystem fs, request_t *request) except -100:
    if request.body_size >= sizeof(fuse_forget_in):
        fs.inodes.forget(request.header.nodeid, (<fuse_forget_in *>request.body).nlookup)
    return NO_REPLY


cdef int batch_forget(FileSystem fs, request_t *request) except -100:
    cdef uint32_t count, i
    cdef fuse_forget_one *one
    if request.body_size >= sizeof(fuse_batch_forget_in):
        count = (<fuse_batch_forget_in *>request.body).count
        one = <fuse_forget_one *>(request.body + sizeof(fuse_batch_forget_in))
        for i in range(min(count, (request.body_size - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one))):
            fs.inodes.forget(one[i].nodeid, one[i].nlookup)
    return NO_REPLY


cdef int getattr_(FileSystem fs, request_t *request) except -100:
    cdef inode_t *inode = fs.inodes.get(request.header.nodeid)
    if inode == NULL:
        return ESTALE
    request.reply_size = sizeof(fuse_attr_out)
    return fs.replies.fill_attr_out(<fuse_attr_out *>request.reply, inode, True)
