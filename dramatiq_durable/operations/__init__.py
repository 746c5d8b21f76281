"""Operations: what the group commit commits.

An operation is one item; all items of one kind in a batch become one call of a SQL procedure, with parallel arrays.
"""

from .activities import Beat, Defer, Expire, FinishActivity, Park, StartActivity
from .advancing import Advance, Child, Send
from .asking import AnswerQuery, RequestUpdate, StartRunWith
from .base import Context, LeaseOperation, Operation, Rows, statement
from .calls import by_kind, calls_of, parts_of, size_of
from .escalating import ChangeEscalation, ClaimEscalation
from .living import ExpireRun, LookAtEnd, ResetRun
from .scheduling import ControlSchedule, Due, FireByHand, FireSchedule, LookUpSchedule, SaveSchedule
from .sending import Enqueue, EnqueueKeyed, EnqueueOne, Post, StartRun, Terminate
from .settling import (
    Ack,
    Bury,
    Claim,
    CompleteActivity,
    FailSettling,
    FailTask,
    FinishEvent,
    Leave,
    LookAgain,
    MarkStarted,
    Release,
    Reschedule,
    Result,
    Together,
)

__all__ = [
    "Ack",
    "Advance",
    "AnswerQuery",
    "Beat",
    "Bury",
    "ChangeEscalation",
    "Child",
    "Claim",
    "ClaimEscalation",
    "CompleteActivity",
    "Context",
    "ControlSchedule",
    "Defer",
    "Due",
    "Enqueue",
    "EnqueueKeyed",
    "EnqueueOne",
    "Expire",
    "ExpireRun",
    "FailSettling",
    "FailTask",
    "FinishActivity",
    "FinishEvent",
    "FireByHand",
    "FireSchedule",
    "LeaseOperation",
    "Leave",
    "LookAgain",
    "LookAtEnd",
    "LookUpSchedule",
    "MarkStarted",
    "Operation",
    "Park",
    "Post",
    "Release",
    "RequestUpdate",
    "Reschedule",
    "ResetRun",
    "Result",
    "Rows",
    "SaveSchedule",
    "Send",
    "StartActivity",
    "StartRun",
    "StartRunWith",
    "Terminate",
    "Together",
    "by_kind",
    "calls_of",
    "parts_of",
    "size_of",
    "statement",
]
