"""The run's log, and TensorBoard's view of it."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twofold.train.journal import Journal, read_rows
from twofold.train.tfevents import crc32c


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(directory / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def write(directory: Path, steps: range, keep_to: int = 0) -> None:
    journal = Journal(directory, keep_to)
    for step in steps:
        journal.add(step, loss=1.0 / step, lr=0.5, grad_norm=2.0, tokens=step * 10)
        if step % 2 == 0:
            journal.add(step, valid_loss=3.0 / step)
            journal.add(step, prompt="a", text="ä \u2028 b")
    journal.close()


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_tensorboard_reads_back_every_number(tmp_path: Path) -> None:
    write(tmp_path, range(1, 301))
    losses = scalars(tmp_path, "train/loss")
    assert [step for step, _ in losses] == list(range(1, 301))
    assert [value for _, value in losses] == pytest.approx([1.0 / n for n in range(1, 301)])
    assert scalars(tmp_path, "valid/loss")[0] == (2, 1.5)
    assert scalars(tmp_path, "train/lr")[-1] == (300, 0.5)


def test_rows_behind_the_checkpoint_are_cut_from_both_logs(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 11), keep_to=4)
    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "text" in row] == [2, 4, 6, 8, 10]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == list(range(1, 11))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "\x00\x00", '{"no step": 1}\n', "[1]\n", '"\xff'])
def test_a_torn_line_ends_the_log(tmp_path: Path, tail: str) -> None:
    write(tmp_path, range(1, 4))
    with (tmp_path / "log.jsonl").open("a", encoding="latin-1") as file:
        file.write(tail)
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl") if "loss" in row] == [1, 2, 3]
    write(tmp_path, range(4, 5), keep_to=3)
    for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line)
