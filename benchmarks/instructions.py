"""Counting the instructions of a process: what it does, however much else runs on the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

#: The number of perf_event_open, by machine.
_CALL = {"x86_64": 298, "aarch64": 241}

#: Of the structure that it takes: its size, what is counted (PERF_COUNT_HW_INSTRUCTIONS), that threads are counted too,
#: and that the kernel and a hypervisor are not.
_SIZE, _INSTRUCTIONS, _INHERIT, _LEFT_OUT = 112, 1, 1 << 1, 1 << 5 | 1 << 6


def count() -> int | None:
    """Begin to count what this thread, and those that it starts from now on, execute in user mode; answers a file
    for `counted`, or None where the kernel or the processor does not tell."""
    call = _CALL.get(platform.machine()) if sys.platform == "linux" else None
    if call is None:
        return None
    wanted = struct.pack("IIQQQQQ", 0, _SIZE, _INSTRUCTIONS, 0, 0, 0, _INHERIT | _LEFT_OUT).ljust(_SIZE, b"\0")
    file = ctypes.CDLL(None, use_errno=True).syscall(call, ctypes.create_string_buffer(wanted), 0, -1, -1, 0)
    return None if file < 0 else int(file)


def counted(file: int) -> int:
    """How many there were until now."""
    return int(struct.unpack("Q", os.read(file, 8))[0])
