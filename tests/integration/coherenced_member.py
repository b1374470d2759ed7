"""A backend without a guest, which does what its standard input says.

A line is one of: announce SLOTS, clear, bump SLOT, chroot DIRECTORY, leave; and watch PATH, which is answered with
"refused" where coherenced does not watch that.
"""

from __future__ import annotations

import asyncio
import os
import sys

from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.coherence.common import log


async def main(table_path: str, socket_path: str, guest: str, share: str) -> None:
    """Join, then obey until the input ends."""
    log.configure("warn")
    root = os.open(share, os.O_PATH | os.O_DIRECTORY)
    membership = Membership.join(table_path, share_root=root, guest=guest, cache="shared", socket_path=socket_path)
    os.close(root)
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[bool] = asyncio.Queue()
    membership.attach(
        loop,
        lambda: {"requests": 7},
        lambda token, ok: answers.put_nowait(ok),
        lambda: print("forgotten", file=sys.stderr, flush=True),
    )
    print("joined", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        match line.split():
            case ["announce", *slots]:
                membership.journal.announce([int(slot) for slot in slots])
            case ["clear"]:
                membership.journal.clear()
            case ["bump", slot]:
                membership.table.bump(int(slot))
            case ["chroot", directory]:
                os.chroot(directory)
                os.chdir("/")
            case ["leave"]:
                membership.close()
            case ["watch", path]:
                fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
                asked = membership.watch(fd, fd)
                os.close(fd)
                if not asked or not await answers.get():
                    print("refused", flush=True)
                    continue
        print("done", line.strip(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
