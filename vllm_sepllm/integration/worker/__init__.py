"""In the workers: SepLLM layers, and the plan turned into slots and kernels' metadata."""
