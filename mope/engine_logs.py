"""Text logs of serving engines: what vLLM and SGLang say about requests in their server logs, and why it is no data.

Knows the lines of `vllm serve --enable-log-requests` (0.10 to 0.33) and of SGLang's `--log-requests` as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_INSTEAD = (
    "log requests together with their responses: by a gateway such as LiteLLM or Helicone, as OpenTelemetry spans with "
    "message content, or in your client as JSON Lines"
)
# lines of vLLM, and what they lack
_VLLM = (
    (
        re.compile(r"Generated response \S+(?: \(streaming \w+\))?(?:: output: | details: output_token_ids: )"),
        "its lines 'Generated response' leave out thoughts, and of streams their tokens and why they ended",
    ),
    (
        re.compile(r"Request \S+ (?:details: prompt: |JSON body: )|Received request \S+: prompt: "),
        "its lines 'Received request' and 'Request' hold prompts, but no length of any answer",
    ),
    (
        re.compile(r"Received request \S+: params: "),
        "its lines 'Received request' hold neither prompts nor the lengths of answers",
    ),
)
_SGLANG = re.compile(r"(?:Receive|Receive OpenAI|Finish): obj=(?:\{|\w+\()")


def refusal(lines: Iterable[str]) -> str:
    """Why an engine's text log holds no requests with their lengths, and what to use instead.

    Args:
        lines: some lines of a file, or texts of its records.

    Returns:
        One sentence without the file's name; empty if no line is an engine's about a request.
    """
    nearest = len(_VLLM)
    for line in lines:
        if _SGLANG.search(line):
            return (
                "this is SGLang's request log as text; start the server with --log-requests --log-requests-level 3 "
                "--log-requests-format json, and give the lines of that log"
            )
        nearest = next((place for place, (known, _) in enumerate(_VLLM[:nearest]) if known.search(line)), nearest)
    return f"this is vLLM's server log: {_VLLM[nearest][1]}; {_INSTEAD}" if nearest < len(_VLLM) else ""
