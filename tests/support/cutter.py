"""A wire to Postgres that is cut at an exact moment: before a request gets there, or before its answer comes back."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict


class Cutter:
    """Forwards connections to a server.  The messages of its clients have to be sent without prepared statements, so
    that a call is one request with one answer, which ends with "ready for query".

    Parameters:
      url(str): the server's.

    Attributes:
      url(str): the same database by way of here.
      cut(threading.Event): set once the wire was cut.
    """

    def __init__(self, url: str) -> None:
        parts = conninfo_to_dict(url)
        self._host, self._port = str(parts.get("host", "localhost")), str(parts.get("port", 5432))
        self._listener = socket.create_server(("127.0.0.1", 0))
        user, password = quote(str(parts["user"]), safe=""), quote(str(parts.get("password", "")), safe="")
        self.url = (
            f"postgresql://{user}:{password}@127.0.0.1:{self._listener.getsockname()[1]}/{parts['dbname']}"
            "?sslmode=disable&gssencmode=disable"
        )
        self.cut = threading.Event()
        self._marker, self._answer = b"", False
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, marker: bytes, *, answer: bool) -> None:
        """Cut the wire at the next request that contains ``marker``: before the server has it, or, with ``answer``,
        once the server has answered and before the client has that."""
        self.cut.clear()
        self._answer, self._marker = answer, marker

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _connect(self) -> socket.socket:
        if not self._host.startswith("/"):
            return socket.create_connection((self._host, int(self._port)))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{self._host}/.s.PGSQL.{self._port}")
        return server

    def _serve(self, client: socket.socket) -> None:
        server = self._connect()
        self._sockets += [client, server]
        with client, server, contextlib.suppress(OSError, ValueError):  # closed from outside
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent, answered, waiting = b"", b"", False
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client:
                        sent = (sent + data)[-100_000:]
                        if self._marker and self._marker in sent:
                            self._marker = b""
                            if not self._answer:
                                self.cut.set()
                                return
                            waiting = True
                        server.sendall(data)
                    elif not waiting:
                        client.sendall(data)
                    else:
                        answered += data
                        # ReadyForQuery: the transaction is committed.
                        if answered[-6:-1] == b"Z\0\0\0\5":
                            self.cut.set()
                            return
