# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""For how long the guest may keep what a reply tells it.

In mode shared an aware guest may keep it until the table says otherwise, as far as the host watch sees changes made
on the host; a stock guest gets leases (docs/concepts/leases.md). Times are nanoseconds where FUSE has them, else microseconds.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from coherent_vfs.coherence.shm.leases cimport (
    LT_WORD_EPOCH, Leases, lb_quiet_for, lt_bucket, lt_data_since, lt_grant, lt_load, lt_now,
)
from coherent_vfs.coherence.shm.table cimport VT_WORD_FLOOR, Table, vt_distrusted, vt_is_pinned, vt_load, vt_name_hash, vt_stamp
from coherent_vfs.server.caching.publishing cimport Publisher
from coherent_vfs.server.fuse.wire cimport fuse_attr
from coherent_vfs.server.passthrough.inode_table cimport ASKED, REFUSED, UNASKED, WATCHED, inode_t, watch_t
from coherent_vfs.server.host.libc cimport S_IFDIR, S_IFMT, S_IFREG, realtime_ns, statx_t, statx_timestamp

from coherent_vfs.coherence.common.log import get_logger

log = get_logger(__name__)

cdef enum:
    AGE_SHARE = 4              # of its age is a lease long
    LEAST_LEASE_US = 10_000    # for the guest; a shorter one is not worth it
    UNWATCHED_NS = 1_000_000_000   # as in mode auto
    LATE_US = 10_000           # between a lease and its reply
    RACY_NS = 20_000_000       # two ticks of the slowest kernel clock: a ctime younger than that may come again
    COARSE_NS = 2_020_000_000  # the same where times have no fraction of a second: those of vfat are even
    MTIME_SKEW_US = 200_000
    MTIME_SKEW_MAX = 7
    ANSWER_US = 5_000          # of coherenced, to which replies wait that could not be kept without


cdef class Validity:
    """What one guest may keep.

    Args:
        settings: server.settings.Settings.
        table, leases: of the domain, or None; without leases a stock guest in shared keeps nothing.
        publisher: knows this backend's number in the lease table.

    Attributes:
        given: how many leases were given so far.
        clock_step: nanoseconds by which the host's clock was set forward; tests say so, without setting it.
    """

    def __cinit__(self, settings, Table table, Leases leases, Publisher publisher):
        self.table = table
        self.leases = leases
        self.publisher = publisher
        self.shared = table is not None and settings.cache == "shared"
        self.lease_max = round(settings.lease_max * 1_000_000)
        self.lease_margin = round(settings.lease_margin * 1_000_000)

    def adopt(self, timeout: float, aware: bool) -> None:
        """Take what the cache policy says; aware: the guest proved that it checks the table."""
        self.fixed = round(timeout * 1_000_000_000)
        self.aware = aware

    def watch_with(self, watcher) -> None:
        """From now on ask the host watch for directories: watcher.watch(fd, nodeid) says whether it could be asked.

        watcher.unwatch() tells it that the guest has gone.
        Without that nothing on the host is expected to change.
        """
        self.watcher = watcher

    cdef void begin_request(self) noexcept:
        """Before the host is asked for anything."""
        if self.shared:
            self.stamp = self.reported_by = vt_stamp(&self.table.vt)
            self.epoch = lt_load(&self.leases.lt, LT_WORD_EPOCH) if self.leases is not None else 0
            self.granted = False

    cdef void end_change(self) noexcept:
        """After a change that this request made: what it replies is no older than that."""
        self.reported_by = self.publisher.stamp

    cdef bint too_late(self) noexcept:
        """Whether a reply is so late after the first lease in it that the guest would keep things for too long."""
        return self.granted and lt_now() - self.granted_at > LATE_US

    cdef void ask_watch(self, inode_t *inode) noexcept:
        """Have an inode watched on the host. The answer comes later, as InodeTable.watched()."""
        if self.watcher is None or not self.shared or inode.watch != UNASKED:
            return
        try:
            if self.watcher.watch(inode.fd, inode.nodeid):
                inode.watch = ASKED
                inode.watch_due = lt_now() + ANSWER_US
        except Exception:
            log.exception("the host watch cannot be asked")

    cdef bint awaits_watch(self, const inode_t *inode) noexcept:
        """Whether the host watch was just asked for a directory, so that what is told of it can be kept in a moment."""
        if inode.watch != ASKED or not (self.aware or (self.leases is not None and self.lease_max)):
            return False
        return lt_now() < inode.watch_due

    cdef void watch_via_parent(self, const inode_t *parent, inode_t *inode, const statx_t *stx) noexcept:
        """An inode was found in a directory, whose watch sees changes of it unless it has other links, too."""
        if self.watcher is None or not self.shared:
            return
        if stx.stx_nlink > 1 and inode.type != S_IFDIR:
            inode.parent_watch_epoch = 0
            self.ask_watch(inode)
            return
        inode.parent_watch_epoch = self.epoch if parent.watch == WATCHED else 0
        inode.parent_unwatched = parent.watch == REFUSED

    cdef uint64_t of_name(
        self, inode_t *parent, const char *name, size_t length, int64_t born_sec, int64_t born_nsec
    ) noexcept:
        """For a name in a directory, NULL where there is none; born: when it was changed last, as far as is known."""
        cdef watch_t watch
        if not self.shared:
            return self.fixed
        if parent == NULL:
            return 0
        watch = parent.watch if self.watcher is not None else WATCHED
        if self.aware:
            return known_for(self, watch)
        if self.leases is None or watch <= ASKED:
            return 0
        return lease(self, vt_name_hash(&self.table.vt, parent.slot, name, length), born_sec, born_nsec, watch)

    cdef uint64_t of_attributes(self, inode_t *inode, const statx_t *stx) noexcept:
        """For the attributes of an inode."""
        cdef watch_t watch
        if not self.shared:
            return self.fixed
        watch = watch_of(self, inode, stx)
        if self.aware:
            return known_for(self, watch)
        if self.leases is None or watch <= ASKED:
            return 0
        return lease(self, inode.hash, stx.stx_ctime.tv_sec, stx.stx_ctime.tv_nsec, watch)

    cdef bint tell(self, inode_t *inode, const statx_t *stx, fuse_attr *attr, bint compared) noexcept:
        """Note what a stock guest is told; false where it must ask again.

        With AUTO_INVAL_DATA a guest's kernel drops the pages of a file, and the list of a directory, when size or
        mtime are others than it has (fuse_change_attributes(), fuse_readdir_cached()). They may be the same after a
        change: one within the same tick of the host's clock, or of a file system's that counts seconds, or with an
        mtime that was set back. Then the mtime is told a few nanoseconds wrong: of a file for a moment; of a directory,
        whose list is compared when it is read the next time, until it changes. It
        is compared with the mtime of when it was read, and others may have been told since: while the list is old, that
        one is not told again.

        What the table says counts whatever the times say. Only of what nobody watched can they alone tell.

        Args:
            compared: the guest compares; it does not do so with the reply of a SETATTR.
        """
        cdef bint same_mtime
        if not self.shared or self.aware or self.leases is None or inode.type not in (S_IFREG, S_IFDIR):
            return True
        same_mtime = inode.reported_stamp != 0 and same(&inode.reported_mtime, &stx.stx_mtime)
        if not same_mtime and inode.type == S_IFDIR:
            inode.mtime_skew = 0
            if not later(&stx.stx_mtime, &inode.latest_mtime) and is_list_old(self, inode):
                # Set back, or by a coarse clock or one that was set back: it may have been told before.
                self.force_invalidation(inode)
        if (
            compared
            and same_mtime
            # Whatever the size is: the guest may know it by a write of its own that was not told.
            and (is_known_changed(self, inode) or may_have_changed(self, inode, stx))
        ):
            self.force_invalidation(inode)
        inode.reported_stamp = self.reported_by
        inode.reported_mtime, inode.reported_ctime = stx.stx_mtime, stx.stx_ctime
        inode.reported_racy = age_ns(self, stx.stx_ctime.tv_sec, stx.stx_ctime.tv_nsec) < (
            COARSE_NS if is_coarse(&stx.stx_ctime) else RACY_NS
        )
        if inode.type == S_IFDIR:
            note_shown(inode)
            if same(&inode.shown_mtime, &inode.listed_mtime) and is_list_old(self, inode):
                self.force_invalidation(inode)
                note_shown(inode)
        return inode.mtime_skew == 0 or skew_mtime(inode, attr, compared)

    cdef bint is_watched(self, const inode_t *inode) noexcept:
        """Whether the host watch sees changes of the data of a file, or of the list of a directory."""
        if self.watcher is None or inode.watch == WATCHED:
            return True
        return inode.type != S_IFDIR and inode.parent_watch_epoch == self.epoch

    cdef bint is_stale(self, const inode_t *inode) noexcept:
        """Whether the guest may have pages that are older than what it is told now."""
        return (
            self.shared
            and not self.aware
            and self.leases is not None
            and (inode.mtime_skew != 0 or has_new_data(self, inode))
        )

    cdef void force_invalidation(self, inode_t *inode) noexcept:
        """Let the guest drop the pages of a file, or the list of a directory."""
        if inode.type == S_IFDIR:
            # Going on from where it was, not from 0.
            inode.last_skew = inode.last_skew % MTIME_SKEW_MAX + 1
            inode.mtime_skew = inode.last_skew
        else:
            inode.mtime_skew = inode.mtime_skew % MTIME_SKEW_MAX + 1
        inode.mtime_skew_until = 0


cdef bint has_new_data(Validity self, const inode_t *inode) noexcept:
    """Whether the data may have changed since the guest was told attributes."""
    return is_known_changed(self, inode) or (inode.reported_stamp != 0 and was_blind(self, inode.reported_stamp))


cdef bint is_known_changed(Validity self, const inode_t *inode) noexcept:
    """Whether the table says that the data has changed since the guest was told attributes."""
    return inode.reported_stamp != 0 and (
        lt_data_since(&self.leases.lt, inode.slot, inode.reported_stamp)
        # Somebody stores into it; a guest that maps files has no pages of its own.
        or (vt_is_pinned(&self.table.vt, inode.slot) and not self.maps)
    )


cdef bint is_list_old(Validity self, const inode_t *inode) noexcept:
    """Whether a directory may have changed since the guest read its list."""
    return inode.listed_stamp != 0 and (
        lt_data_since(&self.leases.lt, inode.slot, inode.listed_stamp)
        or was_blind(self, inode.listed_stamp)
        or is_unwatched(inode)
    )


cdef void note_shown(inode_t *inode) noexcept:
    """Keep the mtime of a directory as it is told now, and the latest ever."""
    inode.shown_mtime = inode.reported_mtime
    inode.shown_mtime.tv_nsec += mtime_error(inode, inode.shown_mtime.tv_nsec)
    if later(&inode.shown_mtime, &inode.latest_mtime):
        inode.latest_mtime = inode.shown_mtime


cdef bint may_have_changed(Validity self, const inode_t *inode, const statx_t *stx) noexcept:
    """Whether the data may have changed with nobody watching since the guest was told attributes.

    A ctime cannot be set: the same one is no change, but for one in the same tick. After a blind time, which is rare,
    one in whole seconds proves nothing: the host's clock may have been set back.
    """
    cdef bint maybe = inode.reported_racy or not same(&inode.reported_ctime, &stx.stx_ctime)
    return (maybe and is_unwatched(inode)) or (
        (maybe or is_coarse(&stx.stx_ctime)) and was_blind(self, inode.reported_stamp)
    )


cdef bint was_blind(Validity self, uint64_t stamp) noexcept:
    """Whether anything may have changed since a stamp: events were lost, or coherenced was away and has come back.

    While it is away nobody would be told of an end.
    """
    cdef uint64_t floor = vt_load(&self.table.vt, VT_WORD_FLOOR)
    return floor > stamp and not vt_distrusted(floor)


cdef bint is_unwatched(const inode_t *inode) noexcept:
    """Whether the host watch sees no changes of the data of a file, or of the list of a directory."""
    return inode.watch == REFUSED or (inode.type != S_IFDIR and inode.parent_unwatched)


cdef bint skew_mtime(inode_t *inode, fuse_attr *attr, bint compared) noexcept:
    """Tell a wrong mtime, unless it was told for long enough; false where the guest must ask again."""
    cdef uint64_t now
    if inode.type != S_IFDIR:
        now = lt_now()
        if inode.mtime_skew_until == 0 and compared:
            inode.mtime_skew_until = now + MTIME_SKEW_US
        elif inode.mtime_skew_until != 0 and now >= inode.mtime_skew_until:
            inode.mtime_skew = 0
            return True
    attr.mtimensec += mtime_error(inode, attr.mtimensec)
    return inode.type == S_IFDIR


cdef int mtime_error(const inode_t *inode, uint32_t nanoseconds) noexcept:
    """What is added to the nanoseconds of an mtime that is told wrong, so that the second stays."""
    return <int>inode.mtime_skew if nanoseconds < 500_000_000 else -<int>inode.mtime_skew


cdef uint64_t known_for(Validity self, watch_t watch) noexcept:
    """For an aware guest, by what the host watch sees."""
    if watch == WATCHED:
        return self.fixed
    return UNWATCHED_NS if watch == REFUSED else 0


cdef watch_t watch_of(Validity self, inode_t *inode, const statx_t *stx) noexcept:
    cdef bint linked = stx.stx_nlink > 1 and inode.type != S_IFDIR
    if self.watcher is None or inode.watch == WATCHED:
        return WATCHED
    if stx.stx_nlink == 0:
        # No directory reports what happens to a file that has no name.
        return REFUSED
    if inode.parent_watch_epoch == self.epoch and not linked:
        return WATCHED
    if inode.type == S_IFDIR or linked:
        self.ask_watch(inode)
    return REFUSED if inode.watch == REFUSED or inode.parent_unwatched else ASKED


cdef uint64_t lease(Validity self, uint64_t hash, int64_t born_sec, int64_t born_nsec, watch_t watch) noexcept:
    """A lease on something of that age, as the validity for the guest; 0 where none can be given."""
    cdef uint64_t now = lt_now(), span
    cdef int64_t age = age_ns(self, born_sec, born_nsec)
    span = lb_quiet_for(lt_bucket(&self.leases.lt, hash), now)
    # A time that is yet to come says nothing: the clock of the file system is another one, or was set back.
    if age >= 0:
        span = min(span, <uint64_t>age // 1000)
    span = min(span // AGE_SHARE, self.lease_max)
    if watch == REFUSED:
        span = min(span, <uint64_t>(UNWATCHED_NS // 1000))
    if span < self.lease_margin + LEAST_LEASE_US:
        return 0
    if not lt_grant(&self.leases.lt, &self.table.vt, hash, self.publisher.journal.backend_id, self.stamp, now, now + span):
        return 0
    if not self.granted:
        self.granted = True
        self.granted_at = now
    self.given += 1
    return (span - self.lease_margin) * 1000


cdef int64_t age_ns(Validity self, int64_t seconds, int64_t nanoseconds) noexcept:
    return realtime_ns() + self.clock_step - (seconds * 1_000_000_000 + nanoseconds)


cdef bint is_coarse(const statx_timestamp *time) noexcept:
    """Whether the file system seems to count whole seconds."""
    return time.tv_nsec == 0


cdef bint later(const statx_timestamp *a, const statx_timestamp *b) noexcept:
    return a.tv_sec > b.tv_sec or (a.tv_sec == b.tv_sec and a.tv_nsec > b.tv_nsec)


cdef bint same(const statx_timestamp *a, const statx_timestamp *b) noexcept:
    return a.tv_sec == b.tv_sec and a.tv_nsec == b.tv_nsec
