"""Parts of an engine without the engine, for benchmarks alone."""
