"""Which tokens are separators, and where a request has them."""
