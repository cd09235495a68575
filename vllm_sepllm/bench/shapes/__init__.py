"""Stock vLLM and sepllm at the sizes of real models, with dummy weights and a time budget."""
