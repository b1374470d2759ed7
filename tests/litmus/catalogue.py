"""All litmus tests. docs/development/litmus.md says how to read them."""

from __future__ import annotations

from tests.litmus.litmus import Litmus, Party, Shows, each

NEVER, MAY, MUST = Shows.NEVER, Shows.MAY, Shows.MUST

# Acknowledged, then seen: party 1 makes a change, and says so when it was told that it is done; from then on
# party 2 must see it, whatever it kept.
TOLD = (
    Litmus(
        name="told-content",
        title="A file written in place, read again by name",
        setup=("file f 0",),
        parties=(Party("write f 1", "tell"), Party("await 1", "r0 = read f", warm=["read f"])),
        local=each([1]),
        stale=each([0]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="told-held",
        title="A file written in place, read again through a file that was open before",
        setup=("file f 0",),
        parties=(Party("write f 1", "tell"), Party("await 1", "r0 = pread 0", warm=["open 0 f", "pread 0"])),
        local=each([1]),
        stale=each([0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-size",
        title="A file that grew",
        setup=("file f 1",),
        parties=(
            Party("append f 1", "tell"),
            Party("await 1", "r0 = size f", "r1 = read f", warm=["read f", "size f"]),
        ),
        local=each([2], [11]),
        stale=each([1], [1, 11]) | each([2], [1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-mode",
        title="Permissions",
        setup=("file f 0",),
        parties=(Party("chmod f 600", "tell"), Party("await 1", "r0 = mode f", warm=["mode f"])),
        local=each([600]),
        stale=each([644]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-create",
        title="A name that did not exist, then a file is created",
        setup=(),
        parties=(
            Party("create f 1", "tell"),
            Party("await 1", "r0 = exists f", "r1 = read f", warm=["exists f", "exists f"]),
        ),
        local=each([1], [1]),
        stale=each([0], ["ENOENT", 1]),
        # Neither mode keeps missing names.
        auto=NEVER,
        always=NEVER,
    ),
    Litmus(
        name="told-unlink",
        title="A file removed",
        setup=("file f 0",),
        parties=(Party("unlink f", "tell"), Party("await 1", "r0 = exists f", warm=["exists f"])),
        local=each([0]),
        stale=each([1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-rmdir",
        title="A directory removed",
        setup=("dir d",),
        parties=(Party("rmdir d", "tell"), Party("await 1", "r0 = exists d", warm=["exists d"])),
        local=each([0]),
        stale=each([1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-rename",
        title="A file renamed: the old name is gone, the new one is there",
        setup=("file a 0",),
        parties=(
            Party("rename a b", "tell"),
            Party("await 1", "r0 = exists a", "r1 = exists b", warm=["exists a", "exists b"]),
        ),
        local=each([0], [1]),
        stale=each([1], [0, 1]) | each([0], [0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-rename-directory",
        title="A directory renamed: what is in it moves with it",
        setup=("dir d", "file d/f 0"),
        parties=(
            Party("rename d e", "tell"),
            Party("await 1", "r0 = read d/f", "r1 = read e/f", warm=["read d/f", "exists e"]),
        ),
        local=each(["ENOENT"], [0]),
        stale=each([0], [0, "ENOENT"]) | each(["ENOENT"], ["ENOENT"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-replace",
        title="A file replaced by rename, as editors save",
        setup=("file f 0",),
        parties=(Party("replace f 1", "tell"), Party("await 1", "r0 = read f", warm=["read f"])),
        local=each([1]),
        stale=each([0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-replace-held",
        title="Rename over an open file: the open one stays as it was, the name is the new file",
        setup=("file f 0",),
        parties=(
            Party("replace f 1", "tell"),
            Party("await 1", "r0 = pread 0", "r1 = read f", warm=["open 0 f", "pread 0", "read f"]),
        ),
        local=each([0], [1]),
        stale=each([0], [0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-replace-links",
        title="Rename over an open file: the open one has no link any more",
        setup=("file f 0",),
        parties=(
            Party("replace f 1", "tell"),
            Party("await 1", "r0 = held-links 0", warm=["open 0 f", "held-links 0"]),
        ),
        local=each([0]),
        stale=each([1]),
        auto=MUST,
        always=MUST,
        without_name=True,
    ),
    Litmus(
        name="told-recreate",
        title="A file removed and made anew under its name, while the old one is open",
        setup=("file f 0",),
        parties=(
            Party("unlink f", "create f 1", "tell"),
            Party("await 1", "r0 = read f", "r1 = pread 0", warm=["open 0 f", "pread 0", "read f"]),
        ),
        local=each([1], [0]),
        stale=each([0], [0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-link",
        title="A hard link made, and written through: count and content of the other name",
        setup=("file f 0",),
        parties=(
            Party("link f g", "write g 1", "tell"),
            Party(
                "await 1",
                "r0 = pread 0",
                "r1 = links f",
                "r2 = read g",
                warm=["open 0 f", "pread 0", "links f", "exists g"],
            ),
        ),
        local=each([1], [2], [1]),
        stale=each([0, 1], [1, 2], [0, 1, "ENOENT"]) - each([1], [2], [1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-symlink",
        title="A symbolic link made anew with another target",
        setup=("symlink 1 l",),
        parties=(
            Party("unlink l", "symlink 2 l", "tell"),
            Party("await 1", "r0 = target l", warm=["target l"]),
        ),
        local=each([2]),
        stale=each([1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-truncate",
        title="A file truncated: size, and what an open file reads",
        setup=("file f 1111",),
        parties=(
            Party("truncate f 0", "tell"),
            Party("await 1", "r0 = pread 0", "r1 = size f", warm=["open 0 f", "pread 0", "size f"]),
        ),
        local=each(["ENODATA"], [0]),
        stale=each([1111], [0, 4]) | each(["ENODATA"], [4]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-truncate-extend",
        title="A file truncated and extended to the same size: zeros (EILSEQ), nothing of what it was",
        setup=("file f 1111",),
        parties=(
            Party("truncate f 0", "truncate f 4", "tell"),
            Party("await 1", "r0 = pread 0", "r1 = read f", warm=["open 0 f", "pread 0"]),
        ),
        local=each(["EILSEQ"], ["EILSEQ"]),
        stale=each([1111], [1111, "EILSEQ"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="told-listed",
        title="A new file in a directory's list",
        setup=("dir d", "file d/old 0"),
        parties=(
            Party("create d/n 1", "tell"),
            Party("await 1", "r0 = listed d n", "r1 = exists d/n", warm=["listed d n", "listed d n"]),
        ),
        local=each([1], [1]),
        stale=each([0], [0, 1]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="told-unlisted",
        title="A removed file in a directory's list",
        setup=("dir d", "file d/old 0"),
        parties=(
            Party("unlink d/old", "tell"),
            Party(
                "await 1",
                "r0 = listed d old",
                "r1 = exists d/old",
                warm=["listed d old", "listed d old", "exists d/old"],
            ),
        ),
        local=each([0], [0]),
        stale=each([0, 1], [1]) | each([1], [0]),
        auto=MUST,
        always=MUST,
    ),
)

# Message passing: who sees the second of two changes sees the first.
MESSAGE_PASSING = (
    Litmus(
        name="MP",
        title="Two files written in place; each is looked at once",
        setup=("file data 0", "file flag 0"),
        parties=(
            Party("write data 1", "write flag 1"),
            Party("r0 = read flag", "r1 = read data", warm=["read data"]),
        ),
        local=each([0], [0, 1]) | each([1], [1]),
        stale=each([1], [0]),
        auto=NEVER,
        always=MAY,
    ),
    Litmus(
        name="MP+wait",
        title="The same; party 2 waits for the flag, having kept both",
        setup=("file data 0", "file flag 0"),
        parties=(
            Party("write data 1", "write flag 1"),
            Party("r0 = until 1 read flag", "r1 = read data", warm=["read data", "read flag"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="MP+flag-file",
        title="Flag file: data written, then the flag created",
        setup=("file data 0",),
        parties=(
            Party("write data 1", "create flag 1"),
            Party("r0 = until 1 exists flag", "r1 = read data", warm=["read data", "exists flag"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="MP+held",
        title="Flag file, the data read through a file that was open before",
        setup=("file data 0",),
        parties=(
            Party("write data 1", "create flag 1"),
            Party("r0 = until 1 exists flag", "r1 = pread 0", warm=["open 0 data", "pread 0", "exists flag"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+size",
        title="Flag file, metadata of the data file",
        setup=("file data 1",),
        parties=(
            Party("append data 1", "create flag 1"),
            Party("r0 = until 1 exists flag", "r1 = size data", warm=["size data", "exists flag"]),
        ),
        local=each([1], [2]),
        stale=each([1], [1]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+directories",
        title="A file replaced in one directory, the flag created in another",
        setup=("dir a", "dir b", "file a/data 0"),
        parties=(
            Party("replace a/data 1", "create b/flag 1"),
            Party("r0 = until 1 exists b/flag", "r1 = read a/data", warm=["read a/data", "exists b/flag"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+unlink",
        title="Remove one, create the other",
        setup=("file old 0",),
        parties=(
            Party("unlink old", "create new 1"),
            Party("r0 = until 1 exists new", "r1 = exists old", warm=["exists new", "exists old"]),
        ),
        local=each([1], [0]),
        stale=each([1], [1]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+rename",
        title="One rename: who sees the new name does not see the old one",
        setup=("file a 0",),
        parties=(
            Party("rename a b"),
            Party("r0 = until 1 exists b", "r1 = exists a", warm=["exists a", "exists b"]),
        ),
        local=each([1], [0]),
        stale=each([1], [1]) | each([0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+content-mtime",
        title="One write: who sees the content sees the modification time",
        setup=("file f 0",),
        parties=(
            Party("write f 1"),
            Party("r0 = until 1 read f", "r1 = modified f", warm=["read f", "modified f"]),
        ),
        local=each([1], [1]),
        stale=each([1], [0]) | each([0], ["-"]),
        # Reading makes the access time unknown, and with it all attributes are fetched.
        auto=MAY,
        always=MUST,
    ),
    Litmus(
        name="MP+size-content",
        title="One append: who sees the size sees the content, through an open file too",
        setup=("file f 1",),
        parties=(
            Party("append f 1"),
            Party("r0 = until 2 size f", "r1 = pread 0", warm=["open 0 f", "pread 0", "size f"]),
        ),
        local=each([2], [11]),
        stale=each([1], ["-"]) | each([2], [1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+content-size",
        title="One append: who reads all of it sees the size",
        setup=("file f 1",),
        parties=(
            Party("append f 1"),
            Party("r0 = until 11 read f", "r1 = size f", warm=["read f", "size f"]),
        ),
        local=each([11], [2]),
        stale=each([1], ["-"]) | each([11], [1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="MP+rewrite",
        title="A file truncated and written again, shorter: content, then size",
        setup=("file f 1111",),
        parties=(
            Party("overwrite f 22"),
            Party("r0 = until 22 read f", "r1 = size f", warm=["read f", "size f"]),
        ),
        local=each([22], [2]),
        # EILSEQ: the new content with zeros after it, up to the old size.
        stale=each([22], [0, 4]) | each([1111, "EILSEQ", "ENODATA"], ["-"]),
        auto=MAY,
        always=MUST,
    ),
    Litmus(
        name="MP+replace",
        title="A file replaced by rename is whole at any time: the old or the new one",
        setup=("file f 1111",),
        parties=(
            Party("replace f 22"),
            Party("r0 = read f", "r1 = read f", "r2 = size f", warm=["size f"]),
        ),
        local=each([1111], [1111], [4, 2]) | each([1111, 22], [22], [2]),
        stale=each([1111, 22], [22], [4]),
        auto=MAY,
        always=MAY,
    ),
    Litmus(
        name="MP+listed",
        title="Who sees a new file in the list finds it, with its content",
        setup=("dir d",),
        parties=(
            Party("replace d/n 1"),
            Party("r0 = until 1 listed d n", "r1 = read d/n", warm=["listed d n", "listed d n", "exists d/n"]),
        ),
        local=each([1], [1]),
        stale=each([0], ["-"]) | each([1], ["ENOENT"]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="MP+unlisted",
        title="Who does not see a removed file in the list does not find it",
        setup=("dir d", "file d/old 0"),
        parties=(
            Party("unlink d/old"),
            Party(
                "r0 = until 0 listed d old", "r1 = exists d/old", warm=["listed d old", "listed d old", "exists d/old"]
            ),
        ),
        local=each([0], [0]),
        stale=each([0], [1]) | each([1], ["-"]),
        auto=MUST,
        always=MUST,
    ),
)

# Three parties: what was seen may be passed on.
CAUSALITY = (
    Litmus(
        name="WRC",
        title="Guest 2 sees the change of guest 1 and creates a file; guest 3, which sees that, must see the change",
        setup=("file x 0",),
        parties=(
            Party("write x 1"),
            Party("r0 = until 1 read x", "create y 1"),
            Party("r1 = until 1 exists y", "r2 = pread 0", warm=["open 0 x", "pread 0", "exists y"]),
        ),
        local=each([1], [1], [1]),
        stale=each([1], [1], [0]) | each([0], [0], ["-"]) | each([1], [0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="WRC+told",
        title="The same, told over the side channel",
        setup=("file x 0",),
        parties=(
            Party("write x 1"),
            Party("r0 = until 1 read x", "tell"),
            Party("await 2", "r1 = pread 0", "r2 = read x", warm=["open 0 x", "pread 0"]),
        ),
        local=each([1], [1], [1]),
        stale=each([1], [0], [0, 1]) | each([0], [0, 1], [0, 1]) | each([1], [1], [0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="WRC+unlink",
        title="The same with a name that goes",
        setup=("file x 0",),
        parties=(
            Party("unlink x"),
            Party("r0 = until 0 exists x", "tell"),
            Party("await 2", "r1 = exists x", warm=["exists x"]),
        ),
        local=each([0], [0]),
        stale=each([0], [1]) | each([1], [0, 1]),
        auto=MAY,
        always=MAY,
    ),
    Litmus(
        name="WRC+create",
        title="The same with a name that comes",
        setup=(),
        parties=(
            Party("create x 1"),
            Party("r0 = until 1 exists x", "tell"),
            Party("await 2", "r1 = exists x", "r2 = read x", warm=["exists x", "exists x"]),
        ),
        # Between CREATE and the first write the file is empty.
        local=each([1], [1], ["ENODATA", 1]),
        stale=each([1], [0], ["ENOENT", "ENODATA", 1]) | each([0], [0, 1], ["ENOENT", "ENODATA", 1]),
        auto=MAY,
        always=MAY,
    ),
    Litmus(
        name="ISA2",
        title="Guest 1 changes and flags, guest 2 sees the flag and flags itself, guest 3 sees that",
        setup=("file x 1",),
        parties=(
            Party("append x 1", "create y 1"),
            Party("r0 = until 1 exists y", "create z 1", warm=["exists y"]),
            Party("r1 = until 1 exists z", "r2 = size x", warm=["size x", "exists z"]),
        ),
        local=each([1], [1], [2]),
        stale=each([1], [1], [1]) | each([0], [0], ["-"]) | each([1], [0], ["-"]),
        auto=MUST,
        always=MUST,
    ),
)

# Both change and look.
BOTH_CHANGE = (
    Litmus(
        name="SB",
        title="Store buffering: each writes one file and reads the other's; one must see the other",
        setup=("file x 0", "file y 0"),
        parties=(
            Party("write x 1", "r0 = read y", warm=["read y"]),
            Party("write y 1", "r1 = read x", warm=["read x"]),
        ),
        local=each([0, 1], [0, 1]) - each([0], [0]),
        stale=each([0], [0]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="SB+held",
        title="The same through files that were open before",
        setup=("file x 0", "file y 0"),
        parties=(
            Party("write x 1", "r0 = pread 0", warm=["open 0 y", "pread 0"]),
            Party("write y 1", "r1 = pread 0", warm=["open 0 x", "pread 0"]),
        ),
        local=each([0, 1], [0, 1]) - each([0], [0]),
        stale=each([0], [0]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="SB+unlink",
        title="The same: each removes a file",
        setup=("file x 0", "file y 0"),
        parties=(
            Party("unlink x", "r0 = exists y", warm=["exists y"]),
            Party("unlink y", "r1 = exists x", warm=["exists x"]),
        ),
        local=each([0, 1], [0, 1]) - each([1], [1]),
        stale=each([1], [1]),
        auto=MUST,
        always=MUST,
    ),
    Litmus(
        name="SB+create",
        title="The same: each creates a file",
        setup=(),
        parties=(
            Party("create x 1", "r0 = exists y", warm=["exists y", "exists y"]),
            Party("create y 1", "r1 = exists x", warm=["exists x", "exists x"]),
        ),
        local=each([0, 1], [0, 1]) - each([0], [0]),
        stale=each([0], [0]),
        auto=NEVER,
        always=NEVER,
    ),
    Litmus(
        name="CoRR",
        title="Coherence of reads: what was read is not followed by something older",
        setup=("file f 0",),
        parties=(
            Party("write f 1", "write f 2", "write f 3"),
            Party("r0 = read f", "r1 = read f", "r2 = read f", warm=["read f"]),
        ),
        local=frozenset(f"{a} {b} {c}" for a in range(4) for b in range(a, 4) for c in range(b, 4)),
        stale=frozenset(),
        auto=NEVER,
        always=NEVER,
    ),
    Litmus(
        name="CoRR+names",
        title="The same, through two names and an open file of one inode",
        setup=("file f 0", "link f g"),
        parties=(
            Party("write f 1"),
            Party("r0 = until 1 read f", "r1 = pread 0", "r2 = read g", warm=["read f", "open 0 g", "pread 0"]),
        ),
        local=each([1], [1], [1]),
        stale=each([0], ["-"], ["-"]),
        auto=NEVER,
        always=MUST,
    ),
    Litmus(
        name="CoWR",
        title="Two write one file: what is read after one's own write is not older than that",
        setup=("file f 0",),
        parties=(
            Party("write f 1", "r0 = read f", warm=["read f"]),
            Party("write f 2", "r1 = read f", warm=["read f"]),
        ),
        final=("read f",),
        local=each([1, 2], [2], [2]) | each([1], [1, 2], [1]),
        stale=frozenset(),
        auto=NEVER,
        always=NEVER,
    ),
    Litmus(
        name="append",
        title="Two append to one log: nothing is lost, and told so, each sees all of it",
        setup=("file log 1111",),
        parties=(
            Party(
                "append log 2222",
                "append log 2222",
                "append log 2222",
                "tell",
                "await 2",
                "r0 = size log",
                warm=["size log"],
            ),
            Party(
                "append log 3333",
                "append log 3333",
                "append log 3333",
                "tell",
                "await 1",
                "r1 = size log",
                warm=["size log"],
            ),
        ),
        final=("size log",),
        local=each([28], [28], [28]),
        stale=each(range(4, 29, 4), range(4, 29, 4), [28]) - each([28], [28], [28]),
        auto=MAY,
        always=MAY,
    ),
    Litmus(
        name="mkdirs",
        title="Two make the same directories, as mkdir -p, and a file in them",
        setup=(),
        parties=(
            Party(
                "r0 = mkdirs a/b/c",
                "r1 = create a/b/c/1 1",
                "tell",
                "await 2",
                "r2 = exists a/b/c/2",
                warm=["exists a"],
            ),
            Party(
                "r3 = mkdirs a/b/c",
                "r4 = create a/b/c/2 1",
                "tell",
                "await 1",
                "r5 = exists a/b/c/1",
                warm=["exists a"],
            ),
        ),
        final=("exists a/b/c/1", "exists a/b/c/2"),
        local=each([0], [0], [1], [0], [0], [1], [1], [1]),
        stale=frozenset(),
        auto=NEVER,
        always=NEVER,
    ),
    Litmus(
        name="rmdir-create",
        title="One removes a directory, one creates a file in it: one of them fails",
        setup=("dir d",),
        parties=(
            Party("r0 = rmdir d", warm=["exists d"]),
            Party("r1 = create d/f 1", warm=["exists d", "exists d/f"]),
        ),
        final=("exists d/f",),
        local=each([0], ["ENOENT"], [0]) | each(["ENOTEMPTY"], [0], [1]),
        stale=frozenset(),
        auto=NEVER,
        always=NEVER,
    ),
)


def _lock(
    name: str,
    title: str,
    taking: str,
    giving: str,
    refusal: str,
    *,
    setup: tuple[str, ...] = (),
    add: str = "increment",
) -> Litmus:
    """Two parties take a lock twice each and add one to a counter: no increment is lost.

    `taking` and `giving` may name the party as {0}; `refusal` is the error of who does not get the lock.
    """

    def party(number: int) -> Party:
        take, give = taking.format(number), giving.format(number)
        first, second = 2 * number - 2, 2 * number - 1
        return Party(
            f"r{first} = until 0 {take}", f"{add} counter", give,
            f"r{second} = until 0 {take}", f"{add} counter", give,
        )  # fmt: skip

    local = each([0], [0], [0], [0], [4])
    gave_up = [("0", "0"), ("0", refusal), (refusal, "-")]
    stale = frozenset(f"{' '.join(a)} {' '.join(b)} {n}" for a in gave_up for b in gave_up for n in range(5))
    return Litmus(
        name=name,
        title=title,
        setup=("file counter 0000", *setup),
        parties=(party(1), party(2)),
        final=("read counter",),
        local=local,
        stale=stale - local,
        # It takes some luck that the two are in each other's way.
        auto=MAY,
        always=MAY,
    )


# Mutual exclusion without fcntl.
LOCKS = (
    _lock("lock-create", "O_EXCL as a lock", "create lock 1", "unlink lock", "EEXIST"),
    _lock("lock-mkdir", "mkdir as a lock", "mkdir lock", "rmdir lock", "EEXIST"),
    _lock(
        "lock-link",
        "link as a lock",
        "link mine.{0} lock",
        "unlink lock",
        "EEXIST",
        setup=("file mine.1 0", "file mine.2 0"),
    ),
    _lock(
        "lock-rename",
        "A token, which who renames it has",
        "rename token mine.{0}",
        "rename mine.{0} token",
        "ENOENT",
        setup=("file token 0",),
    ),
    _lock(
        "lock-replace",
        "mkdir as a lock; the counter is replaced by rename",
        "mkdir lock",
        "rmdir lock",
        "EEXIST",
        add="increment-by-replace",
    ),
)

GROUPS: dict[str, tuple[Litmus, ...]] = {
    "Acknowledged, then seen": TOLD,
    "Message passing": MESSAGE_PASSING,
    "Causality": CAUSALITY,
    "Both change": BOTH_CHANGE,
    "Locks": LOCKS,
}
ALL = tuple(test for group in GROUPS.values() for test in group)
