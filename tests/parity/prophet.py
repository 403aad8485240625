"""A proposer that has read the texts that are about to be written, and errs now and then."""

from __future__ import annotations

import random

from twofold.engine.engine import Engine
from twofold.engine.proposer import Guess
from twofold.engine.speculation import Speculation


class Prophet:
    """Guesses from `texts` (request id to output ids); each token is another one with a chance of `wrong`."""

    costs = False

    def __init__(self, texts, vocab, wrong=0.25):
        self.texts, self.vocab, self.wrong = texts, vocab, wrong
        self.rng = random.Random(5)

    def propose(self, wanted):
        found = {}
        for row, count in wanted:
            said = len(row.request.output_ids)
            text = self.texts[row.request.id][said : said + count]
            tokens = [self.rng.randrange(self.vocab) if self.rng.random() < self.wrong else token for token in text]
            if tokens:
                found[row.serial] = Guess(tuple(tokens), (0,) * len(tokens))
        return found

    def told(self, row, kept):
        pass

    def forget(self, row):
        pass

    def sleep(self):
        pass


def foretold(engine: Engine, said, vocab: int, *, most: int = 5, wrong: float = 0.25) -> Engine:
    """The engine, with a prophet who knows what an engine without one has `said`."""
    texts = {name: [token.id for token in tokens] for name, tokens in said.items()}
    engine.speculation = Speculation(Prophet(texts, vocab, wrong), most=most, adaptive=False)
    engine.scheduler.speculation = engine.speculation
    return engine
