"""A long mixed load against a server: ``python -m vllm_sepllm.bench.soak``."""
