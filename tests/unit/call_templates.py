"""A chat template for every form of calls, in the manner of the families that speak it, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken

from tests.unit import toy_tokenizers as toys
from twofold.data import ChatTemplate, Tokenizer

_OBJECT = "{'name': c.function.name, 'arguments': c.function.arguments} | tojson"
_LISTED = (
    "[{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]"
)
_NINE = "{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
_XML = (
    "{% for c in m.tool_calls %}{{ '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
    "{% for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>\\n' }}"
    "{{ v if v is string else v | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' }}{% endfor %}"
)
_PAIRS = (
    "{% for c in m.tool_calls %}{{ '\\n<tool_call>' + c.function.name + '\\n' }}"
    "{% for k, v in c.function.arguments | items %}<arg_key>{{ k }}</arg_key>\n<arg_value>"
    "{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
)
_PYTHON = (
    "[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}="
    "{{ 'True' if v is true else 'False' if v is false else 'None' if v is none else v | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]"
)
CALLS = {
    "hermes": "{% for c in m.tool_calls %}{{ '\\n<tool_call>\\n' }}{{ "
    + _OBJECT
    + " }}{{ '\\n</tool_call>' }}{% endfor %}",
    "qwen3_coder": _XML,
    "glm45": _PAIRS,
    "llama3_json": (
        "{% for c in m.tool_calls %}{{ '<|python_tag|>' if loop.first }}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
        "{{ '; ' if not loop.last }}{% endfor %}"
    ),
    "mistral": "[TOOL_CALLS]{% for c in m.tool_calls %}" + _NINE + "{% endfor %}" + _LISTED,
    "mistral_new": (
        "{% for c in m.tool_calls %}" + _NINE + "[TOOL_CALLS]{{ c.function.name }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}"
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
        "{{ '\\n' if not loop.first }}{{ '<｜tool▁call▁begin｜>' + c.type "
        "+ '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}"
        "{% endfor %}<｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
        "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' "
        "+ c.function.arguments + '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>"
    ),
    "pythonic": "<|python_start|>" + _PYTHON + "<|python_end|>",
    "granite": "<|tool_call|>" + _LISTED,
    "internlm": "{% for c in m.tool_calls %}<|action_start|><|plugin|>{{ " + _OBJECT + " }}<|action_end|>{% endfor %}",
}
SPECIAL = [
    *("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL_RESULTS]", "<|python_start|>", "<|python_end|>"),
    *("<|tool_call|>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "[THINK]", "[/THINK]"),
]
PLAIN = [  # tokens of the vocabulary that it does not call special, as in Qwen's and DeepSeek's
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
]


def template(name: str) -> ChatTemplate:
    """A template whose assistant thinks, speaks and calls in one form."""
    source = (
        "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{{ '\\n' }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'tool' %}{{ '<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
        "{% else %}{% if m.reasoning_content %}"
        "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content or '' }}{% if m.tool_calls %}" + CALLS[name] + "{% endif %}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"
    )
    return ChatTemplate(source)


def tokenizer(folder: Path) -> Tokenizer:
    backend = toys.byte_level()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return toys.save(backend, folder, eos_token="<|im_end|>")
