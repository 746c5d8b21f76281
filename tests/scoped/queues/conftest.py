"""A broker on a database of its own and workers in this process, as for the tests of queues."""

from tests.broker.conftest import broker, make_broker, notes, rows, start_worker

__all__ = ["broker", "make_broker", "notes", "rows", "start_worker"]
