"""What a logged record says: the request, the answers, the tokens that were generated, and why they ended.

One table says where servers, gateways, batch services and tracing tools keep a request and its response. To read a
further tool, add it there: training and `mope predict --input` then read it. Files and rows are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from mope.log_answers import (
    ASSISTANT,
    CALLS,
    FINISH,
    RESPONSES,
    THOUGHTS,
    TOKEN_LISTS,
    USAGE,
    LoggedAnswer,
    Usage,
    answers_of,
    at,
    finish_of,
    message_answer,
    usage_of,
)
from mope.log_losses import lost, lost_by_sglang
from mope.log_spans import ATTRIBUTES, attributes_of, read_span
from mope.log_streams import unstreamed
from mope.reader import FIELDS, TEXTS, TOP_NAMES, number, parsed, read_flags, true_or_false
from mope.request import role_of

Record = Mapping[str, Any]

CONVERSATIONS = ("messages", "conversation", "conversations")
PROMPTS = ("prompt", "instruction", "question", "query", "input")  # columns of a prompt as text
MORE = ("input", "context")  # columns that belong to an instruction or a question
GROUP_COLUMNS = ("conversation_id", "conversation_hash", "conv_id", "session_id")
ID_COLUMNS = ("id", "request_id", *GROUP_COLUMNS)
OF_LLM = ("target_llm", "llm_family", "llm_size", "llm_reasoning", "llm_year")
COMPLETION_TOKENS = 16  # cap of a text completion that names none, as OpenAI and engines have it
PYTHON_REPR = "a cell in Python's notation (single quotes); write such cells with json.dumps"

# why a record of a family may have no prompt, and what to do
NO_PROMPT = {
    "openai batch": "batch output has no prompts; read it together with its input, they are joined by custom_id",
    "anthropic batch": "batch results have no prompts; read them together with their requests, they are joined by "
    "custom_id",
    "litellm": "a spend log without texts; set store_prompts_in_spend_logs: true in LiteLLM's general_settings",
    "vllm bench": "results of vllm bench have lengths but no prompts; add the prompts, or log requests on the server",
    "trace": "a trace of lengths has no prompts to learn from; as JSON Lines of arrival_s, client, prompt_tokens and "
    "response_tokens it can be replayed: mope replay --workloads trace --trace FILE",
    "sglang": "logged without texts; start SGLang with --log-requests-level 3",
    "opentelemetry": "a span without messages; switch on the capture of message content in the instrumentation",
}


class Logged(NamedTuple):
    """One logged call of an LLM.

    Attributes:
        family: whose form the record has, such as `"helicone"`.
        request: the body as the server got it, for `mope.reader`; what the record says about the LLM is in it, too.
            Empty if the record holds no prompt.
        answers: what was generated, one for each choice; empty if no answer was logged.
        usage: tokens of all answers together, as they were recorded.
        finish: why the answer ended, in lower case, if there is one answer at most; None: not said.
        failed: whether the call failed.
        lacking: why there is no request, in words; empty if there is one.
        is_call: False for what a tool logs beside calls: agents, tools, retrieval, requests to other paths.
    """

    family: str
    request: Record
    answers: tuple[LoggedAnswer, ...] = ()
    usage: Usage = Usage()
    finish: str | None = None
    failed: bool = False
    lacking: str = ""
    is_call: bool = True


class Envelope(NamedTuple):
    """Where a tool keeps a request and its response; of several places, the first that holds any counts.

    Attributes:
        family: the name of the form.
        marks: sets of names; a record has this form if it has all names of one set.
        request: where the request may stand; `.` is the record itself.
        response: where the response may stand.
        flags: objects of the record that hold flags of the request.
    """

    family: str
    marks: tuple[frozenset[str], ...]
    request: tuple[str, ...]
    response: tuple[str, ...]
    flags: tuple[str, ...] = ()


def _marks(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in sets)


# from the most to the least specific
ENVELOPES: tuple[Envelope, ...] = (
    Envelope(
        "anthropic batch", _marks("custom_id result", "custom_id params"),
        ("params", "request.params", "request.body", "request"), ("result.message",),
    ),
    Envelope(
        "openai batch", _marks("custom_id response", "custom_id body"),
        ("body", "request.body", "request"), ("response.body", "response"),
    ),
    Envelope("helicone", _marks("request_body"), ("request_body",), ("response_body",)),
    Envelope(
        "litellm", _marks("call_type", "proxy_server_request", "custom_llm_provider", "spend"),
        ("proxy_server_request.body", "proxy_server_request", "."), ("response",), ("model_parameters",),
    ),
    Envelope("sglang", _marks("obj out", "obj event"), ("obj",), ("out",)),
    Envelope(
        "langfuse",
        _marks("modelParameters input", "usageDetails input", "usage_details input", "traceId input", "trace_id input"),
        ("input",), ("output",), ("modelParameters", "model_parameters"),
    ),
    Envelope("request and response", _marks("request"), ("request.body", "request"), ("response.body", "response")),
)  # fmt: skip
# of lengths without texts, by their names in lower case without separators
_TRACE = frozenset(
    {"generatedtokens", "responsetokens", "outputtokens", "completiontokens", "outputlength", "numoutputtokens",
     "numgeneratedtokens", "outputlen"}
)  # fmt: skip
_BENCH = (
    "input_lens", "output_lens", "generated_texts", "prompts", "input_texts", "errors", "ttfts", "itls", "tpots",
    "e2els", "start_times", "model_id",
)  # fmt: skip
_SPANS = ("resourceSpans", "scopeSpans", "spans")
_FAILURES = ("error", "errors", "exception", "error_information")
_FAMILIES_OF_FIELDS = {
    "candidates": "gemini", "contents": "gemini", "eval_count": "ollama", "done_reason": "ollama",
    "generated_text": "text generation inference", "meta_info": "sglang",
}  # fmt: skip

# what Langfuse observes beside generations: their tokens, if any, are sums over the calls inside
_OBSERVATIONS = frozenset(
    {"SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL"}
)
# names that a record may have at its top, as they are written here
NAMES: frozenset[str] = TOP_NAMES.union(
    TEXTS, CONVERSATIONS, PROMPTS, MORE, RESPONSES, THOUGHTS, CALLS, TOKEN_LISTS, OF_LLM, _BENCH, _SPANS, _FAILURES,
    (path.partition(".")[0] for path in FINISH),
    (path.partition(".")[0] for count in USAGE for path in (count.tokens, *count.thoughts)),
    (name for envelope in ENVELOPES for names in envelope.marks for name in names),
    (path.partition(".")[0] for e in ENVELOPES for path in (*e.request, *e.response, *e.flags) if path != "."),
    ("contents", "systemInstruction", "system_instruction", "attributes", "modelVersion", "status", "done", "censored"),
    ("response_status", "resource", "events", "event", "n", "best_of", "object"),
    ("choices", "content", "stop_sequence", "role", "type", "name"),
    ("id", "request_id", "conversation_id", "conversation_hash", "conv_id", "session_id", "rid", "spanId", "span_id"),
    ("language", "dataset", "redacted", "sessionId"),
    (f"{place}{name}" for place in ("", "attributes.") for name in ATTRIBUTES),
)  # fmt: skip
_FOLDED: dict[str, str] = {name.lower(): name for name in sorted(NAMES, reverse=True)}


@lru_cache(maxsize=4096)
def canonical(name: str) -> str:
    """A name as the tables have it: `Output Tokens` is `output_tokens`. Other names are returned as they are."""
    if name in NAMES:
        return name
    folded = name.strip().lower().replace(" ", "_").replace("-", "_")
    return _FOLDED.get(folded, name)


def named(record: Record) -> Record:
    """A record under the names of the tables, whatever their case. Fields that have one of them already go first."""
    if all(name in NAMES or canonical(name) == name for name in record if isinstance(name, str)):
        return record
    found = {canonical(name): value for name, value in record.items() if isinstance(name, str)}
    return {**found, **{name: value for name, value in record.items() if name in NAMES}}


def unpacked(record: Record) -> Iterator[Record]:
    """The records inside of a record: the spans of an OTLP export, the requests of `vllm bench serve`; or itself."""
    for name in _SPANS:
        inner = parsed(record.get(name))
        if isinstance(inner, list):
            for one in inner:
                if isinstance(one, Mapping):
                    yield from unpacked(one)
            return
    columns = {name: parsed(record.get(name)) for name in ("output_lens", "input_lens", "generated_texts", "errors")}
    columns["prompts"] = parsed(record.get("prompts", record.get("input_texts")))
    lengths = columns["output_lens"]
    if not isinstance(lengths, list):
        yield record
        return
    for row in range(len(lengths)):
        here = {name: values[row] for name, values in columns.items() if isinstance(values, list) and row < len(values)}
        yield {
            "model": record.get("model_id"), "prompt": here.get("prompts"), "output_len": here["output_lens"],
            "input_len": here.get("input_lens"), "response": here.get("generated_texts"), "error": here.get("errors"),
            **{name: record[name] for name in ("ignore_eos", "max_tokens", "temperature") if name in record},
        }  # fmt: skip


def logged(record: Record) -> Logged | None:
    """What a record of a log says. Some ten microseconds.

    Args:
        record: a JSON object of any family of `ENVELOPES`, a span with `gen_ai.*` attributes, or flat: a request with
            its answer, its usage or both at the top. The body of a request alone is read, too: it has no answers.
            Values may be JSON text, names may be written in any case.

    Returns:
        None if nothing here is known.
    """
    record = named(record)
    attributes = attributes_of(record)
    if attributes is not None:
        span = read_span(attributes)
        if span is None:
            return None
        if not span.is_call:
            return Logged("opentelemetry", {}, is_call=False)
        return _put_together("opentelemetry", span.record, span.request, span.response)
    for envelope in ENVELOPES:
        if any(names <= record.keys() and any(record[name] is not None for name in names) for names in envelope.marks):
            return _enveloped(record, envelope)
    return _flat(record)


def python_repr(record: Record) -> bool:
    """Whether a cell that should be JSON is written in Python's notation, as pandas writes lists into CSV files."""
    places = (*CONVERSATIONS, "request", "response", "usage", "choices", "request_body", "response_body", "prompt")
    return any(
        isinstance(value := record.get(name), str)
        and value.lstrip()[:2] in ("[{", "{'", '{"')
        and "'" in value[:3]
        and isinstance(parsed(value), str)
        for name in places
    )


def _enveloped(record: Record, envelope: Envelope) -> Logged:
    request: Record = {}
    for path in envelope.request:
        said = at(record, path) if path != "." else _flat_request(record)
        request = _as_body(said)
        if request:
            break
    response = next((said for path in envelope.response if (said := at(record, path)) not in (None, "", {}, [])), None)
    if envelope.flags and request:
        given: dict[str, Any] = {}
        for name in envelope.flags:
            if isinstance(said := parsed(record.get(name)), Mapping):
                given.update(said)
        request = {**given, **request}
    return _put_together(envelope.family, record, request, response)


def _flat(record: Record) -> Logged | None:
    """A record that is request and response at once, a conversation, or a request alone."""
    conversation = next((said for name in CONVERSATIONS if isinstance(said := parsed(record.get(name)), list)), None)
    request = _flat_request(record)
    family = next((family for name, family in _FAMILIES_OF_FIELDS.items() if name in record), "flat")
    response: Any = {
        name: value
        for name, value in record.items()
        if name not in (*CONVERSATIONS, *MORE, "content", "text", "prompt")
        and not (name in THOUGHTS and isinstance(parsed(value), Mapping))
    }
    if isinstance(said := parsed(record.get("completion")), list) and isinstance(parsed(record.get("prompt")), list):
        family, response = "trl", {**response, "completion": said}
    found = _put_together(family, record, request, response)
    if not found.answers and conversation and isinstance(conversation[-1], Mapping):
        last = conversation[-1]
        if role_of(last) in ASSISTANT:
            answer = _completed(message_answer(last), record)
            family = "conversation" if found.usage.tokens is None else found.family
            found = found._replace(family=family, answers=(answer,), finish=answer.finish or found.finish)
    if not request and not found.answers and found.usage == Usage():
        return None if not _is_trace(record) else Logged("trace", {}, lacking=NO_PROMPT["trace"])
    return found


def _completed(answer: LoggedAnswer, record: Record) -> LoggedAnswer:
    usage = answer.usage if answer.usage.tokens is not None else usage_of(record)
    return answer._replace(finish=answer.finish or finish_of(record), usage=usage)


def _flat_request(record: Record) -> Record:
    """The body of a request whose fields stand beside those of its response."""
    flags = {name: record[name] for name in record if name in TOP_NAMES and name not in TEXTS}
    flags |= {name: record[name] for name in ("n", "best_of") if name in record}
    if isinstance(record.get("text"), Mapping):
        flags["text"] = record["text"]  # the format of an answer of the Responses API
    for name in CONVERSATIONS:
        if isinstance(said := parsed(record.get(name)), list):
            return {**flags, "messages": said} if said else {}
    if isinstance(contents := parsed(record.get("contents")), list):
        return _google({**flags, **{n: record[n] for n in ("systemInstruction", "system_instruction") if n in record},
                        "contents": contents})  # fmt: skip
    prompt = record.get("prompt")
    if isinstance(listed := parsed(prompt), list) and any(isinstance(one, Mapping) for one in listed):
        return {**flags, "messages": listed}  # TRL's conversational prompt
    if isinstance(parsed(record.get("input")), list):
        return {**flags, "input": parsed(record["input"])}
    if prompt is not None:
        return {**flags, "prompt": prompt}
    column = next((name for name in PROMPTS if isinstance(record.get(name), str)), None)
    if column is not None:
        parts = [record[column]]
        if column != "input":
            parts += [said for more in MORE if isinstance(said := record.get(more), str) and said]
        return {**flags, "prompt": "\n\n".join(part for part in parts if part)}
    for name in ("text", "inputs"):
        if isinstance(record.get(name), str):
            return {**flags, name: record[name]}
    return {}


def _as_body(said: Any) -> Record:
    """What stands for a request as the body of one; empty if it holds no text."""
    if isinstance(said, str) and said:
        return {"prompt": said}
    if isinstance(said, list) and said:
        return {"messages": said}
    if not isinstance(said, Mapping):
        return {}
    if isinstance(parsed(said.get("contents")), list):
        return _google(said)
    return said if any(said.get(name) not in (None, "", [], {}) for name in (*TEXTS, "input_ids")) else {}


def _google(body: Record) -> Record:
    """The body of generateContent with its contents as messages."""
    messages = []
    system = parsed(body.get("systemInstruction", body.get("system_instruction")))
    if system:
        messages.append({"role": "system", "content": _google_parts(system)})
    for content in parsed(body["contents"]):
        if isinstance(content, str):
            messages.append({"role": "user", "content": content})
        elif isinstance(content, Mapping):
            parts = parsed(content.get("parts"))
            is_result = isinstance(parts, list) and any(
                isinstance(part, Mapping) and ("functionResponse" in part or "function_response" in part)
                for part in parts
            )
            role = "tool" if is_result else content.get("role") or "user"
            messages.append({"role": role, "content": _google_parts(content)})
    rest = {n: v for n, v in body.items() if n not in ("contents", "systemInstruction", "system_instruction")}
    return {**rest, "messages": messages}


def _google_parts(content: Any) -> Any:
    parts = parsed(content.get("parts")) if isinstance(content, Mapping) else content
    if isinstance(parts, Mapping):
        parts = [parts]
    return [part for part in parts if not _is_thought(part)] if isinstance(parts, list) else parts


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and bool(true_or_false(part.get("thought")))


def _put_together(family: str, record: Record, request: Record, response: Any) -> Logged:
    """A call of a family from its request and its response."""
    response = unstreamed(response)
    answers = answers_of(response)
    usage = usage_of(response) if isinstance(response, Mapping) else Usage()
    if usage == Usage() and len(answers) == 1:
        usage = answers[0].usage
    if usage == Usage():
        usage = usage_of(record)
    finish = answers[0].finish if len(answers) == 1 else None
    if finish is None and len(answers) < 2:
        finish = (finish_of(response) if isinstance(response, Mapping) else None) or finish_of(record)
    failed = not (answers and any(one.text or one.thoughts or one.calls for one in answers)) and not usage.tokens
    failed = failed and _has_failed(record, response)
    lacking = lost([request[name] for name in _SAID if name in request])
    if family == "sglang":
        lacking = lacking or lost_by_sglang(request)
    if lacking:
        request = {}
    elif request:
        request = _with_facts(request, record, response)
    else:
        lacking = NO_PROMPT.get(family, "")
    if family == "flat" and _is_bench(record):
        family, lacking = "vllm bench", lacking or ("" if request else NO_PROMPT["vllm bench"])
    elif not request and not lacking and _is_trace(record) and not answers:
        family, lacking = ("trace", NO_PROMPT["trace"]) if family == "flat" else (family, lacking)
    if family == "request and response" and isinstance(response, Mapping):
        family = _family_of(request, response)
    is_call = family in ("flat", "trl", "trace") or bool(request or answers or lacking) or usage != Usage() or failed
    if family == "langfuse" and str(record.get("type") or "GENERATION").upper() in _OBSERVATIONS:
        is_call = False
    return Logged(family, request, answers, usage, finish, failed, lacking, is_call)


def _family_of(request: Record, response: Record) -> str:
    if "candidates" in response:
        return "gemini"
    if "output" in response:
        return "openai responses"
    if "stop_reason" in response or response.get("type") == "message":
        return "anthropic"
    if "done_reason" in response or "eval_count" in response:
        return "ollama"
    return "openai completions" if "prompt" in request and "messages" not in request else "openai chat"


def _with_facts(request: Record, record: Record, response: Any) -> Record:
    """A request with what only its response or the record says of the LLM, and the cap that a server adds."""
    said = read_flags(request)
    more: dict[str, Any] = {}
    for place in (response, record):
        if isinstance(place, Mapping):
            facts = read_flags({name: value for name, value in place.items() if name in _FACT_NAMES})
            more = {**{name: facts[name] for name in OF_LLM if name in facts and name not in said}, **more}
    if isinstance(response, Mapping):
        version = response.get("modelVersion")
        if isinstance(version, str) and version and "target_llm" not in said:
            more.setdefault("target_llm", version)
        if response.get("object") == "text_completion" and "max_tokens" not in said:
            tokens = usage_of(response).tokens
            if tokens is not None and tokens <= COMPLETION_TOKENS:
                more["max_tokens"] = COMPLETION_TOKENS
    return {**request, **more} if more else request


_SAID = (*TEXTS, "system", "instructions", "history")  # of a body: what is read as text
_FACT_NAMES = frozenset(name.partition(".")[0] for flag in OF_LLM for field in FIELDS[flag] for name in field.names)


def _has_failed(record: Record, response: Any) -> bool:
    for place in (record, response, parsed(record.get("response")), parsed(record.get("result"))):
        if not isinstance(place, Mapping):
            continue
        if any(parsed(place.get(name)) not in (None, "", {}, [], False) for name in _FAILURES):
            return True
        status = number(place.get("status_code", place.get("response_status")))
        if status is not None and status >= 400:
            return True
        if place.get("status") in ("failure", "failed", "error") or place.get("type") in (
            "errored", "expired", "canceled", "error",
        ):  # fmt: skip
            return True
    return False


def _is_trace(record: Record) -> bool:
    names = {name.lower().replace("_", "").replace(" ", "") for name in record if isinstance(name, str)}
    return not names.isdisjoint(_TRACE)


def _is_bench(record: Record) -> bool:
    return "output_len" in record and "input_len" in record
