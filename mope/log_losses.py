"""Texts that a logger did not keep as they were sent: cut, redacted, or put into a chat template. They are no prompts.

Knows what LiteLLM and SGLang leave in place of a text, and what to set so that they keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CUT_MARK = "... (litellm_truncated skipped "
REDACTED = "redacted-by-litellm"
LITELLM_CUT = "LiteLLM cut its text; raise MAX_STRING_LENGTH_PROMPT_IN_DB where LiteLLM runs"
LITELLM_REDACTED = "LiteLLM redacted its text; set turn_off_message_logging: false in LiteLLM's litellm_settings"
SGLANG_CUT = "SGLang cut its text to 2,048 characters; start it with --log-requests-level 3"
SGLANG_TEMPLATE = "SGLang logs prompts of chats after the chat template, not as sent; log at a gateway or in the client"
_SGLANG_HALF = 1024  # characters of both ends that SGLang keeps of a text that is longer than both
_NO_TEXTS = frozenset({"image_url", "input_audio", "audio", "video_url", "file", "source", "inlineData", "inline_data"})
MAX_DEPTH = 12


def lost(value: Any, depth: int = MAX_DEPTH) -> str:
    """What a logger did to a text, or to a text inside of messages or of a body; empty if all are whole.

    Args:
        value: of JSON, as it was logged.
        depth: how many levels are looked through.
    """
    if isinstance(value, str):
        if "litellm" not in value:
            return ""
        if CUT_MARK in value:
            return LITELLM_CUT
        return LITELLM_REDACTED if value.strip() == REDACTED or f'"{REDACTED}"' in value else ""
    if depth == 0:
        return ""
    if isinstance(value, Mapping):
        inner = [one for name, one in value.items() if name not in _NO_TEXTS]
    else:
        inner = list(value) if isinstance(value, list | tuple) else []
    return next((said for one in inner if (said := lost(one, depth - 1))), "")


def lost_by_sglang(request: Mapping[str, Any]) -> str:
    """What SGLang did to the prompt of a request in its log; empty if it is whole."""
    text = request.get("text")
    if not isinstance(text, str):
        return ""
    if isinstance(request.get("input_ids"), list):
        return SGLANG_TEMPLATE  # it was decoded from the tokens
    is_cut = len(text) == 2 * _SGLANG_HALF + 3 and text[_SGLANG_HALF : _SGLANG_HALF + 3] == "..."
    return SGLANG_CUT if is_cut else ""
