"""SepLLM on CUDA and ROCm, Model Runner V1 and V2: vLLM's own backend, wrapped."""
