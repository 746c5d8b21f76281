"""A broker on a database of its own and workers in this process, as for the tests of workflows."""

from tests.workflow.conftest import broker, make_broker, start_worker

__all__ = ["broker", "make_broker", "start_worker"]
