"""Guesses found in text: what followed the last time that the same words stood there. No model, microseconds.

    text   … a b c X Y Z … a b c          the tail "a b c" stood before: guess X Y Z
                   └─ guess ┘      └─ tail

Where a short run of tokens stood before is kept as in LZ77 compressors, one chain through the text for each run. The
occurrences of the longest tail are what a node of a suffix tree holds, at one number a token.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from .proposer import GRADES, Guess
from .row import Row

LOOKED_AT = 16  # earlier places that are compared with the tail
BORDER = -1  # between two requests' texts
TENANTS = 8  # salts whose texts are kept


class Text:
    """Tokens in order, and for each place the last earlier place that came after the same `run` tokens."""

    __slots__ = ("_before", "_last", "run", "tokens")

    def __init__(self, run: int) -> None:
        self.run = run
        self.tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        known, last, before, run = self.tokens, self._last, self._before, self.run
        for token in tokens:
            place = len(known)
            if place >= run:
                key = tuple(known[place - run :])
                before.append(last.get(key, -1))
                last[key] = place
            else:
                before.append(-1)
            known.append(token)

    def places(self, tail: Sequence[int]) -> Iterator[int]:
        """Places that follow what the tail ends with, latest first."""
        place = self._last.get(tuple(tail[-self.run :]), -1) if len(tail) >= self.run else -1
        for _ in range(LOOKED_AT):
            if place < 0:
                return
            yield place
            place = self._before[place]

    def alike(self, place: int, tail: Sequence[int], most: int) -> int:
        """How many tokens before `place` are those that the tail ends with, at most `most`."""
        known, size = self.tokens, self.run
        most = min(most, place, len(tail))
        while size < most and known[place - size - 1] == tail[-size - 1]:
            size += 1
        return min(size, most)

    def onwards(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; a text that ends before goes round, since it repeats itself then."""
        found = self.tokens[place : place + count]
        while len(found) < count:
            found += found[: count - len(found)]
        return found


class Known:
    """The texts of the rows that are running, kept up with them."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._texts: dict[int, Text] = {}

    def of(self, row: Row) -> Text:
        text = self._texts.get(row.serial)
        if text is None:
            text = self._texts[row.serial] = Text(self._run)
        text.extend(row.tokens(len(text.tokens), row.request.num_tokens))
        return text

    def forget(self, row: Row) -> None:
        self._texts.pop(row.serial, None)


class NGram:
    """What followed the latest occurrence of the longest tail of `least` to `most` tokens, in the request's own text.

    After prompt lookup decoding (Saxena 2023).
    """

    costs = False

    def __init__(self, least: int, most: int) -> None:
        self._most = most
        self._known = Known(least)

    def propose(self, wanted: Sequence[tuple[Row, int]]) -> dict[int, Guess]:
        found = {}
        for row, count in wanted:
            text = self._known.of(row)
            longest, best = 0, -1
            for place in text.places(text.tokens):
                size = text.alike(place, text.tokens, self._most)
                if size > longest:
                    longest, best = size, place
                if size == self._most:
                    break
            if best >= 0:
                grade = text.alike(best, text.tokens, GRADES - 1)
                grades = (*range(grade, min(GRADES, grade + count)), *[GRADES - 1] * (grade + count - GRADES))
                found[row.serial] = Guess(tuple(text.onwards(best, count)), grades)
        return found

    def told(self, row: Row, kept: int) -> None:
        pass

    def forget(self, row: Row) -> None:
        self._known.forget(row)

    def sleep(self) -> None:
        pass


class Outputs:
    """What ended requests have said: of the latest `requests` at least half, at most `tokens` tokens."""

    def __init__(self, run: int, requests: int, tokens: int = 1 << 18) -> None:
        self._run, self._requests, self._tokens = run, max(1, requests // 2), tokens // 2
        self.texts: deque[Text] = deque([Text(run)], maxlen=2)
        self._held = 0

    def add(self, output: Sequence[int]) -> None:
        said = [*output[-self._tokens + 1 :], BORDER]
        if self._held >= self._requests or len(self.texts[0].tokens) + len(said) > self._tokens:
            self.texts.appendleft(Text(self._run))  # the older half goes as a whole
            self._held = 0
        self.texts[0].extend(said)
        self._held += 1


class Suffix:
    """What most often followed the longest tail, in the request's own text and in what other requests have said.

    A guess goes on while the share of occurrences that agree with all of it is `share` or more, so its length follows
    from what was found. After SuffixDecoding (Oliaro et al. 2025). Texts of different salts never meet.
    """

    costs = False

    def __init__(self, depth: int, requests: int, share: float, run: int = 2) -> None:
        self._depth, self._requests, self._share, self._run = depth, requests, share, run
        self._known = Known(run)
        self._said: OrderedDict[str, Outputs] = OrderedDict()

    def propose(self, wanted: Sequence[tuple[Row, int]]) -> dict[int, Guess]:
        found = {}
        for row, count in wanted:
            own = self._known.of(row)
            said = self._said.get(row.request.salt)
            guess = self._vote(own.tokens, [own, *(said.texts if said else ())], count)
            if guess.tokens:
                found[row.serial] = guess
        return found

    def _vote(self, tail: Sequence[int], texts: Sequence[Text], count: int) -> Guess:
        """The path that most occurrences of the longest tail took."""
        longest, ways = 0, list[list[int]]()
        for text in texts:
            for place in text.places(tail):
                size = text.alike(place, tail, self._depth)
                if size > longest:
                    longest, ways = size, []
                if size == longest:
                    ways.append(text.onwards(place, count))
        tokens, grades, total = list[int](), list[int](), len(ways)
        for ahead in range(count if ways else 0):
            votes: dict[int, int] = {}
            for way in ways:
                votes[way[ahead]] = votes.get(way[ahead], 0) + 1
            best = max(votes, key=votes.__getitem__)  # the latest among equals
            if best == BORDER or votes[best] < self._share * total:
                break
            tokens.append(best)
            grades.append(min(GRADES - 1, (longest + ahead) * votes[best] // total))
            ways = [way for way in ways if way[ahead] == best]
        return Guess(tuple(tokens), tuple(grades))

    def told(self, row: Row, kept: int) -> None:
        pass

    def forget(self, row: Row) -> None:
        self._known.forget(row)
        if not row.request.output_ids or not self._requests:
            return
        salt = row.request.salt
        if salt not in self._said:
            self._said[salt] = Outputs(self._run, self._requests)
            if len(self._said) > TENANTS:
                self._said.popitem(last=False)
        self._said.move_to_end(salt)
        self._said[salt].add(row.request.output_ids)

    def sleep(self) -> None:
        pass
