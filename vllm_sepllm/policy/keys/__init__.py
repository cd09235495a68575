"""The keys that a tile of queries reads, for each kind of prefill attention."""
