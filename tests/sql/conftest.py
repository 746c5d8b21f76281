from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.sql.api import Session


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[..., Session]]:
    """Opens sessions, as the administrator unless another URL is given; they are closed before the database goes."""
    sessions: list[Session] = []

    def open_session(url: str | None = None) -> Session:
        sessions.append(Session(url or database_url))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()


@pytest.fixture
def db(connect: Callable[..., Session]) -> Session:
    """One session of the administrator."""
    return connect()
