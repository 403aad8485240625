"""A recipe with sparse attention: trained, written down in config.json, served as trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_recipe import finish, start, write_recipe

from twofold import LLM, SamplingParams
from twofold.core.sparse import BigBird, Local
from twofold.models import PackedContext, load, read_spec

TABLE = """
[model.sparse_attention]
mode = "bigbird"
num_sliding_window_blocks = 1
num_global_blocks = 0
layers = "odd"
"""


def layouts(model: Path) -> list[object]:
    return [layer.mixer.sparse for layer in read_spec(model).layers]


def test_a_sparse_model_is_trained_written_and_served(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=TABLE)
    status, said = finish(start(recipe, "schedule.steps=8"))
    assert status == 0, said
    model = tmp_path / "run" / "model"
    told = json.loads((model / "config.json").read_text())["sparse_attention"]
    assert told == {"mode": "bigbird", "num_sliding_window_blocks": 1, "num_global_blocks": 0, "layers": "odd"}
    bird = BigBird(num_sliding_window_blocks=1, num_global_blocks=0)
    assert layouts(model) == [None, bird]

    llm = LLM(model, num_blocks=40, dtype="float32")
    ids = [5 + i % 90 for i in range(100)]
    params = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0, ignore_eos=True)
    (answer,) = llm.generate([ids], params, progress=False)
    found, decoder = answer.outputs[0], load(model)
    whole = torch.tensor([*ids, *found.token_ids])
    with torch.no_grad():
        hidden_TD = decoder(whole, PackedContext([len(whole)]))
        scores = decoder.logprobs(hidden_TD[:-1], whole[1:])[len(ids) - 1 :].tolist()
        sparse_layer, decoder.layers[1].attend = decoder.layers[1].attend, decoder.layers[0].attend
        dense_TD = decoder(whole, PackedContext([len(whole)]))
    assert sparse_layer.sparse is not None and not torch.equal(hidden_TD, dense_TD), "the layout matters here"
    assert [token.logprob for token in found.logprobs] == scores


def test_a_model_goes_on_with_another_layout_than_it_came_with(tmp_path: Path) -> None:
    """The table in the recipe replaces the one of the directory that a run starts from."""
    recipe = write_recipe(tmp_path, model=TABLE)
    status, said = finish(start(recipe, "schedule.steps=1", "schedule.warmup=0"))
    assert status == 0, said
    head, data = recipe.read_text().partition(TABLE)[0], recipe.read_text().partition("[data]")[2]
    start_from = f'from = "{tmp_path / "run" / "model"}"\n[model.sparse_attention]\nmode = "local"\nblock = 32\n'
    recipe.write_text(head + start_from + "[data]" + data)
    status, said = finish(start(recipe, "schedule.steps=1", "schedule.warmup=0", f"run.output={tmp_path / 'more'}"))
    assert status == 0, said
    assert layouts(tmp_path / "more" / "model") == [Local(block=32)] * 2


def test_a_key_that_the_mode_has_not_is_an_error(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=TABLE.replace("num_global_blocks", "num_local_blocks"))
    status, said = finish(start(recipe))
    assert status != 0 and "sparse_attention.num_local_blocks" in said
