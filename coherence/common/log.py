"""Structured logs on stderr, quiet by default: structlog in front, the standard library's logging behind."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog

Level = Literal["error", "warn", "info", "debug", "trace", "off"]

TRACE = 5
"""Below logging.DEBUG: what is written for each request."""

LEVELS: dict[str, int] = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}


def configure(level: str, *, json: bool = False) -> None:
    """Send this process's logs to stderr, one event a line.

    Args:
        level: the least severe level to show: off, error, warn, info, debug or trace (virtiofsd's names).
        json: write JSON objects instead of logfmt.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    logging.basicConfig(stream=sys.stderr, level=LEVELS[level], format="%(message)s", force=True)


def traces() -> bool:
    """Whether each request is to be logged; such lines are of level debug."""
    return logging.getLogger().isEnabledFor(TRACE)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one module; events are short phrases, facts are keywords."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger
