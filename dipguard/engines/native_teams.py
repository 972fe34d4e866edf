"""Whether threads without an image of their own help with another's: what has measured faster lately.

On idle cores helping pays (a single 224x224 image on two: 156 ms a step against 309). But a team waits at some hundred
places a step, and where other programs want the cores too, it may wait at each for a thread that is not running: 14 ms
were seen in place of 2.5 (32x32), on two cores with five programs. Neither can be known beforehand, and results do not
depend on it.
"""

from __future__ import annotations

import statistics

TRIAL = 3
"""Steps, of which the median counts."""
SHORTEST, LONGEST = 32, 512
"""Steps from one trial of the slower way to the next; doubled each time that it was slower again."""


class TeamChoice:
    """Tries both ways at first, and the slower one again now and then.

    Attributes:
        teams: Whether the next step is to use teams.
    """

    def __init__(self) -> None:
        self.teams = True
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._better: bool | None = None  # None: not both have been tried
        self._interval = SHORTEST
        self._left = TRIAL + 1  # the first step of all touches its memory for the first time

    def record(self, seconds: float) -> None:
        """A step's time, in the way that ``teams`` asked for."""
        seen = self._seconds[self.teams]
        seen.append(seconds)
        del seen[:-TRIAL]
        self._left -= 1
        if self._left > 0:
            return
        if self._better == self.teams:  # time to try the other way
            self.teams, self._left = not self.teams, TRIAL
        elif self._better is None and self.teams:
            self.teams, self._left = False, TRIAL
        else:
            self._settle()

    def _settle(self) -> None:
        better = statistics.median(self._seconds[True]) <= statistics.median(self._seconds[False])
        self._interval = min(2 * self._interval, LONGEST) if better == self._better else SHORTEST
        self.teams = self._better = better
        self._left = self._interval
