"""The figures of the load benchmark: the field's definitions, by hand; lengths and arrivals, by their laws."""

from __future__ import annotations

import asyncio
import random
import statistics
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from load import Seen, Target, closed_loop, one, open_loop
from load_chart import Plot, draw
from load_figures import figures, meets_sla, percentile, tpot, ttft, under_agreement
from serve import arguments
from traffic import SCENARIOS, Ask, Lengths, arrivals, asks


def seen(sent: float, *pieces: float, tokens_in: int = 512, error: str | None = None) -> Seen:
    ended = pieces[-1] if pieces else sent
    return Seen(
        due=sent,
        sent=sent,
        ended=ended,
        pieces=list(pieces),
        tokens_in=tokens_in,
        tokens_out=len(pieces),
        error=error,
    )


def test_latencies_are_the_fields_definitions() -> None:
    request = seen(10.0, 10.5, 10.6, 10.9)
    assert ttft(request) == pytest.approx(0.5)
    assert tpot(request) == pytest.approx(0.2)  # (10.9 - 10.5) / (3 - 1)
    assert tpot(seen(0.0, 1.0)) is None
    found = figures([request, seen(10.0, 11.0, 12.0), seen(10.0, error="HTTP 500")], {"ttft": 600, "tpot": 250})
    assert found["completed"] == 2 and found["failed"] == 1 and found["error"] == "HTTP 500"
    assert found["seconds"] == pytest.approx(2.0)
    assert found["requests_s"] == pytest.approx(1.0)
    assert found["output_tokens_s"] == pytest.approx(2.5)
    assert found["itl_ms"]["mean"] == pytest.approx(1e3 * (0.1 + 0.3 + 1.0) / 3)
    assert found["goodput_s"] == pytest.approx(0.5)  # the second is late in both
    assert found["peak_tokens_s"] == 4.0  # from 10.5 to 11.0


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert percentile([1.0], 99) == 1.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([4.0, 1.0], 90) == pytest.approx(3.7)


def test_an_agreement_needs_a_prompt_start_and_steady_tokens() -> None:
    steady = [1.0 + 0.2 * i for i in range(10)]
    assert meets_sla(seen(0.0, *steady), 5.0 - 1e-6)
    assert not meets_sla(seen(0.0, *steady), 6.0)
    assert not meets_sla(seen(0.0, *steady, tokens_in=256), 2.0)  # first piece after 1 s, 0.5 s promised
    assert meets_sla(seen(0.0, 1.0, 1.1, 1.2, 2.2, 2.3), 4.0)  # one late token is averaged away
    assert not meets_sla(seen(0.0, 1.0, 1.1, 4.2), 4.0)
    point = under_agreement([seen(0.0, *steady), seen(0.0, *steady, tokens_in=256)], [4.0])
    assert point["effective_s"]["4"] == pytest.approx(point["requests_s"] / 2)


def test_arrivals_take_as_long_as_their_rate_says_and_bursts_are_uneven() -> None:
    def deviation(burstiness: float) -> float:
        times = arrivals(2000, 10.0, burstiness, random.Random(1))
        assert times[-1] == pytest.approx(200.0) and times == sorted(times)
        gaps = [b - a for a, b in pairwise(times)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    assert deviation(1.0) == pytest.approx(1.0, abs=0.1)  # Poisson
    assert deviation(0.25) == pytest.approx(2.0, abs=0.3)  # 1 / sqrt(shape)
    assert deviation(16.0) == pytest.approx(0.25, abs=0.03)
    assert arrivals(3, float("inf"), 1.0, random.Random(1)) == [0.0, 0.0, 0.0]


def test_lengths_follow_their_shapes_and_fit_the_context() -> None:
    rng = random.Random(3)
    pairs, shrink = Lengths(kind="sharegpt").draw(4000, rng, 4096)
    assert shrink == 1.0
    assert 100 < statistics.fmean(p for p, _ in pairs) < 170 and 280 < statistics.fmean(o for _, o in pairs) < 345
    assert all(p <= 1024 and p + o <= 2048 for p, o in pairs)
    pairs, _ = Lengths(kind="random", input_len=100, output_len=40, range_ratio=0.5).draw(500, rng, 4096)
    assert min(p for p, _ in pairs) >= 50 and max(p for p, _ in pairs) <= 150 and len(set(pairs)) > 100
    pairs, shrink = Lengths(kind="fixed", input_len=SCENARIOS["long"][0][0], output_len=60).draw(2, rng, 512)
    assert shrink < 0.2 and all(p + o < 512 for p, o in pairs)
    made = asks([(5, 2), (5, 2)], [0.0, 0.0], rng, None)
    assert all(isinstance(ask.prompt, str) and len(ask.prompt.split()) == 5 for ask in made)


def test_a_drawing_is_well_formed_and_keeps_every_line() -> None:
    plot = Plot(title="a & b", x="clients", y="ms", lines={"one": [(1, 2), (2, 3)], "two": [(1, float("nan")), (2, 1)]})
    tree = ET.fromstring(draw("t", "n", [plot, plot]))
    assert len(tree.findall(".//{*}polyline")) == 4
    ET.fromstring(draw("nothing", "", [Plot(title="", x="", y="", lines={})]))


def test_flags_out_of_range_and_unknown_limits_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments(["--goodput", "ttft:200", "e2el:1500.5"]).limits == {"ttft": 200.0, "e2el": 1500.5}
    for wrong in (["--goodput", "itl:3"], ["--goodput", "ttft"], ["--request-rate", "0"]):
        with pytest.raises(SystemExit):
            arguments(wrong)
    assert "MILLISECONDS" in capsys.readouterr().err


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"/v1/completions" not in head:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone")
    else:
        events = b'data: {"choices": [{"text": "a"}]}\r\n\r\ndata: {"choices": [{"text": "b"}]}\n\n'
        events += b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\ndata: [DONE]\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in (events[:25], events[25:]):  # in the middle of an event
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


def test_a_client_reads_streams_refusals_and_silence() -> None:
    async def run() -> tuple[list[Seen], list[Seen], Seen, Seen]:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        target = Target(url=url, model="m")
        ask = Ask(prompt=(1, 2), tokens_out=3)
        open_, closed = await open_loop(target, [ask] * 3, 2), await closed_loop(target, [ask] * 5, 2)
        refused = await one(Target(url=url, model="m", chat=True), ask, 0.0)
        server.close()
        await server.wait_closed()
        return open_, closed, refused, await one(target, ask, 0.0)

    opened, closed, refused, gone = asyncio.run(run())
    assert len(opened) == 3 and len(closed) == 5
    for each in (*opened, *closed):
        assert each.error is None and (each.tokens_in, each.tokens_out, len(each.pieces)) == (7, 3, 2)
    assert refused.error == "HTTP 404: none"
    assert gone.error is not None and "Error" in gone.error
