"""What the workflow's code asks for, and the futures that wait for the answers: a module for each kind."""

from .activities import ActivityCall, ActivityHandle, CancelActivity, RequestActivityCancel, ScheduleActivity
from .base import Answer, Call, Cancellation, Command, CommandFuture
from .children import CancelChild, ChildCall, ChildHandle, StartChild
from .closing import CancelWorkflow, CompleteWorkflow, FailWorkflow
from .local import Compute, ComputeCall
from .patches import RecordPatch
from .state import Answered, ChangeEntity, EmitTopic, UpsertSearch, WriteOutput
from .timers import CancelTimer, StartTimer, TimerCall

__all__ = [
    "ActivityCall",
    "ActivityHandle",
    "Answer",
    "Answered",
    "Call",
    "CancelActivity",
    "CancelChild",
    "CancelTimer",
    "CancelWorkflow",
    "Cancellation",
    "ChangeEntity",
    "ChildCall",
    "ChildHandle",
    "Command",
    "CommandFuture",
    "CompleteWorkflow",
    "Compute",
    "ComputeCall",
    "EmitTopic",
    "FailWorkflow",
    "RecordPatch",
    "RequestActivityCancel",
    "ScheduleActivity",
    "StartChild",
    "StartTimer",
    "TimerCall",
    "UpsertSearch",
    "WriteOutput",
]
