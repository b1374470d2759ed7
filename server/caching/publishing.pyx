# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""How a change is made known: to those who cache, before it is acknowledged (docs/reference/table.md, docs/concepts/leases.md).

An operation that changes something names it with add_name() and add_inode(), calls begin() right before its system
call, and commit() or abort() right after it.
"""

from libc.errno cimport EACCES, EDQUOT, EEXIST, EINTR, EISDIR, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from posix.unistd cimport usleep

from coherent_vfs.coherence.shm.leases cimport (
    LT_WORD_MARKERS, Leases, lb_close, lb_free_since, lb_is_closed, lb_leased_until, lb_lock, lb_t, lb_time, lb_unlock,
    lb_write_lease, lt_bucket, lt_data_since, lt_load, lt_now, lt_set_data, lt_set_origin,
)
from coherent_vfs.coherence.shm.table cimport (
    VJ_WORD_CHANGES, VT_WORD_ROOT_EPOCH, VT_WORD_SLOTS, Journal, Table, vj_announce, vj_clear, vt_bump, vt_is_root,
    vt_lift_floor, vt_load, vt_name_hash, vt_name_slot, vt_stamp,
)
from coherent_vfs.server.fuse.wire cimport FUSE_ROOT_ID
from coherent_vfs.server.passthrough.inode_table cimport inode_t

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void *buffer, size_t size, long offset)

cdef extern from *:
    """
    #if defined(__x86_64__)
    #define relax() __builtin_ia32_pause()
    #else
    #define relax() __asm__ volatile("" ::: "memory")
    #endif
    """
    void relax() noexcept nogil

cdef enum:
    SPIN_US = 30         # for a lock: most changes take less
    AGAIN_US = 300       # after which a lock is tried again
    CLOSED_US = 500000   # beyond the end of the last lease, for the change to be made
    RESERVED_US = 20000  # beyond it, for other changes to wait until it is made


cdef class Publisher:
    """The changes that one guest makes.

    Args:
        table: the version table of the domain, writable, or None without one: then all of this does nothing.
        journal: where changes are announced; goes with the table.
        leases: the lease table; goes with the table.

    Attributes:
        due: after an operation said PARK, when to try again (CLOCK_MONOTONIC, microseconds).
        stamp: after commit(): one that is no older than this change, and no newer than another's.
        made: changes made so far.
        abandoning: requests wait for leases at the most, as the front-end has the device stop.
        leased: whether the request that is served was kept waiting by leases; whoever serves it resets it before.
        held: changes that had to wait for leases, as who parks them counts.
    """

    def __cinit__(self, Table table, Journal journal, Leases leases):
        self.table = table
        self.journal = journal
        self.leases = leases
        # Not from 0: origins of an earlier backend with the same number are still there.
        self.number = self.first = lt_now()

    @property
    def made(self) -> int:
        return self.number - self.first

    cdef int put_off(self, uint64_t due) noexcept:
        """The request that is served has to wait for somebody: PARK, or EINTR where it cannot.

        Args:
            due: when to try again, if it is not woken before (CLOCK_MONOTONIC, microseconds).
        """
        self.due = due
        return EINTR if self.abandoning else PARK

    cdef void add_name(self, change_t *change, uint64_t dir_slot, const char *name, size_t length) noexcept:
        """Count a name as changed. Names come first: see commit()."""
        cdef uint64_t hash
        if not is_announced(self, change):
            return
        hash = vt_name_hash(&self.table.vt, dir_slot, name, length)
        add_thing(change, hash, False)
        add_name_slot(self, change, hash & self.table.vt.mask)
        # To a guest, whose root is always node id 1, the same name is found under slot 1.
        if vt_is_root(&self.table.vt, dir_slot):
            add_name_slot(self, change, vt_name_slot(&self.table.vt, FUSE_ROOT_ID, name, length))

    cdef void add_inode(self, change_t *change, uint64_t hash, bint data) noexcept:
        """Count an inode as changed; data: not only its attributes."""
        if not is_announced(self, change):
            return
        add_thing(change, hash, data)
        add_slot(change, hash & self.table.vt.mask)
        if vt_is_root(&self.table.vt, hash & self.table.vt.mask):
            add_slot(change, FUSE_ROOT_ID)

    cdef void add_known(self, change_t *change, inode_t *inode, bint data) noexcept:
        """Count an inode as changed that the guest knows: of its own changes it need not be told."""
        self.add_inode(change, inode.hash, data)
        if data and change.known_count < THINGS_MAX:
            change.known[change.known_count] = inode
            change.known_count += 1

    cdef int begin(self, change_t *change) noexcept:
        """Before the system call: 0, or PARK where the change has to wait for others.

        Leaves word of what is about to change, should this process die before it is acknowledged.
        """
        if self.table is None:
            return 0
        # Before the locks: coherenced unlocks for the dead what they announced.
        vj_announce(&self.journal.vj, change.slots, change.count)
        if self.leases is not None and not lock(self, change):
            vj_clear(&self.journal.vj)
            return PARK
        return 0

    cdef void commit(self, change_t *change) noexcept:
        """After the system call and before the reply: nobody can use an older copy from here on.

        Which inodes a name stood for was found out before the call, and somebody may have changed the name since:
        the host, or another backend where there are no leases and so no locks. Everybody bumps names before inodes.
        So either the other's name bump is seen here, and as nobody knows what was behind the name everything is
        given up; or its bumps of the inodes are still to come. In that last case, and only for the link count of an
        inode that two fought over, the other's bump and not this one ends the use of older copies.
        """
        cdef unsigned i
        cdef bint overtaken = False
        if self.table is None:
            return
        if self.leases is not None:
            mark(self, change)
        for i in range(change.names):
            if vt_load(&self.table.vt, VT_WORD_SLOTS + change.slots[i]) != change.seen[i]:
                overtaken = True
        for i in range(change.count):
            vt_bump(&self.table.vt, change.slots[i])
        # What has become the root of a share since the beginning has slot 1, too, for that share's guest.
        if overtaken or vt_load(&self.table.vt, VT_WORD_ROOT_EPOCH) != change.root_epoch:
            vt_lift_floor(&self.table.vt)
        # Under the locks: no other backend's change of these is older than this and newer than the change.
        self.stamp = vt_stamp(&self.table.vt)
        for i in range(change.known_count):
            if change.current[i]:
                change.known[i].reported_stamp = self.stamp
            # What the guest changes in a directory makes its kernel drop the list (fuse_dir_changed()).
            if change.list_current[i]:
                change.known[i].listed_stamp = self.stamp
        if not unlock(change, lt_now()):
            # A lock was held too long: somebody may have taken it away, or given a lease on what was old.
            vt_lift_floor(&self.table.vt)
            outwait(self, change)
        vj_clear(&self.journal.vj)

    cdef void abort(self, change_t *change, int error) noexcept:
        """After a system call that failed: there is nothing to bump where the error says that nothing happened.

        Others, as EIO of a network file system, may come after the change took effect.
        """
        if error not in (EEXIST, ENOENT, ENOTDIR, EISDIR, EACCES, EPERM, EROFS, ENOSPC, EDQUOT):
            self.commit(change)
        elif self.table is not None:
            vj_clear(&self.journal.vj)
            restore(change)


cdef bint is_announced(Publisher self, change_t *change) noexcept:
    """Whether there is anybody to tell of a change, to which something is going to be added."""
    if self.table is None:
        return False
    if change.count == 0:
        change.root_epoch = vt_load(&self.table.vt, VT_WORD_ROOT_EPOCH)
    return True


cdef void add_slot(change_t *change, uint64_t slot) noexcept:
    cdef unsigned i
    for i in range(change.count):
        if change.slots[i] == slot:
            return
    if change.count < SLOTS_MAX:
        change.slots[change.count] = slot
        change.count += 1


cdef void add_name_slot(Publisher self, change_t *change, uint64_t slot) noexcept:
    if change.names < NAMES_MAX:
        change.seen[change.names] = vt_load(&self.table.vt, VT_WORD_SLOTS + slot)
        change.slots[change.names] = slot
        change.names += 1
        change.count = change.names


cdef void add_thing(change_t *change, uint64_t hash, bint data) noexcept:
    cdef unsigned i
    for i in range(change.thing_count):
        if change.things[i] == hash:
            change.data[i] = change.data[i] or data
            return
    if change.thing_count < THINGS_MAX:
        change.things[change.thing_count] = hash
        change.data[change.thing_count] = data
        change.thing_count += 1


cdef bint lock(Publisher self, change_t *change) noexcept:
    """Lock the buckets of all that changes, and see that nobody else has a lease on it; else set due.

    A change that waits for leases closes its buckets for some time longer, and again where locks keep it waiting after
    that: else a guest that asks all the time could have the next lease before the change is made. Locks alone close
    nothing: they are over in a moment.
    """
    cdef uint64_t now = lt_now(), give_up = now + SPIN_US
    cdef lb_t *bucket
    cdef unsigned i
    while not lock_buckets(self, change, now):
        relax()
        now = lt_now()
        if now > give_up:
            self.due = now + AGAIN_US
            for i in range(change.thing_count):
                bucket = lt_bucket(&self.leases.lt, change.things[i])
                if lb_is_closed(bucket, now):
                    lb_close(bucket, now + CLOSED_US)
            return False
    for i in range(change.names):
        if vt_load(&self.table.vt, VT_WORD_SLOTS + change.slots[i]) != change.seen[i]:
            # The inode behind the name may be another one, with other leases.
            self.due = now
            restore(change)
            return False
    self.due = leased_until(self, change, now)
    if self.due == 0:
        return True
    for i in range(change.thing_count):
        if change.data[i]:
            reserve(self, change.things[i], now)
    for i in range(change.locked_count):
        lb_close(change.locked[i], self.due + CLOSED_US)
    restore(change)
    self.leased = True
    return False


cdef void reserve(Publisher self, uint64_t hash, uint64_t now) noexcept:
    """Let other guests' changes of the same data wait for this one, which waits.

    While a guest changes the size of a file its kernel takes no notice of attributes (FUSE_I_SIZE_UNSTABLE), and so
    would go on using pages that another guest's change made old. Only the first to wait does this, or two would wait
    for each other.
    """
    cdef lb_t *bucket = lt_bucket(&self.leases.lt, hash)
    if not lb_is_closed(bucket, now):
        lb_write_lease(bucket, hash, self.journal.backend_id, now, self.due + RESERVED_US)


cdef bint lock_buckets(Publisher self, change_t *change, uint64_t now) noexcept:
    """All or nothing."""
    cdef lb_t *bucket
    cdef unsigned i, k
    cdef bint known
    for i in range(change.thing_count):
        bucket = lt_bucket(&self.leases.lt, change.things[i])
        known = False
        for k in range(change.locked_count):
            known = known or change.locked[k] == bucket
        if known:
            continue
        k = change.locked_count
        change.mine[k] = lb_lock(bucket, self.journal.backend_id, now, &change.before[k])
        if change.mine[k] == 0:
            restore(change)
            return False
        change.locked[k] = bucket
        change.locked_count += 1
    return True


cdef void outwait(Publisher self, change_t *change) noexcept:
    """Wait for the leases of others on what has been changed; new ones can only be on what it is now."""
    cdef uint64_t now = lt_now(), until = leased_until(self, change, now)
    while now < until:
        usleep(min(until - now, <uint64_t>100_000))
        now = lt_now()


cdef uint64_t leased_until(Publisher self, change_t *change, uint64_t now) noexcept:
    """When the last lease of others on what changes ends; 0 when there is none."""
    cdef uint64_t until = 0
    cdef unsigned i
    for i in range(change.thing_count):
        until = max(
            until,
            lb_leased_until(
                lt_bucket(&self.leases.lt, change.things[i]), change.things[i], self.journal.backend_id, now
            ),
        )
    return until


cdef bint unlock(change_t *change, uint64_t now) noexcept:
    """Unlock everything; false where a lock was gone, or had run out by now."""
    cdef bint held = True
    cdef unsigned i
    for i in range(change.locked_count):
        held = lb_time(change.mine[i]) > now and held
        held = lb_unlock(change.locked[i], change.mine[i], lb_free_since(now)) and held
    change.locked_count = 0
    return held


cdef void restore(change_t *change) noexcept:
    """Unlock everything as if it had not been locked."""
    cdef unsigned i
    for i in range(change.locked_count):
        lb_unlock(change.locked[i], change.mine[i], change.before[i])
    change.locked_count = 0


cdef void mark(Publisher self, change_t *change) noexcept:
    """Say in the lease table what this was; then to a host watch by inotify, which sees writes to the journal, that
    it was."""
    cdef unsigned i
    cdef inode_t *inode
    for i in range(change.known_count):
        inode = change.known[i]
        change.current[i] = inode.reported_stamp != 0 and not lt_data_since(
            &self.leases.lt, inode.slot, inode.reported_stamp
        )
        change.list_current[i] = inode.listed_stamp != 0 and not lt_data_since(
            &self.leases.lt, inode.slot, inode.listed_stamp
        )
    for i in range(change.thing_count):
        if change.data[i]:
            lt_set_data(&self.leases.lt, &self.table.vt, change.things[i])
    self.number += 1
    for i in range(change.count):
        lt_set_origin(&self.leases.lt, change.slots[i], self.journal.backend_id, self.number)
    if lt_load(&self.leases.lt, LT_WORD_MARKERS):
        pwrite(self.journal.fd, &self.number, sizeof(self.number), 8 * VJ_WORD_CHANGES)
