"""How a run ends early: it saves after the step that it is in."""

import signal
import time
from typing import Any


class StopRequest:
    """Takes SIGTERM and Ctrl-C for a request to end after the present step; a second Ctrl-C ends the run at once.

    Truth value: whether one came. `interrupted` says whether it was Ctrl-C.
    """

    def __init__(self) -> None:
        self.came_at: float | None = None
        self.interrupted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)

    def __bool__(self) -> bool:
        return self.came_at is not None

    def _take(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        # One within a second is the same one: a launcher passes it on to processes that have got it, too.
        if number == signal.SIGINT and self.came_at is not None and now - self.came_at > 1:
            raise KeyboardInterrupt
        self.came_at, self.interrupted = self.came_at or now, number == signal.SIGINT
