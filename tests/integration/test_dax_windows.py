"""DAX windows of backends, given out by a running coherenced."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from coherent_vfs.coherence.client import dax
from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.ctl import main as ctl
from coherent_vfs.coherence.ctl.client import fetch_dax
from coherent_vfs.coherence.protocol.connection import Dropped
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.coherence.protocol.messages import (
    Claim,
    Claimed,
    FromClient,
    Mapping,
    Release,
    Revoked,
    Truncate,
    TruncateGranted,
    Window,
    Windowed,
)
from coherent_vfs.coherence.shm import liveness
from tests.integration.coherenced_process import SECONDS, Coherenced, open_directory
from tests.integration.test_coherenced_hostile import Client, join
from tests.integration.user_guests import Backend

WINDOW = 64 * CHUNK
Value = TypeVar("Value")
ExpectLog = Callable[[str], None]


@pytest.fixture
def coherenced(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as daemon:
        daemon.start("--dax-window", "128M", "--dax-total", "512M")
        yield daemon


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor, open for writing."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 4 * CHUNK)
    yield fd
    os.close(fd)


class Guest:
    """A backend in this process, whose guest maps what the test says. It answers no revocation by itself.

    Attributes:
        revocations: (device, inode, size, done) that it was asked for; resized: files of its Resize messages.
    """

    def __init__(self, coherenced: Coherenced, name: str, window: int = WINDOW) -> None:
        with open_directory(coherenced.directory) as root:
            self.membership = Membership.join(
                str(coherenced.paths.table),
                share_root=root,
                guest=name,
                cache="shared",
                socket_path=str(coherenced.socket),
                window=window,
            )
        self.dax = self.membership.dax
        self.revocations: asyncio.Queue[tuple[int, int, int, Callable[[], None]]] = asyncio.Queue()
        self.resized: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self.dax.attach(lambda *asked: self.revocations.put_nowait(asked), lambda *file: self.resized.put_nowait(file))
        self.membership.attach(asyncio.get_running_loop())

    async def claim(self, fd: int, offset: int, moffset: int | None = None, length: int = CHUNK) -> int:
        """The moffset that was granted. Raises OSError when it was refused."""
        answer: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        status = os.fstat(fd)
        self.dax.claim(
            status.st_dev,
            status.st_ino,
            offset,
            length,
            moffset,
            True,
            lambda moffset, error: answer.set_result((moffset, error)),
        )
        granted, error = await within(answer)
        if error:
            raise OSError(error, os.strerror(error))
        return granted

    async def refused(self, fd: int, offset: int, moffset: int | None = None, length: int = CHUNK) -> int:
        """The errno with which a claim is refused."""
        with pytest.raises(OSError) as caught:
            await self.claim(fd, offset, moffset, length)
        return caught.value.errno or 0

    def truncate(self, fd: int, size: int) -> tuple[int, asyncio.Future[None]]:
        """Begin to truncate a file: a token, and a future that is done when it is granted."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return self.dax.truncate(fd, size, lambda: granted.set_result(None)), granted


async def within(what: Awaitable[Value]) -> Value:
    """It must not take for ever."""
    return await asyncio.wait_for(what, SECONDS)


async def eventually(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(SECONDS):
        while not what():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def guests(coherenced: Coherenced, *names: str) -> AsyncIterator[list[Guest]]:
    """Backends with windows."""
    with contextlib.ExitStack() as stack:
        members = []
        for name in names:
            members.append(Guest(coherenced, name))
            stack.callback(members[-1].membership.close)
        # All know of each other's windows.
        await eventually(lambda: len(names) == 1 or all(guest.dax.coordinates for guest in members))
        yield members


def windows(coherenced: Coherenced) -> dict[str, tuple[int, int]]:
    """By guest: mappings and mapped bytes."""
    report = fetch_dax(coherenced.socket, 10)
    assert report.use.mapped_bytes == sum(window.mapped_bytes for window in report.windows)
    return {window.guest: (window.mappings, window.mapped_bytes) for window in report.windows}


def test_claims_are_granted_refused_and_given_back(coherenced: Coherenced, file: int) -> None:
    async def play() -> None:
        async with guests(coherenced, "red", "blue") as (red, blue):
            assert await red.claim(file, 0, 5 * CHUNK) == 5 * CHUNK
            # The allocator chooses, and windows are apart from each other.
            assert [await red.claim(file, 0) for _ in range(6)] == [n * CHUNK for n in (0, 1, 2, 3, 4, 6)]
            assert await blue.claim(file, 0, 5 * CHUNK) == 5 * CHUNK
            assert windows(coherenced) == {"red": (7, 7 * CHUNK), "blue": (1, CHUNK)}
            assert await red.refused(file, 0, 5 * CHUNK) == errno.EBUSY
            assert await red.refused(file, 0, 5 * CHUNK + 4096) == errno.EINVAL
            assert await red.refused(file, 0, WINDOW) == errno.EINVAL
            with pytest.raises(UserError, match="--dax-total"):
                async with guests(coherenced, "green", "black", "white"):
                    pass
            assert await red.claim(file, 0, 7 * CHUNK, 57 * CHUNK) == 7 * CHUNK
            assert await red.refused(file, 0, None) == errno.ENOSPC
            red.dax.release([(5 * CHUNK, CHUNK), (7 * CHUNK, 57 * CHUNK)])
            assert await red.claim(file, 0, 5 * CHUNK) == 5 * CHUNK
            assert await blue.claim(file, 0, 6 * CHUNK, 36 * CHUNK) == 6 * CHUNK
            blue.membership.close()
            await eventually(lambda: windows(coherenced) == {"red": (7, 7 * CHUNK)})
            blue.membership.close()

    asyncio.run(play())


def test_many_claims_and_releases_at_once(coherenced: Coherenced, file: int) -> None:
    async def play() -> None:
        async with guests(coherenced, "red") as (red,):
            for _ in range(10):
                await asyncio.gather(*(red.claim(file, 0, n * CHUNK) for n in range(64)))
                assert windows(coherenced) == {"red": (64, WINDOW)}
                red.dax.release([(n * CHUNK, CHUNK) for n in range(64)])
            await eventually(lambda: windows(coherenced) == {"red": (0, 0)})

    asyncio.run(play())


def test_a_window_that_is_too_large(coherenced: Coherenced) -> None:
    async def play() -> None:
        with pytest.raises(UserError, match="a DAX window of 256M is more than the 128M that coherenced allows"):
            Guest(coherenced, "red", 256 << 20)

    asyncio.run(play())
    assert "is larger than the limit" in coherenced.log()


def test_a_truncation_waits_until_all_others_have_revoked(coherenced: Coherenced, file: int) -> None:
    async def play() -> None:
        async with guests(coherenced, "red", "blue", "green", "grey") as (red, blue, green, grey):
            status = os.fstat(file)
            await red.claim(file, 0)
            await red.claim(file, 2 * CHUNK)
            await blue.claim(file, 2 * CHUNK)
            await green.claim(file, CHUNK)
            token, granted = grey.truncate(file, CHUNK + 1)
            others = [await within(guest.revocations.get()) for guest in (red, blue, green)]
            assert [other[:3] for other in others] == [(status.st_dev, status.st_ino, CHUNK + 1)] * 3
            # A claim of the file waits, one of another does not.
            waiting = asyncio.create_task(green.claim(file, 3 * CHUNK))
            with Path("/dev/zero").open("rb") as other:
                await green.claim(other.fileno(), 0)
            others[0][3]()
            others[1][3]()
            coherenced.status()
            assert not granted.done()
            others[2][3]()
            await within(granted)
            assert not waiting.done()
            grey.dax.truncated(token)
            for guest in red, blue, green:
                assert await within(guest.resized.get()) == (status.st_dev, status.st_ino)
            await within(waiting)
            # What ends at the new end may stay, and one's own mappings are one's own matter.
            token, granted = red.truncate(file, 4 * CHUNK)
            await within(granted)
            red.dax.truncated(token)
            assert all(guest.revocations.empty() for guest in (red, blue, green, grey))

    asyncio.run(play())


def test_a_backend_that_dies_counts_as_revoked(coherenced: Coherenced, file: int) -> None:
    async def play() -> None:
        async with guests(coherenced, "red", "blue", "grey") as (red, blue, grey):
            await red.claim(file, 0)
            await blue.claim(file, 0)
            _, granted = grey.truncate(file, 0)
            *_, done = await within(blue.revocations.get())
            done()
            red.membership.close()
            await within(granted)
            # The backend that truncates dies: the file can be claimed again.
            waiting = asyncio.create_task(blue.claim(file, CHUNK))
            coherenced.status()
            assert not waiting.done()
            grey.membership.close()
            await within(waiting)
            await within(blue.resized.get())

    asyncio.run(play())


def test_nobody_waits_for_ever(coherenced: Coherenced, file: int) -> None:
    async def play() -> None:
        async with guests(coherenced, "red", "grey") as (red, grey):
            await red.claim(file, 0)
            for _ in range(3):
                token, granted = grey.truncate(file, 0)
                # After 2 s the first time, then at once.
                await within(granted)
                grey.dax.truncated(token)
            for _ in range(3):
                *_, done = await within(red.revocations.get())
                done()
            # It is waited for again, once the daemon has read that.
            await red.claim(file, 0)
            _, granted = grey.truncate(file, 0)
            *_, done = await within(red.revocations.get())
            assert not granted.done()
            done()
            await within(granted)
        assert coherenced.log().count("does not give up what it has mapped in time") == 1

    asyncio.run(play())


def test_alone_nobody_is_asked(coherenced: Coherenced, file: int) -> None:
    async def play() -> None:
        async with guests(coherenced, "red") as (red,):
            await eventually(lambda: not red.dax.coordinates)
            token, granted = red.truncate(file, 0)
            assert granted.done()
            red.dax.truncated(token)
            blue = Guest(coherenced, "blue")
            await eventually(lambda: red.dax.coordinates)
            blue.membership.close()
            await eventually(lambda: not red.dax.coordinates)
            # A backend without a window truncates files, too.
            grey = Guest(coherenced, "grey", 0)
            await eventually(lambda: grey.dax.coordinates)
            assert await grey.refused(file, 0) == errno.ENOSPC
            grey.membership.close()

    asyncio.run(play())


def test_a_daemon_that_is_killed_learns_everything_again(
    coherenced: Coherenced, file: int, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("coherenced is gone")
    # More pages than one.
    monkeypatch.setattr(dax, "MAX_MAPPINGS", 7)
    monkeypatch.setattr(dax, "AWAY_SECONDS", SECONDS)

    async def play() -> None:
        async with guests(coherenced, "red", "blue") as (red, blue):
            await asyncio.gather(*(red.claim(file, 0, n * CHUNK) for n in range(50)))
            await blue.claim(file, CHUNK, 0)
            coherenced.kill()
            await eventually(lambda: not red.dax.reported and not blue.dax.reported)
            # These wait for the next one; what is given back is not told.
            claim = asyncio.create_task(red.claim(file, 0, 50 * CHUNK))
            token, granted = blue.truncate(file, CHUNK)
            red.dax.release([(3 * CHUNK, CHUNK)])
            coherenced.start()
            await within(granted)
            blue.dax.truncated(token)
            await within(claim)
            await within(red.resized.get())
            await within(blue.resized.get())
            assert windows(coherenced) == {"red": (50, 50 * CHUNK), "blue": (1, CHUNK)}
            # Blue is asked for what the daemon before has granted.
            token, granted = red.truncate(file, CHUNK)
            *_, done = await within(blue.revocations.get())
            done()
            await within(granted)
            red.dax.truncated(token)

    asyncio.run(play())


def test_a_daemon_that_does_not_come_back(
    coherenced: Coherenced, file: int, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("coherenced is gone")
    monkeypatch.setattr(dax, "AWAY_SECONDS", 0.05)

    async def play() -> None:
        async with guests(coherenced, "red", "blue") as (red, blue):
            await red.claim(file, 0)
            _, granted = blue.truncate(file, 0)
            await within(red.revocations.get())
            coherenced.kill()
            await within(granted)
            # Nobody will say that this is over.
            await within(red.resized.get())
            assert await red.refused(file, 0) == errno.EAGAIN
            _, granted = blue.truncate(file, 0)
            assert granted.done()

    asyncio.run(play())


def test_a_smaller_limit_after_a_restart(coherenced: Coherenced, file: int, expect_log: ExpectLog) -> None:
    expect_log("coherenced is gone")
    expect_log("coherenced refuses the DAX window")

    async def play() -> None:
        async with guests(coherenced, "red") as (red,):
            await red.claim(file, 0)
            coherenced.stop()
            coherenced.start("--dax-window", "64M")
            await eventually(lambda: bool(coherenced.status().backends) and red.dax.reported)
            assert await red.refused(file, 0) == errno.ENOSPC
            assert coherenced.status().status.trusted

    asyncio.run(play())


def test_a_change_on_the_host_is_told_to_who_has_the_file_mapped(
    coherenced: Coherenced, file: int, tmp_path: Path
) -> None:
    async def play() -> None:
        async with guests(coherenced, "red", "blue") as (red, blue):
            directory = os.open(tmp_path, os.O_PATH)
            watched: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            red.membership.attach(asyncio.get_running_loop(), watched=lambda token, ok: watched.set_result(ok))
            assert red.membership.watch(directory, 1)
            assert await within(watched)
            os.close(directory)
            await red.claim(file, 0)
            os.truncate(tmp_path / "file", 3)
            status = os.fstat(file)
            assert await within(red.resized.get()) == (status.st_dev, status.st_ino)
            # Many changes are told a few times, the last of them, too.
            for size in range(300):
                os.truncate(tmp_path / "file", size)
            await within(red.resized.get())
            assert blue.resized.empty()

    asyncio.run(play())


def test_coherencectl_dax(coherenced: Coherenced, file: int, capsys: pytest.CaptureFixture[str]) -> None:
    async def play() -> None:
        async with guests(coherenced, "red", "blue") as (red, _):
            await red.claim(file, 0, 0, 3 * CHUNK)
            await red.refused(file, 0, 0)
            assert ctl.main(["dax", "--socket", str(coherenced.socket)]) == 0
            text = capsys.readouterr().out
            assert "2 windows of 256M, 512M at most; 6M mapped, 1 mappings of 1 files, 1 refused" in text
            status = os.fstat(file)
            assert f"{status.st_dev}:{status.st_ino}" in text
            assert ctl.main(["dax", "--json", "--files", "1", "--socket", str(coherenced.socket)]) == 0
            report = json.loads(capsys.readouterr().out)
            assert [window["guest"] for window in report["windows"]] == ["red", "blue"]
            assert report["files"] == [
                {
                    "device": status.st_dev,
                    "inode": status.st_ino,
                    "mappings": 1,
                    "mapped_bytes": 3 * CHUNK,
                    "windows": 1,
                }
            ]
            assert ctl.main(["status", "--socket", str(coherenced.socket)]) == 0
            assert "DAX       2 windows" in capsys.readouterr().out

    asyncio.run(play())


@contextlib.contextmanager
def member(coherenced: Coherenced) -> Iterator[Client]:
    """A backend that speaks the protocol by hand; its counterparts must go on."""
    with Client(coherenced) as client:
        key = join(client)
        try:
            yield client
        finally:
            liveness.let_go(key)


@pytest.mark.parametrize(
    "messages",
    [
        [Claim(1, 1, 2, 0, CHUNK, 0, True)],
        [Release([(0, CHUNK)])],
        [Window(WINDOW), Window(WINDOW)],
        [Window(WINDOW, [], True), Window(WINDOW + CHUNK)],
        [Window(WINDOW, [], True), Claim(1, 1, 2, 0, CHUNK, 0, True)],
        [Revoked(1)],
        [Window(CHUNK + 1), Release([])],
    ],
)
def test_messages_out_of_order(coherenced: Coherenced, messages: list[FromClient]) -> None:
    with member(coherenced) as client:
        for message in messages:
            client.connection.send(message)
        with pytest.raises(Dropped):
            while isinstance(client.connection.receive()[0], Windowed):
                pass
    assert "Traceback" not in coherenced.log()
    assert coherenced.status().status.dax.windows == 0


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_a_truncation_by_one_who_could_not_do_it(coherenced: Coherenced, tmp_path: Path, flags: int) -> None:
    (tmp_path / "f").touch()
    fd = os.open(tmp_path / "f", flags)
    with member(coherenced) as client:
        client.connection.send(Truncate(1, 0), [fd])
        os.close(fd)
        with pytest.raises(Dropped):
            client.connection.receive()
    assert "not open for writing" in coherenced.log()


def test_too_many_truncations_at_once(coherenced: Coherenced, file: int) -> None:
    with member(coherenced) as client, pytest.raises(Dropped):
        for token in range(100):
            client.connection.send(Truncate(token, 0), [file])
        while isinstance(client.connection.receive()[0], TruncateGranted):
            pass
    assert "truncations at a time" in coherenced.log()


def test_mappings_that_make_no_sense(coherenced: Coherenced) -> None:
    mappings = [Mapping(1, 2, 0, CHUNK, 0, True), Mapping(1, 2, 0, CHUNK, 0, True), Mapping(1, 2, 3, 4, 5, True)]
    with member(coherenced) as client:
        client.connection.send(Window(WINDOW, mappings))
        assert client.connection.receive()[0] == Windowed(0, 128 << 20, 2)
        client.connection.send(Release([(0, CHUNK), (0, CHUNK), ((1 << 64) - 1, 0)]))
        client.connection.send(Claim(7, 1, 2, 0, CHUNK, None, True))
        assert client.connection.receive()[0] == Claimed(7, 0, 0)
        assert coherenced.status().status.dax.mappings == 1
    assert coherenced.log().count("a mapping is refused") == 1
    assert coherenced.log().count("a release is refused") == 1


def test_one_who_claims_and_does_not_read(coherenced: Coherenced) -> None:
    with member(coherenced) as client:
        client.connection.send(Window(WINDOW))
        with pytest.raises(Dropped):
            for token in range(100_000):
                client.connection.send(Claim(token, 1, 2, 0, CHUNK, 0, True))
    assert "it does not read its messages" in coherenced.log()
    assert coherenced.status().status.dax.mappings == 0


def test_a_backend_that_was_stopped_asks_again(coherenced: Coherenced, tmp_path: Path) -> None:
    """It finds the grant when it goes on, and coherenced has ended that long ago."""
    share = tmp_path / "share"
    share.mkdir()
    path = share / "file"
    path.touch()
    os.truncate(path, 4 * CHUNK)

    async def play(backend: Backend, file: int) -> None:
        red = Guest(coherenced, "red")
        try:
            await red.claim(file, CHUNK)
            guest = await asyncio.to_thread(backend.connect)
            with guest:
                truncation = asyncio.create_task(asyncio.to_thread(guest.truncate, "/file", 0))
                *_, done = await within(red.revocations.get())
                assert backend.process is not None
                backend.process.send_signal(signal.SIGSTOP)
                done()
                try:
                    await within(red.resized.get())
                    assert "does not say that a truncation is over" in coherenced.log()
                    await red.claim(file, 2 * CHUNK)
                finally:
                    backend.process.send_signal(signal.SIGCONT)
                asked = asyncio.create_task(red.revocations.get())
                await within(asyncio.wait({asked, truncation}, return_when=asyncio.FIRST_COMPLETED))
                assert asked.done(), "truncated what the other has mapped"
                assert os.fstat(file).st_size == 4 * CHUNK
                asked.result()[3]()
                await within(truncation)
                assert os.fstat(file).st_size == 0
        finally:
            red.membership.close()

    with Backend(share, tmp_path, cache="shared", daemon=coherenced) as backend, path.open("r+b") as opened:
        asyncio.run(play(backend, opened.fileno()))
