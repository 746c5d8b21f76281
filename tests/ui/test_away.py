"""The pages while the database is away, and when it is there again."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import psycopg_pool.base
import pytest

from dramatiq_durable import database
from tests.support.cutter import Cutter
from tests.ui.conftest import OpenSite
from tests.ui.test_pages import look


class Wire(Cutter):
    """A wire to the server that can be pulled out."""

    gone = False

    def _serve(self, client: socket.socket) -> None:
        if self.gone:
            client.close()
        else:
            super()._serve(client)

    def pull_out(self) -> None:
        self.gone = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(database_url: str) -> Iterator[Wire]:
    wire = Wire(database_url)
    yield wire
    wire.close()


def test_it_says_so_and_comes_back_by_itself(wire: Wire, opened: OpenSite, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise ten seconds, and one.
    monkeypatch.setattr(database, "CONNECT_TIMEOUT", 1)
    monkeypatch.setattr(psycopg_pool.base.AttemptWithBackoff, "INITIAL_DELAY", 0.5)
    client = opened(wire.url)
    look(client, "/runs")
    wire.pull_out()
    since = time.monotonic()
    while time.monotonic() < since + 3.8:
        page = look(client, "/runs", 503)
        assert "The database cannot be used" in page.text
        assert "load this page again" in page.text
        assert "127.0.0.1" in page.text
        # What needs no database is there.
        assert client.get("/style.css").status_code == 200
    wire.gone = False
    # However long it was away, it is not waited for longer than that.
    tries = 1
    while client.get("/runs").status_code != 200:
        tries += 1
    assert tries <= 2
