# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""From names on the host to inodes, and from inodes to descriptors."""

from libc.errno cimport EMFILE, ENFILE, ENOMEM, ENOTDIR, ESTALE, errno
from libc.stdint cimport uint64_t
from posix.fcntl cimport O_ACCMODE, O_APPEND, O_RDWR, O_WRONLY
from posix.unistd cimport close

from coherent_vfs.server.fuse.wire cimport FUSE_ROOT_ID
from coherent_vfs.server.passthrough.inode_table cimport InodeTable, inode_t
from coherent_vfs.server.host.libc cimport (
    AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_PATH, STATX_WANTED, S_IFDIR,
    open_beneath, openat, snprintf, statx, statx_dev, statx_t,
)

import os

from coherent_vfs.coherence.common.errors import UserError

cdef enum:
    MAX_DEPTH = 4096       # of directories that are found by file handle; a path has fewer


cdef class Lookups:
    """How one guest's inodes are found and opened on the host.

    Where the process has no descriptors left, each of these closes some that can be opened again.

    Args:
        inodes: what is found is counted there.
        writeback: the guest delays writes.

    Raises:
        UserError: /proc is not there.
    """

    def __cinit__(self, InodeTable inodes, bint writeback):
        self.inodes = inodes
        self.writeback = writeback
        self.proc_fd = -1
        try:
            self.proc_fd = os.open("/proc/self/fd", os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"/proc/self/fd: {error.strerror}: vfs-backend needs /proc mounted") from None

    def __dealloc__(self):
        if self.proc_fd >= 0:
            close(self.proc_fd)

    cdef int look_up(self, inode_t *parent, const char *name, inode_t **found, statx_t *stx) noexcept:
        """Find a name in a directory and count the lookup: 0 or an errno. The name is one component.

        Who goes through a tree for the first time finds one new inode after the other: to expect that saves a call.
        """
        cdef inode_t *inode
        cdef int error
        if self.expects_new:
            error = open_and_adopt(self, parent, name, found, stx)
            if error != EMFILE and error != ENFILE:
                return error
        if statx(parent.fd, name, AT_SYMLINK_NOFOLLOW, STATX_WANTED, stx) < 0:
            return errno
        inode = self.inodes.find(stx)
        if inode != NULL and inode.fd >= 0:
            self.inodes.take_from_idle(inode)
            found[0] = inode
            return 0
        return open_and_adopt(self, parent, name, found, stx)

    cdef int look_up_entry(
        self, inode_t *parent, const char *name, uint64_t ino, inode_t **found, statx_t *stx
    ) noexcept:
        """look_up() for a directory entry, whose inode number is known beforehand: saves a call for new inodes."""
        if self.inodes.find_ino(parent, ino) != NULL:
            return self.look_up(parent, name, found, stx)
        return open_and_adopt(self, parent, name, found, stx)

    cdef int look_up_itself(self, uint64_t nodeid, inode_t **found, statx_t *stx) noexcept:
        """Find what the guest has a file handle of, which it may have forgotten: 0 or an errno.

        Only what it was given can be found, and no directory that has been moved out of the share since.
        """
        cdef inode_t *inode = self.inodes.recall(nodeid)
        cdef int error = 0
        if inode == NULL:
            return ESTALE
        if inode.type == S_IFDIR and not lies_beneath(self, inode.fd):
            error = ESTALE
        elif statx(inode.fd, b"", AT_EMPTY_PATH, STATX_WANTED, stx) < 0:
            error = errno
        if error:
            self.inodes.forget(nodeid, 1)
        found[0] = inode
        return error

    cdef int look_up_parent(self, uint64_t nodeid, inode_t **found, statx_t *stx) noexcept:
        """Find the directory that a directory is in: 0 or an errno. The root of the share is in itself."""
        cdef inode_t *inode = self.inodes.get(nodeid)
        cdef int fd
        if inode == NULL:
            return ESTALE
        if inode.type != S_IFDIR:
            return ENOTDIR
        if inode.nodeid == FUSE_ROOT_ID:
            return self.look_up_itself(nodeid, found, stx)
        fd = openat(inode.fd, b"..", O_PATH | O_DIRECTORY | O_CLOEXEC)
        if fd < 0 and self.inodes.make_room():
            fd = openat(inode.fd, b"..", O_PATH | O_DIRECTORY | O_CLOEXEC)
        if fd < 0:
            return errno
        if not lies_beneath(self, fd):
            close(fd)
            return ESTALE
        return self.adopt(fd, found, stx)

    cdef int adopt(self, int fd, inode_t **found, statx_t *stx) noexcept:
        """Count a lookup of what an O_PATH descriptor is open on, which it takes: 0 or an errno."""
        cdef inode_t *inode
        cdef int error
        if statx(fd, b"", AT_EMPTY_PATH, STATX_WANTED, stx) < 0:
            error = errno
            close(fd)
            return error
        inode = self.inodes.find(stx)
        self.expects_new = inode == NULL or inode.fd < 0
        if inode != NULL and inode.fd >= 0:
            close(fd)
            self.inodes.take_from_idle(inode)
        elif inode == NULL or not self.inodes.rebind(inode, fd):
            inode = self.inodes.insert(stx, fd)
            if inode == NULL:
                return ENOMEM
        found[0] = inode
        return 0

    cdef int host_flags(self, int flags) noexcept:
        """The flags to open a file with on the host, for a guest that opens it with these."""
        if self.writeback:
            # The guest's kernel reads to fill pages of files that are open for writing, and places appends.
            if flags & O_ACCMODE == O_WRONLY:
                flags = flags & ~O_ACCMODE | O_RDWR
            flags &= ~O_APPEND
        return flags

    cdef int reopen_fd(self, const inode_t *inode, int flags) noexcept:
        """A new descriptor of an inode, or a negative errno."""
        return open_again(self, inode.fd, (self.host_flags(flags) & ~O_NOFOLLOW) | O_CLOEXEC)

    cdef int path_fd(self, int fd) noexcept:
        """An O_PATH descriptor of what a descriptor is open on, or a negative errno."""
        return open_again(self, fd, O_PATH | O_CLOEXEC)

    cdef void hold(self, const statx_t *stx) noexcept:
        """An inode is about to lose a name, perhaps its last: where it is known, it must be open from now on."""
        cdef inode_t *inode = self.inodes.find(stx)
        if inode != NULL and inode.nlookup:
            inode.unnamed = True
            self.inodes.get(inode.nodeid)

    cdef void release(self, const statx_t *stx) noexcept:
        """After that: an inode has a name."""
        cdef inode_t *inode = self.inodes.find(stx)
        if inode != NULL:
            inode.unnamed = False


cdef bint lies_beneath(Lookups self, int directory_fd) noexcept:
    """Whether a directory is in the share, or its root."""
    cdef const inode_t *root = &self.inodes.root
    cdef statx_t stx, above
    cdef int fd = directory_fd, up, i
    cdef bint found = False
    if statx(fd, b"", AT_EMPTY_PATH, STATX_WANTED, &stx) < 0:
        return False
    for i in range(MAX_DEPTH):
        found = is_same(root, &stx)
        if found:
            break
        up = openat(fd, b"..", O_PATH | O_DIRECTORY | O_CLOEXEC)
        if up < 0 and self.inodes.make_room():
            up = openat(fd, b"..", O_PATH | O_DIRECTORY | O_CLOEXEC)
        if fd != directory_fd:
            close(fd)
        fd = up
        if fd < 0 or statx(fd, b"", AT_EMPTY_PATH, STATX_WANTED, &above) < 0:
            break
        if above.stx_ino == stx.stx_ino and statx_dev(&above) == statx_dev(&stx) and above.stx_mnt_id == stx.stx_mnt_id:
            # The root of all.
            break
        stx = above
    if fd >= 0 and fd != directory_fd:
        close(fd)
    return found


cdef bint is_same(const inode_t *inode, const statx_t *stx) noexcept:
    return inode.ino == stx.stx_ino and inode.dev == statx_dev(stx) and inode.mnt_id == stx.stx_mnt_id


cdef int open_and_adopt(
    Lookups self, const inode_t *parent, const char *name, inode_t **found, statx_t *stx
) noexcept:
    cdef int fd = open_beneath(parent.fd, name, O_PATH, 0)
    if fd < 0 and self.inodes.make_room():
        fd = open_beneath(parent.fd, name, O_PATH, 0)
    if fd < 0:
        return errno
    return self.adopt(fd, found, stx)


cdef int open_again(Lookups self, int fd, int flags) noexcept:
    """A new descriptor of what a descriptor is open on, or a negative errno."""
    cdef char number[16]
    cdef int again
    snprintf(number, sizeof(number), b"%d", fd)
    again = openat(self.proc_fd, number, flags)
    if again < 0 and self.inodes.make_room():
        again = openat(self.proc_fd, number, flags)
    return again if again >= 0 else -errno
