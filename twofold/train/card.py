"""The model card: a README.md as Hugging Face reads it, made of the JSON that stands beside it and of nothing else.

    config.json ───────┐
    training.json ─────┼── README.md       YAML front matter with `model-index`, then what a reader wants to know
    evaluation.json ───┘                   (of `twofold evaluate`; where there is one)

So an evaluation that comes later writes the card anew, in the model's directory alone, and the same model always has
the same card: there is no date in it, and of absolute paths the last name alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..core import CheckpointError
from ..models.weights import read_config

CARD, TRAINING, EVALUATION = "README.md", "training.json", "evaluation.json"
MARK = "<!-- written by Twofold from training.json and evaluation.json; without this line it is left as it is -->"

FIGURES = {
    "loss": "Training loss",
    "valid_loss": "Validation loss",
    "reward": "Reward",
    "ref_kl": "KL from the reference",
    "entropy": "Entropy",
    "accuracy": "Preference accuracy",
    "margin": "Preference margin",
}
"""Numbers of a run's log whose last values a card tells."""

KINDS = {
    "pretrain": "to predict text",
    "chat": "to answer in chats",
    "sft": "to answer as demonstrated",
    "reward": "to tell the better of two answers",
    "dpo": "to prefer the better of two answers (DPO)",
    "ppo": "by reinforcement (PPO)",
    "grpo": "by reinforcement (GRPO)",
}

HEAD = "draft_head.depth"
"""The key by which a recipe is known as a draft head's."""


def training(recipe: Mapping[str, Any], step: int, tokens: int, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What `training.json` holds: the dotted keys of a recipe, how far it was run, and the last figures of its log."""
    last: dict[str, float] = {}
    for row in rows:
        if row.get("step", 0) <= step:
            last |= {name: row[name] for name in FIGURES if isinstance(row.get(name), int | float)}
    plain = {key: _public(value) for key, value in recipe.items() if value is not None}
    return {"recipe": plain, "steps": step, "tokens": tokens, "figures": {n: last[n] for n in FIGURES if n in last}}


def put(directory: Path, trained: Mapping[str, Any], evaluations: Path | None = None, name: str = "") -> None:
    """Write `training.json` and the card into a model's directory, and the run's evaluations where it has some."""
    _write(directory / TRAINING, json.dumps({"name": name, **trained}, indent=1) + "\n")
    if evaluations is not None and evaluations.is_file():
        (directory / EVALUATION).write_bytes(evaluations.read_bytes())
    refresh(directory)


def steps(directory: Path) -> int | None:
    """How many steps the model of a directory was trained for, where that is known."""
    return _read(directory / TRAINING).get("steps") if (directory / TRAINING).is_file() else None


def refresh(directory: Path) -> bool:
    """Write the card of a model anew; False where it has none of ours, which is then left alone.

    Raises:
        CheckpointError: one of the files that it is made of cannot be read.
    """
    path = directory / CARD
    if not (directory / TRAINING).is_file():
        return False
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    trained = _read(directory / TRAINING)
    told = _read(directory / EVALUATION).get("evaluations", []) if (directory / EVALUATION).is_file() else []
    try:
        text = card(trained.get("name") or directory.resolve().name, read_config(directory), trained, told)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the card of {directory} cannot be made: {type(error).__name__}: {error}") from None
    _write(path, text)
    return True


def card(
    name: str, config: Mapping[str, Any], trained: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The card's whole text, from what the files beside it say."""
    sections = [
        f"---\n{_front(name, config, trained, evaluations)}---\n{MARK}\n\n# {name}\n",
        _introduction(config, trained),
        _use(trained),
        _training(trained),
    ]
    if evaluations:
        sections.append(_evaluation(evaluations))
    return "\n".join(sections)


# ------------------------------------------------------------------------------------------------- front matter
def _front(
    name: str, config: Mapping[str, Any], trained: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    """YAML, written so that every text is a JSON string, which YAML reads as it stands."""
    tags = ["twofold", *filter(None, [config.get("model_type"), _kind(trained)])]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {_text(t)}" for t in tags)]
    if evaluations:
        lines += ["model-index:", f"- name: {_text(name)}", "  results:"]
    for found in evaluations:
        lines += [
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            f"      name: {_text(found['task'])}",
            f"      type: {_text(found['task'])}",
            "    metrics:",
        ]
        for label, figure, _ in _figures(found):
            if label.startswith(("greedy", "pass@")):
                kind = "pass@1" if label.startswith("greedy") else label
                lines += [f"    - type: {kind}", f"      name: {_text(label)}", f"      value: {figure['value']}"]
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    return json.dumps(str(value))


# ------------------------------------------------------------------------------------------------- sections
def _introduction(config: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    shape = [
        (("num_hidden_layers", "n_layer"), "{} layers"),
        (("hidden_size", "n_embd"), "{} wide"),
        (("vocab_size",), "a vocabulary of {}"),
        (("max_position_embeddings", "n_positions"), "a context of {} tokens"),
    ]
    told = [
        words.format(config[key])
        for keys, words in shape
        for key in [next((key for key in keys if key in config), "")]
        if key
    ]
    family = config.get("model_type", "language model")
    purpose = KINDS.get(_kind(trained), "")
    begun = trained["recipe"].get("model.from")
    if HEAD in trained["recipe"]:
        return f"A draft head ({', '.join(told)}), trained with Twofold to guess what `{begun}` says next.\n"
    start = f", from the weights of `{begun}`" if begun else ""
    return f"A {family} model ({', '.join(told)}), trained {purpose} with Twofold{start}.\n".replace("  ", " ")


def _use(trained: Mapping[str, Any]) -> str:
    if HEAD in trained["recipe"]:
        config = json.dumps({"method": "eagle", "model": "DIRECTORY"})
        return f"## Use\n\n```sh\ntwofold serve MODEL --speculative-config '{config}'   # this directory\n```\n"
    door = "generate --prompt 'def main():' --model" if _kind(trained) == "pretrain" else "chat --model"
    return f"## Use\n\n```sh\ntwofold {door} DIRECTORY   # this directory\ntwofold serve DIRECTORY\n```\n"


def _training(trained: Mapping[str, Any]) -> str:
    figures = [(FIGURES[name], f"{value:.4f}") for name, value in trained["figures"].items() if name in FIGURES]
    facts = [("Steps", f"{trained['steps']:,}"), ("Tokens", f"{trained['tokens']:,}"), *figures]
    recipe = "".join(f"{key} = {_toml(value)}\n" for key, value in trained["recipe"].items())
    return (
        "## Training\n\n" + _table(("", "at the end"), facts) + f"\nThe recipe, key by key:\n\n```toml\n{recipe}```\n"
    )


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> str:
    parts = ["## Evaluation\n"]
    for found in evaluations:
        settings, level = found.get("settings", {}), found.get("settings", {}).get("level", 0.95)
        drawn = ", greedy"
        if found["samples"]:
            drawn += f" and {found['samples']} samples each at temperature {settings.get('temperature', 1.0):g}"
        parts += [
            f"### {found['task']}\n",
            f"{found['prompts']} prompts{drawn}, at most {settings.get('max_tokens', '?')} tokens; "
            f"an answer passes from a reward of {settings.get('success', 1.0):g}.\n",
            _table(
                ("", "value", f"{level:.0%} interval"),
                [
                    (label, _figure(f["value"], rate), f"{_figure(f['low'], rate)} to {_figure(f['high'], rate)}")
                    for label, f, rate in _figures(found)
                ],
            ),
        ]
    return "\n".join(parts)


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float], bool]]:
    """Label, figure and whether it is a share, of everything that an evaluation measured."""
    yield "greedy pass rate", found["greedy"], True
    for k, figure in found.get("pass@k", {}).items():
        yield f"pass@{k}", figure, True
    for name, figure in found.get("reward", {}).items():
        yield f"reward, {name}", figure, False
    for name, figure in found.get("rewards", {}).items():
        yield name, figure, False


def _figure(value: float, rate: bool) -> str:
    return f"{value:.1%}" if rate else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


# ------------------------------------------------------------------------------------------------- words
def _kind(trained: Mapping[str, Any]) -> str:
    recipe = trained["recipe"]
    return str(recipe.get("algorithm") or recipe.get("kind") or "")


def _public(value: Any) -> Any:
    """A recipe's value as the world may read it: of an absolute path the last name."""
    if isinstance(value, str | Path):
        return PurePath(value).name if PurePath(value).is_absolute() else str(value)
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _public(item) for key, item in value.items()}
    return value if isinstance(value, bool | int | float | None) else str(value)


def _toml(value: Any) -> str:
    """A value as a recipe spells it: JSON's spelling, but for tables."""
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {_toml(item)}" for key, item in value.items() if item is not None]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, not a table")
    return found


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
