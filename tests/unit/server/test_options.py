"""The command line of vfs-backend."""

import json
from pathlib import Path

import pytest

from coherent_vfs.server.options import parse
from coherent_vfs.server.settings import Settings

LEAST = ["--shared-dir", "/srv", "--socket-path", "/run/s.sock"]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("vfs-backend: ")
    assert line.endswith(": see vfs-backend --help")
    return line


def test_defaults() -> None:
    options = parse(LEAST)
    assert options.settings(7) == Settings(shared_dir=Path("/srv"), root_fd=7)
    assert (options.socket_path, options.fd) == (Path("/run/s.sock"), None)
    assert (options.log_level, options.guest, options.rlimit_nofile) == ("warn", "s.sock", None)
    assert not options.exit_on_disconnect


def test_everything() -> None:
    argv = [
        *("--shared-dir=/srv", "--fd=3", "--tag=data", "--cache=always", "--timeout=0.5", "--writeback"),
        *("--xattr", "--readonly", "--no-readdirplus", "--allow-mmap", "--allow-direct-io"),
        *("--num-request-queues=4", "--queue-size=256", "--rlimit-nofile=0", "--exit-on-disconnect"),
        *("--coherence=/dev/shm/vt", "--coherence-socket=/run/c.sock", "--guest=web", "--log-level=debug"),
    ]
    options = parse(argv)
    assert options.settings(5) == Settings(
        shared_dir=Path("/srv"),
        root_fd=5,
        tag="data",
        cache="always",
        timeout=0.5,
        writeback=True,
        xattr=True,
        readonly=True,
        readdirplus=False,
        allow_mmap=True,
        allow_direct_io=True,
        num_request_queues=4,
        queue_size=256,
    )
    assert (options.coherence, options.coherence_socket) == (Path("/dev/shm/vt"), Path("/run/c.sock"))
    assert (options.guest, options.fd, options.rlimit_nofile) == ("web", 3, 0)


@pytest.mark.parametrize("table", ["vt", "/vt", "/dev/shm/vt"])
def test_each_spelling_of_a_domain_is_understood(table: str) -> None:
    assert parse([*LEAST, "--coherence", table]).coherence == Path("/dev/shm/vt")


def test_never_is_none_and_has_no_readdirplus() -> None:
    settings = parse([*LEAST, "--cache", "never"]).settings(-1)
    assert (settings.cache, settings.readdirplus) == ("none", False)


def test_guest_is_called_after_its_tag() -> None:
    assert parse([*LEAST, "--tag", "data"]).guest == "data"


def test_options_of_the_old_virtiofsd() -> None:
    options = parse(["-o", "source=/srv,cache=always,timeout=3,xattr,no_posix_lock", "-ologlevel=info", "--fd", "3"])
    assert (options.share.shared_dir, options.share.cache, options.share.timeout) == (Path("/srv"), "always", 3.0)
    assert (options.share.xattr, options.log_level) == (True, "info")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--shared-dir"),
        (["--shared-dir", "/srv"], "--socket-path"),
        ([*LEAST, "--fd", "3"], "--fd"),
        (["--shared-dir", "/srv", "--fd", "3", "--socket-group", "kvm"], "--socket-group"),
        (["--shared-dir", "/srv", "--fd", "-1"], "--fd"),
        (["--shared-dir", "/srv", "--fd", "three"], "--fd"),
        ([*LEAST, "--cache", "metadata"], "--cache"),
        ([*LEAST, "--cache", "shared"], "--coherence"),
        ([*LEAST, "--coherence-socket", "/run/c.sock"], "--coherence"),
        ([*LEAST, "--timeout", "-1"], "--timeout"),
        ([*LEAST, "--timeout", "nan"], "--timeout"),
        ([*LEAST, "--timeout", "inf"], "--timeout"),
        ([*LEAST, "--timeout", "soon"], "--timeout"),
        ([*LEAST, "--cache", "none", "--timeout", "1"], "--timeout"),
        ([*LEAST, "--cache", "none", "--writeback"], "--writeback"),
        ([*LEAST, "--cache", "shared", "--coherence", "/dev/shm/vt", "--writeback"], "--writeback"),
        ([*LEAST, "--dax", "always"], "--coherence"),
        ([*LEAST, "--dax", "often"], "--dax"),
        ([*LEAST, "--coherence", "/dev/shm/vt", "--dax", "auto", "--readonly"], "--readonly"),
        ([*LEAST, "--coherence", "/dev/shm/vt", "--dax", "auto", "--writeback"], "--writeback"),
        ([*LEAST, "--dax-window", "3M"], "--dax-window"),
        ([*LEAST, "--dax-window", "1M"], "--dax-window"),
        ([*LEAST, "--dax-min-size", "much"], "--dax-min-size"),
        ([*LEAST, "--tag", ""], "--tag"),
        ([*LEAST, "--tag", "t" * 37], "--tag"),
        ([*LEAST, "--guest", "line\nfeed"], "--guest"),
        ([*LEAST, "--guest", "host"], "--guest"),
        ([*LEAST, "--tag", "host"], "--guest"),
        ([*LEAST, "--num-request-queues", "0"], "--num-request-queues"),
        ([*LEAST, "--queue-size", "100"], "--queue-size"),
        ([*LEAST, "--rlimit-nofile", "many"], "--rlimit-nofile"),
        ([*LEAST, "--log-level", "loud"], "--log-level"),
        ([*LEAST, "--sandbox", "none"], "--sandbox"),
        ([*LEAST, "--read"], "--read"),
        ([*LEAST, "-o", "cache"], "cache"),
        ([*LEAST, "-o", "flock"], "flock"),
        ([*LEAST, "-o"], "-o"),
        ([*LEAST, "extra"], "extra"),
    ],
)
def test_wrong_values(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(argv, capsys)


@pytest.mark.parametrize("option", ["--help", "--version", "--print-capabilities"])
def test_printed_and_done(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([option])
    assert not caught.value.code
    output = capsys.readouterr()
    assert output.err == ""
    assert "vfs-backend" in output.out or json.loads(output.out)["type"] == "fs"


def test_dax() -> None:
    argv = [*LEAST, "--coherence", "/dev/shm/vt", "--dax", "auto"]
    options = parse(argv)
    assert options.settings(5).window_bytes == 512 << 20
    assert options.settings(5, dax=False).window_bytes == parse(LEAST).settings(5).window_bytes == 0
    settings = parse([*argv, "--dax-window", "64M", "--dax-min-size", "4K"]).settings(5)
    assert (settings.dax, settings.window_bytes, settings.dax_min_size) == ("auto", 64 << 20, 4096)


def test_leases(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(LEAST)
    assert (options.share.lease_max, options.share.lease_margin) == (1.0, 0.2)
    settings = parse([*LEAST, "--lease-max", "0.25", "--lease-margin", "0.025"]).settings(5)
    assert (settings.lease_max, settings.lease_margin) == (0.25, 0.025)
    # None at all, whatever the margin.
    assert parse([*LEAST, "--lease-max", "0"]).share.lease_max == 0
    assert parse([*LEAST, "--lease-max", "10", "--lease-margin", "10"]).share.lease_margin == 10
    for option in ("--lease-max", "--lease-margin"):
        for value in ("-1", "10.1", "nan", "inf"):
            assert f"argument {option}: '{value}': use 0 to 10 seconds" in refused(
                [*LEAST, f"{option}={value}"], capsys
            )
        assert "invalid number of seconds value" in refused([*LEAST, option, "long"], capsys)
    assert "--lease-margin is longer than --lease-max" in refused([*LEAST, "--lease-max", "0.05"], capsys)
    assert "--lease-margin is longer than --lease-max" in refused([*LEAST, "--lease-margin", "1.5"], capsys)


def test_help_tells_of_leases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--lease-max SECONDS" in text
    assert "--lease-margin SECONDS" in text
    assert "0 gives none" in text
