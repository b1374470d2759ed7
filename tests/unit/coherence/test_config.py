"""The daemon's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.config import Config, load

EXAMPLE = Path(__file__).parents[3] / "packaging" / "coherenced.toml"


def test_the_defaults() -> None:
    config = load(None, {})
    assert config == Config()
    assert config.socket_path == Path("/run/coherenced/vt.sock")
    assert config.paths.table == Path("/dev/shm/vt")
    assert config.socket_bits == 0o660


def test_the_example_is_the_defaults() -> None:
    assert load(EXAMPLE, {}) == Config()


def test_every_setting_is_in_the_example() -> None:
    text = EXAMPLE.read_text()
    assert all(name.replace("_", "-") in text for name in Config.__struct_fields__)


def test_flags_overrule_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('table = "blue"\nslots = 2048\n')
    config = load(path, {"slots": 4096})
    assert (config.table, config.slots) == ("blue", 4096)
    assert config.socket_path == Path("/run/coherenced/blue.sock")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slots = ", "not TOML"),
        ("slots = 1000", "power of two|>= 1024"),
        ("slots = 3000", "use a power of two"),
        ('slots = "1024"', "slots"),
        ("slot = 1024", "slot"),
        ('socket-mode = "rwx"', "socket-mode is 'rwx': use octal"),
        ("socket-mode = 660", "socket-mode"),
        ('log-level = "loud"', "log-level"),
        ('watch = "closely"', "watch"),
        ("max-watches = 0", "max-watches"),
        ('metrics = "localhost:9999"', "metrics is 'localhost:9999': use one such as"),
        ('table = ""', "table name"),
        ('table = "/dev/shm/a/b"', "table name"),
        ('table = "a/b"', "table name"),
        ('table = "/a/b"', "table name"),
        ('table = "/.."', "table name"),
        ('table = "/vt.lock"', "table name"),
        ('table = "/vt.journal.00000001"', "table name"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load(path, {})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(UserError, match="command line"):
        load(path, {"slots": 3})


def test_a_missing_file_is_told() -> None:
    with pytest.raises(UserError, match=r"/nowhere/c\.toml: No such file"):
        load(Path("/nowhere/c.toml"), {})


def test_a_binary_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not TOML"):
        load(path, {})
