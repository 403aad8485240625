"""A file of requests answered without a server: the same routes, one model, and nobody to give way to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ...core import ConfigError
from ...engine.config import EngineConfig
from .. import wire
from ..app import Api, build_app
from ..client import EngineClient
from ..config import ServeConfig
from ..process import COMMAND
from ..texts import Texts
from .inside import Inside
from .job import Work
from .lines import Place, done, index
from .shapes import ENDPOINTS, Counts

FOREVER = 1e11  # as a time.time(), in some thousands of years


async def answer_file(
    config: ServeConfig,
    engine: EngineConfig,
    source: Path,
    out: Path,
    *,
    command: Sequence[str] = COMMAND,
    tell: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Answer every line of `source` into `out`; what `out` answers already is not asked again.

    Raises:
        ConfigError: the input cannot be read or has a wrong line, or `out` belongs to another input.
        CheckpointError, CapacityError: the model cannot be loaded.
    """
    places = _places(source, out, config.limits.batch_lines)
    texts = Texts.load(config)
    client = EngineClient(
        config, wire.Start(str(config.model), dataclasses.asdict(engine), texts.tokenizer.eos_ids), command
    )
    api = Api(config, client, texts)
    build_app(api)
    assert api.shared.app is not None
    inside = Inside(api.shared.app)
    client.start()
    try:
        info = await client.first_ready
        tell(f"{config.name} is ready: {len(places)} lines to answer")
        work = Work(
            source, out, out, lambda path, body, seconds: inside.post(path, body, "", seconds),
            lambda model, mine: mine < 2 * info.max_running, FOREVER,
        )  # fmt: skip
        await work.run(places)
        return work.counts
    finally:
        await client.stop()
        api.judge.stop()
        api.shared.close()


def _places(source: Path, out: Path, most: int) -> list[Place]:
    try:
        places, errors = index(source, ENDPOINTS, most)
        answered = done([out])
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
    if errors:
        first = errors[0]
        raise ConfigError(
            f"{source}, line {first.line}: {first.message}" if first.line else f"{source}: {first.message}"
        )
    strange = set(answered) - {place.custom_id for place in places}
    if strange:
        raise ConfigError(
            f"{out} answers {min(strange)!r}, which is not in {source}: name another output, or remove it"
        )
    return places
