"""The forms that are known, by the names that vLLM gave them; a new family is a new row here.

hermes        <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
qwen3_coder   <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
glm45         <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>
llama3_json   {"name": "f", "parameters": {"a": 1}}; {...}             behind <|python_tag|>, or as the whole answer
mistral       [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]       or [TOOL_CALLS]f[ARGS]{"a": 1}
deepseek_v3   <｜tool▁call▁begin｜>function<｜tool▁sep｜>f, then the arguments in a fence
deepseek_v31  <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>
pythonic      [f(a=1), g()]                                            as the whole answer, or between marks
granite       <|tool_call|>[{"name": "f", "arguments": {"a": 1}}]
internlm      <|action_start|><|plugin|>{"name": "f", "parameters": {"a": 1}}<|action_end|>
"""

from __future__ import annotations

from .form import BEGIN, DONE, END, OPEN, OTHER, Form, Thoughts, Writing

_ARGUMENTS = '", "arguments": '

HERMES = Form(
    name="hermes",
    reads={"call": "call", "close": "space"},
    moves={
        ("text", "<tool_call>"): ("call", BEGIN),
        ("call", DONE): ("close",),
        ("close", "{"): ("call", BEGIN),
        ("close", "<tool_call>"): ("call", BEGIN),
        ("close", "</tool_call>"): ("start",),
    },
    looks=frozenset({"{"}),
    signs=(("<tool_call>",),),
    writes=(Writing(before='<tool_call>\n{"name": "', between=_ARGUMENTS, after="}\n</tool_call>", separator="\n"),),
    also=("<tool_response>", "</tool_response>", "<tools>", "</tools>"),
)

QWEN3_CODER = Form(
    name="qwen3_coder",
    reads={
        "head": "space",
        "name": "name",
        "parameters": "space",
        "key": "key",
        "value": "value",
        "tail": "space",
    },
    moves={
        ("text", "<tool_call>"): ("head", BEGIN),
        ("text", "<function="): ("name", BEGIN),
        ("head", "<function="): ("name",),
        ("name", ">"): ("parameters", OPEN),
        ("parameters", "<parameter="): ("key",),
        ("key", ">"): ("value",),
        ("value", "</parameter>"): ("parameters",),
        ("parameters", "</function>"): ("tail", END),
        ("tail", "<function="): ("name", BEGIN),
        ("tail", "<tool_call>"): ("head", BEGIN),
        ("tail", "</tool_call>"): ("start",),
    },
    signs=(("<function=", "<parameter="),),
    also=HERMES.also,
)

GLM45 = Form(
    name="glm45",
    reads={"name": "name", "key": "key", "gap": "space", "value": "value", "pairs": "space"},
    moves={
        ("text", "<tool_call>"): ("name", BEGIN),
        ("name", "<arg_key>"): ("key", OPEN),
        ("name", "</tool_call>"): ("start", OPEN, END),
        ("key", "</arg_key>"): ("gap",),
        ("gap", "<arg_value>"): ("value",),
        ("value", "</arg_value>"): ("pairs",),
        ("pairs", "<arg_key>"): ("key",),
        ("pairs", "</tool_call>"): ("start", END),
    },
    signs=(("<arg_key>",),),
    also=HERMES.also,
)

LLAMA3 = Form(
    name="llama3_json",
    reads={"call": "call", "bare": "known call", "next": "space"},
    moves={
        ("text", "<|python_tag|>"): ("call", BEGIN),
        ("start", "{"): ("bare", BEGIN),
        ("call", DONE): ("next",),
        ("bare", DONE): ("next",),
        ("next", ";"): ("next",),
        ("next", "{"): ("bare", BEGIN),
        ("next", "<|python_tag|>"): ("call", BEGIN),
    },
    looks=frozenset({"{"}),
    writes=(Writing(before='{"name": "', between='", "parameters": ', after="}", separator="; "),),
    signs=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters": ')),
)

MISTRAL = Form(
    name="mistral",
    reads={"head": "space", "calls": "calls", "name": "name", "id": "word", "arguments": "arguments"},
    moves={
        ("text", "[TOOL_CALLS]"): ("head", BEGIN),
        ("head", "["): ("calls",),
        ("head", OTHER): ("name",),
        ("name", "{"): ("arguments",),
        ("name", "[ARGS]"): ("arguments",),
        ("name", "[CALL_ID]"): ("id",),
        ("id", "[ARGS]"): ("arguments",),
        ("arguments", DONE): ("start",),
        ("calls", DONE): ("start",),
    },
    looks=frozenset({"[", "{"}),
    signs=(("[TOOL_CALLS]",),),
    writes=(
        Writing(before="[TOOL_CALLS]", between="[ARGS]", after="", needs="[ARGS]"),
        Writing(open="[TOOL_CALLS] [", before='{"name": "', between=_ARGUMENTS, after="}", separator=", ", close="]"),
    ),
    also=("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]"),
)

_CALLS, _CALL, _SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
_CALL_END, _CALLS_END = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK = (
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    *("<｜User｜>", "<｜Assistant｜>"),
)

DEEPSEEK_V3 = Form(
    name="deepseek_v3",
    reads={"between": "space", "kind": "word", "name": "name", "arguments": "arguments", "end": "space"},
    moves={
        ("text", _CALLS): ("between", BEGIN),
        ("text", _CALL): ("kind", BEGIN),
        ("between", _CALL): ("kind", BEGIN),
        ("kind", _SEP): ("name",),
        ("name", "\n```json\n"): ("arguments",),
        ("arguments", DONE): ("end",),
        ("end", "```"): ("end",),
        ("end", _CALL_END): ("between",),
        ("between", _CALLS_END): ("start",),
    },
    signs=((_CALLS, "```json"),),
    writes=(
        Writing(
            open=_CALLS,
            before=f"{_CALL}function{_SEP}",
            between="\n```json\n",
            after=f"\n```{_CALL_END}",
            separator="\n",
            close=_CALLS_END,
        ),
    ),
    also=_DEEPSEEK,
)

DEEPSEEK_V31 = Form(
    name="deepseek_v31",
    reads={"between": "space", "name": "name", "arguments": "arguments", "end": "space"},
    moves={
        ("text", _CALLS): ("between", BEGIN),
        ("text", _CALL): ("name", BEGIN),
        ("between", _CALL): ("name", BEGIN),
        ("name", _SEP): ("arguments",),
        ("arguments", DONE): ("end",),
        ("end", _CALL_END): ("between",),
        ("between", _CALLS_END): ("start",),
    },
    signs=((_CALLS,),),
    writes=(Writing(open=_CALLS, before=_CALL, between=_SEP, after=_CALL_END, close=_CALLS_END),),
    also=_DEEPSEEK,
)

PYTHONIC = Form(
    name="pythonic",
    reads={"bare": "known python", "marked": "python", "close": "space"},
    moves={
        ("start", "["): ("bare", BEGIN),
        ("bare", DONE): ("start",),
        ("text", "<|python_start|>"): ("marked", BEGIN),
        ("text", "<|tool_call_start|>"): ("marked", BEGIN),
        ("marked", DONE): ("close",),
        ("close", "<|python_end|>"): ("start",),
        ("close", "<|tool_call_end|>"): ("start",),
    },
    looks=frozenset({"["}),
    writes=(Writing(open="[", between="(", after=")", separator=", ", close="]", pythonic=True),),
    signs=(("<|python_start|>",), ("<|tool_call_start|>",), ("func_name1(params_name1=",)),
)

GRANITE = Form(
    name="granite",
    reads={"calls": "calls"},
    moves={
        ("text", "<|tool_call|>"): ("calls", BEGIN),
        ("text", "<tool_call>"): ("calls", BEGIN),
        ("calls", DONE): ("start",),
    },
    signs=(("<|tool_call|>",),),
    writes=(
        Writing(open="<|tool_call|>[", before='{"name": "', between=_ARGUMENTS, after="}", separator=", ", close="]"),
    ),
)

INTERNLM = Form(
    name="internlm",
    reads={"head": "space", "call": "call", "close": "space"},
    moves={
        ("text", "<|action_start|>"): ("head", BEGIN),
        ("head", "<|plugin|>"): ("call",),
        ("call", DONE): ("close",),
        ("close", "<|action_end|>"): ("start",),
    },
    signs=(("<|action_start|>", "<|plugin|>"),),
    writes=(
        Writing(before='<|action_start|><|plugin|>{"name": "', between='", "parameters": ', after="}<|action_end|>"),
    ),
)

FORMS = {
    form.name: form
    for form in (
        *(QWEN3_CODER, GLM45, DEEPSEEK_V3, DEEPSEEK_V31, MISTRAL, GRANITE, INTERNLM),
        *(PYTHONIC, HERMES, LLAMA3),
    )
}
"""In the order in which a template's signs are looked for: the more telling first."""

FORM_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama": "llama3_json",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "lfm2": "pythonic",
    "deepseek_r1": "deepseek_v3",
    "glm4": "glm45",
    "glm47": "glm45",
}

_THINK = ("<think>", "</think>")
THOUGHTS = {
    row.name: row
    for row in (
        Thoughts(name="mistral", opens="[THINK]", closes="[/THINK]"),
        Thoughts(name="seed_oss", opens="<seed:think>", closes="</seed:think>"),
        Thoughts(name="kimi", opens="◁think▷", closes="◁/think▷"),
        Thoughts(name="granite", opens="Here is my thought process:", closes="Here is my response:"),
        Thoughts(name="qwen3", opens=_THINK[0], closes=_THINK[1]),
        Thoughts(name="deepseek_r1", opens=_THINK[0], closes=_THINK[1], assumed=True),
    )
}
"""In the order in which a template's signs are looked for."""

THOUGHT_ALIASES = {"deepseek_v3": "qwen3", "glm45": "qwen3", "hunyuan": "qwen3", "holo2": "qwen3", "think": "qwen3"}

PROMPT_MARKS = frozenset(
    mark
    for texts in (
        *((*form.marks, *form.also) for form in FORMS.values()),
        *((row.opens, row.closes) for row in THOUGHTS.values()),
    )
    for mark in texts
    if len(mark) > 3
)
"""What users may not write as tokens, where a vocabulary has it as a token that is not called special."""
