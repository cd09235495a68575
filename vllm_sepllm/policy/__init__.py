"""Which tokens a query may read and where their KV lives. Standard library and numpy only."""
