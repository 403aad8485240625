"""What may be asked of the sampler, through HTTP: each parameter does what it says, whole, streamed and cached."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from served import Served, served

TEXT, CHAT, IDS = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
HI = [{"role": "user", "content": "Say something about the lazy dog, please."}]


def post(server: Served, path: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    answer = server.http.post(path, json=fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(server: Served, **fields: Any) -> list[dict[str, Any]]:
    usual = {"prompt": "The quick", "temperature": 0, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
    choices: list[dict[str, Any]] = post(server, TEXT, **(usual | fields))["choices"]
    return choices


def refused(server: Served, path: str, **fields: Any) -> str:
    answer = server.http.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["param"])


def streamed(server: Served, path: str, **fields: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", path, json={"stream": True, **fields}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def mean(choice: dict[str, Any]) -> float:
    numbers = choice["logprobs"]["token_logprobs"]
    return sum(numbers) / len(numbers)


def has(ids: list[int], word: list[int]) -> bool:
    return any(ids[at : at + len(word)] == word for at in range(len(ids)))


def test_bad_words_do_not_come(server: Served) -> None:
    free = complete(server, max_tokens=60)[0]
    ids = free["token_ids"]
    spelled = [server.http.post("/detokenize", json={"tokens": ids[at : at + 2]}).json()["prompt"] for at in range(50)]
    tried = 0
    for at, word in enumerate(spelled):
        again = server.http.post("/tokenize", json={"prompt": word}).json()["tokens"]
        if "�" in word or not word.strip() or word != word.strip() or again != ids[at : at + 2] or tried == 3:
            continue
        tried += 1
        choice = complete(server, max_tokens=60, bad_words=[word])[0]
        assert has(ids, again) and not has(choice["token_ids"], again), word
        assert choice["token_ids"][: at + 1] == ids[: at + 1], "nothing but the end of the word was banned"
    assert tried
    chat = post(server, CHAT, messages=HI, temperature=0, max_tokens=8, bad_words=["a", "e"])["choices"][0]
    banned = {server.http.post("/tokenize", json={"prompt": text}).json()["tokens"][0] for text in ("a", "e")}
    assert banned and not banned & set(server.http.post("/tokenize", json={"prompt": chat["message"]["content"]})
                                       .json()["tokens"][:1])  # fmt: skip
    assert refused(server, TEXT, prompt="x", bad_words=[" "]) == "bad_words"
    assert refused(server, TEXT, prompt="x", bad_words=["a"] * 300) == "bad_words"


def test_the_best_of_several_come_back(server: Served) -> None:
    given = {"temperature": 1, "seed": 5, "logprobs": 0, "max_tokens": 12}
    every = complete(server, n=6, **given)
    answer = post(server, TEXT, prompt="The quick", ignore_eos=True, n=2, best_of=6, return_token_ids=True, **given)
    best = sorted(every, key=mean, reverse=True)[:2]
    assert [choice["token_ids"] for choice in answer["choices"]] == [choice["token_ids"] for choice in best]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 6 * 12, "all that was made is counted"
    two = post(server, TEXT, prompt=["The quick", "def add"], temperature=1, seed=5, max_tokens=6, best_of=3)
    assert [choice["index"] for choice in two["choices"]] == [0, 1] and two["choices"][0]["logprobs"] is None
    chat = post(server, CHAT, messages=HI, temperature=1, seed=5, max_tokens=6, best_of=3, n=2)
    assert len(chat["choices"]) == 2 and chat["choices"][0]["logprobs"] is None
    assert refused(server, TEXT, prompt="x", n=3, best_of=2) == "best_of"
    assert refused(server, TEXT, prompt="x", best_of=2, stream=True) == "stream"


def test_a_chats_prompt_is_scored_whole_streamed_and_warm(server: Served) -> None:
    given = {"messages": HI, "max_tokens": 3, "temperature": 0, "prompt_logprobs": 2, "cache_salt": "scored"}
    first, second = (post(server, CHAT, **given) for _ in range(2))
    scores = first["prompt_logprobs"]
    assert scores[0] is None and len(scores) == first["usage"]["prompt_tokens"]
    assert all(2 <= len(score) <= 3 for score in scores[1:]) and second["prompt_logprobs"] == scores
    told = [chunk["prompt_logprobs"] for chunk in streamed(server, CHAT, **given) if "prompt_logprobs" in chunk]
    assert told == [scores]
    plain = post(server, CHAT, **(given | {"prompt_logprobs": None}))
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert plain["choices"][0]["message"] == first["choices"][0]["message"]


def test_modes_of_logprobs(server: Served) -> None:
    given = {"logit_bias": {"50": 4.0}, "logprobs": 3, "temperature": 0.5, "seed": 1, "max_tokens": 6}
    found = {mode: complete(server, **given, logprobs_mode=mode)[0] for mode in ("raw", "tempered", "processed")}
    assert len({tuple(choice["token_ids"]) for choice in found.values()}) == 1
    assert len({mean(choice) for choice in found.values()}) == 3
    assert refused(server, TEXT, prompt="x", logprobs_mode="cooked") == "logprobs_mode"


def test_a_stop_counts_only_after_min_tokens(server: Served) -> None:
    text = complete(server, max_tokens=40)[0]["text"]
    stop = next(part for part in (text[at : at + 2] for at in range(2, 20)) if "�" not in part)
    early = complete(server, max_tokens=40, stop=stop)[0]
    least = len(early["token_ids"]) + 3
    late = complete(server, max_tokens=40, stop=stop, min_tokens=least)[0]
    assert early["finish_reason"] == "stop" and early["text"] == text[: text.index(stop)]
    assert len(late["token_ids"]) >= least and late["text"].startswith(text[: text.index(stop) + len(stop)])
    parts = streamed(server, TEXT, prompt="The quick", temperature=0, max_tokens=40, stop=stop, min_tokens=least,
                     ignore_eos=True)  # fmt: skip
    assert "".join(part["choices"][0]["text"] for part in parts) == late["text"]


def test_salts_keep_prefixes_apart(server: Served) -> None:
    def cached(salt: str | None) -> int:
        given = {"prompt": "The quick brown fox jumps over the lazy dog. " * 3, "max_tokens": 1, "cache_salt": salt}
        found: int = post(server, TEXT, **given)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached("one") == 0 and cached("one") > 0 and cached("two") == 0


def test_the_urgent_go_first_and_time_is_kept(tiny: Path) -> None:
    dials = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "scheduling_policy": "priority"}
    with served(tiny, engine=dials, limits={"queue_requests": 16}) as one:
        ended: list[str] = []

        def ask(name: str, priority: int, tokens: int, n: int = 1) -> None:
            post(one, TEXT, prompt="The", max_tokens=tokens, ignore_eos=True, priority=priority, n=n)
            ended.append(name)

        threads = [threading.Thread(target=ask, args=("first", 0, 400, 4))]
        threads[0].start()
        one.wait(lambda: one.stats()["running"])
        each = one.stats()["prompt_tokens_total"]
        for name, priority in (("later", 9), ("urgent", -1)):
            threads.append(threading.Thread(target=ask, args=(name, priority, 40)))
            threads[-1].start()
            one.wait(lambda: one.stats()["prompt_tokens_total"] >= each * len(threads))
        for thread in threads:
            thread.join()
        assert ended.index("urgent") < ended.index("later")
        for path, body in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": HI}), (IDS, {"token_ids": [5]})):
            most = {"sampling_params": {"max_tokens": 400, "ignore_eos": True}} if path == IDS else {"max_tokens": 400}
            late = one.http.post(path, json={**body, **most}, headers={"X-Request-Timeout": "0.01"})
            assert late.status_code == 504, path


# -- beams ----------------------------------------------------------------------------------------------------------


def test_beams_come_best_first_with_their_scores(server: Served) -> None:
    given = {"prompt": "The quick", "use_beam_search": True, "best_of": 4, "n": 3, "max_tokens": 10, "logprobs": 2}
    answer = post(server, TEXT, **given, return_token_ids=True)
    choices = answer["choices"]
    scores = [choice["beam_score"] for choice in choices]
    assert [choice["index"] for choice in choices] == [0, 1, 2] and scores == sorted(scores, reverse=True)
    assert len({choice["text"] for choice in choices}) > 1 and answer["usage"]["completion_tokens"] == sum(
        len(choice["token_ids"]) for choice in choices
    )
    for choice in choices:
        numbers = choice["logprobs"]["token_logprobs"]
        assert sum(numbers) == pytest.approx(choice["cumulative_logprob"], abs=1e-4)
        assert choice["beam_score"] == pytest.approx(choice["cumulative_logprob"] / len(numbers), abs=1e-6)
        assert any(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"]), "ids that look alike are one"
    greedy = complete(server, max_tokens=10, ignore_eos=False, logprobs=0)[0]
    assert choices[0]["cumulative_logprob"] >= sum(greedy["logprobs"]["token_logprobs"]) - 1e-4
    chat = post(server, CHAT, messages=HI, use_beam_search=True, beam_width=3, n=2, max_tokens=8, logprobs=True)
    assert len(chat["choices"]) == 2 and chat["choices"][0]["beam_score"] >= chat["choices"][1]["beam_score"]
    assert len(chat["choices"][0]["logprobs"]["content"]) in range(1, 9)
    two = post(server, TEXT, **(given | {"prompt": ["The quick", "def add"]}), return_token_ids=True)["choices"]
    assert [choice["token_ids"] for choice in two[:3]] == [choice["token_ids"] for choice in choices]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.7}, "temperature"),
        ({"stop": ["a"]}, "stop"),
        ({"n": 3, "beam_width": 2}, "beam_width"),
        ({"beam_width": 99}, "beam_width"),
        ({"length_penalty": 1e9}, "length_penalty"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
        ({"use_beam_search": False, "length_penalty": 0.5}, "length_penalty"),
    ],
    ids=str,
)
def test_what_beams_cannot_do_is_said(server: Served, fields: dict[str, Any], param: str) -> None:
    for path, body in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": HI})):
        assert refused(server, path, **{"use_beam_search": True, **body, **fields}) == param


# -- token in, token out --------------------------------------------------------------------------------------------


def test_ids_in_and_out_are_the_completions(server: Served) -> None:
    prompt = server.http.post("/tokenize", json={"prompt": "The quick"}).json()["tokens"]
    how = {"temperature": 1, "seed": 3, "max_tokens": 12, "n": 2, "logprobs": 2, "prompt_logprobs": 1}
    text = complete(server, **how)
    answer = post(server, IDS, token_ids=prompt, sampling_params=how | {"ignore_eos": True}, request_id="mine")
    assert answer["request_id"] == "mine" and answer["usage"]["completion_tokens"] == 24
    for choice, other in zip(answer["choices"], text, strict=True):
        assert choice["token_ids"] == other["token_ids"] and choice["finish_reason"] == "length"
        assert [token["logprob"] for token in choice["logprobs"]] == other["logprobs"]["token_logprobs"]
        assert [token["token_id"] for token in choice["logprobs"]] == choice["token_ids"]
        assert all(len(token["top"]) == 2 for token in choice["logprobs"])
        assert [token["token_id"] for token in choice["prompt_logprobs"]] == prompt
    said: dict[int, list[int]] = {0: [], 1: []}
    chunks = streamed(server, IDS, token_ids=prompt, sampling_params=how | {"ignore_eos": True})
    for chunk in chunks:
        for choice in chunk["choices"]:
            said[choice["index"]] += choice["token_ids"]
    assert list(said.values()) == [choice["token_ids"] for choice in answer["choices"]]
    assert chunks[-1]["usage"] == answer["usage"]
    many = post(server, IDS, token_ids=[prompt, prompt[:2]], sampling_params={"temperature": 0, "max_tokens": 4})
    assert [choice["index"] for choice in many["choices"]] == [0, 1]
    beams = post(server, IDS, token_ids=prompt, sampling_params={"use_beam_search": True, "n": 2, "max_tokens": 5})
    assert beams["choices"][0]["beam_score"] >= beams["choices"][1]["beam_score"]


@pytest.mark.parametrize(
    "body",
    [
        {}, {"token_ids": []}, {"token_ids": [[]]}, {"token_ids": "hello"}, {"token_ids": [[1], 2]},
        {"token_ids": [-1]},
        {"token_ids": [10**9]}, {"token_ids": [1] * 600}, {"token_ids": [1], "sampling_params": {"stop": ["a"]}},
        {"token_ids": [1], "sampling_params": {"n": 0}}, {"token_ids": [1], "sampling_params": []},
        {"token_ids": [1], "sampling_params": {"bad_words_ids": [[]]}}, {"token_ids": [1], "cache_salt": ""},
        {"token_ids": [1], "sampling_params": {"bad_words_ids": [[400000]]}}, {"token_ids": [1], "priority": 2**40},
        {"token_ids": [1], "stream": True, "sampling_params": {"use_beam_search": True}}, {"token_ids": [1.5]},
        {"token_ids": [[1]] * 65},
    ],
    ids=lambda body: json.dumps(body)[:60],
)  # fmt: skip
def test_bad_requests_for_ids_are_400(server: Served, body: dict[str, Any]) -> None:
    answer = server.http.post(IDS, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_checkpoint_without_a_tokenizer_serves_ids(tiny: Path, server: Served, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    prompt = server.http.post("/tokenize", json={"prompt": "The quick"}).json()["tokens"]
    how = {"temperature": 0, "max_tokens": 9}
    with served(folder, skip_tokenizer_init=True) as bare:
        mine, theirs = (post(one, IDS, token_ids=prompt, sampling_params=how)["choices"] for one in (bare, server))
        assert mine == theirs
        for path, body in (
            (TEXT, {"prompt": "x"}), (TEXT, {"prompt": [1, 2]}), (CHAT, {"messages": HI}),
            ("/tokenize", {"prompt": "x"}), ("/tokenize", {"messages": HI}), ("/detokenize", {"tokens": [5]}),
        ):  # fmt: skip
            answer = bare.http.post(path, json=body)
            assert answer.status_code == 400 and "no tokenizer" in answer.json()["error"]["message"], path
