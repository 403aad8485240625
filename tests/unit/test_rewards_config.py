"""`[[rewards]]`: each kind has its own fields, and everything else is refused with the nearest name."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.align.rewards import RewardConfig
from twofold.align.rewards.config import FIELDS, check_names
from twofold.core import ConfigError, build


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "regx", "pattern": "a"}, "unknown kind of reward 'regx': did you mean 'regex'?"),
        ({"kind": "regex"}, "needs 'pattern'"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "regex", "pattern": "a", "least": 3}, "unknown field of kind 'regex' 'least'"),
        ({"kind": "regex", "patern": "a"}, "unknown key 'patern': did you mean 'pattern'?"),
        ({"kind": "length"}, "'least' or 'most'"),
        ({"kind": "length", "least": 5, "most": 3}, "'most' (3) is below 'least' (5)"),
        ({"kind": "length", "most": 3, "unit": "letters"}, "unknown value 'letters'"),
        ({"kind": "function", "path": "rewards.py"}, "not such as 'rewards.py:score'"),
        ({"kind": "function", "path": "a:b", "interface": "ver"}, "did you mean 'verl'?"),
        ({"kind": "http", "url": "ftp://somewhere"}, "not an http or https address"),
        ({"kind": "http", "url": "http://x", "timeout": 0}, "'timeout' must be above 0"),
        ({"kind": "equals", "pattern": "answer: .*"}, "needs a group"),
        ({"kind": "equals", "weight": float("nan")}, "finite"),
        ({"kind": "json_schema", "schema": {"typo": 1}}, "unknown keyword 'typo': did you mean 'type'?"),
        ({"kind": "python_parses", "tests": "cases"}, "unknown field of kind 'python_parses' 'tests'"),
    ],
)
def test_what_means_nothing_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(RewardConfig, table)
    assert said in str(error.value)


def test_a_table_becomes_a_config_named_after_its_kind() -> None:
    config = build(RewardConfig, {"kind": "python_passes_tests", "weight": "2", "partial": False, "seconds": 3})
    assert (config.name, config.weight, config.partial, config.seconds) == ("python_passes_tests", 2.0, False, 3.0)


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two rewards are called 'length'"):
        check_names((RewardConfig(kind="length", most=1), RewardConfig(kind="length", most=2)))


def test_every_field_belongs_to_a_kind() -> None:
    """A field that no kind lists could be set by nobody."""
    import dataclasses

    listed = {name for names in FIELDS.values() for name in names} | {"kind", "name", "weight", "timeout", "start"}
    assert listed == {f.name for f in dataclasses.fields(RewardConfig)}
