# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""What a guest is told of inodes and names, and for how long it may keep that."""

from libc.errno cimport ENOENT, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from coherent_vfs.server.fuse.wire cimport fuse_attr, fuse_attr_out, fuse_entry_out
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport AT_EMPTY_PATH, STATX_BASIC_STATS, STATX_WANTED, statx, statx_t
from coherent_vfs.server.dax.mapped_files cimport MappedFiles
from coherent_vfs.server.caching.validity cimport Validity


cdef class Replies:
    """The replies to one guest that have attributes in them.

    Args:
        validity: how long what is told is good.
        mapped: what has to be heeded of mapped files.
        writeback: the guest delays writes.
    """

    def __cinit__(self, Validity validity, MappedFiles mapped, bint writeback):
        self.validity = validity
        self.mapped = mapped
        self.writeback = writeback

    cdef void fill_entry(
        self, fuse_entry_out *entry, inode_t *parent, inode_t *inode, const statx_t *stx, const char *name,
        size_t length
    ) noexcept:
        """The reply of a lookup that found an inode; parent: NULL where it has no name."""
        cdef uint64_t attr_valid, entry_valid = 0
        cdef bint told
        entry.nodeid = inode.nodeid
        entry.generation = inode.entry_generation
        fill_attr(&entry.attr, stx)
        entry.attr.flags = self.mapped.attr_flags(inode, stx)
        inode.reached = max(inode.reached, stx.stx_size)
        told = self.validity.tell(inode, stx, &entry.attr, True)
        if parent != NULL:
            self.validity.watch_via_parent(parent, inode, stx)
        attr_valid = self.validity.of_attributes(inode, stx) if told else 0
        # A rename in the guest takes the name's validity along to another name, on which it has no lease: then its
        # lease on the inode has to do.
        if attr_valid:
            entry_valid = self.validity.of_name(parent, name, length, stx.stx_ctime.tv_sec, stx.stx_ctime.tv_nsec)
        set_valid(&entry.entry_valid, &entry.entry_valid_nsec, min(entry_valid, attr_valid))
        set_valid(&entry.attr_valid, &entry.attr_valid_nsec, attr_valid)

    cdef int fill_negative(self, fuse_entry_out *entry, inode_t *parent, const char *name, size_t length) noexcept:
        """The reply of a lookup that found nothing: 0, or ENOENT where the guest may not keep that."""
        cdef statx_t stx
        cdef uint64_t valid
        if not self.validity.shared or statx(parent.fd, b"", AT_EMPTY_PATH, STATX_BASIC_STATS, &stx) < 0:
            return ENOENT
        valid = self.validity.of_name(parent, name, length, stx.stx_mtime.tv_sec, stx.stx_mtime.tv_nsec)
        if valid == 0:
            return ENOENT
        memset(entry, 0, sizeof(fuse_entry_out))
        set_valid(&entry.entry_valid, &entry.entry_valid_nsec, valid)
        return 0

    cdef int fill_attr_out(self, fuse_attr_out *out, inode_t *inode, bint compared):
        """The reply of a GETATTR, or of a SETATTR, which the guest does not compare with what it has: 0, an errno or
        PARK."""
        cdef statx_t stx
        cdef bint told
        cdef int error
        if statx(inode.fd, b"", AT_EMPTY_PATH, STATX_WANTED, &stx) < 0:
            return errno
        error = self.mapped.reach(inode, stx.stx_size)
        if error:
            return error
        if not compared and not self.writeback:
            # A guest that delays writes goes on with the size that it has, whatever it is told.
            inode.reached = stx.stx_size
        memset(out, 0, sizeof(fuse_attr_out))
        fill_attr(&out.attr, &stx)
        out.attr.flags = self.mapped.attr_flags(inode, &stx)
        told = self.validity.tell(inode, &stx, &out.attr, compared)
        set_valid(&out.attr_valid, &out.attr_valid_nsec, self.validity.of_attributes(inode, &stx) if told else 0)
        return 0


cdef void fill_attr(fuse_attr *attr, const statx_t *stx) noexcept:
    attr.ino = stx.stx_ino
    attr.size = stx.stx_size
    attr.blocks = stx.stx_blocks
    attr.atime, attr.atimensec = stx.stx_atime.tv_sec, stx.stx_atime.tv_nsec
    attr.mtime, attr.mtimensec = stx.stx_mtime.tv_sec, stx.stx_mtime.tv_nsec
    attr.ctime, attr.ctimensec = stx.stx_ctime.tv_sec, stx.stx_ctime.tv_nsec
    attr.mode = stx.stx_mode
    attr.nlink = stx.stx_nlink
    attr.uid = stx.stx_uid
    attr.gid = stx.stx_gid
    # As new_encode_dev() of the kernel has it.
    attr.rdev = (
        (stx.stx_rdev_minor & 0xFF) | (stx.stx_rdev_major << 8) | ((stx.stx_rdev_minor & ~<uint32_t>0xFF) << 12)
    )
    attr.blksize = stx.stx_blksize
    attr.flags = 0


cdef void set_valid(uint64_t *seconds, uint32_t *nanoseconds, uint64_t valid) noexcept:
    seconds[0] = valid // 1_000_000_000
    nanoseconds[0] = valid % 1_000_000_000
