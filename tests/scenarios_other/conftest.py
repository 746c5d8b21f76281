"""The broker and the workers are those of the tests of workflows."""

from tests.workflow.conftest import broker, make_broker, start_worker

__all__ = ["broker", "make_broker", "start_worker"]
