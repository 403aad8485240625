"""The pool: counts, eviction order, names, and an integrity check that notices."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.core import ConfigError, StateError
from twofold.engine.blocks import BlockPool, block_name, root_digest


def chain(tokens, size, root=None):
    names, parent = [], root or root_digest("", 0, "")
    for start in range(0, len(tokens) - size + 1, size):
        names.append(block_name(parent, tokens[start : start + size]))
        parent = names[-1][0]
    return names


def filled(pool, names):
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names):
        pool.publish(block, name)
    return blocks


def test_what_is_published_is_found_and_shared():
    pool = BlockPool(8, 4)
    names = chain(range(12), 4)
    blocks = filled(pool, names)
    assert pool.find(names) == blocks
    assert pool.find(chain([*range(8), 99, 99, 99, 99], 4)) == blocks[:2]
    pool.acquire(blocks[:2])
    pool.check_integrity([blocks, blocks[:2]])
    assert pool.used == 3
    pool.release(blocks)
    assert pool.used == 2
    pool.release(blocks[:2])
    assert pool.used == 0 and pool.available == 8
    assert pool.find(names) == blocks


def test_salt_version_and_adapter_are_apart():
    roots = {root_digest(*key) for key in [("", 0, ""), ("a", 0, ""), ("", 1, ""), ("", 0, "a"), ("a0", 0, "")]}
    assert len(roots) == 5
    pool = BlockPool(8, 4)
    blocks = filled(pool, chain(range(8), 4))
    assert pool.find(chain(range(8), 4)) == blocks
    assert pool.find(chain(range(8), 4, root_digest("tenant", 0, ""))) == []


def test_nameless_blocks_are_reused_first_and_chains_lose_their_tails_first():
    pool = BlockPool(4, 4)
    names = chain(range(12), 4)
    named = filled(pool, names)
    plain = pool.allocate(1)
    pool.release(named)
    pool.release(plain)
    assert pool.allocate(1) == plain
    for left in (2, 1, 0):
        pool.allocate(1)
        assert pool.find(names) == named[:left]


def test_the_least_recently_used_chain_goes_first():
    pool = BlockPool(4, 4)
    old, new = chain(range(8), 4), chain(range(50, 58), 4)
    old_blocks, new_blocks = filled(pool, old), filled(pool, new)
    pool.release(old_blocks)
    pool.release(new_blocks)
    pool.acquire(old_blocks)
    pool.release(old_blocks)  # used again, so now the younger
    pool.allocate(2)
    assert pool.find(new) == [] and pool.find(old) == old_blocks


def test_a_collision_of_digests_is_no_hit():
    pool = BlockPool(4, 4)
    (name,) = chain(range(4), 4)
    filled(pool, [name])
    assert pool.find([(name[0], b"other tokens")]) == []


def test_forget_all_keeps_holders():
    pool = BlockPool(4, 4)
    names = chain(range(8), 4)
    blocks = filled(pool, names)
    idle = filled(pool, chain(range(20, 24), 4))
    pool.release(idle)
    pool.forget_all()
    assert pool.find(names) == []
    pool.check_integrity([blocks])


def test_misuse_is_an_error():
    with pytest.raises(ConfigError):
        BlockPool(0, 16)
    pool = BlockPool(2, 4)
    with pytest.raises(StateError):
        pool.allocate(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(StateError):
        pool.release(blocks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._holders.__setitem__(0, 5),
        lambda pool: pool._free.pop(),
        lambda pool: pool._free.append(pool._free[-1]),
        lambda pool: pool._index.clear(),
        lambda pool: pool._cached.clear(),
    ],
)
def test_integrity_check_notices_damage(damage):
    pool = BlockPool(6, 4)
    held = filled(pool, chain(range(8), 4))
    idle = filled(pool, chain(range(40, 44), 4))
    pool.release(idle)
    pool.check_integrity([held])
    damage(pool)
    with pytest.raises(StateError):
        pool.check_integrity([held])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("anr"), st.integers(0, 3), st.integers(1, 5)), max_size=60))
def test_any_sequence_of_operations_keeps_the_pool_whole(operations):
    pool = BlockPool(10, 2)
    tables = []
    for verb, which, count in operations:
        if verb == "a" and count <= pool.available:
            tables.append(pool.allocate(count))
        elif verb == "n":
            names = chain([which] * (2 * count), 2)
            found = pool.find(names)
            need = len(names) - len(found)
            if need + pool.idle(found) <= pool.available:
                pool.acquire(found)
                table = found + pool.allocate(need)
                for block, name in zip(table, names):
                    pool.publish(block, name)
                tables.append(table)
        elif verb == "r" and tables:
            pool.release(tables.pop(which % len(tables)))
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.available == 10
