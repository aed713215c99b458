"""Every made-up form of log, by its name."""

from __future__ import annotations

from engine_forms import ENGINES
from log_forms import FORMS as TOOLS
from log_forms import Form
from lossy_forms import LOSSY
from stream_forms import STREAMS

FORMS: dict[str, Form] = {**TOOLS, **STREAMS, **ENGINES, **LOSSY}
