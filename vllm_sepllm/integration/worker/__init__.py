"""The workers: SepLLM layers, and builders that turn the plan into slots and metadata."""
