"""How many messages a worker process claims ahead of its threads: it follows the rate at which they finish them."""

from __future__ import annotations

import time

#: How much work, in seconds at the present rate, is claimed ahead of the threads, and how many messages at the most.
AHEAD = 0.04
MOST_AHEAD = 1000

#: Messages that were claimed ahead go back when nothing was claimed or finished for so long, in seconds.
STALE = 1.0


class Pace:
    """The rate at which messages are finished here.

    Attributes:
      finished(int): how many were finished since the last look at the clock; whoever finishes one counts it.
      ahead(int): how many messages are claimed ahead of the threads.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.ahead = 0
        self._rate = 0.0
        self._measured = self._last_finished = self._last_claimed = time.monotonic()

    def measure(self, threads: int) -> None:
        """How many messages a second are finished: what is claimed ahead follows it.

        It believes a time that is long, or in which each of the threads has finished several: that some end together
        says little.
        """
        now = time.monotonic()
        elapsed = now - self._measured
        if elapsed < 0.005:
            return
        finished, self.finished = self.finished, 0
        if finished:
            self._last_finished = now
        self._rate += (finished / elapsed - self._rate) * min(1.0, max(elapsed / 0.1, finished / (8 * max(threads, 1))))
        self._measured = now
        # It follows a rising rate at once and a falling one slowly: work that is under way keeps its places.
        self.ahead = min(MOST_AHEAD, max(int(self._rate * AHEAD), int(self.ahead * 0.9)))

    def claimed(self) -> None:
        """Messages have come that the threads have not had the time to take."""
        self._last_claimed = time.monotonic()

    def stale(self) -> bool:
        """Whether the threads get to nothing of what was claimed ahead of them."""
        return time.monotonic() - max(self._last_finished, self._last_claimed) >= STALE
