"""A vLLM scheduler that writes down what reaches it with each request; the file is named by `MOPE_TEST_RECORD`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class RecordingScheduler(Scheduler):  # type: ignore[misc, unused-ignore]
    """vLLM's own, with a diary."""

    def add_request(self, request: Any) -> None:
        line = {
            "extra": (request.sampling_params and request.sampling_params.extra_args) or {},
            "priority": request.priority,
            "max_tokens": request.max_tokens,
            "prompt_tokens": request.num_prompt_tokens,
        }
        with Path(os.environ["MOPE_TEST_RECORD"]).open("a", encoding="utf-8") as diary:
            diary.write(json.dumps(line) + "\n")
        super().add_request(request)
