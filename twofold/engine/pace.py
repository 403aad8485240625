"""Pace: how many tokens to guess at, from how often guesses were right and from what a longer step costs.

    tokens a second    (rows + chances of the drafts) / (seconds of a step with so many tokens more)

The length that makes this largest is taken, which is none where guesses are wrong, or where the machine is busy enough
that a token more costs its full share. Both figures are learned from the steps themselves; time decides about the
length alone, never about a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from .proposer import GRADES

PRIOR = 0.6  # of a grade that was never seen
TRUST = 2.0  # tries of a request that weigh as much as what all requests have shown
FADE = 0.9  # what a request's figure keeps of itself at each new try; the figure of all keeps 0.99
FADE_STEP = 0.98  # what the line keeps of what it knew at each new step
SLOPE = 0.25  # share of a step that as many tokens again are thought to cost before it was measured
PROBE = 48  # steps without a draft after which two are sent, to see whether that is still right
LEAST = 0.02  # a draft of less chance is not looked at


class Rates:
    """How often guesses of each grade were right, of late; `of` another's, where there is too little of one's own."""

    __slots__ = ("_fade", "_of", "_right", "_tries")

    def __init__(self, fade: float, of: Rates | None = None) -> None:
        self._fade, self._of = fade, of
        self._right = [0.0] * GRADES
        self._tries = [0.0] * GRADES

    def saw(self, grade: int, right: bool) -> None:
        self._right[grade] = self._right[grade] * self._fade + right
        self._tries[grade] = self._tries[grade] * self._fade + 1.0
        if self._of is not None:
            self._of.saw(grade, right)

    def rate(self, grade: int) -> float:
        usual = PRIOR if self._of is None else self._of.rate(grade)
        return (self._right[grade] + TRUST * usual) / (self._tries[grade] + TRUST)

    def chances(self, grades: Sequence[int]) -> list[float]:
        """For each draft the chance that it and all before it are right, as far as that is worth a look."""
        found, chance = list[float](), 1.0
        of = self._of or self
        for grade in grades:
            usual = (of._right[grade] + TRUST * PRIOR) / (of._tries[grade] + TRUST)
            chance *= (self._right[grade] + TRUST * usual) / (self._tries[grade] + TRUST)
            if chance < LEAST:
                break
            found.append(chance)
        return found


class Cost:
    """Seconds of a step by its number of tokens: the line through the steps seen of late, which are of about the sizes
    that are asked for. One slow step says little, and sizes that were never tried have the slope of those that were.
    """

    def __init__(self) -> None:
        self._weight = self._size = self._seconds = 0.0
        self._spread = self._together = 0.0  # of the sizes, and of sizes with seconds

    def saw(self, tokens: int, seconds: float) -> None:
        if self._weight:
            seconds = min(seconds, 2.0 * self.of(tokens))
        self._weight = FADE_STEP * self._weight + 1.0
        share = 1.0 / self._weight
        off, off_seconds = tokens - self._size, seconds - self._seconds
        self._size += share * off
        self._seconds += share * off_seconds
        self._spread = (1.0 - share) * (self._spread + share * off * off)
        self._together = (1.0 - share) * (self._together + share * off * off_seconds)

    def line(self) -> tuple[float, float, float]:
        """The mean size, the seconds of a step of it, and seconds for each token more."""
        if not self._weight:
            return 1.0, 1.0, 0.0
        most, doubt = self._seconds / self._size, 0.03 * self._size
        each = (self._together + doubt * SLOPE * most) / (self._spread + doubt)
        return self._size, self._seconds, min(max(0.0, each), most)  # a token more costs its full share at most

    def of(self, tokens: int) -> float:
        size, seconds, each = self.line()
        return seconds + each * (tokens - size)


class Pace:
    """Chooses lengths. `most` bounds one request's; without `adaptive` every guess is sent whole."""

    def __init__(self, *, adaptive: bool = True) -> None:
        self.adaptive = adaptive
        self.cost = Cost()
        self.per_pass = 0.0  # seconds of the proposer for each token of depth
        self._all = Rates(0.99)
        self._rows: dict[int, Rates] = {}
        self._idle = 0
        self._turn = 0

    def lengths(self, graded: Sequence[tuple[int, Sequence[int]]], base: int, room: int, *, drawing: int) -> list[int]:
        """How many drafts to send for each (serial, grades of its guess), in a step of `base` tokens without them.

        `room` is how many there may be in all, `drawing` how many rows the step gives a token to at any rate.
        """
        if not self.adaptive:
            return _shares([len(grades) for _, grades in graded], room)
        chances = [self.rates(serial).chances(grades) for serial, grades in graded]
        # drafts by their chances: a row's own come in order, since each is less likely than the one before it
        order = [(-chance, depth, at) for at, row in enumerate(chances) for depth, chance in enumerate(row)]
        order.sort()
        sent, wanted = self._best(order[:room], base, drawing), [0] * len(graded)
        for _, _, at in order[:sent]:
            wanted[at] += 1
        if sent:
            self._idle = 0
        elif order:
            self._idle += 1
            if self._idle >= PROBE:
                self._idle = 0
                self._turn += 1
                turn = self._turn % len(graded)
                return [min(2, room, len(grades)) if at == turn else 0 for at, (_, grades) in enumerate(graded)]
        return wanted

    def _best(self, order: Sequence[tuple[float, int, int]], base: int, rows: int) -> int:
        """How many of the likeliest drafts to send."""
        seconds, each = self.cost.of(base), self.cost.line()[2]
        best, sent, gain, deepest = rows / seconds, 0, float(rows), 0
        for count, (chance, depth, _) in enumerate(order, 1):
            gain -= chance
            deepest = depth if depth > deepest else deepest
            rate = gain / (seconds + each * count + self.per_pass * (deepest + 1))
            if rate > best:
                best, sent = rate, count
        return sent

    def rates(self, serial: int) -> Rates:
        found = self._rows.get(serial)
        if found is None:
            found = self._rows[serial] = Rates(FADE, self._all)
        return found

    def forget(self, serial: int) -> None:
        self._rows.pop(serial, None)


def _shares(wanted: Sequence[int], room: int) -> list[int]:
    """As many for each as wanted while there is room, first come first served."""
    out = []
    for count in wanted:
        out.append(min(count, room))
        room -= out[-1]
    return out
