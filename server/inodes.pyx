# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The inodes that a guest knows: node id to O_PATH descriptor, with the guest's lookup counts.

A node id is slot | index << slot_bits | generation << (slot_bits + 28): the low bits are the inode's slot in the
version table, so that a guest which checks the table finds it from the node id alone; the generation makes the
id of a forgotten inode useless.

A forgotten inode stays open, idle, for a moment: a guest that caches nothing forgets each inode right after its
use and looks it up again at once.
"""

from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from posix.unistd cimport close

from coherence.table cimport Table, vt_inode_slot
from server.libc cimport AT_EMPTY_PATH, STATX_BASIC_STATS, STATX_MNT_ID, statx, statx_dev, statx_t

import os

cdef enum:
    INDEX_BITS = 28
    MAX_IDLE = 4096
    IDLE_NS = 1_000_000_000
    S_IFMT = 0o170000
    ROOT_NODEID = 1


cdef class InodeTable:
    """All inodes of one guest's session.

    Args:
        root_fd: O_PATH descriptor of the share's root; it is duplicated.
        table: the version table of the domain, or None.

    Raises:
        OSError: the root cannot be read.
    """

    def __cinit__(self, int root_fd, Table table):
        cdef statx_t stx
        self.table = table
        self.slot_bits = table.vt.bits if table is not None else 0
        self.bucket_count = 1024
        self.buckets = <inode_t **>calloc(self.bucket_count, sizeof(void *))
        self.record_room = 1024
        self.records = <inode_t **>calloc(self.record_room, sizeof(void *))
        if self.buckets == NULL or self.records == NULL:
            raise MemoryError
        # Index 0 is never given out: with no table, node ids 0 and 1 would come from it.
        self.record_count = 2
        self.root.fd = os.dup(root_fd)
        if statx(self.root.fd, b"", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_MNT_ID, &stx) < 0:
            raise OSError("the root of the share cannot be read")
        self.root.nodeid = ROOT_NODEID
        self.root.nlookup = UINT64_MAX
        self.root.dev, self.root.ino, self.root.mnt_id = statx_dev(&stx), stx.stx_ino, stx.stx_mnt_id
        self.root.type = stx.stx_mode & S_IFMT
        self.root.slot = self.slot_of(&stx)

    def __dealloc__(self):
        if self.records != NULL and self.buckets != NULL:
            self.clear()
            close(self.root.fd)
        free(self.records)
        free(self.buckets)

    def clear(self) -> None:
        """Forget everything but the root: the guest's session is over."""
        cdef uint64_t i
        for i in range(2, self.record_count):
            if self.records[i].fd >= 0:
                close(self.records[i].fd)
            free(self.records[i])
        for i in range(self.bucket_count):
            self.buckets[i] = NULL
        self.record_count = 2
        self.free_records = self.oldest_idle = self.newest_idle = NULL
        self.live = self.idle = 0

    cdef uint64_t slot_of(self, const statx_t *stx) noexcept:
        if self.table is None:
            return 0
        return vt_inode_slot(&self.table.vt, statx_dev(stx), stx.stx_ino)

    cdef inode_t *get(self, uint64_t nodeid) noexcept:
        """The live inode of a node id from the guest, or NULL."""
        cdef uint64_t index = nodeid >> self.slot_bits & ((1 << INDEX_BITS) - 1)
        cdef inode_t *inode
        if nodeid == ROOT_NODEID:
            return &self.root
        if index < 2 or index >= self.record_count:
            return NULL
        inode = self.records[index]
        return inode if inode.nodeid == nodeid and inode.nlookup else NULL

    cdef inode_t *find(self, const statx_t *stx) noexcept:
        """The inode with this identity, live or idle, or NULL."""
        cdef inode_t *inode
        cdef uint64_t dev = statx_dev(stx)
        if stx.stx_ino == self.root.ino and dev == self.root.dev and stx.stx_mnt_id == self.root.mnt_id:
            return &self.root
        inode = self.buckets[bucket_of(self, stx.stx_ino)]
        while inode != NULL:
            if inode.ino == stx.stx_ino and inode.dev == dev and inode.mnt_id == stx.stx_mnt_id:
                return inode
            inode = inode.next
        return NULL

    cdef inode_t *find_ino(self, const inode_t *sibling, uint64_t ino) noexcept:
        """The inode with this number in the same file system as another, live or idle, or NULL."""
        cdef inode_t *inode = self.buckets[bucket_of(self, ino)]
        while inode != NULL:
            if inode.ino == ino and inode.dev == sibling.dev and inode.mnt_id == sibling.mnt_id:
                return inode
            inode = inode.next
        return NULL

    cdef inode_t *refer(self, const statx_t *stx, int fd) noexcept:
        """Make a record of an inode that find() does not have, with one lookup; takes fd. NULL: no memory."""
        cdef inode_t *inode
        cdef uint64_t bucket
        if self.free_records == NULL and self.grow() < 0:
            close(fd)
            return NULL
        inode = self.free_records
        self.free_records = inode.next
        inode.dev, inode.ino, inode.mnt_id = statx_dev(stx), stx.stx_ino, stx.stx_mnt_id
        inode.slot = self.slot_of(stx)
        inode.type = stx.stx_mode & S_IFMT
        inode.fd = fd
        inode.nlookup = 1
        inode.generation += 1
        inode.nodeid = (
            inode.slot
            | inode.index << self.slot_bits
            | <uint64_t>inode.generation << (self.slot_bits + INDEX_BITS)
        )
        bucket = bucket_of(self, inode.ino)
        inode.next = self.buckets[bucket]
        self.buckets[bucket] = inode
        self.live += 1
        return inode

    cdef int grow(self) noexcept:
        """Make one more free record, and more buckets where they have become few."""
        cdef inode_t *inode
        cdef inode_t *following
        cdef inode_t **records
        cdef inode_t **buckets
        cdef uint64_t i, bucket, old_count = self.bucket_count
        if self.record_count == <uint64_t>1 << INDEX_BITS:
            return -1
        if self.record_count == self.record_room:
            records = <inode_t **>realloc(self.records, 2 * self.record_room * sizeof(void *))
            if records == NULL:
                return -1
            self.records = records
            self.record_room *= 2
            buckets = <inode_t **>calloc(2 * old_count, sizeof(void *))
            if buckets == NULL:
                return -1
            self.bucket_count = 2 * old_count
            for i in range(old_count):
                inode = self.buckets[i]
                while inode != NULL:
                    following = inode.next
                    bucket = bucket_of(self, inode.ino)
                    inode.next = buckets[bucket]
                    buckets[bucket] = inode
                    inode = following
            free(self.buckets)
            self.buckets = buckets
        inode = <inode_t *>calloc(1, sizeof(inode_t))
        if inode == NULL:
            return -1
        inode.fd = -1
        inode.index = self.record_count
        self.records[self.record_count] = inode
        self.record_count += 1
        self.free_records = inode
        return 0

    cdef void revive(self, inode_t *inode) noexcept:
        """Count one more lookup of an inode that find() gave."""
        if inode.nodeid == ROOT_NODEID:
            return
        if inode.nlookup == 0:
            self.unlink_idle(inode)
            self.live += 1
        inode.nlookup += 1

    cdef void forget(self, uint64_t nodeid, uint64_t nlookup) noexcept:
        """Take lookups back; with the last one the inode becomes idle. Unknown ids and excess are ignored."""
        cdef inode_t *inode = self.get(nodeid)
        if inode == NULL or nodeid == ROOT_NODEID:
            return
        inode.nlookup -= min(nlookup, inode.nlookup)
        if inode.nlookup:
            return
        self.live -= 1
        self.idle += 1
        inode.idle_tick = self.tick
        inode.idle_older = self.newest_idle
        inode.idle_newer = NULL
        if self.newest_idle != NULL:
            self.newest_idle.idle_newer = inode
        else:
            self.oldest_idle = inode
        self.newest_idle = inode
        if self.idle > MAX_IDLE:
            self.drop_idle(self.oldest_idle)

    cdef void unlink_idle(self, inode_t *inode) noexcept:
        if inode.idle_older != NULL:
            inode.idle_older.idle_newer = inode.idle_newer
        else:
            self.oldest_idle = inode.idle_newer
        if inode.idle_newer != NULL:
            inode.idle_newer.idle_older = inode.idle_older
        else:
            self.newest_idle = inode.idle_older
        self.idle -= 1

    cdef void drop_idle(self, inode_t *inode) noexcept:
        """Close an idle inode and free its record."""
        cdef uint64_t bucket = bucket_of(self, inode.ino)
        cdef inode_t **link = &self.buckets[bucket]
        self.unlink_idle(inode)
        while link[0] != inode:
            link = &link[0].next
        link[0] = inode.next
        close(inode.fd)
        inode.fd = -1
        inode.nodeid = 0
        inode.next = self.free_records
        self.free_records = inode

    cdef void drop_all_idle(self) noexcept:
        """Close all idle inodes: descriptors are short."""
        while self.oldest_idle != NULL:
            self.drop_idle(self.oldest_idle)

    cdef void evict(self, const statx_t *stx) noexcept:
        """Close this inode if it is idle: it was unlinked, and its blocks are to be freed."""
        cdef inode_t *inode = self.find(stx)
        if inode != NULL and inode.nlookup == 0:
            self.drop_idle(inode)

    cdef void expire_idle(self, uint64_t now) noexcept:
        """Close what has been idle for one to two seconds. now: monotonic nanoseconds."""
        if now - self.tick_began < IDLE_NS:
            return
        self.tick_began = now
        while self.oldest_idle != NULL and self.oldest_idle.idle_tick != self.tick:
            self.drop_idle(self.oldest_idle)
        self.tick += 1


cdef inline uint64_t bucket_of(InodeTable self, uint64_t ino) noexcept:
    return (ino * <uint64_t>0x9E3779B97F4A7C15 >> 32) & (self.bucket_count - 1)
