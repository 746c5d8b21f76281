"""Where what was counted is shown, as far as that goes by itself.

Neither prometheus_client nor OpenTelemetry is imported before there is a reason: prometheus_client's multiprocess
directory is set (as Dramatiq's Prometheus middleware does), or an OpenTelemetry SDK for metrics was loaded and a broker
wants its metrics there.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from .recorder import digest, is_wanted

if TYPE_CHECKING:
    from .multiprocess import Files

logger = logging.getLogger(__name__)

#: How often what was counted is written into the multiprocess directory, and how often it is looked whether there is
#: one, in seconds.
PERIOD = 1.0

_next_look = 0.0
_lock = threading.Lock()
_files: Files | None = None
_instrumented = False


def look() -> None:
    """Called before every use of the database: once a period, looks for somebody to show it to."""
    if time.monotonic() >= _next_look:
        _look()


def _look() -> None:
    global _next_look, _files, _instrumented
    _next_look = time.monotonic() + PERIOD
    digest()
    with _lock:
        if not _instrumented and "opentelemetry.sdk.metrics" in sys.modules and is_wanted():
            from . import otel

            _instrumented = True
            otel.instrument()
        directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if directory and _files is None:
            from .multiprocess import Files

            _files = Files(directory)
            threading.Thread(target=_keep, args=(_files,), name="dramatiq-durable-metrics", daemon=True).start()


def _keep(files: Files) -> None:
    while files is _files:
        time.sleep(PERIOD)
        _write(files)


def _write(files: Files) -> None:
    with _lock:
        try:
            files.write()
        except Exception:
            logger.exception("the metrics cannot be written to %s", files.directory)


def flush() -> None:
    """Write what was counted, where it is shown in files: this process may be about to end."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _look()
    if _files is not None:
        _write(_files)


def _after_fork() -> None:
    """The files are the parent's, and so is the thread that writes them; so are its instruments."""
    global _lock, _files, _next_look
    if _files is not None:
        _files.close()
    _lock, _files, _next_look = threading.Lock(), None, 0.0


os.register_at_fork(after_in_child=_after_fork)
