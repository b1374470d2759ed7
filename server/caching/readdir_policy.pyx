# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""When a stock guest in shared keeps the list of a directory, and when its list brings attributes.

Such a guest reads directories by READDIRPLUS only (server.session.init): the answer says of each entry whether it has
attributes, and with them leases.

- A list brings attributes, so that a walk (find, ls -l, tar) need not ask for the files one by one. When these leases
  are over the guest drops its list and reads the directory anew. Until then it reads the list that it has.
- Where files of a directory are looked up by name, and not because it was listed (git status looks up what its index
  names), the list has names only, and the guest keeps it for as long as the directory does not change.
- Where programs list names and do not look at the files (find -name, ls), lists have names only, too. We are not asked
  for attributes that came with a list, so now and then one file of a list goes without, as a probe: who looks at the
  files asks for it. When several probes in a row were not asked for, all lists have names only, until a file is looked
  up because of a list.

Directories have their attributes in any list: who walks through a tree goes into them.

A LOOKUP is taken for one because of a list if its directory was the last one that was opened. Directories are looked up
by whoever goes through them, and what is missing has no attributes: these say nothing.

What is kept is right in any case: the guest compares the directory's mtime (docs/concepts/leases.md).
"""

from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.coherence.shm.leases cimport lt_now
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport DT_REG, S_IFDIR

from coherent_vfs.server.fuse.protocol import OpenFlag

cdef enum:
    PROBES = 4             # that nobody asks for until lists have names only
    RESTS = 7              # lists without a probe after one that was asked for

cdef uint32_t KEEP_CACHE = int(OpenFlag.KEEP_CACHE)


cdef class Listings:
    """What one guest does with its directories.

    Args:
        settings: server.settings.Settings.
    """

    def __cinit__(self, settings):
        self.span = max(0, round((settings.lease_max - settings.lease_margin) * 1_000_000))
        self.shared = settings.cache == "shared"

    def adopt(self, aware: bool) -> None:
        """The session begins, or the guest has proved that it checks the table: then it needs no leases."""
        self.chooses = self.shared and not aware
        self.opened = self.rests = self.unanswered = 0
        self.probes = self.awaits = False

    cdef uint32_t open(self, inode_t *inode, uint32_t flags) noexcept:
        """An OPENDIR: the flags that answer it, of those that the cache policy has for directories."""
        self.opened = inode.nodeid
        if self.chooses and self.brings(inode) and inode.listed_at and lt_now() - inode.listed_at >= self.span:
            return flags & ~KEEP_CACHE
        return flags

    cdef void looked_up(self, inode_t *parent, const inode_t *inode) noexcept:
        """A LOOKUP found an inode."""
        if inode.type == S_IFDIR:
            return
        if inode.ino == parent.probe:
            parent.probe = 0
        else:
            parent.singly = parent.nodeid != self.opened
            if parent.singly:
                return
        self.rests = RESTS
        self.unanswered = 0
        self.probes = self.awaits = False

    cdef bint brings(self, const inode_t *inode) noexcept:
        """Whether the list of a directory brings attributes of its files."""
        return not self.chooses or (self.span != 0 and not inode.singly and self.unanswered < PROBES)

    cdef void begin(self, inode_t *inode) noexcept:
        """A READDIRPLUS of a directory, from its beginning."""
        inode.listed_at = lt_now()
        self.unanswered += self.awaits
        self.awaits = False
        if not self.chooses or not self.brings(inode):
            self.probes = False
        elif self.rests:
            self.rests -= 1
        else:
            self.probes = True

    cdef bint tries(self, inode_t *parent, uint64_t ino, unsigned type) noexcept:
        """Whether an entry, of an inode that the guest does not know yet, goes without attributes as a probe."""
        if not self.probes or type != DT_REG:
            return False
        parent.probe = ino
        self.probes = False
        self.awaits = True
        return True
