"""In the process that takes requests in: HTTP 400 and metrics."""
