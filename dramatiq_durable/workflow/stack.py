"""Where a run's code waits."""

from __future__ import annotations

import linecache
from typing import Any

from .loop import WorkflowLoop


def stack_of(loop: WorkflowLoop) -> str:
    """Return what the run's tasks await, as a text: for each its name, and its frames, outermost first."""
    parts = []
    for task in loop.pending_tasks():
        lines = [f"{task.get_name()}:"]
        awaited: Any = task.get_coro()
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
            if frame is None:
                break
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_qualname}')
            text = linecache.getline(code.co_filename, frame.f_lineno).strip()
            if text:
                lines.append(f"    {text}")
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
        parts.append("\n".join(lines))
    return "\n".join(parts)
