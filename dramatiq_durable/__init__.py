"""Durable queues and durable workflows for Dramatiq, on Postgres."""

from .activity import ActivityInfo, activity_info, transaction
from .broker import DurableBroker
from .errors import *  # noqa: F403
from .migrate import migrate
from .workflow.client import Description, HistoryEvent, WorkflowHandle, get_handle
from .workflow.definition import activity, activity_stub, workflow
from .workflow.primitives import (
    info,
    is_replaying,
    logger,
    now,
    random,
    sleep,
    uuid4,
    uuid7,
    wait_condition,
    wait_for_signal,
)

__version__ = "0.1.0"
