"""What the workflow's code asks for, and the futures that wait for the answers: a module for each kind."""

from .activities import ActivityCall, ActivityHandle, CancelActivity, RequestActivityCancel, ScheduleActivity
from .base import Answer, Call, Cancellation, Command, CommandFuture
from .children import AwaitChildStart, CancelChild, ChildCall, ChildHandle, ChildStartCall, StartChild
from .closing import CancelWorkflow, CompleteWorkflow, ContinueAsNew, FailWorkflow
from .local import Compute, ComputeCall
from .patches import RecordPatch
from .timers import CancelTimer, StartTimer, TimerCall

__all__ = [
    "ActivityCall",
    "ActivityHandle",
    "Answer",
    "AwaitChildStart",
    "Call",
    "CancelActivity",
    "CancelChild",
    "CancelTimer",
    "CancelWorkflow",
    "Cancellation",
    "ChildCall",
    "ChildHandle",
    "ChildStartCall",
    "Command",
    "CommandFuture",
    "CompleteWorkflow",
    "Compute",
    "ComputeCall",
    "ContinueAsNew",
    "FailWorkflow",
    "RecordPatch",
    "RequestActivityCancel",
    "ScheduleActivity",
    "StartChild",
    "StartTimer",
    "TimerCall",
]
