"""The exporter, when the database is slow, away or silent, and when its clients are hostile."""

from __future__ import annotations

import gzip
import http.client
import logging
import select
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError

import psycopg
import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.database import Database
from dramatiq_durable.metrics import exporter, gauges
from dramatiq_durable.metrics.catalogue import EXPORTER, GAUGES
from dramatiq_durable.metrics.exporter import Server
from dramatiq_durable.metrics.gauges import Gauges
from tests.support import wait_until

EXPORTING = [sys.executable, "-m", "dramatiq_durable.cli", "--url"]
UP = "dramatiq_durable_up"


class Exporter:
    """One that listens in this process."""

    def __init__(self, url: str, interval: float) -> None:
        self.gauges = Gauges(Database(lambda: url), interval)
        self.asked = 0
        ask = self.gauges._ask

        def counted() -> Any:
            self.asked += 1
            return ask()

        self.gauges._ask = counted  # type: ignore[method-assign]
        self.server = Server(("127.0.0.1", 0), self.gauges)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        wait_until(lambda: self.gauges._reading is None)
        self.gauges.close()


@pytest.fixture
def exporting(database_url: str) -> Iterator[Callable[..., Exporter]]:
    started: list[Exporter] = []

    def start(url: str = database_url, interval: float = 0.0) -> Exporter:
        started.append(Exporter(url, interval))
        return started[-1]

    yield start
    for each in started:
        each.close()


def scrape(port: int, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=15) as answer:
        return answer.status, dict(answer.headers), answer.read()


def values(port: int) -> dict[str, float]:
    """The values of the series that have no label but the namespace."""
    families = read_text(scrape(port)[2].decode())
    return {s.name: s.value for family in families for s in family.samples if set(s.labels) == {"namespace"}}


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 15) as client:
        client.sendall(request)
        answer = b""
        while data := client.recv(65536):
            answer += data
        return answer


# --- the database ----------------------------------------------------------------------------------------------


def test_many_who_ask_at_once_are_one_query(exporting: Callable[..., Exporter]) -> None:
    exporter = exporting(interval=60)
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(scrape(exporter.port)[2])) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exporter.asked == 1
    assert len(set(answers)) == 1
    assert len(answers) == 20
    assert values(exporter.port)[UP] == 1
    assert exporter.asked == 1


def test_while_the_database_is_slow_there_is_what_was_found_before(
    exporting: Callable[..., Exporter], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "PATIENCE", 0.2)
    exporter = exporting()
    # The first look includes the connection.
    before = wait_until(lambda: (v := values(exporter.port))[UP] == 1 and v)
    with psycopg.connect(database_url) as conn:
        conn.execute("LOCK TABLE durable.stream IN ACCESS EXCLUSIVE MODE")
        asked = exporter.asked
        began = time.monotonic()
        during = [values(exporter.port) for _ in range(3)]
        assert time.monotonic() - began < 1.9
        for each in during:
            assert each[UP] == 1
        seen = "dramatiq_durable_exporter_collected_timestamp_seconds"
        assert {each[seen] for each in during[1:]} == {during[0][seen]}
        assert exporter.asked - asked <= 2
        # The lock is not waited for for ever.
        wait_until(lambda: values(exporter.port)[UP] == 0)
    after = wait_until(lambda: (v := values(exporter.port))[UP] == 1 and v)
    assert after[seen] > before[seen]


class Wire:
    """The way to a server; ``silent``: nothing comes through, and nobody is told."""

    def __init__(self, url: str) -> None:
        self.silent = False
        parts = psycopg.conninfo.conninfo_to_dict(url)
        self._path = f"{parts['host']}/.s.PGSQL.{parts['port']}"
        self._port = 0
        self._clients: list[socket.socket] = []
        self.connect()
        self.url = (
            f"postgresql://{parts['user']}:{parts.get('password', '')}@127.0.0.1:{self._port}/{parts['dbname']}"
            "?sslmode=disable&gssencmode=disable"
        )

    def connect(self) -> None:
        """Let clients connect, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """As when the server is stopped: connections end, and new ones are refused."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._path)
        with client, server, suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if not self.silent:
                        (server if source is client else client).sendall(data)


@pytest.fixture
def wire(database_url: str) -> Iterator[Wire]:
    wire = Wire(database_url)
    yield wire
    wire.cut()


def test_a_database_that_falls_silent_is_found_again(
    exporting: Callable[..., Exporter], wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an error nor the end of the connection comes: the network is gone, or the server hangs."""
    exporter = exporting(wire.url)
    wait_until(lambda: values(exporter.port)[UP] == 1)
    monkeypatch.setattr(gauges, "PATIENCE", 0.1)
    monkeypatch.setattr(gauges, "TIMEOUT", 0.3)
    threads = threading.active_count()
    wire.silent = True
    wait_until(lambda: values(exporter.port)[UP] == 0)
    assert threading.active_count() <= threads + 3
    wire.silent = False
    wait_until(lambda: values(exporter.port)[UP] == 1)


def test_it_starts_before_the_database_and_survives_it(run_process: Any, wire: Wire) -> None:
    process = run_process(*EXPORTING, wire.url, "exporter", "--listen", "127.0.0.1:0", "--interval", "0.1s")
    port = int(process.wait_for("listening on").rpartition(":")[2].partition("/")[0])
    assert values(port)[UP] == 1
    wire.cut()
    wait_until(lambda: values(port)[UP] == 0)
    with pytest.raises(HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=15)
    with error.value as answer:
        assert answer.code == 503
    for _ in range(5):
        assert set(values(port)) == {m.name for m in EXPORTER}
    # Once, however often it is asked.
    assert process.output.count("the gauges cannot be read") <= 2
    late = run_process(*EXPORTING, wire.url, "exporter", "--listen", "127.0.0.1:0", "--interval", "0.1s")
    late_port = int(late.wait_for("listening on").rpartition(":")[2].partition("/")[0])
    assert "the database is away, and waited for" in late.output
    assert values(late_port)[UP] == 0
    wire.connect()
    for each in (port, late_port):
        wait_until(lambda port=each: values(port)[UP] == 1)  # type: ignore[misc]
    process.wait_for("the gauges can be read again")
    assert process.stop() == late.stop() == 0


def test_what_it_may_not_see_is_said_once(
    exporting: Callable[..., Exporter], database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = exporting()
    with caplog.at_level(logging.WARNING, "dramatiq_durable"):
        unseen = [values(exporter.port)["dramatiq_durable_unseen_sessions"] for _ in range(3)]
    # Processes of the server itself, at least.
    assert min(unseen) > 0
    assert caplog.text.count("GRANT pg_read_all_stats") == 1
    with psycopg.connect(database_url, autocommit=True) as conn:
        found = conn.execute("SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'durable'").fetchone()
        assert found is not None
        conn.execute(f"GRANT pg_read_all_stats TO {found[0]}".encode())
        try:
            assert values(exporter.port)["dramatiq_durable_unseen_sessions"] == 0
        finally:
            # The role is other tests', too.
            conn.execute(f"REVOKE pg_read_all_stats FROM {found[0]}".encode())


# --- its clients ----------------------------------------------------------------------------------------------------


@pytest.fixture
def port(exporting: Callable[..., Exporter]) -> int:
    started = exporting(interval=60)
    wait_until(lambda: values(started.port)[UP] == 1)
    return int(started.port)


def test_what_it_answers(port: int) -> None:
    status, headers, body = scrape(port)
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert int(headers["Content-Length"]) == len(body)
    names = {family.name for family in read_text(body.decode())}
    assert names == {m.name for m in (*EXPORTER, *GAUGES)}

    _, headers, packed = scrape(port, **{"Accept-Encoding": "deflate, gzip;q=1.0"})
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed) == body

    wanted = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    _, headers, body = scrape(port, Accept=wanted)
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    assert {family.name for family in read_openmetrics(body.decode())} == names

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    for method, path, expected in (
        ("HEAD", "/metrics", 200),
        ("GET", "/metrics?name[]=up", 200),
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("POST", "/metrics", 501),
        ("DELETE", "/metrics", 501),
    ):
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        assert (answer.status, bool(body)) == (expected, method != "HEAD"), (method, path)
    connection.close()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text;version=abc\r\n\r\n", b" 200 "),
        (b"GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text;version=9\r\n X-Evil: 1\r\n\r\n", b" 200 "),
        (b"GET /metrics HTTP/1.0\r\nAccept: \xff\xfe;;;,,=\r\nAccept-Encoding: ,;,gzipp\r\n\r\n", b" 200 "),
        (b"GET /metrics HTTP/1.0\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", b" 431 "),
        (b"GET /metrics HTTP/1.0\r\n" + b"X: 1\r\n" * 200 + b"\r\n", b" 431 "),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n", b" 414 "),
        (b"GET /%00%0d%0aX HTTP/1.0\r\n\r\n", b" 404 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b" 400 "),
    ],
    ids=["no version", "folded", "garbage", "long header", "many headers", "long path", "odd path", "TLS"],
)  # fmt: skip
def test_hostile_requests(port: int, request_: bytes, expected: bytes) -> None:
    answer = raw(port, request_)
    head = answer.partition(b"\r\n\r\n")[0]
    assert expected in head.partition(b"\r\n")[0], head
    assert b"\r\nX-Evil" not in head
    assert b"Traceback" not in answer
    assert values(port)[UP] == 1


def test_slow_clients_hold_up_nobody(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PATIENCE", 0.5)
    slow = [socket.create_connection(("127.0.0.1", port), 15) for _ in range(50)]
    for each in slow:
        each.sendall(b"GET /metrics HTTP/1.0\r\n")
    assert values(port)[UP] == 1
    # A byte now and then makes no difference.
    deadline = time.monotonic() + 10
    drip = slow[0]
    with suppress(OSError):
        while not select.select([drip], [], [], 0.05)[0]:
            assert time.monotonic() < deadline
            drip.sendall(b"X")
    for each in slow[1:]:
        with suppress(ConnectionResetError):
            assert each.recv(100) == b""
    for each in slow:
        each.close()


def test_there_are_not_more_clients_than_it_has_places_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PATIENCE", 1.0)
    before = threading.active_count()
    crowd = [socket.create_connection(("127.0.0.1", port), 15) for _ in range(exporter.MOST_CLIENTS + 50)]
    # Some are hung up on.
    wait_until(lambda: len(select.select(crowd, [], [], 0)[0]) >= 50)
    assert threading.active_count() <= before + exporter.MOST_CLIENTS
    for each in crowd:
        each.close()
    wait_until(lambda: threading.active_count() <= before)
    assert values(port)[UP] == 1


def test_a_signal_ends_it_at_once_whoever_is_there(run_process: Any, database_url: str) -> None:
    process = run_process(*EXPORTING, database_url, "exporter", "--listen", "[::1]:0", "--interval", "0s")
    port = int(process.wait_for("listening on").rpartition(":")[2].partition("/")[0])
    with socket.create_connection(("::1", port), 15) as idle, psycopg.connect(database_url) as conn:
        idle.sendall(b"GET /metrics HTTP/1.0\r\n")
        conn.execute("LOCK TABLE durable.stream IN ACCESS EXCLUSIVE MODE")
        with socket.create_connection(("::1", port), 15) as waiting:
            waiting.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            asks = "SELECT 1 FROM pg_locks WHERE relation = 'durable.stream'::regclass AND NOT granted"
            wait_until(lambda: conn.execute(asks).fetchall())
            began = time.monotonic()
            assert process.stop() == 0
            assert time.monotonic() - began < 1.5
    assert "Traceback" not in process.output
    assert "Exception" not in process.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "9192"], "is no address"),
        (["--listen", ":9192"], "is no address"),
        (["--listen", "127.0.0.1:http"], "is no address"),
        (["--listen", "127.0.0.1:\u00b2"], "is no address"),
        (["--listen", "127.0.0.1:65536"], "is no address"),
        (["--listen", "127.0.0.1:-1"], "is no address"),
        (["--listen", "192.0.2.1:0"], "cannot listen on 192.0.2.1:0"),
        (["--listen", "no.such.host.invalid:0"], "cannot listen on no.such.host.invalid:0"),
        (["--interval", "often"], "often"),
        (["--interval", "-1s"], "-1s"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_arguments(database_url: str, options: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["--url", database_url, "exporter", *options])
    assert result.exit_code in (1, 2)
    assert says in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_port_that_is_taken(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(main, ["--url", database_url, "exporter", "--listen", listen])
    assert (result.exit_code, "in use" in result.output) == (1, True), result.output


def test_a_login_that_is_no_monitors(database_url: str) -> None:
    made = durable.provision_worker_role(database_url, name="working", streams=["a"])
    result = CliRunner().invoke(main, ["--url", made.url, "exporter", "--listen", "127.0.0.1:0"])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.output.startswith("Error: ")
