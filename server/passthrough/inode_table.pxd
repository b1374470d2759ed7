from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.coherence.shm.table cimport Table
from coherent_vfs.server.passthrough.handle_table cimport HandleTable
from coherent_vfs.server.host.libc cimport file_handle, statx_t, statx_timestamp

cdef enum watch_t:
    UNASKED
    ASKED
    WATCHED
    REFUSED

cdef enum flag_t:
    UNKNOWN
    ABSENT
    PRESENT

cdef struct inode_t:
    uint64_t nodeid
    uint64_t nlookup
    uint64_t dev, ino, mnt_id
    uint64_t hash          # its low bits are the slot in the version table; 0 without one
    uint64_t slot
    int fd                 # O_PATH; -1 while only the handle is kept
    file_handle *handle    # NULL until the descriptor was closed once
    bint remembered        # forgotten and not open: nlookup is 0, fd -1, and there is a handle
    bint hashed            # false once another inode has taken the number
    bint used              # since the clock came by
    bint unnamed           # the guest took a name from it, or it never had one: if it has none, the guest has it open
    uint64_t request       # the last one that used it
    uint32_t type          # S_IFMT bits
    uint32_t generation
    uint32_t entry_generation  # as the guest is told it; with the node id it never comes twice
    uint32_t idle_tick     # when it became idle
    uint64_t index         # in the array of records
    # Whether the host watch sees changes of it (server.caching.validity).
    watch_t watch
    uint64_t watch_due     # when a reply no longer waits for the answer (CLOCK_MONOTONIC, microseconds)
    uint64_t parent_watch_epoch         # the epoch in which its directory was watched; 0 for none
    bint parent_unwatched         # its directory cannot be watched
    # The attributes that the guest was told last (server.caching.validity).
    uint64_t reported_stamp    # 0 for never
    statx_timestamp reported_mtime, reported_ctime
    bint reported_racy         # when its ctime could still be that of a later change
    uint32_t mtime_skew          # nanoseconds that its mtime is told wrong by, for the guest to drop its pages
    uint64_t mtime_skew_until    # 0: it was not told yet
    # Directories (server.caching.readdir_policy).
    uint64_t listed_stamp  # no later than its list, as the guest may have it; 0 for none (server.caching.validity)
    statx_timestamp listed_mtime       # what the guest had been told last when it began to read the list
    statx_timestamp shown_mtime, latest_mtime   # that the guest was told last, and the latest ever
    uint32_t last_skew     # the last nanoseconds that its mtime was told wrong by
    uint64_t listed_at     # when READDIRPLUS of it began last; 0 for never
    bint singly            # its files are looked up one by one
    uint64_t probe         # inode number of the file that went without attributes in its list; 0 for none
    # The descriptor for a guest that does not open files (server.passthrough.implicit_handles): a handle, 0 for none.
    uint64_t data_fh
    bint data_writable
    uint64_t data_used     # the how manieth use of all that was
    # DAX (server.dax): whether the host's file has its flag for it, and beyond which size mappings were revoked.
    flag_t dax_flag
    uint64_t revoked       # that size + 1; 0: none
    uint64_t reached       # the largest size that the guest may know
    inode_t *next          # in its hash chain, or in the list of free records
    inode_t *older         # in the list of idle or of open ones
    inode_t *newer

cdef struct list_t:
    inode_t *oldest
    inode_t *newest
    uint64_t count

cdef class InodeTable:
    cdef Table table
    cdef HandleTable handles
    cdef unsigned slot_bits
    cdef inode_t root
    cdef inode_t **records
    cdef uint64_t record_count, record_room
    cdef inode_t *free_records
    cdef inode_t **buckets
    cdef uint64_t bucket_count
    cdef readonly uint64_t live
    cdef list_t idle_ones      # forgotten, and open
    cdef list_t open_ones      # live, and open
    cdef list_t remembered_ones
    cdef public uint64_t max_remembered
    cdef uint32_t session      # tells handles of this session from those of others
    cdef uint32_t tick
    cdef uint64_t tick_began
    cdef public uint64_t max_open    # inodes and handles together
    cdef int mount_fd
    cdef uint64_t request
    cdef bint gave_up

    cdef uint64_t hash_of(self, const statx_t *stx) noexcept
    cdef void begin_request(self) noexcept
    cdef inode_t *record(self, uint64_t nodeid) noexcept
    cdef inode_t *get(self, uint64_t nodeid) noexcept
    cdef inode_t *recall(self, uint64_t nodeid) noexcept
    cdef inode_t *find(self, const statx_t *stx) noexcept
    cdef inode_t *find_ino(self, const inode_t *sibling, uint64_t ino) noexcept
    cdef inode_t *insert(self, const statx_t *stx, int fd) noexcept
    cdef bint rebind(self, inode_t *inode, int fd) noexcept
    cdef void regain(self, inode_t *inode, int fd) noexcept
    cdef bint reopen(self, inode_t *inode) noexcept
    cdef int open_handle(self, const inode_t *inode) noexcept
    cdef void set_open(self, inode_t *inode, int fd) noexcept
    cdef void keep_to_limit(self) noexcept
    cdef bint set_closed(self, inode_t *inode, bint desperate) noexcept
    cdef bint take_handle(self, inode_t *inode) noexcept
    cdef bint close_some(self, uint64_t wanted, bint desperate) noexcept
    cdef bint make_room(self) noexcept
    cdef void unhash(self, inode_t *inode) noexcept
    cdef void remember(self, inode_t *inode) noexcept
    cdef void drop_data(self, inode_t *inode) noexcept
    cdef void free_record(self, inode_t *inode) noexcept
    cdef void take_from_idle(self, inode_t *inode) noexcept
    cdef void forget(self, uint64_t nodeid, uint64_t nlookup) noexcept
    cdef void drop_all_idle(self) noexcept
    cdef void drop_idle(self, inode_t *inode) noexcept
    cdef void close_idle(self, inode_t *inode) noexcept
    cdef void drop_if_idle(self, inode_t *inode) noexcept
    cdef bint expire_idle(self, uint64_t now) noexcept
    cdef int grow(self) noexcept
