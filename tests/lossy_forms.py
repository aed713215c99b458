"""Logs whose texts are not what was sent: cut, redacted, left out, or after the chat template."""

from __future__ import annotations

import json

from engine_forms import sglang
from log_forms import (
    CUT,
    FLAGS,
    NUM,
    Form,
    ask,
    assistant,
    chat_request,
    counted,
    every_third,
    litellm,
    recorded,
    say,
    user,
)  # fmt: skip

from mope import log_losses
from mope.training.data import problems as reasons


def cut_by_litellm(text: str) -> str:
    return f"{text[:4]}... (litellm_truncated skipped 90 chars. Truncation is a DB storage safeguard.) ...{text[4:]}"


LOSSY: dict[str, Form] = {
    "litellm with cut texts": Form(
        lambda i: {**litellm(i), "messages": [], "proxy_server_request": {
            **chat_request(i), "messages": [{"role": "user", "content": cut_by_litellm(ask(i)) if i % 2 else ask(i)}]}},
        lambda i: [] if i % 2 else CUT(i), request=FLAGS, counts={reasons.no_prompt(log_losses.LITELLM_CUT): NUM // 2},
    ),
    "litellm with a cut image": Form(
        lambda i: {**litellm(i), "messages": [{"role": "user", "content": [
            {"type": "text", "text": ask(i)}, {"type": "image_url", "image_url": {"url": cut_by_litellm("data:")}}]}],
            "proxy_server_request": {}},
        CUT, request={"target_llm": "gpt-4o"},
    ),
    "litellm with redacted texts": Form(
        lambda i: {**litellm(i), "messages": "{}", "proxy_server_request": json.dumps({
            **chat_request(i), "messages": [{"role": "user", "content": "redacted-by-litellm"}]})},
        refused="8 x record without its prompt .LiteLLM redacted its text",
    ),
    "litellm with cut answers": Form(
        lambda i: {"id": f"l{i}", "messages": [user(i)], "response": {"choices": [
            {"message": {"role": "assistant", "content": cut_by_litellm(say(i)) if i % 2 else say(i)}}]}},
        lambda i: [] if i % 2 else counted()(i), counts={reasons.LOST_ANSWER: NUM // 2},
    ),
    "conversations with cut texts": Form(
        lambda i: {"id": f"l{i}", "messages": [user(i), {**assistant(i), **(
            {"content": cut_by_litellm(say(i))} if i % 2 else {})}]},
        lambda i: [] if i % 2 else counted()(i), read_as="messages",
        counts={reasons.no_prompt(log_losses.LITELLM_CUT): NUM // 2},
    ),
    "sglang log of chats": Form(
        lambda i: [
            {"event": "request.received.openai", "obj": chat_request(i)},
            sglang(i, text=f"<|im_start|>user\n{ask(i)}<|im_end|>\n<|im_start|>assistant\n", input_ids=[1, 2]),
        ],
        refused="8 x record without its prompt .SGLang logs prompts of chats after the chat template",
    ),
    "sglang log with long prompts": Form(
        lambda i: sglang(i, text=f"{ask(i)} " * 60 if i % 2 else f"{'x' * 1024}...{'y' * 1024}"),
        lambda i: recorded(60, every_third)(i) if i % 2 else [],
        counts={reasons.no_prompt(log_losses.SGLANG_CUT): NUM // 2}, prompt=lambda i: f"{ask(i)} " * 60,
    ),
    "sglang log without texts": Form(
        lambda i: sglang(i, text=None), refused="8 x record without its prompt .logged without texts",
    ),
}  # fmt: skip
