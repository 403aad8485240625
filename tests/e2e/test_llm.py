"""twofold.LLM on a checkpoint on disk: texts in, texts out, and every way in which one ends."""

from __future__ import annotations

import json

import pytest

import twofold
from tests.parity import tiny
from tests.unit import toy_tokenizers as toys
from twofold.core import CheckpointError, ConfigError, RequestError
from twofold.engine.defaults import sampling_defaults
from twofold.models.weights import save, spec_from

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    vocab = toys.save(toys.byte_level(), place, eos_token="<|endoftext|>").vocab_size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    save(tiny.decoder(spec_from(config)), place, config=config)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


@pytest.fixture(scope="module")
def llm(folder):
    return twofold.LLM(folder, max_num_seqs=8, num_blocks=100)


def params(**changes):
    return twofold.SamplingParams(**(PLAIN | changes))


def text_of(llm, *args, **changes):
    return llm.generate(*args, params(**changes), progress=False)[0].outputs[0]


def test_prompts_come_as_texts_or_ids_one_or_many(llm):
    one = llm.generate("hello", params(), progress=False)
    ids = llm.tokenizer.encode_prompt("hello")
    assert len(one) == 1 and one[0].prompt == "hello" and list(one[0].prompt_token_ids) == ids
    many = llm.generate([ids, "x", ids], params(), progress=False)
    assert [done.prompt for done in many] == [None, "x", None]
    assert many[0].outputs == many[2].outputs == one[0].outputs
    out = one[0].outputs[0]
    assert out.finish_reason == "length" and len(out.token_ids) == 12
    assert out.text == llm.tokenizer.decode(out.token_ids)
    assert not llm.engine.has_work and llm.engine.pool.used == 0


def test_each_prompt_may_have_its_own_settings(llm):
    first, second = llm.generate(["a", "a"], [params(max_tokens=3), params(max_tokens=5)], progress=False)
    assert (len(first.outputs[0].token_ids), len(second.outputs[0].token_ids)) == (3, 5)
    with pytest.raises(RequestError, match="1 SamplingParams for 2 prompts"):
        llm.generate(["a", "b"], [params()], progress=False)


def test_samples_differ_and_repeat(llm):
    asked = params(temperature=1.5, n=4, seed=3, prompt_logprobs=1, logprobs=0)
    first, again = (llm.generate("hello", asked, progress=False)[0] for _ in range(2))
    assert [out.index for out in first.outputs] == [0, 1, 2, 3]
    assert len({out.text for out in first.outputs}) > 1
    assert first == again
    assert [token.id for token in first.prompt_logprobs] == list(first.prompt_token_ids)
    assert all(token.logprob is not None for out in first.outputs for token in out.logprobs)


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = text_of(llm, "hello").text
    stop = whole[4:6]
    cut = text_of(llm, "hello", stop=stop)
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert llm.tokenizer.decode(cut.token_ids).rfind(stop) >= 0
    kept = text_of(llm, "hello", stop=stop, include_stop_str_in_output=True)
    assert kept.text == whole[: whole.index(stop) + len(stop)]
    late = text_of(llm, "hello", stop=stop, min_tokens=12)
    assert late.text == whole and late.finish_reason == "length"


def test_a_stop_id_ends_the_text_and_is_not_in_it(llm):
    ids = text_of(llm, "hello").token_ids
    out = text_of(llm, "hello", stop_token_ids=(ids[5],))
    end = ids.index(ids[5]) + 1
    assert out.token_ids == ids[:end] and out.stop_reason == ids[5] and out.finish_reason == "stop"
    assert out.text == llm.tokenizer.decode(ids[: end - 1])


def test_eos_ends_unless_ignored(llm):
    (eos,) = llm.tokenizer.eos_ids
    forced = {"logit_bias": {eos: 100.0}, "max_tokens": 4}
    out = text_of(llm, "hello", ignore_eos=False, **forced)
    assert (out.token_ids, out.text, out.finish_reason, out.stop_reason) == ((eos,), "", "stop", None)
    assert text_of(llm, "hello", **forced).token_ids == (eos,) * 4
    assert len(text_of(llm, "hello", ignore_eos=False, min_tokens=2, **forced).token_ids) == 3


def test_chat_renders_the_checkpoints_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    (done,) = llm.chat(messages, params(), progress=False)
    assert done.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert list(done.prompt_token_ids) == llm.tokenizer.encode(done.prompt, special=True)
    pair = llm.chat([messages, messages], params(), progress=False)
    assert [each.outputs for each in pair] == [done.outputs] * 2


def test_a_bad_prompt_leaves_nothing_behind(llm):
    with pytest.raises(RequestError, match="context"):
        llm.generate(["fine", [1] * 500], params(), progress=False)
    assert len(llm.generate("fine", params(), progress=False)) == 1
    assert llm.engine.pool.used == 0


def test_the_bar_goes_to_standard_error(llm, capsys):
    llm.generate(["a", "b"], params(), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""


def test_a_seed_for_the_engine_makes_a_run_repeatable(folder):
    texts = []
    for _ in range(2):
        made = twofold.LLM(folder, seed=5, num_blocks=40, max_num_seqs=4)
        texts.append([text_of(made, "hello", temperature=1.5).text for _ in range(2)])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_what_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        twofold.LLM(folder, max_model_length=3)
    with pytest.raises(CheckpointError):
        twofold.LLM(tmp_path / "nowhere")


def test_the_checkpoint_may_say_how_to_sample(tmp_path):
    assert sampling_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "min_p": None, "eos_token_id": 2}))
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert sampling_defaults(tmp_path) == {"temperature": 0.0}
    path.write_text("[")
    with pytest.raises(CheckpointError, match="generation_config"):
        sampling_defaults(tmp_path)


def test_importing_twofold_is_free_of_torch():
    import subprocess
    import sys

    code = "import twofold, sys; twofold.SamplingParams(); twofold.EngineConfig(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = twofold.nothing


def test_beams_come_best_first_and_the_best_of_samples_are_kept(llm):
    beams = llm.generate(["hello", "def f"], params(use_beam_search=True, beam_width=4, n=3), progress=False)
    for answer in beams:
        scores = [one.beam_score for one in answer.outputs]
        assert scores == sorted(scores, reverse=True) and len({one.token_ids for one in answer.outputs}) == 3
        assert [one.index for one in answer.outputs] == [0, 1, 2] and answer.outputs[0].logprobs is None
        assert all(one.beam_score == pytest.approx(one.cumulative_logprob / 12) for one in answer.outputs)
        assert answer.outputs[0].text == llm.tokenizer.decode(answer.outputs[0].token_ids)
    how = {"temperature": 1.0, "seed": 3, "logprobs": 0}
    every = llm.generate("hello", params(n=6, **how), progress=False)[0].outputs
    best = llm.generate("hello", params(n=2, best_of=6, **how), progress=False)[0].outputs
    ranked = sorted(every, key=lambda one: -sum(token.logprob for token in one.logprobs))
    assert [one.token_ids for one in best] == [one.token_ids for one in ranked[:2]]
    assert [one.index for one in best] == [0, 1]


def test_bad_words_are_banned_at_their_last_token(llm):
    ids = text_of(llm, "hello", max_tokens=60).token_ids
    words = [(at, llm.tokenizer.decode(ids[at : at + 2])) for at in range(58)]
    at, word = next((at, w) for at, w in words if w.strip() == w and tuple(llm.tokenizer.encode(w)) == ids[at : at + 2])
    found = text_of(llm, "hello", max_tokens=60, bad_words=[word]).token_ids
    assert found[: at + 1] == ids[: at + 1] and found[at + 1] != ids[at + 1]
    assert all(found[place : place + 2] != ids[at : at + 2] for place in range(59))


def test_what_beams_cannot_do_is_said(llm):
    for wrong in ({"temperature": 0.5}, {"stop": "x"}, {"beam_width": 1, "n": 2}):
        with pytest.raises(RequestError):
            llm.generate("hello", params(use_beam_search=True, **wrong), progress=False)
