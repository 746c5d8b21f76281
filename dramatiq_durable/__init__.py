"""Durable queues and durable workflows for Dramatiq, on Postgres."""

from . import rate_limits, results, schedules
from .abort import (
    aabort,
    abort,
)
from .activity import (
    ActivityInfo,
    activity_info,
    transaction,
)
from .broker import (
    DurableBroker,
)
from .codecs import (
    Codec,
    decode_only,
)
from .errors import (
    Abort,
    ActivityCancelled,
    ActivityFailed,
    ChildWorkflowFailed,
    CodecFailed,
    DatabaseUnavailable,
    DurableError,
    Failure,
    ForbiddenInWorkflow,
    ImportFailed,
    InvalidDefinition,
    InvalidName,
    InvalidSchedule,
    LeaseLost,
    MessageExists,
    Nondeterminism,
    NotConfigured,
    NotDecodable,
    NotEncodable,
    NotInWorkflow,
    NotPermitted,
    OutcomeUnknown,
    PayloadTooLarge,
    RunawayWorkflow,
    ScheduleExists,
    ScheduleNotFound,
    SchemaOutOfDate,
    Timeout,
    WorkflowAlreadyStarted,
    WorkflowCancelled,
    WorkflowClosed,
    WorkflowFailed,
    WorkflowNotFound,
    WorkflowTerminated,
    WorkflowTimedOut,
)
from .using import (
    using,
)
from .workflow.client import (
    get_handle,
)
from .workflow.continuing import (
    continue_as_new,
)
from .workflow.definition import (
    Activity,
    ActivityStub,
    Workflow,
    activity,
    activity_stub,
    workflow,
)
from .workflow.handle import (
    Description,
    HistoryEvent,
    WorkflowHandle,
)
from .workflow.info import (
    Info,
)
from .workflow.interceptors import (
    CallContext,
    CallNext,
    WorkflowInterceptor,
)
from .workflow.primitives import (
    deprecate_patch,
    info,
    is_replaying,
    local,
    logger,
    now,
    patched,
    random,
    side_effect,
    sleep,
    uuid4,
    uuid7,
    wait_condition,
    wait_for_signal,
)
from .workflow.retry import (
    RetryPolicy,
)
from .workflow.structured import (
    uncancellable,
)

__version__ = "0.1.0"

__all__ = [
    "Abort",
    "Activity",
    "ActivityCancelled",
    "ActivityFailed",
    "ActivityInfo",
    "ActivityStub",
    "CallContext",
    "CallNext",
    "ChildWorkflowFailed",
    "Codec",
    "CodecFailed",
    "DatabaseUnavailable",
    "Description",
    "DurableBroker",
    "DurableError",
    "Failure",
    "ForbiddenInWorkflow",
    "HistoryEvent",
    "ImportFailed",
    "Info",
    "InvalidDefinition",
    "InvalidName",
    "InvalidSchedule",
    "LeaseLost",
    "MessageExists",
    "Nondeterminism",
    "NotConfigured",
    "NotDecodable",
    "NotEncodable",
    "NotInWorkflow",
    "NotPermitted",
    "OutcomeUnknown",
    "PayloadTooLarge",
    "RetryPolicy",
    "RunawayWorkflow",
    "ScheduleExists",
    "ScheduleNotFound",
    "SchemaOutOfDate",
    "Timeout",
    "Workflow",
    "WorkflowAlreadyStarted",
    "WorkflowCancelled",
    "WorkflowClosed",
    "WorkflowFailed",
    "WorkflowHandle",
    "WorkflowInterceptor",
    "WorkflowNotFound",
    "WorkflowTerminated",
    "WorkflowTimedOut",
    "aabort",
    "abort",
    "activity",
    "activity_info",
    "activity_stub",
    "continue_as_new",
    "decode_only",
    "deprecate_patch",
    "get_handle",
    "info",
    "is_replaying",
    "local",
    "logger",
    "now",
    "patched",
    "random",
    "rate_limits",
    "results",
    "schedules",
    "side_effect",
    "sleep",
    "transaction",
    "uncancellable",
    "using",
    "uuid4",
    "uuid7",
    "wait_condition",
    "wait_for_signal",
    "workflow",
]
