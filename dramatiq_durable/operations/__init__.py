"""Operations: what the group commit commits.

An operation is one item; all items of one kind in a batch become one call of a SQL procedure, with parallel arrays.
"""

from .advancing import Advance, Child, Send
from .base import Context, LeaseOperation, Operation, Rows, statement
from .calls import by_kind, calls_of, parts_of, size_of
from .living import ExpireRun, ResetRun
from .scheduling import ControlSchedule, Due, FireByHand, FireSchedule, LookUpSchedule, SaveSchedule
from .sending import Enqueue, EnqueueKeyed, EnqueueOne, Post, StartRun, Terminate
from .settling import (
    Ack,
    Bury,
    Claim,
    CompleteActivity,
    FailSettling,
    FailTask,
    Leave,
    MarkStarted,
    Release,
    Reschedule,
    Result,
    Together,
)

__all__ = [
    "Ack",
    "Advance",
    "Bury",
    "Child",
    "Claim",
    "CompleteActivity",
    "Context",
    "ControlSchedule",
    "Due",
    "Enqueue",
    "EnqueueKeyed",
    "EnqueueOne",
    "ExpireRun",
    "FailSettling",
    "FailTask",
    "FireByHand",
    "FireSchedule",
    "LeaseOperation",
    "Leave",
    "LookUpSchedule",
    "MarkStarted",
    "Operation",
    "Post",
    "Release",
    "Reschedule",
    "ResetRun",
    "Result",
    "Rows",
    "SaveSchedule",
    "Send",
    "StartRun",
    "Terminate",
    "Together",
    "by_kind",
    "calls_of",
    "parts_of",
    "size_of",
    "statement",
]
