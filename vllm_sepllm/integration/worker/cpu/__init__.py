"""SepLLM on vLLM's CPU platform, Model Runner V1."""
