"""Plugins that bring predicted lengths and fair scheduling into serving engines."""
