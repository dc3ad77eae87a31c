"""Faults of the system that cannot be had otherwise: the kernel itself answers a system call with an error."""

import platform
import sys
from typing import NoReturn

from tests.conftest import absent

NUMBERS = {"x86_64": {"flock": 73}, "aarch64": {"flock": 32}}  # of system calls

# a seccomp filter (linux/seccomp.h, linux/filter.h): load the call's number; if it is this one, return the error
FILTER = """
import ctypes, struct
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
steps = b"".join(struct.pack("HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x00050000 | {error}), (0x06, 0, 0, 0x7FFF0000)))
libc, program = ctypes.CDLL(None, use_errno=True), Program(4, steps)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
"""


def without(call: str, error: int) -> str | NoReturn:
    """Python source after which a system call of its process and its children ends with this error."""
    number = NUMBERS.get(platform.machine(), {}).get(call)
    if sys.platform != "linux" or number is None:
        absent(f"{call} cannot be made to fail on {sys.platform} {platform.machine()}")
    return FILTER.format(number=number, error=error)
