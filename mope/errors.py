"""What can go wrong, and whose mistake it is.

    MopeError
    └── UserError                       one clear line on the terminal, exit status 2
        ├── DataError(ValueError)       rows, files or columns that cannot be used
        ├── ConfigError(ValueError)     a recipe, flag or option that cannot be used
        ├── ArtifactError(ValueError)   a saved predictor that is damaged, foreign or of another format
        ├── ExportError(ValueError)     a graph that is not what its network is
        ├── ProfileError(ValueError)    an engine's profile that is damaged, foreign or of another format
        ├── ServerError(ConnectionError)  an LLM server that does not answer, or not as expected
        ├── StoreError(ConnectionError) a shared store that has to be there and is not
        └── MissingExtraError(ImportError)   an optional package that is not installed

Every leaf is also the builtin error that a caller who does not know mope would catch. Anything that is not
a `UserError` is a bug and ends in a traceback.
"""

from __future__ import annotations


class MopeError(Exception):
    """Any error that mope raises on purpose."""


class UserError(MopeError):
    """A mistake that the user can mend; its message says what was got, what was expected and what to type."""


class DataError(UserError, ValueError):
    """Rows, files or columns that cannot be used."""


class ConfigError(UserError, ValueError):
    """A recipe, flag or option that cannot be used."""


class ArtifactError(UserError, ValueError):
    """A saved predictor that is damaged, foreign or of another format."""


class ExportError(UserError, ValueError):
    """An exported graph that is not what its network is; nothing was written."""


class ProfileError(UserError, ValueError):
    """A profile of an engine that is damaged, foreign or of another format."""


class ServerError(UserError, ConnectionError):
    """An LLM server that does not answer, or not as expected.

    Attributes:
        status: the HTTP status that it answered with, if that was the matter.
    """

    status: int | None = None


class StoreError(UserError, ConnectionError):
    """A shared store that has to be there, and that can't be reached or can't be used."""


class MissingExtraError(UserError, ImportError):
    """An optional package that is not installed."""


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked, which pyo3 raises as an error that is no `Exception`."""
    return type(error).__name__ == "PanicException"
