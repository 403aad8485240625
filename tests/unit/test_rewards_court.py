"""python_passes_tests: what counts as a test, honest programs of many shapes, and forged passes that must fail."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from twofold.align.rewards import Panel, RewardConfig
from twofold.align.rewards.court.cases import arrange
from twofold.align.rewards.passes import PassesTests
from twofold.align.rewards.wire import Batch, Scored


@functools.cache
def court(**options: Any) -> PassesTests:
    """One for all tests that ask for the same: its ushers stay warm."""
    return PassesTests(RewardConfig(kind="python_passes_tests", **options))


def judged(code: str | list[str], tests: Any, *, entry: str | None = None, prompt: str = "", **options: Any) -> Scored:
    codes = [code] if isinstance(code, str) else code
    columns: dict[str, list[Any]] = {"tests": [tests] * len(codes)}
    if entry:
        columns["entry_point"] = [entry] * len(codes)
    scorer = court(**{"seconds": 3.0, **options})
    return scorer(Batch([prompt] * len(codes), codes, [[]] * len(codes), columns, 0))


def share(code: str, tests: Any, **options: Any) -> float | None:
    return judged(code, tests, **options).values[0]


ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(1, 0) == 1", "assert add('a', 'b') == 'ab'"]
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    two = candidate(1, 1)\n    assert two == 2\n"
FUNCTIONS = "def test_one():\n    assert add(1, 2) == 3\n\ndef test_two():\n    assert add(2, 0) == 2\n"
CASES = """
import unittest
class Adding(unittest.TestCase):
    def setUp(self): self.one = 1
    def test_one(self): self.assertEqual(add(self.one, 2), 3)
    def test_zero(self): self.assertEqual(add(self.one, 0), 1)
class TestPlain:
    def test_two(self): assert add(0, 2) == 2
    def helper(self): raise KeyError
if __name__ == "__main__":
    unittest.main()
"""


@pytest.mark.parametrize(
    ("tests", "entry", "right", "wrong"),
    [
        (TESTS, None, 1.0, 0.25),
        ("\n".join(TESTS), None, 1.0, 0.25),
        (CHECK, "add", 1.0, 0.0),
        (CHECK + "check(add)\n", None, 1.0, 0.0),
        (FUNCTIONS, None, 1.0, 0.5),
        (CASES, None, 1.0, 1 / 3),
        ([CHECK, FUNCTIONS, TESTS[2]], "add", 1.0, 1 / 3),
        ([CHECK + "check(add)"], "add", 1.0, 0.0),
        ("x = add(1, 2)\nif x != 3:\n    raise SystemExit(0)\n", None, 1.0, 0.0),
    ],
)
def test_every_shape_of_tests(tests: Any, entry: str | None, right: float, wrong: float) -> None:
    assert judged([ADD, WRONG, "no python"], tests, entry=entry).values == [right, wrong, 0.0]


def test_partial_or_all() -> None:
    assert judged([ADD, WRONG], TESTS, partial=False).values == [1.0, 0.0]


def test_prefix_and_fences() -> None:
    assert share("    return a + b\n", TESTS, prompt="def add(a, b):\n", prefix=True) == 1.0
    assert share(f"Here you are:\n```python\n{ADD}```\nIt adds.", TESTS) == 1.0


def test_rows_without_tests_or_with_broken_ones_are_left_out() -> None:
    config = RewardConfig(kind="python_passes_tests")
    rows: dict[str, list[Any]] = {"tests": [None, "assert (", TESTS]}
    scored = PassesTests(config)(Batch([""] * 3, [ADD] * 3, [[]] * 3, rows, 0))
    assert scored.values == [None, None, 1.0]
    assert [fault.reason for fault in scored.faults] == ["tests", "tests"]
    assert "has no 'tests' in a row" in scored.faults[0].note
    assert "tests that are not Python" in scored.faults[1].note


def test_a_court_that_cannot_sit_is_a_fault_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion is never worth 0.0 because of the machine."""
    monkeypatch.setattr("twofold.align.rewards.passes._HERE", "/nowhere")
    scored = judged([ADD, WRONG], TESTS, seconds=1.5)
    assert scored.values == [None, None]
    assert [(fault.reason, fault.count) for fault in scored.faults] == [("court", 2)]
    starved = judged(ADD, TESTS, megabytes=1)
    assert starved.values == [None] and starved.faults[0].reason == "court"


@pytest.mark.parametrize(
    "tests", ["def helper(): pass", "import math", ["def f(): pass"], [""], [CHECK], "class A: pass"]
)
def test_tests_that_cannot_fail_are_a_fault(tests: Any) -> None:
    scored = judged(ADD, tests)
    assert scored.values == [None] and "nothing that could fail" in scored.faults[0].note


def test_asserts_are_fenced_one_by_one() -> None:
    source, count = arrange("a = 1\nassert a == 1\nassert a == 2\n", None)
    assert count == 2 and source.count("with __case__(") == 2 and source.startswith("a = 1\n")


HONEST = {
    "a list is changed in place": (
        "def f(x):\n    x.sort()\n    x[0].append(9)\n    return x",
        "a = [[3], [1], [2]]\nb = f(a)\nassert a == [[1, 9], [2], [3]]\nassert b is a\nassert b[0] is a[0]",
    ),
    "dicts, sets, tuples, bytes, numbers": (
        "def f(*a, **k):\n    return [*a, k]",
        "v = ({1: (2, 3)}, {4}, frozenset({5}), b'6', bytearray(b'7'), 8j, 2**200, -0.5, None, range(3), True, '9')\n"
        "assert f(*v, k=1) == [*v, {'k': 1}]\nassert [type(x) for x in f(*v)][:-1] == [type(x) for x in v]\n"
        "assert f(float('inf'))[0] == float('inf')",
    ),
    "classes, errors of its own, methods": (
        "class Empty(ValueError): pass\nclass Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def __len__(self): return len(self.items)\n"
        "    def pop(self):\n        if not self.items: raise Empty('empty')\n        return self.items.pop()",
        "s = Stack()\ns.push(3)\nassert len(s) == 1\nassert s.items == [3]\nassert s.pop() == 3\nassert not s\n"
        "assert isinstance(s, Stack)\ntry:\n    s.pop()\n    said = ''\nexcept Empty as error:\n    said = str(error)\n"
        "assert said == 'empty'",
    ),
    "operators between its own objects": (
        "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n"
        "    def __eq__(self, o): return self.x == o.x\n    def __lt__(self, o): return self.x < o.x\n"
        "    def __repr__(self): return f'V({self.x})'\n    def __getitem__(self, i): return i",
        "assert V(1) + V(2) == V(3)\nassert V(1) != V(2)\nassert sorted([V(2), V(1)]) == [V(1), V(2)]\n"
        "assert repr(V(1)) == 'V(1)'\nassert V(0)[7] == 7",
    ),
    "functions are lent, generators walked": (
        "def f(g, xs):\n    for x in xs:\n        yield g(x)\ndef outer(n):\n    return lambda x: x + n",
        "assert list(f(lambda x: x * 2, [1, 2])) == [2, 4]\nassert outer(1)(2) == 3\n"
        "assert list(f(lambda x: outer(x)(1), [1])) == [2]\nassert next(f(str, [1])) == '1'",
    ),
    "errors of the language": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return 1 / x",
        "for x, kind in ((-1, ValueError), (0, ZeroDivisionError)):\n    try:\n        f(x)\n        got = None\n"
        "    except Exception as error:\n        got = type(error)\n    assert got is kind\nassert f(2) == 0.5",
    ),
    "files, threads and the library": (
        "import threading, decimal, collections\ndef f():\n    open('x', 'w').write('y')\n    got = []\n"
        "    t = threading.Thread(target=lambda: got.append(open('x').read()))\n    t.start(); t.join()\n"
        "    return got, dict(collections.Counter('aab')), str(decimal.Decimal(1) / 3)[:4]",
        "assert f() == (['y'], {'a': 2, 'b': 1}, '0.33')",
    ),
    "the tests keep their own names": (
        "def math(): return 1\ndef abs(x): return 0\ndef f(x): return x",
        "import math\nassert math.sqrt(4) == 2\nassert abs(f(-3)) == 3",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str) -> None:
    code, tests = HONEST[name]
    assert share(code, tests) == 1.0


LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __lt__(self, other): return True
    def __contains__(self, other): return True
    def __iter__(self): return iter(())
    def __abs__(self): return 0
    def __float__(self): return 3.0
    def __class_getitem__(cls, item): return True
    def __hash__(self): return hash(3)
class Int(int):
    def __eq__(self, other): return True
class Text(str):
    def __eq__(self, other): return True
"""
FORGED = {
    "exits well": "import sys\nsys.exit(0)",
    "ends the process": "import os\nos._exit(0)",
    "ends when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "exits when called": "def add(a, b):\n    raise SystemExit(0)",
    "prints a verdict": "import sys, os\nfor fd in range(64):\n    try:\n"
    '        os.write(fd, b\'{"passed": 4, "tests": 4}\')\n'
    "    except OSError: pass\ndef add(a, b): return 0",
    "answers in advance": "import os\ndef add(a, b):\n    for fd in range(64):\n        try:\n"
    '            os.write(fd, b\'{"result": 3, "changed": []}\\n\' * 8)\n        except OSError: pass\n    return 0',
    "an object that equals everything": LIAR + "def add(a, b): return Liar()",
    "an integer that equals everything": LIAR + "def add(a, b): return Int(99)",
    "a list of liars": LIAR + "def add(a, b): return [Liar()]",
    "is itself a liar": LIAR + "add = Liar()",
    "patched builtins": "import builtins\nclass Fine(Exception): pass\nbuiltins.AssertionError = Fine\n"
    "builtins.isinstance = lambda *a: True\nbuiltins.__build_class__ = None\ndef add(a, b): return 0",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"passed": 4, "tests": 4}\'\ndef add(a, b): return 0',
    "patched operators": "import operator, sys\nfor name in dir(operator):\n    if not name.startswith('__'):\n"
    "        setattr(operator, name, lambda *a: True)\nsys.settrace(lambda *a: None)\ndef add(a, b): return 0",
    "raises what a test may expect": "def add(a, b): raise AssertionError('fine')",
    "walks the frames": "import sys, gc\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
    "        for name, value in list(frame.f_locals.items()):\n"
    "            if isinstance(value, set): value.update(range(9))\n"
    "        frame = frame.f_back\n    for thing in gc.get_objects():\n"
    "        if type(thing) is set and not thing:\n            thing.update(range(9))\n    return 0",
    "at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'{\"passed\": 4}'))\nraise SystemExit(0)",
    "speaks nonsense": "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'nonsense\\n')\n    except OSError: pass",
    "a deep answer": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "a class in place of a function": LIAR.replace("Liar", "add") + "    def __init__(self, a, b): pass\n",
    "reckons with anything": "class Zero:\n    def __init__(self, *a): pass\n"
    "    def __getattr__(self, name): return lambda *a: 0\n"
    "    __abs__ = __bool__ = __float__ = __int__ = lambda self: 0\n    __len__ = __index__ = __round__ = __abs__\n"
    "    __sub__ = __rsub__ = __isub__ = __neg__ = lambda self, *a: self\n"
    "    __contains__ = __eq__ = __lt__ = __gt__ = lambda self, other: True\nadd = Zero",
    "a tuple of its own that equals everything": "class Pair(tuple):\n    def __eq__(self, other): return True\n"
    "    def __contains__(self, other): return True\n    def __sub__(self, other): return 0\n"
    "def add(a, b): return Pair((9,))",
    "swallows errors": "class Fine:\n    def __enter__(self): return self\n    def __exit__(self, *e): return True\n"
    "    def __call__(self, *a): return self\nadd = Fine()",
    "an answer without end": "def add(a, b): return 'x' * 10**8",
}


EXPECTS = [
    *("assert add(1, 2) == 3", "assert 3 == add(1, 2)", "assert abs(add(1, 2) - 3) < 1", "assert 3 in [add(1, 2)]"),
    *("assert 3 in add(1, 2)", "assert not add(1, 2) != 3", "try:\n    ok = add(1, 2) == 3\nfinally:\n    assert ok"),
    "try:\n    got = add(1, 2)\nexcept:\n    got = 0\nassert got == 3",
    *("assert not add(1, 2) - 3", "assert round(add(1, 2) - 3, 7) == 0", "assert -1 < add(1, 2) - 3 < 1"),
    "with add(1, 2):\n    assert 1 == 2",
]


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_pass_fails(name: str) -> None:
    assert share(FORGED[name], EXPECTS, seconds=2.0) == 0.0


def test_an_honest_program_passes_where_the_forged_fail() -> None:
    assert share(ADD, EXPECTS) == 10 / 12  # an integer contains nothing, and is no context


def test_python_does_not_pass_for_a_candidate_that_defines_nothing() -> None:
    bare = "try:\n    sum(None)\n    ok = False\nexcept:\n    ok = True\nassert ok"
    assert share("", ["assert sum([1, 2]) == 3", bare]) == 0.0
    assert share("", "def check(candidate):\n    assert candidate([1, 2]) == 3\n", entry="sum") == 0.0


def test_tests_of_python_alone_are_a_fault() -> None:
    scored = judged("def abs(x): return 0", ["assert abs(sum([1, 2]) - 3) < 1"])
    assert scored.values == [None] and "abs, sum: name the one that is asked for" in scored.faults[0].note


def test_a_dead_candidate_raises_no_error_that_a_test_may_expect() -> None:
    expects = "try:\n    f()\n    assert False\nexcept Exception:\n    pass\n"
    bare = "try:\n    f()\nexcept:\n    pass\n"
    assert share("def f(): raise KeyError", [expects, bare]) == 1.0
    for ending in (
        "import os\ndef f(): os._exit(0)",
        "def f(): raise KeyboardInterrupt",
        "def f():\n    while True: pass",
    ):
        assert share(ending, [expects, bare], seconds=0.5) == 0.0


def test_the_tests_cannot_be_read_by_the_candidate() -> None:
    """Neither its memory, nor a file, nor another process shows the answers: the judge reads them after the fork."""
    spy = (
        "import gc, glob, os, sys\n"
        "def found():\n"
        "    seen = [str(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, str, bytes))]\n"
        "    for path in glob.glob('/proc/*/*') + glob.glob('/tmp/*') + glob.glob('*') + ['/proc/self/mem']:\n"
        "        try: seen.append(open(path, errors='replace').read(100000))\n"
        "        except OSError: pass\n"
        "    return sum('hidden' + '_answer' in text for text in seen), sys.argv[-1].count('hidden'), os.listdir('.')\n"
        "early = found()\n"
    )
    assert share(spy, ["assert early == (0, 0, [])", "'hidden_answer'", "assert found()[0] == 0"]) == 1.0


def test_limits(tmp_path: Path) -> None:
    """Each act is refused by the wall beside it; a wall that this machine lacks is named instead."""
    victim = tmp_path / "victim"
    victim.write_text("alive")
    acts = {
        "bytearray(2 * 10**9)": ("MemoryError", ""),
        "open('big', 'wb').write(bytes(20 * 2**20))": ("OSError", ""),
        "[open(f'/dev/null') for _ in range(100)]": ("OSError", ""),
        "[open(f'f{i}', 'wb').write(bytes(15 * 2**20)) for i in range(5)]": ("OSError", "namespaces"),
        f"open({str(victim)!r}).read()": ("PermissionError", "landlock"),
        f"os.unlink({str(victim)!r})": ("PermissionError", "landlock"),
        "open('/etc/passwd').read()": ("PermissionError", "landlock"),
        "socket.create_connection(('127.0.0.1', 1))": ("PermissionError", "seccomp"),
        "socket.socketpair()": ("PermissionError", "seccomp"),
        "os.fork()": ("PermissionError", "seccomp"),
        "os.kill(os.getppid(), 9)": ("PermissionError", "seccomp"),
        "os.kill(-1, 9)": ("PermissionError", "seccomp"),
        "os.setsid()": ("PermissionError", "seccomp"),
        "subprocess.run(['true'])": ("PermissionError", "seccomp"),
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())": ("PermissionError", "seccomp"),
        "os.sched_setaffinity(os.getppid(), {0})": ("PermissionError", "seccomp"),
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))": ("PermissionError", "seccomp"),
    }
    code = "import fcntl, os, resource, socket, subprocess\ndef act(number):\n    try:\n"
    code += "".join(f"        if number == {i}: {act}\n" for i, act in enumerate(acts))
    code += "    except BaseException as error:\n        return [kind.__name__ for kind in type(error).__mro__]\n"
    lacking = " ".join(fault.note for fault in judged(ADD, TESTS).faults)
    for i, (act, (error, wall)) in enumerate(acts.items()):
        if not wall or wall not in lacking:
            assert share(code, [f"assert {error!r} in act({i})"]) == 1.0, act
    assert victim.read_text() == "alive"


def test_hanging_costs_its_own_time_and_earns_nothing() -> None:
    spin, sleep = "def add(a, b):\n    while True: pass", "import time\ndef add(a, b): time.sleep(99)"
    late = "def add(a, b):\n    while a == 2: pass\n    return a + b"
    start = time.monotonic()
    assert judged([spin, sleep, late, ADD], TESTS, seconds=1.5).values == [0.0, 0.0, 0.25, 1.0]
    assert time.monotonic() - start < 10


def test_the_same_answers_in_the_same_order_and_no_process_left() -> None:
    codes = [f"def add(a, b):\n    return a + b if hash((a, b)) % {n} else set('abc')\n" for n in range(1, 7)]
    codes += [
        "import time\ndef add(a, b): time.sleep(99)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
    ]
    with Panel([RewardConfig(kind="python_passes_tests", seconds=1.5)]) as panel:
        batch = ([""] * len(codes), codes, [[]] * len(codes), {"tests": [TESTS] * len(codes)})
        first, second = panel.score(*batch), panel.score(*batch)
        worker = psutil.Process(panel.pids()["python_passes_tests"])
        assert first == second and first.totals[-2:] == [0.0, 0.0] and None not in first.totals
        ushers = worker.children()
        sent_home = [child for child in worker.children(recursive=True) if child not in ushers]
        assert ushers and not psutil.wait_procs(sent_home, timeout=10)[1]  # no judge, no candidate
    assert not psutil.wait_procs([worker, *ushers], timeout=10)[1]


def test_no_folder_is_left_of_a_court_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Panel([RewardConfig(kind="python_passes_tests", seconds=2.0)]) as panel:
        batch = ([""], [ADD], [[]], {"tests": [TESTS]})
        assert panel.score(*batch).totals == [1.0] and any(tmp_path.glob("twofold-courts-*/court-*"))
        psutil.Process(panel.pids()["python_passes_tests"]).kill()
        assert panel.score(*batch).totals == [None]
        assert panel.score(*batch).totals == [1.0] and len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_tests_that_hang_cost_one_verdict_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.align.rewards.passes._GRACE", 0.3)
    scorer = PassesTests(RewardConfig(kind="python_passes_tests", seconds=1.5))
    rows: dict[str, list[Any]] = {"tests": [["while True: pass"], ["assert add(1, 2) == 3"]]}
    for _ in range(2):
        assert scorer(Batch([""] * 2, [ADD] * 2, [[]] * 2, rows, 0)).values == [0.0, 1.0]
    busy = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in busy if "court.judge" in " ".join(p.cmdline()) and p.ppid() != os.getpid()]
