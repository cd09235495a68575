"""The quality suite: sepllm against other methods at equal mean KV, in real vLLM."""
