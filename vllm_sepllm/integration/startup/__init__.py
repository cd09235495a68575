"""Selecting sepllm, refusing what it does not serve, and diagnosis, before any engine runs."""
