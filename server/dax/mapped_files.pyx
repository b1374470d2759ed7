# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""What a request has to do before it changes or reports the size of a mapped file (docs/concepts/dax.md).

The mappings themselves are in server.dax.window. Without DAX all of this does nothing.
"""

from libc.errno cimport EIO, ENOENT
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.fcntl cimport O_RDONLY
from posix.unistd cimport close

from coherent_vfs.coherence.shm.leases cimport lt_now
from coherent_vfs.server.caching.publishing cimport PARK, Publisher, change_t
from coherent_vfs.server.passthrough.inode_table cimport ABSENT, PRESENT, UNKNOWN, inode_t
from coherent_vfs.server.host.libc cimport S_IFREG, has_dax_flag, statx_t
from coherent_vfs.server.passthrough.lookup cimport Lookups
from coherent_vfs.server.caching.validity cimport Validity

from coherent_vfs.server.fuse.protocol import AttrFlag

cdef enum:
    WOKEN_US = 50_000          # after which a request that somebody wakes is looked at anyway

cdef uint32_t ATTR_DAX = int(AttrFlag.DAX)


cdef class MappedFiles:
    """The mapped files of one guest, for which its requests may have to wait.

    Args:
        settings: server.settings.Settings.
        lookups: opens files.
        publisher: notes until when a request waits.
        validity: is told that the guest maps files.

    Attributes:
        window: server.dax.window.Window, or None.
    """

    def __cinit__(self, settings, Lookups lookups, Publisher publisher, Validity validity):
        self.settings = settings
        self.lookups = lookups
        self.publisher = publisher
        self.validity = validity
        self.dax = DAX_NEVER
        self.dax_min_size = settings.dax_min_size

    def use_window(self, window) -> None:
        """Let the guest map files from now on, in this server.dax.window.Window."""
        self.window = window
        self.validity.maps = True
        self.dax = {"never": DAX_NEVER, "always": DAX_ALWAYS, "inode": DAX_INODE, "auto": DAX_AUTO}[self.settings.dax]

    def advise_no_dax(self) -> None:
        """Nothing new can be mapped: advise the guest against DAX for files that it looks up from now on."""
        self.dax = DAX_NEVER

    def truncate_with(self, truncations) -> None:
        """Ask others before truncations from now on, with this server.dax.truncations.Truncations."""
        self.truncations = truncations

    def reset(self) -> None:
        """End the guest's session."""
        if self.window is not None:
            self.window.begin_session()
        if self.truncations is not None:
            self.truncations.clear()

    cdef uint32_t attr_flags(self, inode_t *inode, const statx_t *stx) noexcept:
        """Whether the guest is to map a file, where it leaves that to us."""
        cdef int fd
        if inode.type != S_IFREG or self.dax == DAX_NEVER or (self.dax == DAX_AUTO and stx.stx_size < self.dax_min_size):
            return 0
        if self.dax == DAX_INODE and inode.dax_flag == UNKNOWN:
            fd = self.lookups.reopen_fd(inode, O_RDONLY)
            inode.dax_flag = PRESENT if fd >= 0 and has_dax_flag(fd) else ABSENT
            if fd >= 0:
                close(fd)
        return 0 if self.dax == DAX_INODE and inode.dax_flag == ABSENT else ATTR_DAX

    cdef int reach(self, inode_t *inode, uint64_t size):
        """The guest is about to be told that a file has this size: 0, or PARK while it has scratch mapped before that
        size, or EINTR if it cannot wait for that."""
        if inode.revoked != 0 and size >= inode.revoked:
            # This ends at once if nothing has to be mapped.
            self.window.restore(inode.nodeid, size)
        if inode.revoked == 0 or size < inode.revoked:
            inode.reached = max(inode.reached, size)
            return 0
        return self.publisher.put_off(lt_now() + WOKEN_US)

    cdef int begin_truncation(self, uint64_t unique, inode_t *inode, uint64_t size):
        """A request is about to truncate a file: 0, an errno, or PARK while others have mappings beyond the new end."""
        cdef change_t change
        # Only regular files are mapped; and opening a FIFO may block for ever.
        if self.truncations is None or inode.type != S_IFREG:
            return 0
        if self.truncations.is_new(unique):
            # Leases first: while this waits for them, others keep their mappings.
            memset(&change, 0, sizeof(change))
            self.publisher.add_known(&change, inode, True)
            if self.publisher.begin(&change) == PARK:
                return PARK
            self.publisher.abort(&change, ENOENT)
        try:
            if self.truncations.begin(unique, inode.nodeid, size):
                return 0
        except OSError as error:
            return error.errno or EIO
        return self.publisher.put_off(lt_now() + WOKEN_US)

    cdef int confirm_truncation(self, uint64_t unique):
        """Right before the system call: 0, or PARK if the result of begin_truncation() is out of date."""
        if self.truncations is None or self.truncations.is_current(unique):
            return 0
        return self.publisher.put_off(lt_now())

    cdef void end_truncation(self, uint64_t unique):
        """The request has truncated the file, or failed."""
        if self.truncations is not None:
            self.truncations.end(unique)

    cdef void forget_request(self, uint64_t unique):
        """A parked request was given up: end everything that was begun for it."""
        if self.window is not None:
            self.window.forget(unique)
        self.end_truncation(unique)

    cdef int end_session(self, uint64_t unique):
        """The guest ends its session: 0, or PARK while something is mapped in its window."""
        # A machine may not survive a device reset while something is mapped (docs/reference/vhost-user.md).
        if self.window is None or self.publisher.abandoning or self.window.emptied(unique):
            return 0
        return self.publisher.put_off(lt_now() + WOKEN_US)
