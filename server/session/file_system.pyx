# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The share as one guest sees it: its inodes and open files, what it may cache, and what its changes announce.

The operations are in server.operations; all of them work on this.
"""

from libc.errno cimport EBADF, EINVAL, ENOMEM, ESTALE
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.fcntl cimport F_GETFL, O_ACCMODE, O_APPEND, O_RDONLY, O_RDWR, O_WRONLY, fcntl
from posix.unistd cimport close

from coherent_vfs.coherence.shm.leases cimport Leases
from coherent_vfs.coherence.shm.table cimport Journal, Table
from coherent_vfs.server.caching.publishing cimport PARK, Publisher, change_t
from coherent_vfs.server.passthrough.implicit_handles cimport DataFiles
from coherent_vfs.server.fuse.wire cimport fuse_attr_out, fuse_entry_out, fuse_open_out
from coherent_vfs.server.passthrough.handle_table cimport HandleTable, handle_t
from coherent_vfs.server.passthrough.inode_table cimport InodeTable, inode_t
from coherent_vfs.server.host.libc cimport AT_SYMLINK_NOFOLLOW, STATX_WANTED, S_IFDIR, S_IFMT, S_IFREG, statx, statx_t
from coherent_vfs.server.caching.readdir_policy cimport Listings
from coherent_vfs.server.passthrough.lookup cimport Lookups
from coherent_vfs.server.dax.mapped_files cimport MappedFiles
from coherent_vfs.server.session.replies cimport Replies
from coherent_vfs.server.caching.validity cimport Validity

import contextlib

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.server.host import credentials
from coherent_vfs.server.host.errors import error as error_of
from coherent_vfs.server.session.init import negotiate
from coherent_vfs.server.fuse.protocol import InitFlag, OpenFlag
from coherent_vfs.server.caching.parking import Parked

log = get_logger(__name__)

cdef uint32_t DIRECT_IO = int(OpenFlag.DIRECT_IO)


cdef class FileSystem:
    """One guest's session on one share.

    Args:
        settings: server.settings.Settings; its root_fd is duplicated.
        table: the version table of the domain, writable, or None without one.
        journal: where changes are announced; goes with the table.
        leases: the lease table; goes with the table.

    Raises:
        UserError: /proc is not there.
        OSError: the root of the share cannot be read.
    """

    def __cinit__(self, settings, Table table=None, Journal journal=None, Leases leases=None):
        self.settings = settings
        self.readonly = settings.readonly
        self.xattr = settings.xattr
        self.writeback = settings.writeback
        self.allow_direct_io = settings.allow_direct_io
        self.table = table
        self.publisher = Publisher(table, journal, leases)
        self.validity = Validity(settings, table, leases, self.publisher)
        self.listings = Listings(settings)
        self.handles = HandleTable()
        self.inodes = InodeTable(settings.root_fd, table, self.handles)
        self.lookups = Lookups(self.inodes, settings.writeback)
        self.data_files = DataFiles(self.handles, self.inodes.max_open)
        self.mapped = MappedFiles(settings, self.lookups, self.publisher, self.validity)
        self.replies = Replies(self.validity, self.mapped, settings.writeback)
        self.adopt_policy()

    def reset(self) -> None:
        """End the guest's session: nothing that it opened or looked up remains."""
        self.mapped.reset()
        self.data_files.clear()
        self.handles.clear()
        self.inodes.clear()
        if self.validity.watcher is not None:
            # A directory that stays watched keeps its file system from being unmounted.
            self.inodes.unwatch()
            self.validity.watcher.unwatch()
        self.initialized = False
        self.opens_nothing = False
        self.interrupted_count = 0
        self.aware = False
        self.adopt_policy()

    def adopt_policy(self) -> None:
        """Take from the settings what the guest may cache, now that it is known to be aware or not."""
        policy = self.settings.policy(aware=self.aware)
        self.validity.adopt(policy.timeout, self.aware)
        self.listings.adopt(self.aware)
        self.file_flags = int(policy.file_flags)
        self.directory_flags = int(policy.directory_flags)

    def initialize(self, body: bytes) -> bytes:
        """Answer an INIT: a new session begins, whatever was before; the encoded fuse_init_out."""
        self.reset()
        agreement = negotiate(body, self.settings, dax=self.mapped.window is not None)
        self.initialized = True
        self.opens_nothing = InitFlag.NO_OPEN_SUPPORT in agreement.flags
        # Since Linux 6.0 it is the guest's kernel that takes set-group-id from what a user makes who is not in the
        # group (mode_strip_sgid() in fs/inode.c). Linux 6.1 has 7.37.
        self.guest_strips_sgid = agreement.minor >= 37
        log.info("guest attached", tag=self.settings.tag, fuse=f"7.{agreement.minor}", flags=hex(agreement.flags))
        return agreement.reply

    def prove_aware(self, value: bytes) -> None:
        """The guest quotes the domain's id from the table's header: it has the table mapped and checks it.

        Raises:
            PermissionError: the value is wrong, or there is no table or another cache mode.
        """
        if self.table is None or self.settings.cache != "shared" or value != self.table.domain:
            raise PermissionError(1, "not the domain of this share")
        self.aware = True
        self.adopt_policy()
        log.info("guest checks the version table", tag=self.settings.tag)

    @property
    def requests(self) -> dict[int, int]:
        """How many requests of each opcode were served since the start."""
        return {opcode: self.counters[opcode] for opcode in range(64) if self.counters[opcode]}

    # --- for the operations in Python -------------------------------------------------------------

    @property
    def window(self):
        """The guest's DAX window, if it has one: server.dax.window.Window."""
        return self.mapped.window

    def fd(self, nodeid: int) -> int:
        """The O_PATH descriptor of an inode; OSError(ESTALE) where the guest was not given it."""
        return live(self, nodeid).fd

    def handle_fd(self, nodeid: int, fh: int, writable: bool = False) -> int:
        """The descriptor of an open handle; OSError(EBADF) where the inode has no such handle.

        Args:
            writable: what a guest that opens nothing, and so has fh 0, is going to do with it. Such a descriptor
                is without O_APPEND, with which nothing can be copied to it: the guest's kernel minds its own.
        """
        cdef handle_t *handle = NULL
        cdef int error = self.open_file(nodeid, fh, writable, &handle)
        if error:
            raise error_of(error)
        if writable:
            self.handles.set_flags(handle, handle.flags & ~O_APPEND)
        return handle.fd

    def entry(self, parent: int, name: bytes) -> bytes:
        """Look a name up, counting the lookup: the encoded fuse_entry_out."""
        cdef inode_t *found = NULL
        cdef statx_t stx
        cdef int error = self.lookups.look_up(live(self, parent), name, &found, &stx)
        if error:
            raise error_of(error)
        return encode_entry(self, live(self, parent), found, &stx, name)

    def entry_fd(self, fd: int, parent: int = 0, name: bytes = b"") -> bytes:
        """Look up the inode that a descriptor is open on; the descriptor stays the caller's.

        Args:
            parent, name: the name that it has just got, if it has one.
        """
        cdef inode_t *found = NULL
        cdef statx_t stx
        cdef int path_fd = self.lookups.path_fd(fd)
        cdef int error = self.lookups.adopt(path_fd, &found, &stx) if path_fd >= 0 else -path_fd
        if error:
            raise error_of(error)
        if not parent:
            # No name but the one that the guest may give it.
            found.unnamed = True
        return encode_entry(self, live(self, parent) if parent else NULL, found, &stx, name)

    def attr_out(self, nodeid: int) -> bytes:
        """The attributes of an inode after a SETATTR: an encoded fuse_attr_out."""
        cdef fuse_attr_out out
        cdef int error = self.replies.fill_attr_out(&out, live(self, nodeid), False)
        if error:
            raise failure(error)
        return (<char *>&out)[:sizeof(out)]

    def is_stale(self, nodeid: int) -> bool:
        """Whether the data of an inode may have changed since the guest was told its attributes."""
        return self.validity.is_stale(live(self, nodeid))

    def force_invalidation(self, nodeid: int) -> None:
        """Have the guest drop the pages of an inode, as soon as it asks for its attributes."""
        self.validity.force_invalidation(live(self, nodeid))

    def reopen(self, nodeid: int, flags: int) -> int:
        """Open an inode anew, with these open(2) flags: a descriptor that the caller closes."""
        cdef int fd = self.lookups.reopen_fd(live(self, nodeid), flags)
        if fd < 0:
            raise error_of(-fd)
        return fd

    def open_handle(self, nodeid: int, fd: int) -> bytes:
        """Make an open handle of a descriptor, which it takes: an encoded fuse_open_out."""
        cdef fuse_open_out out
        cdef int error
        memset(&out, 0, sizeof(out))
        error = self.hand_out(live(self, nodeid), fd, fcntl(fd, F_GETFL), &out.fh)
        if error:
            raise error_of(error)
        out.open_flags = self.flags_of(live(self, nodeid))
        return (<char *>&out)[:sizeof(out)]

    def reaches(self, nodeid: int, size: int) -> None:
        """A file is about to have at least this size; Parked until what the guest has mapped of it is the file."""
        cdef int error = self.mapped.reach(live(self, nodeid), size)
        if error:
            raise failure(error)

    @contextlib.contextmanager
    def truncating(self, unique: int, nodeid: int, size: int):
        """A block in which a request gives a file a size: nobody has mapped what is beyond.

        Raises:
            Parked: on entry.
            OSError: on entry: nobody can be asked.
        """
        cdef inode_t *inode = live(self, nodeid)
        cdef int error = self.mapped.reach(inode, size)
        if error:
            # What it waits for may be another's truncation of this file, which is not over before ours is.
            self.mapped.end_truncation(unique)
            raise failure(error)
        error = self.mapped.begin_truncation(unique, inode, size)
        if error:
            raise failure(error)
        try:
            yield
        except Parked:
            # It begins again, and nobody maps that meanwhile.
            raise
        except BaseException:
            self.mapped.end_truncation(unique)
            raise
        else:
            self.mapped.end_truncation(unique)

    def confirm_truncation(self, unique: int) -> None:
        """In the block of truncating(), right before the system call: Parked where others may have mapped the file
        since."""
        cdef int error = self.mapped.confirm_truncation(unique)
        if error:
            raise failure(error)

    def reached(self, nodeid: int) -> int:
        """The largest size of a file that the guest may know of."""
        cdef inode_t *inode = self.inodes.record(nodeid)
        return 0 if inode == NULL else inode.reached

    def reported_again(self, nodeid: int, size: int) -> None:
        """The guest was told sizes so often since it knew of a larger one that it goes by this one."""
        cdef inode_t *inode = self.inodes.record(nodeid)
        if inode != NULL:
            inode.reached = size

    def revoked_beyond(self, nodeid: int, size: int | None) -> None:
        """Note that the guest has scratch mappings of a file beyond this size; None: it has none."""
        cdef inode_t *inode = self.inodes.record(nodeid)
        if inode == NULL:
            return
        if size is None:
            inode.revoked = 0
        elif inode.revoked == 0 or <uint64_t>size + 1 < inode.revoked:
            inode.revoked = <uint64_t>size + 1

    def wake(self) -> None:
        """Look at parked requests again, whenever they are due."""
        self.woken = True

    def watched(self, nodeid: int, ok: bool) -> None:
        """The host watch answers what it was asked for an inode."""
        self.inodes.watched(nodeid, ok)
        if self.awaiting:
            self.awaiting = False
            self.wake()

    def credentials(self, uid: int, gid: int):
        """A block in which things are created as this user."""
        return credentials.acting_for(uid, gid)

    def without_fsetid(self):
        """A block in which changes clear set-user-id and set-group-id bits."""
        return credentials.without_fsetid()

    @contextlib.contextmanager
    def changing(self, *, inodes=(), names=(), data=False):
        """A block that changes things: announced on entry, bumped on exit, also when the change failed.

        Args:
            inodes: node ids whose attributes, data or listing change.
            data: whether the data of these changes, if they are files.
            names: (node id of the directory, name) of each entry that appears, disappears or changes. The inodes
                behind them, before and after, count as changed as well.

        Raises:
            Parked: on entry.
        """
        cdef change_t change
        cdef inode_t *inode
        cdef inode_t *parent
        if self.table is None:
            yield
            return
        memset(&change, 0, sizeof(change))
        for nodeid, name in names:
            self.publisher.add_name(&change, live(self, nodeid).slot, name, len(name))
        for nodeid in inodes:
            inode = live(self, nodeid)
            self.publisher.add_known(&change, inode, data or (names and inode.type == S_IFDIR))
        for nodeid, name in names:
            add_occupant(self, &change, live(self, nodeid), name, True)
        if self.publisher.begin(&change) == PARK:
            raise Parked
        try:
            yield
        finally:
            try:
                for nodeid, name in names:
                    # Without its directory nobody else can have told the guest what is there now.
                    parent = self.inodes.get(nodeid)
                    if parent != NULL:
                        add_occupant(self, &change, parent, name, False)
            finally:
                # Whatever happened: others wait for it.
                self.publisher.commit(&change)
                self.validity.end_change()

    # --- for the compiled operations --------------------------------------------------------------

    cdef bint awaits_watch(self, const inode_t *directory) noexcept:
        """Whether a request is to be parked, as what it tells of a directory can be kept in a moment."""
        if self.publisher.abandoning or not self.validity.awaits_watch(directory):
            return False
        self.awaiting = True
        self.publisher.due = directory.watch_due
        return True

    cdef int open_file(self, uint64_t nodeid, uint64_t fh, bint writable, handle_t **file) noexcept:
        """The handle for a request on an open file: 0 or an errno."""
        cdef inode_t *inode
        cdef int fd, flags
        file[0] = self.handles.get(nodeid, fh)
        if file[0] != NULL:
            return 0
        if fh != 0 or not self.opens_nothing:
            return EBADF
        inode = self.inodes.get(nodeid)
        if inode == NULL:
            return ESTALE
        if inode.type != S_IFREG:
            return EINVAL
        file[0] = self.data_files.find(inode, writable)
        if file[0] == NULL:
            flags = O_RDWR if writable else O_RDONLY
            fd = self.lookups.reopen_fd(inode, flags)
            if fd < 0:
                return -fd
            file[0] = self.data_files.keep(inode, fd, flags)
        return 0 if file[0] != NULL else ENOMEM

    cdef uint32_t flags_of(self, const inode_t *inode) noexcept:
        """The FOPEN flags for an inode."""
        if self.aware and not self.validity.is_watched(inode):
            # Pages and lists that it keeps would be good until the table says otherwise.
            return 0 if inode.type == S_IFDIR else DIRECT_IO
        return self.directory_flags if inode.type == S_IFDIR else self.file_flags

    cdef int hand_out(self, inode_t *inode, int fd, int flags, uint64_t *fh) noexcept:
        """Give the guest a descriptor, which this takes and which is open with these flags, by an fh: 0 or an errno.

        A guest that opens nothing does not release what it gets by CREATE either: it has fh 0.
        """
        cdef handle_t *handle
        if not self.opens_nothing or inode.type != S_IFREG:
            handle = self.handles.open(inode.nodeid, fd, flags)
            if handle == NULL:
                return ENOMEM
            fh[0] = handle.fh
            self.inodes.keep_to_limit()
            return 0
        fh[0] = 0
        if flags & O_ACCMODE == O_WRONLY:
            # Whatever file of the guest's sends its requests may want to read.
            close(fd)
        else:
            self.data_files.keep(inode, fd, flags)
        return 0

    cdef void name_removed(self, const statx_t *stx) noexcept:
        """A name of this inode is gone: if it was the last one, its blocks are to be freed."""
        cdef inode_t *inode = self.inodes.find(stx)
        if inode != NULL:
            self.data_files.unlinked(inode)
            self.inodes.drop_if_idle(inode)

    cdef void make_space(self) noexcept:
        """The share is full: let go of what the guest has forgotten, which others may have deleted since."""
        self.inodes.drop_all_idle()

    cdef void interrupt(self, uint64_t unique) noexcept:
        """The guest gives up waiting for a request."""
        if self.interrupted_count < INTERRUPTED_MAX:
            self.interrupted[self.interrupted_count] = unique
            self.interrupted_count += 1

    cdef int end(self, uint64_t unique):
        """The guest ends its session: 0, or PARK."""
        if self.mapped.end_session(unique) == PARK:
            return PARK
        self.reset()
        return 0


cdef inode_t *live(FileSystem fs, uint64_t nodeid) except NULL:
    cdef inode_t *inode = fs.inodes.get(nodeid)
    if inode == NULL:
        raise error_of(ESTALE)
    return inode


cdef object failure(int error):
    return Parked() if error == PARK else error_of(error)


cdef bytes encode_entry(FileSystem fs, inode_t *parent, inode_t *inode, const statx_t *stx, bytes name):
    cdef fuse_entry_out entry
    memset(&entry, 0, sizeof(entry))
    fs.replies.fill_entry(&entry, parent, inode, stx, name, len(name))
    return (<char *>&entry)[:sizeof(entry)]


cdef void add_occupant(
    FileSystem fs, change_t *change, const inode_t *parent, const char *name, bint before
) noexcept:
    """Count the inode behind a name as changed, if there is one; before: the change, or after it."""
    cdef statx_t stx
    if statx(parent.fd, name, AT_SYMLINK_NOFOLLOW, STATX_WANTED, &stx) == 0:
        fs.publisher.add_inode(change, fs.inodes.hash_of(&stx), (stx.stx_mode & S_IFMT) == S_IFDIR)
        if before:
            fs.lookups.hold(&stx)
        else:
            fs.lookups.release(&stx)
