"""Waiting for a 32-bit word of shared memory to change.

Uses futexes on Linux on x86-64 and aarch64; polls every millisecond elsewhere and where a sandbox forbids the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial

_CALL_NUMBERS = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT = 0  # without FUTEX_PRIVATE_FLAG: the word is shared between processes
_FUTEX_WAKE = 1
_ALL_WAITERS = 2**31 - 1
_POLL_S = 0.001
_WAIT_S_MAX = 3600.0
_EXPECTED_ERRNOS = (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)


class Bell:
    """A word that writers change and waiters sleep on, at `offset` of `memory` (a writable shared mapping).

    Thread-safe. `wait` releases the GIL while it sleeps. `ring` keeps it: waking takes microseconds, while reacquiring
    the GIL can take a whole switch interval of a computing thread. `waiters` counts this process's threads in `wait`.
    """

    def __init__(self, memory: memoryview, offset: int, *, futex: bool) -> None:
        self._word = ctypes.c_uint32.from_buffer(memory, offset)
        self._address = ctypes.addressof(self._word)
        self._futex = futex
        self.waiters = 0
        self.closed = False
        self._mutex = threading.Lock()
        self.wake = futex_waker(self._address) if futex else lambda: None  # pollers wake by themselves

    @property
    def value(self) -> int:
        """The current word."""
        return int(self._word.value)

    def ring(self, value: int) -> None:
        """Stores `value` and wakes the waiters of all processes."""
        self._word.value = value
        self.wake()

    def wait(self, seen: int, timeout_s: float) -> int:
        """Sleeps until the word differs from `seen`, the timeout or `close`; returns the word."""
        with self._mutex:
            self.waiters += 1
        try:
            deadline = time.monotonic() + timeout_s
            while self._word.value == seen and not self.closed:
                left_s = deadline - time.monotonic()
                if not left_s > 0:
                    break
                if self._futex:
                    futex_wait(self._address, seen, min(left_s, _WAIT_S_MAX))
                else:
                    time.sleep(min(left_s, _POLL_S))
            return self.value
        finally:
            with self._mutex:
                self.waiters -= 1

    def close(self) -> None:
        """Ends this process's waits and releases the memory."""
        self.closed = True
        while self.waiters:  # a waiter may fall asleep after a wake: repeat until none is left
            self.wake()
            time.sleep(_POLL_S)
        del self._word


@cache
def futex_available() -> bool:
    """Returns whether this process may use futexes, which a wait that cannot sleep tries."""
    if sys.platform != "linux" or platform.machine() not in _CALL_NUMBERS or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    word = ctypes.c_uint32(1)
    try:
        futex_wait(ctypes.addressof(word), 0, 0.001)
    except OSError:
        return False
    return True


def futex_wait(address: int, expected: int, timeout_s: float) -> None:
    """Sleeps without the GIL while the word at `address` is `expected`, until a wake-up, a signal or the timeout.

    Raises `OSError` when the kernel refuses the call itself.
    """
    seconds = int(timeout_s)
    timeout = ctypes.byref(_Timespec(seconds, int((timeout_s - seconds) * 1e9)))
    if _syscall_without_gil()(*_arguments(address, _FUTEX_WAIT, expected), timeout, None, _UNUSED) == 0:
        return
    code = ctypes.get_errno()
    if code not in _EXPECTED_ERRNOS:
        raise OSError(code, os.strerror(code))


def futex_waker(address: int) -> Callable[[], object]:
    """Returns a function that wakes all waiters on the word at `address` without releasing the GIL."""
    syscall = ctypes.PyDLL(None).syscall
    syscall.restype = None  # converting the unused count of woken waiters takes time
    return partial(syscall, *_arguments(address, _FUTEX_WAKE, _ALL_WAITERS))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_UNUSED = ctypes.c_long(0)


def _arguments(address: int, operation: int, value: int) -> tuple[object, ...]:
    number = ctypes.c_long(_CALL_NUMBERS[platform.machine()])
    return number, ctypes.c_void_p(address), ctypes.c_long(operation), ctypes.c_long(value)


@cache
def _syscall_without_gil() -> Callable[..., int]:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    return syscall
