"""What serving engines write about requests.

The lines are those of vLLM 0.10 to 0.33 and SGLang 0.5, contents made up.
"""

from __future__ import annotations

from typing import Any

from log_forms import (
    NUM,
    Form,
    Record,
    ask,
    assistant,
    chat_request,
    chat_response,
    every_third,
    recorded,
    say,
    think,
    usage,
)

from mope.training.data import problems as reasons

PREFIX = "(APIServer pid=1234) INFO 12-02 09:00:00 [request_logger.py:65] "
PARAMS = "SamplingParams(n=1, temperature=0.5, seed=None, stop=[], max_tokens=900, min_tokens=0)"


def bench(prompts: bool) -> Record:
    lists = {"input_lens": [9] * NUM, "output_lens": [100 + i for i in range(NUM)], "ttfts": [0.1] * NUM,
             "itls": [[0.01]] * NUM, "generated_texts": [say(i) for i in range(NUM)], "errors": [""] * NUM}  # fmt: skip
    more = {"prompts": [ask(i) for i in range(NUM)]} if prompts else {}
    about = {"date": "20260101", "backend": "vllm", "model_id": "m", "num_prompts": NUM, "mean_ttft_ms": 9.0}
    return {**about, **lists, **more}


def sglang(i: int, **asked: Any) -> Record:
    reason = {"type": "length", "length": 100} if every_third(i) else {"type": "stop", "matched": 2}
    meta = {"id": f"r{i}", "finish_reason": reason, "prompt_tokens": 9, "completion_tokens": 100 + i,
            "reasoning_tokens": 60, "cached_tokens": 0, "weight_version": "default", "num_retractions": 0,
            "e2e_latency": 1.5}  # fmt: skip
    request = {"rid": f"r{i}", "text": ask(i), "input_ids": None, "stream": False, "lora_path": None,
               "sampling_params": {"max_new_tokens": 900, "temperature": 0.5}, **asked}  # fmt: skip
    out = {"text": say(i), "output_ids": [7] * 4, "meta_info": meta}
    return {"timestamp": "2026-12-02T09:00:00", "event": "request.finished", "rid": f"r{i}", "obj": request, "out": out}


def lines(*texts: str, prefix: str = PREFIX) -> list[Record]:
    """Lines of a text log, as `write` takes them."""
    return [{"line": prefix + text} for text in texts]


ENGINES: dict[str, Form] = {
    "vllm bench with prompts": Form(
        lambda i: bench(True) if i == 0 else [], recorded(), suffix=".object.json", request={"target_llm": "m"}
    ),
    "vllm bench": Form(
        lambda i: bench(False) if i == 0 else [], suffix=".object.json",
        refused="8 x record without its prompt .results of vllm bench",
    ),
    "vllm custom data set": Form(
        lambda i: {"id": f"v{i}", "prompt": ask(i), "output_tokens": 100 + i}, recorded(), read_as="lengths"
    ),
    "vllm with reasoning": Form(
        lambda i: {"request": chat_request(i), "response": {
            **chat_response(i, message=assistant(i, reasoning_content=think(i))),
            "usage": usage(i, completion_tokens_details={"reasoning_tokens": 60})}},
        recorded(60, every_third), request={"target_llm": "gpt-4o", "max_tokens": 900, "temperature": 0.5},
    ),
    "vllm log of requests": Form(
        lambda i: lines(f"Received request chatcmpl-{i}: params: {PARAMS}, lora_request: None.",
                        f"Added request chatcmpl-{i}."),
        suffix=".log", refused="log.log: this is vLLM's server log.*neither prompts nor the lengths.*LiteLLM",
    ),
    "vllm log of requests, compressed": Form(
        lambda i: lines(f"Received request cmpl-{i}-0: params: {PARAMS}, lora_request: None."),
        suffix=".log.gz", refused="this is vLLM's server log.*neither prompts nor the lengths",
    ),
    "vllm log of requests, renamed": Form(
        lambda i: lines(f"Received request cmpl-{i}-0: params: {PARAMS}, lora_request: None."),
        suffix=".lines.jsonl", refused="this is vLLM's server log.*neither prompts nor the lengths",
    ),
    "vllm log of requests, 0.10": Form(
        lambda i: lines(f"Received request cmpl-{i}-0: prompt: {ask(i)!r}, params: {PARAMS}, prompt_token_ids: [1, 2], "
                        "prompt_embeds shape: None, lora_request: None."),
        suffix=".log", refused="hold prompts, but no length of any answer",
    ),
    "vllm log of requests, debug": Form(
        lambda i: lines(f"Request chatcmpl-{i} details: prompt: {ask(i)!r}, prompt_token_ids: [1], "
                        "prompt_embeds shape: None.",
                        f"Received request chatcmpl-{i}: params: {PARAMS}, lora_request: None."),
        suffix=".log", refused="hold prompts, but no length of any answer",
    ),
    "vllm log of requests and outputs": Form(
        lambda i: lines(f"Received request chatcmpl-{i}: params: {PARAMS}, lora_request: None.",
                        f"Generated response chatcmpl-{i}: output: {say(i)!r}, finish_reason: stop"),
        suffix=".log", refused="'Generated response' leave out thoughts",
    ),
    "vllm log in a container's JSON": Form(
        lambda i: [{"log": f"{one['line']}\n", "stream": "stderr", "time": f"2026-12-02T09:00:{i:02d}Z"}
                   for one in lines(f"Received request cmpl-{i}-0: params: {PARAMS}, lora_request: None.")],
        refused="log.jsonl: this is vLLM's server log.*neither prompts nor the lengths",
    ),
    "sglang": Form(
        lambda i: [{"event": "request.received", "rid": f"r{i}", "obj": sglang(i)["obj"]}, sglang(i)],
        recorded(60, every_third), counts={reasons.NO_RESPONSE: NUM}, request={"max_tokens": 900, "temperature": 0.5},
    ),
    "sglang log as text": Form(
        lambda i: lines(f"Receive: obj=GenerateReqInput(rid='r{i}', text={ask(i)!r})",
                        f"Finish: obj=GenerateReqInput(rid='r{i}', text={ask(i)!r}), out={{'text': {say(i)!r}}}",
                        prefix="[2026-12-02 09:00:00] "),
        suffix=".log", refused="SGLang's request log as text.*--log-requests-format json",
    ),
}  # fmt: skip
