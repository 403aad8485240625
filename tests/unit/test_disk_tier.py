"""Blocks in files: found after a restart and by others, never believed when torn or foreign, never a trouble."""

import errno
import logging
import os
import time

import pytest

from twofold.core import ConfigError
from twofold.engine import disk_tier
from twofold.engine.blocks import block_name
from twofold.engine.disk_tier import DiskTier

BYTES = 4096
MODEL, OTHER = "a1" * 16, "b2" * 16


@pytest.fixture
def open_tier(tmp_path):
    opened = []

    def make(identity=MODEL, most=1 << 20, folder=tmp_path / "kv"):
        opened.append(DiskTier(folder, identity=identity, block_bytes=BYTES, most_bytes=most))
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()


def named(number):
    return block_name(b"root", tuple(range(number, number + 16)))


def content(number):
    return memoryview(bytearray([number % 251] * BYTES))


def settle(tier):
    """Wait until everything that was handed to the tier's writer is done."""
    tier._writer.submit(lambda: None).result(30)


def put(tier, *numbers):
    for number in numbers:
        tier.store(named(number), content(number))
    settle(tier)


def got(tier, number):
    found = tier.load(named(number)).result(30)
    return None if found is None else bytes(found)


def file_of(tier, number):
    return tier._path(named(number)[0])


def test_a_block_is_found_after_a_restart(open_tier):
    first = open_tier()
    put(first, 1, 2)
    assert got(first, 1) == bytes(content(1))
    first.close()
    again = open_tier()
    assert again.lookup(named(2)) and not again.lookup(named(3))
    assert got(again, 2) == bytes(content(2)) and got(again, 3) is None
    assert again.errors == 0 and not again.wants(named(2), leaving=True), "it is there already"


def test_files_and_folders_are_the_owners_alone(open_tier):
    tier = open_tier()
    put(tier, 1)
    assert file_of(tier, 1).stat().st_mode & 0o777 == 0o600
    assert tier.folder.stat().st_mode & 0o777 == 0o700


def test_what_is_queued_is_written_before_closing(open_tier):
    tier = open_tier()
    for number in range(20):
        tier.store(named(number), content(number))
    tier.close()
    again = open_tier()
    assert all(again.lookup(named(number)) for number in range(20))


@pytest.mark.parametrize("how", ["short", "long", "a bit", "the sum", "other tokens", "another model", "empty"])
def test_a_file_that_is_not_what_it_should_be_is_removed(open_tier, how, caplog):
    tier = open_tier()
    put(tier, 1, 2)
    path = file_of(tier, 1)
    raw = bytearray(path.read_bytes())
    if how == "short":
        del raw[-1:]
    elif how == "long":
        raw.append(0)
    elif how == "a bit":
        raw[-2000] ^= 1
    elif how == "the sum":
        raw[-1] ^= 1
    elif how == "other tokens":
        raw = file_of(tier, 2).read_bytes()
    elif how == "another model":
        other = open_tier(OTHER)
        put(other, 1)
        raw = file_of(other, 1).read_bytes()
    else:
        raw.clear()
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING, "twofold.engine"):
        assert got(tier, 1) is None
        assert not path.exists() and not tier.lookup(named(1)) and tier.errors == 1
        path = file_of(tier, 2)
        path.write_bytes(b"no block")
        assert got(tier, 2) is None
    assert tier.errors == 2 and len(caplog.records) == 1, "it is said once"
    put(tier, 1)
    assert got(tier, 1) == bytes(content(1)), "and written again when it was computed again"


def test_a_collision_of_digests_is_no_hit(open_tier):
    tier = open_tier()
    put(tier, 1)
    digest = named(1)[0]
    assert tier.load((digest, named(2)[1])).result(30) is None


def test_models_do_not_find_each_others_blocks(open_tier):
    put(open_tier(MODEL), 1)
    other = open_tier(OTHER)
    assert not other.lookup(named(1)) and got(other, 1) is None and other.errors == 0


def test_other_servers_find_new_blocks_and_miss_removed_ones(open_tier, monkeypatch):
    mine, theirs = open_tier(), open_tier()
    monkeypatch.setattr(disk_tier, "LOOK_SECONDS", 0.0)
    put(theirs, 1, 2)
    mine.lookup(named(1))
    settle(mine)
    assert mine.lookup(named(1)) and got(mine, 1) == bytes(content(1))
    settle(mine)
    file_of(theirs, 2).unlink()
    mine.lookup(named(2))
    settle(mine)
    assert not mine.lookup(named(2)) and got(mine, 2) is None and mine.errors == 0


def test_a_folder_that_did_not_change_is_not_listed_again(open_tier, monkeypatch):
    tier = open_tier()
    put(tier, 1)
    folder = file_of(tier, 1).parent
    os.utime(folder, ns=(time.time_ns() - 10**10,) * 2)
    tier._list()
    listed = []
    inner = disk_tier._entries
    monkeypatch.setattr(disk_tier, "_entries", lambda path: listed.append(str(path)) or inner(path))
    tier._list()
    assert listed == [str(tier.folder)]


def test_the_oldest_files_of_all_models_go_first_and_nobody_elses(open_tier, tmp_path):
    other = open_tier(OTHER)
    put(other, *range(4))
    for number in range(4):
        os.utime(file_of(other, number), (1000 + number, 1000 + number))
    (tmp_path / "kv" / "notes.txt").write_text("not a block " * 10_000)
    (tmp_path / "kv" / "mine").mkdir()
    (tmp_path / "kv" / "mine" / "old.kv").write_text("not a block either")
    stale = file_of(other, 0).with_name(file_of(other, 0).name + ".7-7.tmp")
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))
    tier = open_tier(most=10 * (BYTES + 600))
    put(tier, *range(10, 20))
    left = sorted(path.name for path in (tmp_path / "kv").rglob("*.kv"))
    assert not any(file_of(other, number).exists() for number in range(4)), "the oldest"
    assert all(file_of(tier, number).exists() for number in range(13, 20))
    assert "old.kv" in left and (tmp_path / "kv" / "notes.txt").exists() and not stale.exists()
    assert tier.held_bytes <= tier.most_bytes


def test_a_use_is_noted_in_the_files_date(open_tier):
    first = open_tier()
    put(first, 1)
    os.utime(file_of(first, 1), (1000, 1000))
    again = open_tier()
    time.sleep(0.01)
    again._index = {digest: noted - 1 for digest, noted in again._index.items()}
    assert not again.wants(named(1), leaving=False)
    settle(again)
    assert file_of(again, 1).stat().st_mtime > 1000


def test_a_full_disk_is_counted_and_left_alone_for_a_while(open_tier, monkeypatch, caplog):
    tier = open_tier()
    settle(tier)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_tier.os, "open", full)
    with caplog.at_level(logging.WARNING, "twofold.engine"):
        put(tier, 1, 2)
    assert tier.errors == 2 and len(caplog.records) == 1 and "No space" in caplog.text
    assert not tier.wants(named(3), leaving=False) and not tier.lookup(named(1))
    monkeypatch.undo()
    tier._rest = 0.0
    put(tier, 1)
    assert got(tier, 1) == bytes(content(1))
    assert not list(tier.folder.rglob("*.tmp"))


def test_a_disk_that_cannot_be_read_is_a_miss(open_tier):
    tier = open_tier()
    put(tier, 1)
    path = file_of(tier, 1)
    path.unlink()
    path.mkdir()
    assert got(tier, 1) is None and tier.errors == 1 and not tier.lookup(named(1))


def test_what_does_not_fit_the_queue_is_left_out(open_tier, monkeypatch):
    tier = open_tier()
    settle(tier)
    monkeypatch.setattr(disk_tier, "QUEUE_BYTES", 2 * BYTES)
    held = tier._writer.submit(time.sleep, 0.2)
    for number in range(4):
        tier.store(named(number), content(number))
    assert tier.full and tier.wants(named(9), leaving=True), "later"
    held.result(30)
    settle(tier)
    assert [tier.lookup(named(number)) for number in range(4)] == [True, True, False, False]


def test_nobody_waits_for_a_disk_that_hangs(open_tier, monkeypatch):
    tier = open_tier()
    settle(tier)
    monkeypatch.setattr(disk_tier, "QUEUE_BYTES", 2 * BYTES)
    monkeypatch.setattr(disk_tier, "REST_SECONDS", 0.05)
    held = tier._writer.submit(time.sleep, 0.3)
    for number in range(2):
        tier.store(named(number), content(number))
    assert tier.full
    time.sleep(0.1)
    assert not tier.full and not tier.wants(named(9), leaving=True)
    held.result(30)
    settle(tier)
    assert tier.lookup(named(1)) and tier.wants(named(9), leaving=True), "it moves again"


def test_other_weights_leave_the_disk_alone(open_tier):
    tier = open_tier()
    put(tier, 1)
    tier.forget()
    assert not tier.lookup(named(1)) and not tier.wants(named(2), leaving=True)
    put(tier, 2)
    assert not file_of(tier, 2).exists() and file_of(tier, 1).exists()


def test_a_directory_that_cannot_be_used_is_told_at_once(open_tier, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="kv_offload_dir"):
        open_tier(folder=tmp_path / "file")
    with pytest.raises(ConfigError, match="kv_offload_bytes"):
        open_tier(most=BYTES)
