"""The exporter: the database's gauges, for Prometheus, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .catalogue import EXPORTER, Metric
from .gauges import Gauges, Look

#: How long a client may take for its request, in seconds.
PATIENCE = 10


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

    def __init__(self, address: tuple[str, int], gauges: Gauges) -> None:
        if ":" in address[0]:
            self.address_family = AF_INET6
        self.gauges = gauges
        self.registry = CollectorRegistry()
        self.registry.register(Exported(gauges))
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = PATIENCE
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept") or "")
            self._answer(200, content_type, encode(self.server.registry))
        elif path == "/health":
            look: Look = self.server.gauges.look()
            self._answer(200 if look.up else 503, "text/plain", b"up\n" if look.up else b"the database is away\n")
        else:
            self._answer(404, "text/plain", b"there is /metrics, and /health\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "dramatiq-durable"

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads a line a scrape."""
