"""Alignment as a course of the trainer: what is read, what a step is made of, and what judges it.

recipe ─▶ algorithm ─▶ data by number, a lesson, an objective ─▶ the trainer's own loop: steps, checkpoints, signals
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..core import ConfigError
from ..data import ChatTemplate, Tokenizer
from ..data.examples import Limits, read_judged, read_preferences
from ..data.pairs import PairLoader, UnpairedLoader
from ..data.prompts import PromptLoader, read_prompts
from ..data.rows import Said
from ..data.wording import Wording
from ..train.build import RecipeWords, build_data, hf_config, text_loader
from ..train.config import Recipe
from ..train.launch import Course
from ..train.lesson import Lesson
from ..train.trainer import Data, Loader
from .average import Average
from .config import AlignRecipe
from .dpo import LabelLesson, LabelLoss, PairLesson, PairLoss
from .grpo import GroupLoss, GrpoLesson
from .play import Play
from .ppo import PolicyAndValue, PpoLesson
from .reward import BradleyTerry, RewardLesson
from .rewards import Panel
from .scorer import RewardModel, padding


class Alignment(Course):
    """The course of `twofold align`."""

    recipe: type[Recipe] = AlignRecipe

    def __init__(self) -> None:
        self._valid: Sequence[Any] = ()
        self._text: Loader | None = None

    def data(self, recipe: Recipe, words: RecipeWords) -> tuple[Data, str]:
        assert isinstance(recipe, AlignRecipe)
        if recipe.algorithm == "sft":
            return build_data(recipe, words)
        loader, fingerprint = self._read(recipe, words)
        if recipe.ppo.pretrain_coef:
            self._text, more = text_loader(recipe, words, recipe.data.text)
            fingerprint += f"+{more}"
        return Data(train=cast(Loader, loader), valid=()), fingerprint

    def _read(self, recipe: AlignRecipe, words: RecipeWords) -> tuple[object, str]:
        """Loader of what is trained on; what is held out stays here."""
        data, seed = recipe.data, recipe.run.seed
        wording = Wording(words.tokenizer, words.template, chat=recipe.kind == "chat")
        longest = recipe.longest_prompt if recipe.plays else data.max_prompt
        limits = Limits(seq_len=data.seq_len, max_prompt=longest, too_long=data.too_long)
        fraction = 0.0 if data.valid else data.valid_fraction
        read: Any = read_preferences
        if recipe.plays:
            read = read_prompts
        elif recipe.algorithm == "dpo" and not recipe.dpo.paired:
            read = read_judged
        parted = read(data.train, wording, limits, valid_fraction=fraction)
        train, valid, fingerprint = parted.train, parted.valid, parted.fingerprint
        if data.valid:
            other = read(data.valid, wording, limits)
            valid, fingerprint = other.train, f"{fingerprint}+{other.fingerprint}"
        if not len(train):
            others = f", {len(valid)} held out (data.valid_fraction)" if len(valid) else ""
            raise ConfigError(f"data.train has nothing to learn from: {train.counts}{others}")
        most = recipe.run.eval_batches
        if recipe.plays:
            self._valid = valid[: data.eval_prompts]
            return PromptLoader(train, data.prompts_per_step, seed=seed), fingerprint
        if read is read_judged:
            loader = UnpairedLoader(valid, data.pairs_per_step, shuffle=False) if len(valid) > 1 else None
            self._valid = list(loader.once(most)) if loader else ()
            return UnpairedLoader(train, data.pairs_per_step, seed=seed), fingerprint
        whole = recipe.algorithm == "reward"
        held = PairLoader(valid, data.pairs_per_step, shuffle=False, whole=whole) if len(valid) else None
        self._valid = list(held.once(most)) if held else ()
        return PairLoader(train, data.pairs_per_step, seed=seed, whole=whole), fingerprint

    def lesson(self, recipe: Recipe, data: Data, words: RecipeWords) -> Lesson:
        assert isinstance(recipe, AlignRecipe)
        loader: Any = data.train
        if recipe.algorithm == "sft":
            return Lesson()
        if recipe.algorithm == "reward":
            return RewardLesson(BradleyTerry(recipe.reward, padding(hf_config(recipe))), self._valid)
        if recipe.algorithm == "dpo" and recipe.dpo.paired:
            return PairLesson(PairLoss(recipe.dpo), loader, self._valid)
        if recipe.algorithm == "dpo":
            return LabelLesson(LabelLoss(recipe.dpo), loader, self._valid)
        rollout, longest = recipe.rollout, recipe.longest_prompt
        play = Play(rollout, words, panel(recipe), seed=recipe.run.seed, longest=longest)
        if recipe.algorithm == "grpo":
            return GrpoLesson(
                config=recipe.grpo,
                correction=recipe.correction,
                play=play,
                prompts=loader,
                per_step=recipe.data.prompts_per_step,
                valid=self._valid,
                objective=GroupLoss(recipe.grpo, rollout.max_tokens, rollout.temperature),
            )
        return PpoLesson(
            config=recipe.ppo,
            correction=recipe.correction,
            play=play,
            prompts=loader,
            valid=self._valid,
            objective=PolicyAndValue(recipe.ppo, rollout.temperature),
            text=self._text,
            average=Average(recipe.ppo.ema_decay) if recipe.ppo.ema_decay else None,
        )


def panel(recipe: AlignRecipe) -> Panel:
    """The recipe's judges; a reward model is a directory, loaded here."""
    for it in recipe.rewards:
        file, _, _ = it.path.rpartition(":")
        if file.endswith(".py") and not Path(file).is_file():
            raise ConfigError(f"reward '{it.name}': no such file: {file}")
    names = {it.model for it in recipe.rewards if it.kind == "model"}
    return Panel(recipe.rewards, {name: PromptScorer(Path(name)) for name in names})


class PromptScorer:
    """A reward model's directory as a judge of answers, in its own tokenizer's words."""

    def __init__(self, folder: Path) -> None:
        self._model = RewardModel.load(folder)
        self._tokenizer = Tokenizer.load(folder)
        self._folder = folder
        self._wordings: dict[bool, Wording] = {}

    def __call__(
        self,
        prompts: Sequence[Said],
        completions: Sequence[Said],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float | None]:
        texts = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return list(self._model(texts))

    def _ids(self, prompt: Said, completion: Said) -> list[int]:
        chat = not isinstance(prompt, str)
        if chat not in self._wordings:
            self._wordings[chat] = Wording(self._tokenizer, ChatTemplate.load(self._folder) if chat else None)
        ids, _ = self._wordings[chat].example(prompt, completion).whole()
        return ids[-self._model.decoder.max_len :]
