"""Fixtures of every test: unexpected log output is a failure."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import structlog

from coherent_vfs.coherence.common import log


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Let commands that tests start be interrupted, also where the tests themselves run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def expect_log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], None]]:
    """Fail a test that logs a warning or worse which it did not announce with expect_log("part of the line")."""
    log.configure("info")
    structlog.configure(cache_logger_on_first_use=False)
    logging.getLogger().addHandler(caplog.handler)
    expected: list[str] = []
    yield expected.append
    records = [r for r in caplog.get_records("call") if r.levelno >= logging.WARNING]
    surprising = [r.getMessage() for r in records if not any(part in r.getMessage() for part in expected)]
    assert not surprising, f"unexpected log output: {surprising}"


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    """Give the umask back that a server in this process took away (server.host.credentials.prepare)."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)
