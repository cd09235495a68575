"""Whole vLLM with sepllm on this machine, stage by stage, against a float32 oracle."""
