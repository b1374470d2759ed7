"""Clients of coherenced that are broken or malicious: they are dropped with a log line and hurt nobody."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coherent_vfs.coherence.protocol.connection import MAX_BYTES, Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    DAEMON_DECODER,
    ENCODER,
    PROTOCOL,
    Answer,
    Claim,
    Coordinate,
    DaxQuestion,
    FromClient,
    FromDaemon,
    Granted,
    Hello,
    Join,
    Ready,
    Refused,
    Registered,
    Release,
    Revoked,
    StatusQuestion,
    Subscribe,
    Truncate,
    Truncated,
    Watch,
    Watched,
    Welcome,
    Window,
)
from coherent_vfs.coherence.shm import liveness
from tests.integration.coherenced_process import SECONDS, Coherenced, Member, eventually, open_directory

PIDFD_GETFD = 438
"""Its number, on every machine."""

Expected = TypeVar("Expected")


@pytest.fixture(scope="module")
def coherenced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coherenced]:
    with Coherenced(tmp_path_factory.mktemp("hostile")) as daemon:
        daemon.start()
        yield daemon


@pytest.fixture(scope="module")
def bystander(coherenced: Coherenced) -> Iterator[Member]:
    with Member(coherenced, "bystander") as member:
        yield member


def descriptors(coherenced: Coherenced) -> int:
    """How many the daemon has open."""
    assert coherenced.process is not None
    return len(list(Path(f"/proc/{coherenced.process.pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def usual_descriptors(coherenced: Coherenced, bystander: Member) -> int:
    return descriptors(coherenced)


@pytest.fixture(autouse=True)
def nobody_else_is_hurt(coherenced: Coherenced, bystander: Member, usual_descriptors: int) -> Iterator[None]:
    """After each test the daemon still serves, with the same backend as before and no descriptor more."""
    yield
    eventually(lambda: descriptors(coherenced) <= usual_descriptors)
    report = coherenced.status()
    assert [backend.pid for backend in report.backends] == [bystander.pid]
    assert report.status.trusted
    assert "Traceback" not in coherenced.log()


class Client:
    """Speaks the protocol by hand, so that it can do it wrong."""

    def __init__(self, coherenced: Coherenced) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(coherenced.socket))
        self.connection: Connection[FromDaemon] = Connection(self.sock, DAEMON_DECODER, fds=3)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def ask(self, message: FromClient, answer: type[Expected]) -> Expected:
        """Send a message; its answer must be of this type. Descriptors are closed."""
        reply, fds = self.ask_for_fds(message, answer)
        for fd in fds:
            os.close(fd)
        return reply

    def ask_for_fds(self, message: FromClient, answer: type[Expected]) -> tuple[Expected, list[int]]:
        """The same; the descriptors are the caller's."""
        with open_directory(Path("/")) as root:
            self.connection.send(message, [root] if isinstance(message, Join) else [])
        reply, fds = self.connection.receive()
        assert isinstance(reply, answer), reply
        return reply, fds

    def assert_dropped(self) -> None:
        """The daemon ends the connection, after refusing it in words or without."""
        with pytest.raises(Dropped):
            while True:
                assert isinstance(self.connection.receive()[0], Refused | Welcome)


JOIN = Join("hostile", "none")
VALID: list[FromClient] = [
    Hello(PROTOCOL, "backend"),
    Hello(PROTOCOL, "control"),
    JOIN,
    Join("", "", 1),
    Ready(),
    Answer({"a": 1}),
    StatusQuestion(),
    StatusQuestion((1 << 64) - 1),
    Watch(0),
    Window(1 << 21),
    Claim(0, 1, 2, 0, 1 << 21, None, True),
    Release([(0, 1 << 21)]),
    Truncate(0, 0),
    Truncated(0),
    Revoked(0),
    DaxQuestion(),
    DaxQuestion((1 << 64) - 1, 100),
    Subscribe(),
    Subscribe(b"\xff/" * 2000),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(VALID).map(ENCODER.encode)
        | st.binary(min_size=1, max_size=64)
        | st.tuples(st.sampled_from(VALID).map(ENCODER.encode), st.integers(0, 200), st.integers(0, 255)).map(
            lambda t: t[0][: t[1]] + bytes([t[2]]) + t[0][t[1] + 1 :]
        ),
        max_size=8,
    )
)
def test_any_messages_in_any_order(coherenced: Coherenced, messages: list[bytes]) -> None:
    with Client(coherenced) as client:
        for message in messages:
            try:
                client.sock.send(message)
            except (BrokenPipeError, ConnectionResetError):
                break


def test_a_malformed_message(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        client.sock.send(b"\xc1rubbish")
        client.assert_dropped()
    assert "a malformed message" in coherenced.log()


def test_deeply_nested_message(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        client.sock.send(b"\x91" * 60000)
        client.assert_dropped()


def test_an_oversized_message(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        client.sock.send(bytes(MAX_BYTES + 1))
        client.assert_dropped()
    assert "a message of more than" in coherenced.log()


def test_descriptors_that_nobody_asked_for(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        read, write = os.pipe()
        try:
            client.connection.send(Hello(PROTOCOL, "control"), [read] * 100)
            assert isinstance(client.connection.receive()[0], Welcome)
        finally:
            os.close(read)
            os.close(write)


def test_another_protocol_version(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        refused = client.ask(Hello(PROTOCOL + 1, "backend"), Refused)
        assert "install one version of both" in refused.reason
        client.assert_dropped()


@pytest.mark.parametrize("path", [None, "/dev/null", "/proc/self/mem"])
def test_a_join_without_proof_that_there_is_such_a_share(coherenced: Coherenced, path: str | None) -> None:
    fds = [] if path is None else [os.open(path, os.O_PATH)]
    with coherenced.table() as table, Client(coherenced) as client:
        roots, journals = table.root_bits, coherenced.paths.journal_keys()
        client.ask(Hello(PROTOCOL, "backend"), Welcome)
        client.connection.send(JOIN, fds)
        answer, _ = client.connection.receive()
        assert isinstance(answer, Refused)
        assert "no descriptor of its share" in answer.reason
        assert (table.root_bits, coherenced.paths.journal_keys()) == (roots, journals)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("message", [JOIN, Ready(), Answer({}), StatusQuestion()])
def test_a_message_before_hello(coherenced: Coherenced, message: FromClient) -> None:
    with Client(coherenced) as client:
        client.connection.send(message)
        client.assert_dropped()


def test_a_control_client_that_wants_to_join(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        client.ask(Hello(PROTOCOL, "control"), Welcome)
        client.connection.send(JOIN)
        client.assert_dropped()


def test_a_backend_that_is_ready_without_the_semaphore(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        client.ask(Hello(PROTOCOL, "backend"), Welcome)
        client.ask(JOIN, Granted)
        assert "semaphore" in client.ask(Ready(), Refused).reason
        client.assert_dropped()


def test_the_key_of_another_backends_journal(coherenced: Coherenced) -> None:
    (key,) = coherenced.paths.journal_keys()
    with Client(coherenced) as client:
        client.ask(Hello(PROTOCOL, "backend"), Welcome)
        granted = client.ask(Join("hostile", "none", key), Granted)
        assert granted.key != key
    eventually(lambda: coherenced.paths.journal_keys() == [key])


def test_a_backend_that_never_answers_is_shown_as_such(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        key = join(client)
        assert coherenced.counters("bystander") == {"requests": 7}
        assert {backend.guest: backend.counters for backend in coherenced.status().backends}["hostile"] is None
        liveness.let_go(key)


def test_an_answer_that_nobody_asked_for(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        key = join(client)
        liveness.let_go(key)
        client.connection.send(Answer({}))
        client.assert_dropped()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a directory that nobody watches."""
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("count", [2, 3, 200])
def test_a_watch_with_too_many_descriptors(coherenced: Coherenced, directory: int, count: int) -> None:
    with Client(coherenced) as client:
        liveness.let_go(join(client))
        client.connection.send(Watch(1), [directory] * count)
        client.assert_dropped()
    assert "too many descriptors" in coherenced.log()


def test_a_watch_without_a_descriptor(coherenced: Coherenced) -> None:
    with Client(coherenced) as client:
        key = join(client)
        assert client.ask(Watch(7), Watched) == Watched(7, False)
        liveness.let_go(key)


def test_a_watch_of_one_who_is_no_member(coherenced: Coherenced, directory: int) -> None:
    with Client(coherenced) as client:
        client.ask(Hello(PROTOCOL, "backend"), Welcome)
        client.connection.send(Watch(1), [directory])
        client.assert_dropped()


def test_a_descriptor_with_another_message(coherenced: Coherenced, directory: int) -> None:
    with Client(coherenced) as client:
        liveness.let_go(join(client))
        client.connection.send(Ready(), [directory])
        client.assert_dropped()


def test_a_watch_of_what_is_no_directory(coherenced: Coherenced, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    ends = os.pipe()
    fds = [os.open(path, os.O_PATH), os.open(os.devnull, os.O_PATH), *ends, os.open("/proc/self/mem", os.O_PATH)]
    with Client(coherenced) as client:
        key = join(client)
        for fd in fds:
            client.connection.send(Watch(fd), [fd])
            assert client.connection.receive()[0] == Watched(fd, False)
            os.close(fd)
        liveness.let_go(key)


def test_a_flood_of_watches_keeps_nobody_waiting(coherenced: Coherenced, tmp_path: Path) -> None:
    """One asks for as much as it can, and reads the answers; another's requests are answered in between."""
    over = threading.Event()
    fds = []
    for number in range(200):
        (tmp_path / f"{number}").mkdir()
        fds.append(os.open(tmp_path / f"{number}", os.O_PATH))
    with Client(coherenced) as client, Member(coherenced, "patient") as patient:
        key = join(client)

        def flood() -> None:
            while not over.is_set():
                for fd in fds[:50]:
                    client.connection.send(Watch(fd), [fd])
                for _ in fds[:50]:
                    client.connection.receive()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            begun = time.monotonic()
            for number in range(200):
                patient.do(f"watch {tmp_path / f'{number}'}")
            assert time.monotonic() - begun < 20
        finally:
            over.set()
            thread.join()
            for fd in fds:
                os.close(fd)
            liveness.let_go(key)


def test_one_who_asks_for_watches_and_does_not_read(coherenced: Coherenced, directory: int) -> None:
    with Client(coherenced) as client:
        liveness.let_go(join(client))
        with pytest.raises(Dropped):
            for _ in range(100_000):
                client.connection.send(Watch(1), [directory])
    assert "it does not read its messages" in coherenced.log()


@pytest.mark.parametrize("spoil", ["cut off", "overwritten"])
def test_a_spoilt_journal_makes_everything_invalid(coherenced: Coherenced, spoil: str) -> None:
    with Client(coherenced) as client, coherenced.table() as table:
        client.ask(Hello(PROTOCOL, "backend"), Welcome)
        granted, (table_fd, leases_fd, journal_fd) = client.ask_for_fds(JOIN, Granted)
        liveness.take(granted.key)
        client.ask(Ready(), Registered)
        if spoil == "cut off":
            os.ftruncate(journal_fd, 10)
        else:
            os.pwrite(journal_fd, b"\xff" * 4096, 0)
        for fd in (table_fd, leases_fd, journal_fd):
            os.close(fd)
        stamp = table.stamp()
        liveness.let_go(granted.key)
        client.connection.close()
        eventually(lambda: not table.valid(500, stamp))


def test_a_flood_of_connections(coherenced: Coherenced) -> None:
    clients = [Client(coherenced) for _ in range(100)]
    assert coherenced.status().status.trusted
    for client in clients:
        client.connection.close()


def test_a_daemon_without_descriptors_serves_again_when_it_has_some(coherenced: Coherenced) -> None:
    assert coherenced.process is not None
    pid = coherenced.process.pid
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), usual[1]))
    clients = [Client(coherenced) for _ in range(5)]
    eventually(lambda: "no client can be accepted" in coherenced.log())
    before = processor_seconds(pid)
    time.sleep(2.5)
    assert processor_seconds(pid) - before < 0.5
    assert coherenced.log().count("no client can be accepted") == 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    for client in clients:
        client.connection.close()


def test_a_socket_that_is_shut_down_is_left_alone_and_members_stay(tmp_path: Path) -> None:
    with Coherenced(tmp_path) as daemon:
        daemon.start()
        assert daemon.process is not None
        pid = daemon.process.pid
        with Member(daemon, "member"):
            (line,) = (
                each
                for each in Path("/proc/net/unix").read_text().splitlines()
                if str(daemon.socket) in each and each.split()[3] == "00010000"
            )
            (fd,) = (
                int(path.name)
                for path in Path(f"/proc/{pid}/fd").iterdir()
                if str(path.readlink()) == f"socket:[{line.split()[6]}]"
            )
            taken_from(pid, fd).shutdown(socket.SHUT_RDWR)
            eventually(lambda: "no client can connect any more" in daemon.log())
            before = processor_seconds(pid)
            time.sleep(1)
            assert processor_seconds(pid) - before < 0.3
        assert daemon.log().count("no client can connect any more") == 1


def taken_from(pid: int, fd: int) -> socket.socket:
    """A socket of another process (pidfd_getfd(2))."""
    pidfd = os.pidfd_open(pid)
    try:
        taken = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    return socket.socket(fileno=taken)


def processor_seconds(pid: int) -> float:
    """What a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def join(client: Client) -> int:
    """Become a member as a backend should; returns the key of the semaphore, which is held then."""
    client.ask(Hello(PROTOCOL, "backend"), Welcome)
    granted = client.ask(JOIN, Granted)
    liveness.take(granted.key)
    client.ask(Ready(), Registered)
    assert client.connection.receive()[0] == Coordinate(False)
    return granted.key
