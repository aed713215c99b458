"""From conversations and logs to rows: read, normalise, count tokens, split without leaks."""
