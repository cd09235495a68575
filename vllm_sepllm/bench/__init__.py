"""Benchmarks and models of cost: ``python -m vllm_sepllm.bench.<name>``."""
