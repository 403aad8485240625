"""The field's clients against a server of ours: openai, litellm, langchain; chat, streams, tools, forms, embeddings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from served import Served, served
from tiny_checkpoint import make_checkpoint

HI: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of some days.", "parameters": WEATHER},
}
NAMED = {"type": "function", "function": {"name": "weather"}}
FORM: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "weather", "strict": True, "schema": WEATHER},
}
TEMPLATE = (
    "{% if tools %}<|start|>system\n{{ tools | tojson }} <tool_call> </tool_call><|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_checkpoint(tmp_path_factory.mktemp("clients") / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    with served(folder, engine={"convert": "embed"}, api_keys=["secret-key"]) as server:
        yield server


def called(name: str, arguments: str) -> None:
    assert name == "weather"
    jsonschema.validate(json.loads(arguments), WEATHER)


# ---------------------------------------------------------------------------------------------------- openai
@pytest.fixture
def client(hermes: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="secret-key", max_retries=0)


def test_openai_chats_and_streams(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, seed=3, temperature=0.8)
    stream = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=12, seed=3, temperature=0.8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (whole.choices[0].message.content or "")
    last = chunks[-1].usage
    assert whole.usage is not None and last is not None
    assert (last.prompt_tokens, last.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    done = client.completions.create(model="tiny", prompt="def add(a", max_tokens=5, temperature=0)
    assert done.usage is not None and done.usage.completion_tokens <= 5


def test_openai_forms(client: openai.OpenAI) -> None:
    for seed in range(4):
        said = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=60, seed=seed, temperature=1.2, response_format=FORM
        )
        called("weather", said.choices[0].message.content or "")
    with client.chat.completions.stream(model="tiny", messages=HI, max_tokens=60, response_format=FORM) as stream:
        final = stream.get_final_completion()
    called("weather", final.choices[0].message.content or "")
    with pytest.raises(openai.BadRequestError, match="wrong"):
        client.chat.completions.create(
            model="tiny", messages=HI,
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "wrong"}}},
        )  # fmt: skip


def test_openai_tools(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    how |= {"max_tokens": 200, "temperature": 1.0}
    said = client.chat.completions.create(model="tiny", messages=HI, **how).choices[0]
    assert said.finish_reason == "tool_calls" and said.message.tool_calls
    for call in said.message.tool_calls:
        assert call.type == "function"
        called(call.function.name, call.function.arguments)
    with client.chat.completions.stream(model="tiny", messages=HI, **how) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in streamed] == [
        (c.function.name, c.function.arguments) for c in said.message.tool_calls if c.type == "function"
    ]
    first = said.message.tool_calls[0]
    back = [
        *HI,
        said.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.id, "content": '{"degrees": 21}'},
    ]
    again = client.chat.completions.create(model="tiny", messages=back, tools=[TOOL], tool_choice="none", max_tokens=5)
    assert again.choices[0].message.tool_calls is None


def test_openai_embeddings_and_models(client: openai.OpenAI) -> None:
    texts = ["The quick brown fox", "for i in range(10):"]
    found = client.embeddings.create(model="tiny", input=texts)
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [len(each.embedding) for each in found.data] == [64, 64]
    for a, b in zip(found.data, plain.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding)
        assert math.isclose(sum(x * x for x in a.embedding), 1.0, rel_tol=1e-4)
    assert [card.id for card in client.models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=str(client.base_url), api_key="wrong", max_retries=0).models.list()


# ---------------------------------------------------------------------------------------------------- litellm
def test_litellm(hermes: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # at its import it would ask the network for prices
    import litellm

    where: dict[str, Any] = {"model": "openai/tiny", "api_base": f"{hermes.url}/v1", "api_key": "secret-key"}
    whole = litellm.completion(messages=HI, max_tokens=9, seed=5, **where)
    stream = litellm.completion(messages=HI, max_tokens=9, seed=5, stream=True, **where)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == (whole.choices[0].message.content or "")
    formed = litellm.completion(messages=HI, max_tokens=60, response_format=FORM, **where)
    called("weather", formed.choices[0].message.content)
    tooled = litellm.completion(messages=HI, max_tokens=200, tools=[TOOL], tool_choice=NAMED, **where)
    for call in tooled.choices[0].message.tool_calls:
        called(call.function.name, call.function.arguments)
    found = litellm.embedding(input=["The quick brown fox"], **where)
    assert len(found.data[0]["embedding"]) == 64


# ---------------------------------------------------------------------------------------------------- langchain
def test_langchain(hermes: Served) -> None:
    where: dict[str, Any] = {"model": "tiny", "base_url": f"{hermes.url}/v1", "api_key": "secret-key", "max_retries": 0}
    chat = ChatOpenAI(**where, max_tokens=9, seed=7, temperature=0.9)
    messages = [SystemMessage("Be brief."), HumanMessage("The quick brown")]
    whole = chat.invoke(messages)
    assert "".join(str(chunk.content) for chunk in chat.stream(messages)) == whole.content
    form = ChatOpenAI(**where, max_tokens=60).with_structured_output(
        {"title": "weather", **WEATHER}, method="json_schema", strict=True
    )
    jsonschema.validate(form.invoke(messages), WEATHER)
    tools = ChatOpenAI(**where, max_tokens=200, seed=2).bind_tools([TOOL], tool_choice="weather")
    said = tools.invoke(messages)
    assert isinstance(said, AIMessage) and said.tool_calls
    for call in said.tool_calls:
        called(call["name"], json.dumps(call["args"]))
    back = [*messages, said, *(ToolMessage("21 degrees", tool_call_id=call["id"]) for call in said.tool_calls)]
    assert isinstance(chat.invoke(back), AIMessage)
    vectors = OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(["The quick", "brown fox"])
    assert [len(vector) for vector in vectors] == [64, 64]
