"""Contracts: names inside vLLM that we lean on and that vLLM does not promise to keep.

Most are derived: imports and inheritance from our code (derived.py), attributes and calls of
vLLM's types by mypy. By hand, a file a side, stands what neither sees: members that are wrapped,
attributes that we write, objects without a type. ``check.py`` holds all of it against a vLLM,
installed or unpacked; docs/upgrading-vllm.md says when.
"""
