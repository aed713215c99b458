"""As the package itself: every kernel by name; calling one fails."""

from sgl_kernel import __getattr__  # noqa: F401
