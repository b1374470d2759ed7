"""The litmus tests of mapped files: loads and stores, alone and mixed with requests (docs/concepts/dax.md).

A file has words of four digits, which a load reads as a number. EILSEQ: zeros; EFAULT: SIGBUS, beyond the end of the
file as far as this party's kernel knows it. "local" is here what guests with DAX may see, and "stale" what those see in
addition that each have pages of their own.
"""

from __future__ import annotations

from tests.litmus.litmus import Litmus, Party, Shows, each

NEVER, MAY, MUST = Shows.NEVER, Shows.MAY, Shows.MUST

# Only loads and stores, and read(2) and write(2), which use the same memory: nobody can have an old copy of it.
MEMORY = (
    Litmus(
        name="told-store-load",
        title="A store, then a load",
        setup=("file f 0000",),
        parties=(
            Party("store-held 0 0 1", "tell", warm=["map 0 f", "load-held 0 0"]),
            Party("await 1", "r0 = load-held 0 0", warm=["map 0 f", "load-held 0 0"]),
        ),
        local=each([1]),
        stale=each([0]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="told-store-read",
        title="A store, then read(2), by name and through a file that was open before",
        setup=("file f 0000",),
        parties=(
            Party("store-held 0 0 1", "tell", warm=["map 0 f", "load-held 0 0"]),
            Party("await 1", "r0 = pread 0", "r1 = read f", warm=["open 0 f", "pread 0"]),
        ),
        local=each([1], [1]),
        stale=each([0], [0, 1]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="told-write-load",
        title="write(2), then a load",
        setup=("file f 0000",),
        parties=(
            Party("write f 0001", "tell"),
            Party("await 1", "r0 = load-held 0 0", "r1 = load f", warm=["map 0 f", "load-held 0 0"]),
        ),
        local=each([1], [1]),
        stale=each([0], [0, 1]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="MP+words",
        title="Message passing by two words of one file",
        setup=("file f 00000000",),
        parties=(
            Party("store-held 0 0 1", "store-held 0 1 1", warm=["map 0 f", "load-held 0 0"]),
            Party("r0 = until 1 load-held 0 1", "r1 = load-held 0 0", warm=["map 0 f", "load-held 0 0"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="MP+mapped-files",
        title="The same by the words of two files; each is looked at once",
        setup=("file data 0000", "file flag 0000"),
        parties=(
            Party("store-held 0 0 1", "store-held 1 0 1", warm=["map 0 data", "map 1 flag"]),
            Party(
                "r0 = load-held 1 0",
                "r1 = load-held 0 0",
                warm=["map 0 data", "load-held 0 0", "map 1 flag", "load-held 1 0"],
            ),
        ),
        local=each([0], [0, 1]) | each([1], [1]),
        stale=each([1], [0]),
        # Nothing makes a page of another guest appear: such guests see the flag as seldom as the data.
        auto=MAY,
        always=MAY,
        memory=True,
    ),
    Litmus(
        name="MP+mapped-files+wait",
        title="The same; party 2 waits for the flag",
        setup=("file data 0000", "file flag 0000"),
        parties=(
            Party("store-held 0 0 1", "store-held 1 0 1", warm=["map 0 data", "map 1 flag"]),
            Party(
                "r0 = until 1 load-held 1 0",
                "r1 = load-held 0 0",
                warm=["map 0 data", "load-held 0 0", "map 1 flag", "load-held 1 0"],
            ),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="MP+store-write",
        title="Data stored, the flag written; the data read, the flag loaded",
        setup=("file data 0000", "file flag 0000"),
        parties=(
            Party("store-held 0 0 1", "write flag 0001", warm=["map 0 data"]),
            Party(
                "r0 = until 1 load-held 0 0",
                "r1 = pread 1",
                warm=["map 0 flag", "load-held 0 0", "open 1 data", "pread 1"],
            ),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="SB+words",
        title="Store buffering: each stores into one word and loads the other; one must see the other",
        setup=("file f 00000000",),
        parties=(
            Party("store-held 0 0 1", "r0 = load-held 0 1", warm=["map 0 f", "load-held 0 0"]),
            Party("store-held 0 1 1", "r1 = load-held 0 0", warm=["map 0 f", "load-held 0 0"]),
        ),
        local=each([0, 1], [0, 1]) - each([0], [0]),
        stale=each([0], [0]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
    Litmus(
        name="CoRR+words",
        title="Coherence of loads: what was loaded is not followed by something older",
        setup=("file f 0000",),
        parties=(
            Party("store-held 0 0 1", "store-held 0 0 2", "store-held 0 0 3", warm=["map 0 f"]),
            Party(
                "r0 = load-held 0 0",
                "r1 = load-held 0 0",
                "r2 = load-held 0 0",
                warm=["map 0 f", "load-held 0 0"],
            ),
        ),
        local=frozenset(f"{a} {b} {c}" for a in range(4) for b in range(a, 4) for c in range(b, 4)),
        stale=frozenset(),
        auto=NEVER,
        always=NEVER,
        memory=True,
    ),
    Litmus(
        name="false-sharing",
        title="Two store into words of one page: none is lost",
        setup=("file f 00000000",),
        parties=(
            Party("store-held 0 0 1", "tell", "await 2", "r0 = load-held 0 1", warm=["map 0 f", "load-held 0 0"]),
            Party("store-held 0 1 2", "tell", "await 1", "r1 = load-held 0 0", warm=["map 0 f", "load-held 0 0"]),
        ),
        final=("read f",),
        local=each([2], [1], [10002]),
        # Without DAX the page that is written back last wins.
        stale=each([0, 2], [0, 1], [10000, 2, 10002]) - each([2], [1], [10002]),
        auto=MUST,
        always=MUST,
        memory=True,
    ),
)

# Loads and stores, and names and attributes, which guests keep.
NAMES = (
    Litmus(
        name="MP+store-create",
        title="Flag file: data stored, then the flag created",
        setup=("file data 0000",),
        parties=(
            Party("store-held 0 0 1", "create flag 1", warm=["map 0 data"]),
            Party(
                "r0 = until 1 exists flag", "r1 = load-held 0 0", warm=["map 0 data", "load-held 0 0", "exists flag"]
            ),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+store-create+anew",
        title="The same, the data mapped anew by both",
        setup=("file data 0000",),
        parties=(
            Party("store data 1", "create flag 1"),
            Party("r0 = until 1 exists flag", "r1 = load data", warm=["load data", "exists flag"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        # To unmap writes the page back, and to open reads it anew.
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="told-store-stat",
        title="A store, then the modification time",
        setup=("file f 0000",),
        parties=(
            Party("store-held 0 0 1", "tell", warm=["map 0 f", "load-held 0 0"]),
            Party("await 1", "r0 = modified f", "r1 = size f", warm=["modified f"]),
        ),
        local=each([1], [4]),
        stale=each([0], [4]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-store-stat+again",
        title="A store into a page that waits to be written out: the host leaves the modification time as it is",
        setup=("file f 0000",),
        parties=(
            Party("age f", "store-held 0 0 2", "tell", warm=["map 0 f", "store-held 0 0 1"]),
            Party("await 1", "r0 = modified f", "r1 = load-held 0 0", warm=["map 0 f", "load-held 0 0"]),
        ),
        # Another time: the page was just written out.
        local=each([0, 1], [2]),
        stale=each([0, 1], [0, 1]),
        auto=MAY,
        always=MUST,
    ),
    Litmus(
        name="append-load",
        title="One append: who sees the size loads the content",
        setup=("file f 1111",),
        parties=(
            Party("append f 2222"),
            Party("r0 = until 8 size f", "r1 = load-held 0 1", warm=["map 0 f", "load-held 0 0", "size f"]),
        ),
        local=each([8], [2222]),
        stale=each([4], ["-"]) | each([8], ["EILSEQ"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-append-read",
        title="An append, then stat, then read(2) through a file that was open before: all of it",
        setup=("file f 1111",),
        parties=(
            Party("append f 2222", "tell"),
            Party("await 1", "r0 = size f", "r1 = pread 0", warm=["open 0 f", "pread 0", "size f"]),
        ),
        local=each([8], [11112222]),
        stale=each([4], [1111]) | each([8], [1111]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-replace-mapped",
        title="Rename over a mapped file: the mapping stays as it was, the name is the new file",
        setup=("file f 0000",),
        parties=(
            Party("replace f 0001", "tell"),
            Party(
                "await 1",
                "r0 = load-held 0 0",
                "map 1 f",
                "r1 = load-held 1 0",
                "store-held 0 0 2",
                "r2 = load-held 1 0",
                warm=["map 0 f", "load-held 0 0"],
            ),
        ),
        final=("read f",),
        local=each([0], [1], [1], [1]),
        stale=each([0], [0], [2], [1]),
        auto=MUST,
        always=MUST,
    ),
)

# Files that get smaller. Played by guests only: a file that the host cuts off may kill who has it mapped.
SMALLER = (
    Litmus(
        name="told-truncate-load",
        title="Truncated: zeros by the old size, SIGBUS by the new one",
        setup=("file f 1111",),
        parties=(
            Party("truncate f 0", "tell"),
            Party(
                "await 1",
                "r0 = load-held 0 0",
                "r1 = pread 1",
                "r2 = size f",
                "r3 = load-held 0 0",
                warm=["map 0 f", "load-held 0 0", "open 1 f", "pread 1"],
            ),
        ),
        local=each(["EILSEQ", "EFAULT"], ["EILSEQ", "ENODATA"], [0], ["EFAULT"]),
        stale=each([1111], [1111], [0, 4], [1111, "EFAULT"]),
        auto=MUST,
        always=MUST,
        by_host=False,
    ),
    Litmus(
        name="truncate-load",
        title="The same while it happens: all, or zeros, or an error, and never a crash",
        setup=("file f 1111",),
        parties=(
            Party("truncate f 0"),
            Party(
                "r0 = load-held 0 0",
                "r1 = pread 1",
                # -EILSEQ: again and again, until there are zeros.
                "r2 = until -84 load-held 0 0",
                warm=["map 0 f", "load-held 0 0", "open 1 f", "pread 1"],
            ),
        ),
        local=each([1111], [1111], ["EILSEQ", "EFAULT"])
        | each([1111, "EILSEQ", "EFAULT"], ["EILSEQ", "ENODATA"], ["EILSEQ", "EFAULT"]),
        stale=each([1111], [1111, "ENODATA"], [1111]),
        auto=MAY,
        always=MUST,
        by_host=False,
    ),
    Litmus(
        name="told-truncate-part",
        title="Truncated within a page: what is left stays mapped and takes stores, the rest is zeros",
        setup=("file f 11112222",),
        parties=(
            Party("truncate f 4", "tell"),
            Party(
                "await 1",
                "r0 = load-held 0 0",
                "r1 = load-held 0 1",
                "r2 = store-held 0 0 3333",
                warm=["map 0 f", "load-held 0 0"],
            ),
        ),
        final=("read f",),
        local=each([1111], ["EILSEQ"], [0], [3333]),
        # Without DAX the page is written back as far as its guest thinks that the file reaches.
        stale=each([1111], [2222], [0], [3333, 33332222]),
        auto=MUST,
        always=MUST,
        by_host=False,
    ),
    Litmus(
        name="truncate-store",
        title="A store while the file is truncated and made as long again: it is there, or it is gone",
        setup=("file f 1111",),
        parties=(
            Party("truncate f 0", "truncate f 4"),
            Party("r0 = store-held 0 0 2222", warm=["map 0 f", "load-held 0 0"]),
        ),
        final=("read f",),
        local=each([0, "EFAULT"], ["EILSEQ", 2222]),
        stale=frozenset(),
        auto=NEVER,
        always=NEVER,
        by_host=False,
    ),
    Litmus(
        name="told-truncate-store",
        title="Truncated and made as long again: who has asked for the size stores into the file",
        setup=("file f 1111",),
        parties=(
            Party("truncate f 0", "truncate f 4", "tell"),
            Party(
                "await 1",
                "r0 = size f",
                "r1 = load-held 0 0",
                "r2 = store-held 0 0 2222",
                "r3 = load-held 0 0",
                warm=["map 0 f", "load-held 0 0"],
            ),
        ),
        final=("read f",),
        local=each([4], ["EILSEQ"], [0], [2222], [2222]),
        stale=each([4], [1111], [0], [2222], [2222]),
        auto=MAY,
        always=MUST,
        by_host=False,
    ),
)

MAPPED_GROUPS: dict[str, tuple[Litmus, ...]] = {
    "Mapped files: memory": MEMORY,
    "Mapped files: names and attributes": NAMES,
    "Mapped files that get smaller": SMALLER,
}
MAPPED = tuple(test for group in MAPPED_GROUPS.values() for test in group)
