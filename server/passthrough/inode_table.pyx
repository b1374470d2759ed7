# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The inodes that a guest knows: node id to O_PATH descriptor, with the guest's lookup counts.

A node id is slot | index << slot_bits | generation << (slot_bits + 28): the low bits are the inode's slot in the
version table, so that a guest which checks the table finds it from the node id alone; the generation makes the
id of a forgotten inode useless.

A forgotten inode stays open, idle, for a moment: a guest that caches nothing forgets each inode right after its
use and looks it up again at once. One that has no name any more does not: as long as it is open it takes space.

After that it is remembered, by its file handle, as long as there is room: it keeps its node id, by which programs in
the guest that have a file handle (name_to_handle_at(2), as NFS servers do) find it again. Whatever a node id finds,
the guest was given in this session.

A guest that caches much may know more inodes than we may have descriptors. Then those that it has not used for long
are closed, and found again by file handle (open_by_handle_at(2)), where the file system has them and we may. A deleted
one cannot be found again and stays open; but a guest may know very many that others have deleted, and they would leave
no descriptor for what is new. So they are given up then: it gets ESTALE for them.
"""

from libc.errno cimport EMFILE, ENFILE, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp
from posix.unistd cimport close

from coherent_vfs.coherence.shm.table cimport Table, vt_inode_hash
from coherent_vfs.server.passthrough.handle_table cimport HandleTable, handle_t
from coherent_vfs.server.host.libc cimport (
    AT_EMPTY_PATH, AT_STATX_DONT_SYNC, MAX_HANDLE_SZ, O_CLOEXEC, O_NOFOLLOW, O_PATH, STATX_BASIC_STATS, STATX_MNT_ID,
    STATX_NLINK, S_IFDIR, S_IFMT, file_handle, name_to_handle_at, open_by_handle_at, statx, statx_dev, statx_t,
)

import os
import resource

from coherent_vfs.coherence.common.log import get_logger

log = get_logger(__name__)

cdef extern from *:
    """
    #define set_errno(error) (errno = (error))
    """
    void set_errno(int error) noexcept

cdef enum:
    NODEID_BITS = 64
    INDEX_BITS = 28
    MAX_IDLE = 4096
    MAX_REMEMBERED = 65536 # of some 400 bytes each
    IDLE_NS = 1_000_000_000
    SEARCH = 128           # open inodes that were not used and are looked at for some to close
    OTHER_OPEN = 512       # descriptors for all but inodes and handles: queues, memory, a system call or two
    OVERDRAWN = 64         # of these are used for inodes before deleted ones are given up
    LEAST_OPEN = 32
    ROOT_NODEID = 1


cdef class InodeTable:
    """All inodes of one guest's session.

    Args:
        root_fd: O_PATH descriptor of the share's root; it is duplicated.
        table: the version table of the domain, or None.
        handles: what the guest has open, which takes descriptors, too.

    Raises:
        OSError: the root cannot be read.
    """

    def __cinit__(self, int root_fd, Table table, HandleTable handles not None):
        cdef statx_t stx
        cdef int64_t limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.table = table
        self.handles = handles
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
        self.session = int.from_bytes(os.urandom(4))
        identify(self, &self.root, &stx)
        self.max_remembered = MAX_REMEMBERED
        self.max_open = max(limit - OTHER_OPEN, limit // 2, LEAST_OPEN)
        self.mount_fd = open_for_handles(self.root.fd)

    def __dealloc__(self):
        if self.records != NULL and self.buckets != NULL:
            self.clear()
            close(self.root.fd)
            if self.mount_fd >= 0:
                close(self.mount_fd)
        free(self.records)
        free(self.buckets)

    def watched(self, nodeid: int, ok: bool) -> None:
        """The host watch answers what it was asked for an inode, which may be idle or gone meanwhile."""
        cdef inode_t *inode = numbered(self, nodeid)
        if inode != NULL and not inode.remembered:
            inode.watch = WATCHED if ok else REFUSED

    def unwatch(self) -> None:
        """The host watch is gone, or another one: nothing is watched."""
        cdef uint64_t i
        self.root.watch = UNASKED
        self.root.parent_watch_epoch = 0
        for i in range(2, self.record_count):
            self.records[i].watch = UNASKED
            self.records[i].parent_watch_epoch = 0
            self.records[i].parent_unwatched = False

    def clear(self) -> None:
        """Forget everything but the root: the guest's session is over."""
        cdef uint64_t i
        for i in range(2, self.record_count):
            if self.records[i].fd >= 0:
                close(self.records[i].fd)
            free(self.records[i].handle)
            free(self.records[i])
        for i in range(self.bucket_count):
            self.buckets[i] = NULL
        self.record_count = 2
        self.root.reported_stamp = self.root.data_fh = self.root.mtime_skew = 0
        self.root.listed_stamp = self.root.last_skew = 0
        self.root.latest_mtime.tv_sec = self.root.latest_mtime.tv_nsec = 0
        self.root.listed_at = self.root.singly = self.root.probe = 0
        self.free_records = NULL
        self.idle_ones = self.open_ones = self.remembered_ones = list_t(NULL, NULL, 0)
        self.live = 0
        self.session = int.from_bytes(os.urandom(4))

    @property
    def idle(self) -> int:
        """Inodes that the guest has forgotten and that are still open."""
        return self.idle_ones.count

    @property
    def remembered(self) -> int:
        """Inodes that the guest has forgotten and that are not open, but can be found again by node id."""
        return self.remembered_ones.count

    @property
    def open(self) -> int:
        """Inodes that are open, idle ones included; the root is not counted."""
        return self.open_ones.count + self.idle_ones.count

    cdef uint64_t hash_of(self, const statx_t *stx) noexcept:
        if self.table is None:
            return 0
        return vt_inode_hash(&self.table.vt, statx_dev(stx), stx.stx_ino)

    cdef void begin_request(self) noexcept:
        """What get() gives from here on keeps its descriptor until the next request."""
        self.request += 1

    cdef inode_t *record(self, uint64_t nodeid) noexcept:
        """The inode with a node id from the guest, live, but perhaps not open; or NULL."""
        cdef inode_t *inode = numbered(self, nodeid)
        return inode if inode != NULL and inode.nlookup else NULL

    cdef inode_t *get(self, uint64_t nodeid) noexcept:
        """The live inode of a node id from the guest, open; NULL where there is none, or none any more."""
        cdef inode_t *inode = self.record(nodeid)
        if inode == NULL:
            return NULL
        inode.used = True
        inode.request = self.request
        if inode.fd < 0 and not self.reopen(inode):
            return NULL
        return inode

    cdef inode_t *recall(self, uint64_t nodeid) noexcept:
        """The inode of a node id that the guest was given at some time, open, with one more lookup; NULL where it is
        not remembered, or gone from the host."""
        cdef inode_t *inode = numbered(self, nodeid)
        cdef int fd
        if inode == NULL:
            return NULL
        if inode.fd >= 0:
            self.take_from_idle(inode)
            return inode
        fd = self.open_handle(inode)
        if fd < 0:
            return NULL
        self.regain(inode, fd)
        return inode

    cdef inode_t *find(self, const statx_t *stx) noexcept:
        """The inode with this identity, live, idle or remembered, or NULL. If it is not open, it may be an older inode that had
        the same number: rebind() tells."""
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
                return inode if not inode.remembered else NULL
            inode = inode.next
        return NULL

    cdef inode_t *insert(self, const statx_t *stx, int fd) noexcept:
        """Make a record of an inode that find() does not have, with one lookup; takes fd. NULL: no memory."""
        cdef inode_t *inode
        cdef uint64_t bucket
        if self.free_records == NULL and self.grow() < 0:
            close(fd)
            return NULL
        inode = self.free_records
        self.free_records = inode.next
        inode.dev, inode.ino, inode.mnt_id = statx_dev(stx), stx.stx_ino, stx.stx_mnt_id
        identify(self, inode, stx)
        inode.type = stx.stx_mode & S_IFMT
        inode.nlookup = 1
        inode.handle = NULL
        inode.data_fh = 0
        inode.revoked = inode.reached = 0
        begin_anew(inode)
        inode.generation += 1
        inode.entry_generation = self.session + (
            <uint64_t>inode.generation >> (NODEID_BITS - self.slot_bits - INDEX_BITS)
        )
        inode.nodeid = (
            inode.slot
            | inode.index << self.slot_bits
            | <uint64_t>inode.generation << (self.slot_bits + INDEX_BITS)
        )
        bucket = bucket_of(self, inode.ino)
        inode.next = self.buckets[bucket]
        self.buckets[bucket] = inode
        inode.hashed = True
        self.live += 1
        self.set_open(inode, fd)
        return inode

    cdef bint rebind(self, inode_t *inode, int fd) noexcept:
        """Whether an O_PATH descriptor, just opened, is that of an inode that find() gave and that is not open.

        If so the inode takes it, with one more lookup. If not, the inode is gone from the host, and its number has a
        new owner.
        """
        cdef file_handle *handle = handle_of(fd)
        cdef bint same = (
            handle != NULL
            and handle.handle_bytes == inode.handle.handle_bytes
            and handle.handle_type == inode.handle.handle_type
            and memcmp(&handle.f_handle, &inode.handle.f_handle, handle.handle_bytes) == 0
        )
        free(handle)
        if same:
            self.regain(inode, fd)
        elif inode.remembered:
            self.free_record(inode)
        else:
            self.unhash(inode)
        return same

    cdef void regain(self, inode_t *inode, int fd) noexcept:
        """An inode that was not open, live or remembered, takes this descriptor, and one more lookup."""
        if inode.remembered:
            remove(&self.remembered_ones, inode)
            inode.remembered = False
            self.live += 1
        inode.nlookup += 1
        self.set_open(inode, fd)

    cdef bint reopen(self, inode_t *inode) noexcept:
        """Open a live inode that is not; false where it is gone from the host."""
        cdef int fd = self.open_handle(inode)
        if fd < 0:
            return False
        self.set_open(inode, fd)
        return True

    cdef int open_handle(self, const inode_t *inode) noexcept:
        """An O_PATH descriptor of an inode by its file handle, or a negative number."""
        cdef int fd
        if inode.handle == NULL:
            return -1
        fd = open_by_handle_at(self.mount_fd, inode.handle, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0 and self.make_room():
            fd = open_by_handle_at(self.mount_fd, inode.handle, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        return fd

    cdef void set_open(self, inode_t *inode, int fd) noexcept:
        inode.fd = fd
        inode.used = False
        inode.request = self.request
        append(&self.open_ones, inode)
        self.keep_to_limit()

    cdef void keep_to_limit(self) noexcept:
        """Another inode or handle was opened: close inodes where that is too many."""
        cdef uint64_t count = self.open_ones.count + self.idle_ones.count + self.handles.live
        if count <= self.max_open:
            return
        if self.idle_ones.count:
            self.drop_idle(self.idle_ones.oldest)
        else:
            self.close_some(count - self.max_open, count > self.max_open + OVERDRAWN)

    cdef bint set_closed(self, inode_t *inode, bint desperate) noexcept:
        """Close an inode, to be found again by its handle; false where it has to stay open.

        A guest that deletes what it has not open forgets it at once. What others have deleted it has in its cache only,
        unless it has a handle of it, or reads it now and then.

        Args:
            desperate: give up what others have deleted.
        """
        cdef statx_t stx
        if statx(inode.fd, b"", AT_EMPTY_PATH, STATX_NLINK, &stx) < 0:
            return False
        if stx.stx_nlink != 0:
            inode.unnamed = False
            if not self.take_handle(inode):
                return False
        elif not desperate or inode.unnamed or self.handles.holds(inode.nodeid):
            return False
        else:
            if not self.gave_up:
                self.gave_up = True
                log.warning(
                    "descriptors are short, deleted files are given up: raise --rlimit-nofile", limit=self.max_open
                )
            self.unhash(inode)
        remove(&self.open_ones, inode)
        close(inode.fd)
        inode.fd = -1
        return True

    cdef bint take_handle(self, inode_t *inode) noexcept:
        """Make sure that an open inode can be found again by its file handle; false where it cannot."""
        # Those of other mounts cannot be opened by handle from the root's.
        if self.mount_fd < 0 or inode.mnt_id != self.root.mnt_id:
            return False
        if inode.handle == NULL:
            inode.handle = handle_of(inode.fd)
        return inode.handle != NULL

    cdef bint close_some(self, uint64_t wanted, bint desperate) noexcept:
        """Close so many open inodes, or fewer where that would take long: the oldest that were not used since they
        were looked at the last time. False when none was closed.

        Args:
            desperate: give up deleted ones as well.
        """
        cdef uint64_t closed = 0, examined = 0, i
        cdef inode_t *inode
        for i in range(2 * self.open_ones.count):
            if closed == wanted or examined == SEARCH or self.open_ones.count == 0:
                break
            inode = self.open_ones.oldest
            # The current request needs its own.
            if not inode.used and inode.request != self.request:
                examined += 1
                if self.set_closed(inode, desperate):
                    closed += 1
                    continue
            inode.used = False
            remove(&self.open_ones, inode)
            append(&self.open_ones, inode)
        return closed > 0

    cdef bint make_room(self) noexcept:
        """After a system call that failed: whether that was for want of descriptors and, as some could be closed, it
        may succeed. Else errno is as it was."""
        cdef int error = errno
        if error not in (EMFILE, ENFILE):
            return False
        if self.idle_ones.count:
            self.drop_all_idle()
            return True
        if self.close_some(1, False) or self.close_some(1, True):
            return True
        set_errno(error)
        return False

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

    cdef void take_from_idle(self, inode_t *inode) noexcept:
        """Count one more lookup of an inode that find() gave."""
        if inode.nodeid == ROOT_NODEID:
            return
        inode.used = True
        inode.request = self.request
        if inode.nlookup == 0:
            remove(&self.idle_ones, inode)
            append(&self.open_ones, inode)
            self.live += 1
        inode.nlookup += 1

    cdef void forget(self, uint64_t nodeid, uint64_t nlookup) noexcept:
        """Take lookups back; with the last one the inode becomes idle, or is closed where nobody can find it again.

        Unknown ids and excess are ignored.
        """
        cdef inode_t *inode = self.record(nodeid)
        if inode == NULL or nodeid == ROOT_NODEID:
            return
        inode.nlookup -= min(nlookup, inode.nlookup)
        if inode.nlookup:
            return
        self.live -= 1
        if inode.fd < 0:
            self.remember(inode)
            return
        remove(&self.open_ones, inode)
        append(&self.idle_ones, inode)
        inode.idle_tick = self.tick
        if is_deleted(inode):
            self.unhash(inode)
            self.close_idle(inode)
        elif self.idle_ones.count > MAX_IDLE:
            self.drop_idle(self.idle_ones.oldest)

    cdef void drop_idle(self, inode_t *inode) noexcept:
        """Close an idle inode, and remember it where that is possible."""
        self.take_handle(inode)
        self.close_idle(inode)

    cdef void close_idle(self, inode_t *inode) noexcept:
        """Close an idle inode; it is remembered if it has a handle."""
        remove(&self.idle_ones, inode)
        close(inode.fd)
        inode.fd = -1
        self.remember(inode)

    cdef void remember(self, inode_t *inode) noexcept:
        """Remember an inode that the guest has forgotten and that is not open; free its record where it cannot be
        found again."""
        if inode.handle == NULL:
            self.free_record(inode)
            return
        self.drop_data(inode)
        begin_anew(inode)
        inode.remembered = True
        append(&self.remembered_ones, inode)
        if self.remembered_ones.count > self.max_remembered:
            self.free_record(self.remembered_ones.oldest)

    cdef void drop_data(self, inode_t *inode) noexcept:
        """Close what a guest that opens nothing has used of an inode."""
        cdef handle_t *handle = self.handles.get(inode.nodeid, inode.data_fh) if inode.data_fh else NULL
        if handle != NULL:
            self.handles.close(handle)
        inode.data_fh = 0

    cdef void unhash(self, inode_t *inode) noexcept:
        """Let find() not give an inode any more, nor reopen() open it."""
        cdef inode_t **link = &self.buckets[bucket_of(self, inode.ino)]
        if inode.hashed:
            while link[0] != inode:
                link = &link[0].next
            link[0] = inode.next
            inode.hashed = False
        free(inode.handle)
        inode.handle = NULL

    cdef void free_record(self, inode_t *inode) noexcept:
        """Free the record of an inode that the guest has forgotten and that is not open."""
        if inode.remembered:
            remove(&self.remembered_ones, inode)
            inode.remembered = False
        self.drop_data(inode)
        self.unhash(inode)
        inode.nodeid = 0
        inode.next = self.free_records
        self.free_records = inode

    cdef void drop_all_idle(self) noexcept:
        """Close all idle inodes: descriptors are short, or space."""
        while self.idle_ones.count:
            self.drop_idle(self.idle_ones.oldest)

    cdef void drop_if_idle(self, inode_t *inode) noexcept:
        """Close an inode if it is idle: it was unlinked, and its blocks are to be freed."""
        if inode.nlookup == 0 and inode.fd >= 0:
            self.drop_idle(inode)

    cdef bint expire_idle(self, uint64_t now) noexcept:
        """Close what has been idle for one to two seconds. now: monotonic nanoseconds. True once in a second."""
        if now - self.tick_began < IDLE_NS:
            return False
        self.tick_began = now
        while self.idle_ones.count and self.idle_ones.oldest.idle_tick != self.tick:
            self.drop_idle(self.idle_ones.oldest)
        self.tick += 1
        return True


cdef void begin_anew(inode_t *inode) noexcept:
    """Whatever the guest was told of an inode, or it was watched for, is over."""
    inode.unnamed = False
    inode.watch = UNASKED
    inode.parent_watch_epoch = inode.reported_stamp = 0
    inode.parent_unwatched = False
    inode.mtime_skew = 0
    inode.listed_stamp = inode.last_skew = 0
    inode.latest_mtime.tv_sec = inode.latest_mtime.tv_nsec = 0
    inode.listed_at = 0
    inode.singly = False
    inode.probe = 0
    inode.dax_flag = UNKNOWN


cdef bint is_deleted(const inode_t *inode) noexcept:
    """Whether an open inode has no name any more. Directories do not count: an empty one takes next to nothing, and
    each path brings FORGETs of several."""
    cdef statx_t stx
    return (
        inode.type != S_IFDIR
        and statx(inode.fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_NLINK, &stx) == 0
        and stx.stx_nlink == 0
    )


cdef inline inode_t *numbered(InodeTable self, uint64_t nodeid) noexcept:
    """The inode with a node id, live or idle, or NULL."""
    cdef uint64_t index = nodeid >> self.slot_bits & ((1 << INDEX_BITS) - 1)
    if nodeid == ROOT_NODEID:
        return &self.root
    if index < 2 or index >= self.record_count or self.records[index].nodeid != nodeid:
        return NULL
    return self.records[index]


cdef void identify(InodeTable self, inode_t *inode, const statx_t *stx) noexcept:
    inode.hash = self.hash_of(stx)
    inode.slot = inode.hash & self.table.vt.mask if self.table is not None else 0


cdef void append(list_t *list, inode_t *inode) noexcept:
    inode.older = list.newest
    inode.newer = NULL
    if list.newest != NULL:
        list.newest.newer = inode
    else:
        list.oldest = inode
    list.newest = inode
    list.count += 1


cdef void remove(list_t *list, inode_t *inode) noexcept:
    if inode.older != NULL:
        inode.older.newer = inode.newer
    else:
        list.oldest = inode.newer
    if inode.newer != NULL:
        inode.newer.older = inode.older
    else:
        list.newest = inode.older
    list.count -= 1


cdef file_handle *handle_of(int fd) noexcept:
    """The file handle of what a descriptor is open on, to be freed; NULL where there is none."""
    cdef file_handle *handle = <file_handle *>malloc(sizeof(file_handle) + MAX_HANDLE_SZ)
    cdef file_handle *fitting
    cdef int mount_id
    if handle == NULL:
        return NULL
    handle.handle_bytes = MAX_HANDLE_SZ
    if name_to_handle_at(fd, b"", handle, &mount_id, AT_EMPTY_PATH) < 0:
        free(handle)
        return NULL
    fitting = <file_handle *>realloc(handle, sizeof(file_handle) + handle.handle_bytes)
    return fitting if fitting != NULL else handle


cdef int open_for_handles(int root_fd):
    """A descriptor of the root through which handles can be opened; -1 where that is not possible or permitted."""
    cdef file_handle *handle
    cdef int mount_fd, fd
    try:
        mount_fd = os.open(f"/proc/self/fd/{root_fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    handle = handle_of(root_fd)
    fd = open_by_handle_at(mount_fd, handle, O_PATH | O_CLOEXEC) if handle != NULL else -1
    free(handle)
    if fd < 0:
        close(mount_fd)
        return -1
    close(fd)
    return mount_fd


cdef inline uint64_t bucket_of(InodeTable self, uint64_t ino) noexcept:
    return (ino * <uint64_t>0x9E3779B97F4A7C15 >> 32) & (self.bucket_count - 1)
