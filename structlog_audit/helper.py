"""The helper: a thread for what no caller can do, started when it is first needed.

Giving an order neither waits nor takes a lock that somebody else may hold: it is safe on an event
loop, in signal handlers and in `__del__`. The order goes into a deque, then a bell is rung: a lock
that the thread waits to acquire. A `SimpleQueue` will not do: on CPython 3.10 its `get(timeout=…)`
blocks for ever when the thread is suspended at the wrong instant (seen, not read).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from time import monotonic

_STARTING, _RUNNING = "starting", "running"


class Helper:
    """Takes turns when it is told to.

    Args:
        turn: does what is due; returns in how many seconds it wants another turn, or None.
    """

    def __init__(self, turn: Callable[[], float | None]) -> None:
        self._turn = turn
        self._orders: deque[float | Callable[[], None] | None] = deque()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._thread: dict[str, object] = {}  # who starts it, and which runs; claimed in one step

    def order(self, order: float | Callable[[], None]) -> None:
        """Have it take a turn in so many seconds at the latest, or do something at once.

        Raises:
            RuntimeError: no thread can be started.
        """
        self._start()
        self._tell(order)

    def stop(self) -> None:
        """Let the thread go, when nobody will order again."""
        if _RUNNING in self._thread:
            self._tell(None)

    def _tell(self, order: float | Callable[[], None] | None) -> None:
        try:
            self._orders.append(order)
        finally:  # a signal handler may raise in between
            with contextlib.suppress(RuntimeError):  # it rings already
                self._bell.release()

    def _start(self) -> None:
        """Start the thread unless it runs; neither locks nor waits, as Thread.start would.

        An exception from a signal handler may strike anywhere in here. So the claim to start it
        is given back in any case, and it is the thread itself that claims to be the one.
        """
        if _RUNNING in self._thread:
            return
        me = object()
        try:
            if self._thread.setdefault(_STARTING, me) is me:
                start_new_thread(self._run, (me,))
        finally:
            if self._thread.get(_STARTING) is me:
                del self._thread[_STARTING]

    def _run(self, me: object) -> None:
        if self._thread.setdefault(_RUNNING, me) is not me:
            return
        try:
            self._work()
        finally:
            del self._thread[_RUNNING]
        if self._orders:  # given while it went
            self._start()

    def _work(self) -> None:
        due: float | None = None
        while True:
            if not self._orders:  # the thread before may have heard the bell for them
                self._bell.acquire(timeout=-1 if due is None else max(0.0, due - monotonic()))
            while self._orders:
                order = self._orders.popleft()
                if order is None:
                    return
                if callable(order):
                    _do(order)
                else:
                    due = _sooner(due, order)
            if due is not None and due <= monotonic():
                due = _sooner(None, _do(self._turn))


def _sooner(due: float | None, delay: float | None) -> float | None:
    if delay is None:
        return due
    when = monotonic() + delay
    return when if due is None else min(due, when)


def _do(work: Callable[[], float | None]) -> float | None:
    """Do something in the helper, which must outlive it."""
    try:
        return work()
    except BaseException as error:  # noqa: BLE001 - and so may be raised by an excepthook
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error, error.__traceback__)
    return None
