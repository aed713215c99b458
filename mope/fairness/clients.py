"""Names at the border: whatever says who sent a request becomes a path of short strings.

Knows nothing of requests or money. A path names the client from the outermost group inwards, such as
`("acme", "alice")`: its tenant, and the user within it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from mope.errors import ConfigError

Path = tuple[str, ...]

ANONYMOUS: Path = ("(anonymous)",)  # all who send no name: one client together, so that hiding gains nothing
MAX_NAME = 256  # characters; longer names are replaced by a digest
MAX_DEPTH = 4


def client_path(client: str | Sequence[str] | None) -> Path:
    """The path of a client.

    Args:
        client: a name, with `/` between a group and those in it; a sequence of names; or None or an empty one, which
            is `ANONYMOUS`. A name of more than `MAX_NAME` characters is replaced by its beginning and SHA-256.

    Raises:
        ConfigError: not a name, or deeper than `MAX_DEPTH`.
    """
    if isinstance(client, str) and len(client) <= MAX_NAME:
        return _named(client)
    parts: Sequence[str] = client.split("/", MAX_DEPTH - 1) if isinstance(client, str) else client or ()
    usable = isinstance(parts, Sequence) and len(parts) <= MAX_DEPTH
    if not usable or not all(isinstance(part, str) for part in parts):
        raise ConfigError(
            f"a client is {str(client)[:80]!r}; expected a name, or up to {MAX_DEPTH} names from the group inwards"
        )
    named = tuple(part if len(part) <= MAX_NAME else _shortened(part) for part in parts if part)
    return named or ANONYMOUS


@lru_cache(maxsize=8192)  # who asks once asks again
def _named(client: str) -> Path:
    return tuple(part for part in client.split("/", MAX_DEPTH - 1) if part) or ANONYMOUS


def _shortened(name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name[: MAX_NAME - 65]}~{digest}"
