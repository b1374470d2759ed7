"""Metrics of a real daemon, as Prometheus reads them."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.coherenced_process import SECONDS, Coherenced, Member, eventually
from tests.integration.user_guests import Backend

Address = tuple[str, int] | Path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as daemon:
        yield daemon


def start(daemon: Coherenced, metrics: str) -> Address:
    """Start the daemon; returns where its metrics are."""
    daemon.start("--metrics", metrics)
    found = re.findall(r"event=metrics address=\"?(?:\('([0-9.:]+)', (\d+)[^\n]*|(/\S+)) ", daemon.log())
    host, port, path = found[-1]
    return Path(path) if path else (host, int(port))


def connect(address: Address) -> socket.socket:
    """A connection to the daemon's metrics."""
    if isinstance(address, Path):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(SECONDS)
        sock.connect(str(address))
        return sock
    return socket.create_connection(address, SECONDS)


def scrape(address: Address) -> dict[tuple[str, ...], float]:
    """All values, by name and labels' values without the process's."""
    client = http.client.HTTPConnection("metrics")
    client.sock = connect(address)
    client.request("GET", "/metrics")
    answer = client.getresponse()
    assert answer.status == 200
    assert (answer.getheader("Content-Type") or "").startswith("text/plain; version=")
    text = answer.read().decode()
    client.close()
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "pid")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", "unix"])
def test_what_a_guest_does_is_in_the_metrics(daemon: Coherenced, tmp_path: Path, where: str) -> None:
    if where == "[::1]:0" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    address = start(daemon, str(tmp_path / "metrics.sock") if where == "unix" else where)
    share = tmp_path / "share"
    share.mkdir()
    with Backend(share, tmp_path, name="red", cache="shared", daemon=daemon) as backend, backend.connect() as guest:
        guest.write_bytes("/f", b"1")
        before: dict[tuple[str, ...], float] = {}

        def answered() -> bool:
            before.update(scrape(address))
            return before["coherenced_backend_answered", "red"] == 1

        eventually(answered)
        for _ in range(5):
            guest.write_bytes("/f", b"2")

        def counted() -> bool:
            now = scrape(address)
            grown = {name for name in now if name in before and now[name] > before[name]}
            return grown >= {
                ("coherenced_bumps_total",),
                ("coherenced_backend_requests_total", "red"),
                ("coherenced_backend_changes_total", "red"),
            }

        eventually(counted)
        assert before["coherenced_backends",] == before["coherenced_trusted",] == 1
        assert before["coherenced_backend_aware", "red"] == 1
        assert before["coherenced_backend_info", "shared", "red"] == 1
    eventually(lambda: scrape(address)["coherenced_backends",] == 0)
    assert daemon.stop() == 0
    assert not isinstance(address, Path) or not address.exists()


def test_a_backend_that_does_not_answer_holds_nobody_up(daemon: Coherenced, tmp_path: Path) -> None:
    address = start(daemon, str(tmp_path / "m"))
    with Member(daemon, "deaf") as deaf, Member(daemon, "well"):
        deaf.signal(signal.SIGSTOP)
        values: dict[tuple[str, ...], float] = {}

        def answered() -> bool:
            values.update(scrape(address))
            return values["coherenced_backend_answered", "well"] == 1

        eventually(answered)
        assert values["coherenced_backend_answered", "deaf"] == 0
        assert ("coherenced_backend_requests_total", "deaf") not in values
        assert values["coherenced_backend_requests_total", "well"] == 7


def test_scrapers_that_stay_hurt_nobody(daemon: Coherenced, tmp_path: Path) -> None:
    address = start(daemon, str(tmp_path / "m"))
    stuck = [connect(address) for _ in range(100)]
    for sock in stuck:
        try:
            sock.sendall(b"GET /metrics HTT")
        except BrokenPipeError:
            continue
    with Member(daemon, "one"):
        assert daemon.status().status.trusted
    for sock in stuck:
        sock.close()
    eventually(lambda: scrape_if_served(address))
    assert "Traceback" not in daemon.log()


def scrape_if_served(address: Address) -> bool:
    """Whether there is a free place; the daemon hangs up where not."""
    try:
        return bool(scrape(address))
    except (ConnectionError, http.client.HTTPException):
        return False


def test_many_at_once(daemon: Coherenced, tmp_path: Path) -> None:
    address = start(daemon, "127.0.0.1:0")
    seen: list[float] = []
    with Member(daemon, "one"):
        threads = [
            threading.Thread(target=lambda: seen.append(scrape(address)["coherenced_backends",])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == 8 * [1]


def test_another_address_needs_a_restart(daemon: Coherenced, tmp_path: Path) -> None:
    config = tmp_path / "coherenced.toml"
    config.write_text(f'metrics = "{tmp_path / "m"}"\n')
    daemon.start("--config", str(config))
    assert daemon.process is not None
    config.write_text('metrics = "127.0.0.1:0"\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.manager.wait_for("RELOADING=1")
    daemon.manager.wait_for("READY=1")
    eventually(lambda: "takes effect after a restart only" in daemon.log())
    assert "metrics" in daemon.log().rpartition("takes effect")[2]
    assert scrape(tmp_path / "m")["coherenced_trusted",] == 1


def refusal(process: subprocess.Popen[str], daemon: Coherenced) -> str:
    """The one line of a daemon that does not start."""
    assert process.wait(SECONDS) == 1
    (line,) = [line for line in daemon.log().splitlines() if line.startswith("coherenced: ")]
    assert "Traceback" not in daemon.log()
    return line


def test_a_port_in_use_is_one_line(daemon: Coherenced) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refusal(daemon.spawn("--metrics", f"127.0.0.1:{port}"), daemon)
        assert line == (
            f"coherenced: metrics at 127.0.0.1 port {port}: Address already in use: choose another with --metrics"
        )


def test_a_path_that_is_no_socket_is_one_line_and_is_kept(daemon: Coherenced, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    assert "is no socket" in refusal(daemon.spawn("--metrics", str(path)), daemon)
    assert path.read_text() == "data"


def test_after_a_kill_it_serves_there_again(daemon: Coherenced, tmp_path: Path) -> None:
    for _ in range(2):
        address = start(daemon, str(tmp_path / "m"))
        assert scrape(address)["coherenced_trusted",] == 1
        daemon.kill()


def test_it_is_off_by_default(daemon: Coherenced) -> None:
    daemon.start()
    assert daemon.process is not None
    listening = Path(f"/proc/{daemon.process.pid}/net/tcp").read_text().splitlines()[1:]
    sockets = {line.split()[9] for line in listening if line.split()[3] == "0A"}
    links = [fd.readlink() for fd in Path(f"/proc/{daemon.process.pid}/fd").iterdir()]
    assert not [link for link in links if str(link)[8:-1] in sockets and str(link).startswith("socket:")]
    assert "event=metrics" not in daemon.log()
