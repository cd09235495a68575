"""What crosses a process border: configuration, plan, a request's choices, metrics."""
