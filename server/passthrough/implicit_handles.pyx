# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The descriptors for a guest that opens no files: FUSE_NO_OPEN_SUPPORT, in mode shared.

Such a guest reads and writes with fh 0. What it uses is opened then, and closed when it was not used for one to two
seconds: on the host, a program that is open for writing cannot be run. What could not be opened again stays open
until the guest forgets it: it may have the file open.
"""

from libc.errno cimport EACCES, errno
from libc.stdint cimport uint64_t
from posix.fcntl cimport O_ACCMODE, O_RDWR
from posix.unistd cimport R_OK, W_OK

from coherent_vfs.server.passthrough.handle_table cimport HandleTable, handle_t
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport AT_EACCESS, AT_EMPTY_PATH, STATX_BASIC_STATS, faccessat, statx, statx_t

cdef enum:
    S_IXUGO = 0o111


cdef class DataFiles:
    """The files that one guest uses without having opened them; their descriptors are handles that it cannot name.

    Args:
        handles: where they are.
        max_open: inodes and handles that may be open together; these are half of them at most.
    """

    def __cinit__(self, HandleTable handles, uint64_t max_open):
        self.handles = handles
        self.capacity = min(<uint64_t>MOST, max_open // 2)

    cdef handle_t *find(self, inode_t *inode, bint writable) noexcept:
        """The descriptor of an inode, NULL where it has none that will do."""
        if inode.data_fh == 0 or (writable and not inode.data_writable):
            return NULL
        use(self, inode)
        return self.handles.get(inode.nodeid, inode.data_fh)

    cdef handle_t *keep(self, inode_t *inode, int fd, int flags) noexcept:
        """Keep a descriptor, which it takes and which is open with these flags, in place of what the inode has;
        NULL: no memory."""
        cdef handle_t *handle
        self.drop(inode)
        if self.count == self.capacity:
            close_at(self, least_used(self))
        handle = self.handles.open(inode.nodeid, fd, flags)
        if handle == NULL:
            return NULL
        inode.data_fh = handle.fh
        inode.data_writable = flags & O_ACCMODE == O_RDWR
        use(self, inode)
        self.kept[self.count].inode = inode
        self.kept[self.count].nodeid = inode.nodeid
        self.kept[self.count].fh = handle.fh
        self.count += 1
        return handle

    cdef void drop(self, inode_t *inode) noexcept:
        """Close the descriptor of an inode, if it has one."""
        cdef unsigned i
        if inode.data_fh == 0:
            return
        for i in range(self.count):
            if self.kept[i].fh == inode.data_fh:
                close_at(self, i)
                return

    cdef void unlinked(self, inode_t *inode) noexcept:
        """Close the descriptor of an inode that may have no name any more, so that its blocks are freed."""
        if inode.data_fh and not is_irreplaceable(self, inode):
            self.drop(inode)

    cdef void expire(self) noexcept:
        """Once in a second: close what was not used since the last time."""
        cdef unsigned i = 0
        while i < self.count:
            if is_current(&self.kept[i]) and (
                self.kept[i].inode.data_used > self.uses_at_tick or is_irreplaceable(self, self.kept[i].inode)
            ):
                i += 1
            else:
                close_at(self, i)
        self.uses_at_tick = self.uses

    cdef void clear(self) noexcept:
        """Before the handles and the inodes are cleared."""
        while self.count:
            close_at(self, self.count - 1)


cdef void use(DataFiles self, inode_t *inode) noexcept:
    self.uses += 1
    inode.data_used = self.uses


cdef unsigned least_used(DataFiles self) noexcept:
    """Which one was not used for longest: never one that the same request uses."""
    cdef unsigned i, least = 0
    for i in range(self.count):
        if not is_current(&self.kept[i]):
            return i
        if self.kept[i].inode.data_used < self.kept[least].inode.data_used:
            least = i
    return least


cdef bint is_current(const kept_t *kept) noexcept:
    """Whether the record of the inode is still that of the same one: records are used again, never freed before
    the session ends."""
    return kept.inode.nodeid == kept.nodeid and kept.inode.data_fh == kept.fh


cdef bint is_irreplaceable(DataFiles self, const inode_t *inode) noexcept:
    """Whether the mode of a file that the guest knows would not let us open it again as it is open: it was made with
    open(O_CREAT, 0444), say, and we are not root. A program is let go all the same, for the host to run it."""
    cdef handle_t *handle = self.handles.get(inode.nodeid, inode.data_fh)
    cdef int wanted = R_OK | W_OK if inode.data_writable else R_OK
    cdef statx_t stx
    if inode.nlookup == 0 or handle == NULL:
        return False
    if faccessat(handle.fd, b"", wanted, AT_EACCESS | AT_EMPTY_PATH) == 0 or errno != EACCES:
        return False
    return statx(handle.fd, b"", AT_EMPTY_PATH, STATX_BASIC_STATS, &stx) == 0 and not stx.stx_mode & S_IXUGO


cdef void close_at(DataFiles self, unsigned i) noexcept:
    cdef kept_t *kept = &self.kept[i]
    cdef handle_t *handle = self.handles.get(kept.nodeid, kept.fh)
    if handle != NULL:
        self.handles.close(handle)
    if is_current(kept):
        kept.inode.data_fh = 0
    self.count -= 1
    kept[0] = self.kept[self.count]
