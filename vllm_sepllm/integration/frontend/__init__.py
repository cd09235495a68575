"""The process that takes requests in: HTTP 400 for wrong choices, and metrics."""
