"""Ops choose by machine, by call and by name; a wrong name is told with the nearest one."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels.op import VARIABLE, Call, Needs, Op, check_names, multiple_of, named, ops, watch
from twofold.kernels.reader import Reader
from twofold.kernels.shapes import axes, learn, letters, shape_of


def scaled(x_TK: Tensor, w_NK: Tensor | None = None, by: float = 2.0) -> Tensor:
    return x_TK * by


def says(word: str):
    """An implementation that leaves its name in the result's place."""
    return lambda *args, **kwargs: word


@pytest.fixture
def op() -> Op[..., object]:
    return Op(scaled)


@pytest.fixture
def listed(op: Op[..., object]) -> Iterator[Op[..., object]]:
    """The op, under its name among all ops."""
    ops.register(op.name)(op)
    yield op
    del ops._items[op.name]


# ------------------------------------------------------------------------------------------------ by machine
def test_the_first_that_can_run_here_serves(op) -> None:
    op.on("far", why="faster", missing=lambda: "a key")(says("far"))
    op.on("wide", why="wider", needs=Needs(instructions=("no_such_instruction",)))(says("wide"))
    assert op.serving()[0] == "reference"
    assert op.serving()[2] == "far lacks a key; wide lacks the instructions no_such_instruction"
    assert torch.equal(op(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    op.on("near", why="close by")(says("near"))
    op.on("late", why="late")(says("late"))
    assert op(torch.ones(2, 3)) == "near"
    assert op.serving()[2] == "close by"
    assert op.others() == {
        "far": "lacks a key",
        "wide": "lacks the instructions no_such_instruction",
        "late": "another comes first",
    }


def test_a_device_that_is_not_there_is_lacking(op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op.on("device", why="fast", needs=Needs(devices=("cuda",)))(says("device"))
    assert op.choose(Call(device="cuda")).name == "reference"
    assert op.serving(Call(device="cuda"))[2] == "device lacks a cuda device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert op.choose(Call(device="cuda")).name == "device"
    assert op.choose(Call(device="cpu")).name == "reference"


def test_what_is_built_at_first_use_is_not_asked_for_while_another_serves(op) -> None:
    asked = []
    op.on("first", why="first")(says("first"))
    op.on("built", why="built", missing=lambda: asked.append("built") or "")(says("built"))
    assert op(torch.ones(1, 1)) == "first"
    op.use("reference")
    op(torch.ones(1, 1))
    assert asked == []


# ------------------------------------------------------------------------------------------------ by call
def test_a_call_is_served_by_what_takes_it(op) -> None:
    needs = Needs(devices=("cpu",), dtypes=(torch.float32,), shapes={"K": multiple_of(4, most=64)})
    op.on("fours", why="fast", needs=needs)(says("fours"))
    op.on("halves", why="small", needs=Needs(dtypes=(torch.bfloat16,)))(says("halves"))
    assert op(torch.ones(3, 8)) == "fours"
    assert op(x_TK=torch.ones(3, 8), by=1.0) == "fours"
    assert op(torch.ones(3, 6)).shape == (3, 6)
    assert op(torch.ones(3, 0)).shape == (3, 0)
    assert op(torch.ones(3, 128)).shape == (3, 128)
    assert op(torch.ones(3, 6, dtype=torch.bfloat16)) == "halves"
    assert op(torch.ones(3, 8, dtype=torch.float64)).dtype == torch.float64
    assert op(torch.ones(3, 8, device="meta")).device.type == "meta"
    assert op(torch.ones(3, 8)) == "fours"


def test_a_model_chooses_before_there_is_a_call() -> None:
    def product(x_TK: Tensor, w_NK: Tensor) -> Tensor:
        return x_TK @ w_NK.T

    op = Op(product)
    needs = Needs(dtypes=(torch.float32,), formats=("int8",), shapes={"K": range(32, 4096), "N": multiple_of(16)})
    op.on("packed", why="fast", needs=needs)(says("packed"))
    assert op.choose().name == "packed"  # nothing is known that speaks against it
    assert op.choose(Call(dtype=torch.float32, format="int8", shapes={"K": 64, "N": 48})).name == "packed"
    for call, why in (
        (Call(dtype=torch.bfloat16), "packed is not for bfloat16, it takes float32"),
        (Call(format="int4"), "packed is not for format int4, it takes int8"),
        (Call(shapes={"K": 31}), "packed is not for K = 31, it takes 32 and on up to 4095"),
        (Call(shapes={"N": 40}), "packed is not for N = 40, it takes multiples of 16 from 16"),
    ):
        assert op.serving(call)[0] == "reference"
        assert op.serving(call)[2] == why


def test_choices_are_remembered_but_not_for_ever(op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["twofold.kernels.op"], "_REMEMBERED", 8)
    op.on("odd", why="odd", needs=Needs(shapes={"T": range(1, 1000, 2)}))(says("odd"))
    for count in range(40):
        assert isinstance(op(torch.ones(count, 1)), str) == bool(count % 2)
        assert len(op._chosen) <= 8


def test_a_call_is_looked_at_only_where_a_need_that_can_be_met_speaks_of_it(op, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op.on("device", why="device", needs=Needs(devices=("cuda",), dtypes=(torch.float16,)))(says("device"))
    op.on("plain", why="plain")(says("plain"))
    op.on("late", why="late", needs=Needs(dtypes=(torch.float32,)))(says("late"))
    monkeypatch.setattr(op, "_by_call", None)
    assert op(torch.ones(1, 1)) == "plain"


def test_a_need_of_a_dimension_nobody_names_is_refused(op) -> None:
    with pytest.raises(ConfigError, match=r"needs sizes of D, but the reference's tensors speak of K, T"):
        op.on("lost", why="lost", needs=Needs(shapes={"D": multiple_of(4)}))
    with pytest.raises(ConfigError, match="needs sizes of N"):  # w_NK may be left out of a call
        op.on("maybe", why="maybe", needs=Needs(shapes={"N": multiple_of(4)}))


def test_arguments_that_do_not_fit_are_a_type_error(op) -> None:
    op.on("floats", why="floats", needs=Needs(dtypes=(torch.float32,)))(says("floats"))
    for args, kwargs in (((), {}), ((torch.ones(1, 1),), {"bye": 1})):
        with pytest.raises(TypeError):
            op(*args, **kwargs)


# ------------------------------------------------------------------------------------------------ by name
def test_by_name_in_a_program(op) -> None:
    op.on("fast", why="fast")(says("fast"))
    op.on("other", why="other")(says("other"))
    op.use("other")
    assert (op(torch.ones(1, 1)), op.serving()[2]) == ("other", "chosen by name")
    op.use("reference")
    assert op(torch.ones(1, 1)) == 2.0
    op.use(None)
    assert op(torch.ones(1, 1)) == "fast"
    with pytest.raises(ConfigError, match="unknown implementation of scaled 'othr': did you mean 'other'"):
        op.use("othr")
    with pytest.raises(ConfigError, match="has an implementation called 'fast' already"):
        op.on("fast", why="again")


def test_by_name_from_outside(listed, monkeypatch: pytest.MonkeyPatch) -> None:
    listed.on("fast", why="fast")(says("fast"))
    monkeypatch.setenv(VARIABLE, " rms_norm=reference, scaled=reference ,")
    check_names()
    assert listed(torch.ones(1, 1)) == 2.0
    assert listed.serving()[::2] == ("reference", "chosen by name")
    listed.use("fast")  # a program's own word comes last
    assert listed(torch.ones(1, 1)) == "fast"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scald=fast", "unknown op 'scald': did you mean 'scaled'"),
        ("scaled=fats", "unknown implementation of scaled 'fats': did you mean 'fast'"),
        ("scaled", "takes op=implementation pairs, such as linear=reference, not 'scaled'"),
        ("scaled=", "takes op=implementation pairs"),
    ],
)
def test_wrong_names_from_outside(listed, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    listed.on("fast", why="fast")(says("fast"))
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=message):
        listed(torch.ones(1, 1))


def test_one_that_is_asked_for_and_cannot_run_is_told_of_once(op, caplog: pytest.LogCaptureFixture) -> None:
    op.on("near", why="near")(says("near"))
    op.on("far", why="far", missing=lambda: "a key", needs=Needs(dtypes=(torch.float32,)))(says("far"))
    op.use("far")
    with caplog.at_level(logging.WARNING, "twofold.kernels"):
        assert [float(op(torch.ones(1, size))[0, 0]) for size in (1, 2)] == [2.0, 2.0]
        op.use("far")
        op(torch.ones(1, 1))
    assert caplog.messages == ["scaled: far is asked for by name, but far lacks a key; the reference serves"] * 2


def test_pairs() -> None:
    assert named("a=b, c = d") == {"a": "b", "c": "d"}
    assert named("") == {}


# ------------------------------------------------------------------------------------------------ names and shapes
def test_names_say_shapes() -> None:
    assert axes("x_TD") == ((1, "T"), (1, "D"))
    assert axes("gate_up_T2F") == ((1, "T"), (2, "F"))
    assert axes("m_Z1") == ((1, "Z"), (1, ""))
    assert axes("head_4dK") == ((4, "d"), (1, "K"))
    assert axes("top_k") is None
    assert axes("x") is None
    assert letters("gate_up_T2F") == {"T", "F"}
    assert shape_of("gate_up_T2F", {"T": 3, "F": 5}) == (3, 10)
    with pytest.raises(ConfigError, match="end it in one letter a dimension, such as x_TD"):
        shape_of("x", {})


def test_a_letter_has_one_size() -> None:
    sizes: dict[str, int] = {}
    learn(sizes, "gate_up_T2F", (3, 10))
    assert sizes == {"T": 3, "F": 5}
    with pytest.raises(ConfigError, match=r"w_F has the shape \(4,\); its name says \[F\] and F is 5"):
        learn(sizes, "w_F", (4,))
    with pytest.raises(ConfigError, match=r"x_TF has the shape \(3,\), 1 dimensions; its name says \[T, F\]"):
        learn(sizes, "x_TF", (3,))
    with pytest.raises(ConfigError, match=r"gate_up_T2F has the shape \(3, 9\); its name says \[T, 2F\]"):
        learn({}, "gate_up_T2F", (3, 9))
    with pytest.raises(ConfigError, match=r"m_T1 has the shape \(3, 2\); its name says \[T, 1\]"):
        learn({}, "m_T1", (3, 2))


def test_sizes_are_read_through_factors() -> None:
    def gated(gate_up_T2F: Tensor, format: str = "fp32") -> Tensor:
        return gate_up_T2F

    reader = Reader(gated)
    key = reader.key_of(["F"])((torch.ones(3, 10),), {"format": "int8"})
    assert reader.told(key, ["F"]) == {
        "device": "cpu",
        "dtype": torch.float32,
        "format": "int8",
        "shapes": {"F": 5},
    }


# ------------------------------------------------------------------------------------------------ watching
def test_watchers_see_whole_calls_the_last_of_them_first(op) -> None:
    seen: list[object] = []

    def watcher(name: str):
        def see(of, args, call):
            seen.append((name, of.name, args[1:]))
            return call() + 1

        return see

    x = torch.ones(2, 3)
    with watch(watcher("outer")), watch(watcher("inner")):
        assert torch.equal(op(x, by=3.0), torch.full((2, 3), 5.0))
    assert seen == [("inner", "scaled", (None, 3.0)), ("outer", "scaled", (None, 3.0))]
    assert torch.equal(op(x), 2 * x) and len(seen) == 2


def test_a_watcher_sees_its_own_thread_unless_it_asks_for_all(op) -> None:
    seen: list[str] = []
    x = torch.ones(1, 1)
    with (
        watch(lambda of, args, call: (seen.append("here"), call())[1]),
        watch(lambda of, args, call: (seen.append("everywhere"), call())[1], everywhere=True),
    ):
        other = threading.Thread(target=lambda: op(x))
        other.start()
        other.join()
        assert seen == ["everywhere"]
        op(x)
    assert seen == ["everywhere", "everywhere", "here"]
