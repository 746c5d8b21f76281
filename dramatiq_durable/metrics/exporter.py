"""The exporter: the database's gauges, for Prometheus, over HTTP."""

from __future__ import annotations

import gzip
import io
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, SocketIO
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector

from .catalogue import EXPORTER, Metric
from .gauges import Gauges, Look

logger = logging.getLogger(__name__)

#: How long a client may take to send its request, and to take its answer, in seconds.
PATIENCE = 10.0

#: How many are answered at a time; whoever comes then is hung up on.
MOST_CLIENTS = 100


class Exported(Collector):
    """A namespace's gauges.  While the database is away there are none, but ``up``, which is 0."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        look = self._gauges.look()
        namespace = self._gauges.database.namespace
        own = dict(zip(EXPORTER, (float(look.up), look.at, look.took), strict=True))
        for metric, value in own.items():
            yield _family(metric, namespace, {(): value})
        for metric, series in look.gauges.items():
            yield _family(metric, namespace, series)

    def describe(self) -> list[Any]:
        return []


def _family(metric: Metric, namespace: str, series: dict[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(metric.name, metric.meaning, labels=("namespace", *metric.labels))
    for labels, value in series.items():
        family.add_metric((namespace, *labels), value)
    return family


class Server(ThreadingHTTPServer):
    """Answers ``GET /metrics``, and ``GET /health``: 200 as long as the database answers.

    Parameters:
      address: host and port; port 0 takes a free one.
      gauges(Gauges): what is shown.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], gauges: Gauges) -> None:
        if ":" in address[0]:
            self.address_family = AF_INET6
        self.gauges = gauges
        self.registry = CollectorRegistry()
        self.registry.register(Exported(gauges))
        self._places = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # As a rule, the client has gone.
        logger.debug("the request of %s failed", client_address, exc_info=True)


class _Hurried(SocketIO):
    """What a client sends: all of it in time, not only each byte."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection, "r")
        self._connection = connection
        self._until = time.monotonic() + PATIENCE

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(max(self._until - time.monotonic(), 0.001))
        return super().readinto(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Hurried(self.connection))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            try:
                encode, content_type = choose_encoder(self.headers.get("Accept") or "")
            except Exception:
                # It names a version that is none: it gets what everybody can read.
                encode, content_type = choose_encoder("")
            self._answer(200, content_type, encode(self.server.registry), self.headers.get("Accept-Encoding") or "")
        elif path == "/health":
            look: Look = self.server.gauges.look()
            self._answer(200 if look.up else 503, "text/plain", b"up\n" if look.up else b"the database is away\n")
        else:
            self._answer(404, "text/plain", b"there is /metrics, and /health\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, content_type: str, body: bytes, encodings: str = "") -> None:
        self.connection.settimeout(PATIENCE)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if gzip_accepted(encodings):
            body = gzip.compress(body, 6)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "dramatiq-durable"

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads a line a scrape."""
