"""Cached prefixes: dense ones up to a + n tokens, checkpoints beyond."""
