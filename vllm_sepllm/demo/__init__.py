"""The demonstration: a small model, a few long documents, stock vLLM beside sepllm."""
