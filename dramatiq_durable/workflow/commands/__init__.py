"""What the workflow's code asks for, and the futures that wait for the answers: a module for each kind."""

from .activities import ActivityCall, ActivityHandle, CancelActivity, RequestActivityCancel, ScheduleActivity
from .base import Answer, Call, Cancellation, Command, CommandFuture
from .children import AwaitChildStart, CancelChild, ChildCall, ChildHandle, ChildStartCall, StartChild
from .closing import CancelWorkflow, CompleteWorkflow, ContinueAsNew, FailWorkflow
from .escalations import EscalationCall, OpenEscalation, WithdrawEscalation
from .local import Compute, ComputeCall
from .messages import CompleteUpdate, SendCall, SendCancel, SendSignal, send_cancel, send_signal
from .patches import RecordPatch
from .state import Answered, ChangeEntity, EmitTopic, UpsertSearch, WriteOutput
from .timers import CancelTimer, StartTimer, TimerCall

__all__ = [
    "ActivityCall",
    "ActivityHandle",
    "Answer",
    "Answered",
    "AwaitChildStart",
    "Call",
    "CancelActivity",
    "CancelChild",
    "CancelTimer",
    "CancelWorkflow",
    "Cancellation",
    "ChangeEntity",
    "ChildCall",
    "ChildHandle",
    "ChildStartCall",
    "Command",
    "CommandFuture",
    "CompleteUpdate",
    "CompleteWorkflow",
    "Compute",
    "ComputeCall",
    "ContinueAsNew",
    "EmitTopic",
    "EscalationCall",
    "FailWorkflow",
    "OpenEscalation",
    "RecordPatch",
    "RequestActivityCancel",
    "ScheduleActivity",
    "SendCall",
    "SendCancel",
    "SendSignal",
    "StartChild",
    "StartTimer",
    "TimerCall",
    "UpsertSearch",
    "WithdrawEscalation",
    "WriteOutput",
    "send_cancel",
    "send_signal",
]
