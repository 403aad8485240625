"""Command lines: read from settings, wrong names refused with the nearest, one line and exit code 2."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from twofold import __version__, cli
from twofold.commands.flags import Flags, field_docs
from twofold.core import ConfigError
from twofold.engine.config import EngineConfig, SpeculativeConfig
from twofold.serve import server
from twofold.serve.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    body_bytes: int = 4
    """How long a body may be."""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Settings of a toy. `rate` is how fast it goes, in turns. It also has a name."""

    name: str = "toy"
    rate: float | None = None
    loud: bool = True
    colours: tuple[str, ...] = ()
    size: Literal["small", "large"] = "small"
    inner: Inner = field(default_factory=Inner)


def parse(*argv: str) -> Toy:
    flags = Flags("toy")
    flags.settings(Toy)
    return flags.parse(argv).settings(Toy)


def test_every_kind_of_field_has_its_flag() -> None:
    toy = parse("--rate", "2.5", "--no-loud", "--colours", "red", "--colours", "blue", "--inner.body-bytes=7")
    assert toy == Toy(rate=2.5, loud=False, colours=("red", "blue"), inner=Inner(body_bytes=7))
    assert parse() == Toy()


def test_defaults_of_the_command_stand_until_a_flag_wins() -> None:
    flags = Flags("toy")
    flags.settings(Toy, skip=["name"])
    assert flags.parse(["--rate", "1"]).settings(Toy, name="given", rate=9.0) == Toy(name="given", rate=1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rat", "1"], "unknown flag '--rat': did you mean '--rate'?"),
        (["--rat=1"], "unknown flag '--rat': did you mean '--rate'?"),
        (["--rate", "fast"], "'--rate' must be a number, not 'fast'"),
        (["--size", "smal"], "'--size': unknown value 'smal': did you mean 'small'?"),
        (["--inner.body-bites", "1"], "did you mean '--inner.body-bytes'?"),
        (["--rate"], "expected one argument"),
        (["extra"], "'extra' is one word too many"),
    ],
)
def test_wrong_lines_are_refused_with_the_nearest_name(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(*argv)
    assert message in str(refusal.value)


def test_help_is_the_fields_own_words() -> None:
    assert field_docs(Inner) == {"body_bytes": "How long a body may be."}
    assert field_docs(Toy)["rate"] == "`rate` is how fast it goes, in turns."


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serv"], "unknown command 'serv': did you mean 'serve'?"),
        (["--versoin"], "unknown flag '--versoin': did you mean '--version'?"),
        (["bench", "thruput"], "unknown benchmark 'thruput': did you mean 'throughput'?"),
        (["doctor", "--verbose"], "unknown flag '--verbose'"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--temperatur", "1"], "did you mean '--temperature'?"),
        (["generate", "--prompt", "x", "--model", "/nowhere"], "no config.json"),
        (["plan", "/nowhere"], "no config.json"),
    ],
)
def test_exit_code_2_and_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as leave:
            cli.main([name, "--help"])
        assert leave.value.code == 0
        assert f"usage: twofold {name}" in capsys.readouterr().out


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    root = Path(cli.__file__).resolve().parents[1]
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=root)


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = (
        "import sys; from twofold.cli import main; c = main(['--help']); sys.exit(9 if 'torch' in sys.modules else c)"
    )
    done = run("-c", code)
    assert done.returncode == 0, "torch was imported for --help"
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_help_imports_little() -> None:
    """What makes a start slow is what it imports: no third-party package at all."""
    code = "import sys; from twofold.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    heavy = {"numpy", "tokenizers", "starlette", "rich", "uvicorn", "msgspec", "jinja2", "psutil", "safetensors"}
    loaded = run("-c", code).stderr
    assert not [name for name in heavy if f"'{name}'" in loaded]


def test_python_m_twofold() -> None:
    done = run("-m", "twofold", "--version")
    assert (done.returncode, done.stdout) == (0, f"twofold {__version__}\n")
    done = run("-m", "twofold", "nonsense")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_settings_may_come_as_one_json_object_and_single_flags_win() -> None:
    flags = Flags("toy")
    flags.settings(EngineConfig)
    whole = '{"method": "ngram", "num_speculative_tokens": 5, "adaptive": false}'
    given = flags.parse(["--speculative-config", whole, "--speculative.num-speculative-tokens", "9"])
    wanted = SpeculativeConfig(method="ngram", num_speculative_tokens=9, adaptive=False)
    assert given.settings(EngineConfig).speculative == wanted == given.options(EngineConfig)["speculative"]
    for wrong, message in (("{", "--speculative-config is not JSON"), ("[1]", "must be a JSON object"),
                           ('{"methods": 1}', "did you mean '--speculative.method'")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            flags.parse(["--speculative-config", wrong]).settings(EngineConfig)


def test_one_model_or_several_with_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    served: list[ServeConfig] = []
    monkeypatch.setattr(server, "serve", lambda config, engine: served.append(config) or 0)
    assert cli.run(["serve", one, "--port", "0"]) == 0
    assert (served[-1].model, served[-1].models) == (Path(one), ()) and len(served[-1].each()) == 1
    assert cli.run(["serve", f"a={one}", f"b={two}", "--max-resident", "1"]) == 0
    assert [(each.name, each.model) for each in served[-1].each()] == [("a", Path(one)), ("b", Path(two))]
    for words in ([one, two], [f"a={one}", two], [f"a={one}", f"a={two}"], [f"={one}"]):
        with pytest.raises(ConfigError):
            cli.run(["serve", *words])
