"""What mkdocs does with a page before it renders it: links to other files of the repository lead to the repository."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\[\]]*)\]\(\.\./([^)]*)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Markdown of a page; links that leave `docs/` become absolute, or text where no address is known."""
    address = config.repo_url
    return OUTSIDE.sub(rf"[\1]({address}/blob/main/\2)" if address else r"\1", markdown)
