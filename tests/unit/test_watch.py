"""The first collective that differs, by hand."""

from __future__ import annotations

from twofold.parallel.watch import Call, Group, first_difference

GROUPS = {"7": Group(name="zero", ranks=(0, 1)), "9": Group(name="tp", ranks=(1, 2))}


def call(number: int, name: str, *shape: int, group: str = "7", at: int = 0, dtype: str = "fp32") -> Call:
    return Call(group=group, number=number, name=name, shapes=(shape,), dtypes=(dtype,), at=at or number, done=True)


def both(last: int, name: str = "all_gather") -> list[Call]:
    return [call(n, name, 4) for n in range(1, last)]


def test_different_calls() -> None:
    told = {0: [*both(41), call(41, "reduce_scatter", 256)], 1: [*both(41), call(41, "all_reduce", 128)]}
    line = "rank 1 is at all_reduce #41 [128] fp32 on zero, rank 0 at reduce_scatter #41 [256] fp32"
    assert first_difference(told, GROUPS) == line


def test_different_shapes_and_dtypes() -> None:
    assert "#2 [5] fp32 on zero" in (
        first_difference({0: [call(2, "all_reduce", 4)], 1: [call(2, "all_reduce", 5)]}, GROUPS) or ""
    )
    assert "#2 [4] bf16" in (
        first_difference({0: [call(2, "gather", 4)], 1: [call(2, "gather", 4, dtype="bf16")]}, GROUPS) or ""
    )
    assert first_difference({0: [call(2, "all_to_all", 4)], 1: [call(2, "all_to_all", 5)]}, GROUPS) is None


def test_a_rank_that_has_not_come() -> None:
    told = {0: both(10), 1: both(9), 2: []}
    line = "rank 0 waits in all_gather #9 [4] fp32 on zero, to which rank 1 has not come (its last there is "
    assert first_difference(told, GROUPS) == line + "all_gather #8 [4] fp32)"
    assert "has come to none there" in (first_difference({0: both(2), 1: []}, GROUPS) or "")


def test_a_difference_says_more_than_a_missing_rank_and_the_first_more_than_a_later_one() -> None:
    missing = {0: both(3), 1: [*both(2), call(1, "all_reduce", 2, group="9", at=90)], 2: []}
    assert "all_gather #2 [4] fp32 on zero" in (first_difference(missing, GROUPS) or "")
    differs = {**missing, 2: [call(1, "all_gather", 2, group="9", at=95)]}
    assert "rank 2 is at all_gather #1 [2] fp32 on tp" in (first_difference(differs, GROUPS) or "")


def test_what_a_ring_forgot_is_no_difference() -> None:
    told = {0: both(9), 1: both(9)[5:]}
    assert first_difference(told, GROUPS) is None
    assert first_difference({0: both(3)}, GROUPS) is None, "one rank alone cannot differ"


def test_calls_go_through_json() -> None:
    one = call(3, "all_reduce", 4, 5)
    row = {"group": "7", "number": 3, "name": "all_reduce", "shapes": [[4, 5]], "dtypes": ["fp32"], "at": 3}
    assert Call.read(row | {"done": True}) == one and str(one) == "all_reduce #3 [4, 5] fp32"
