"""One step of a batch: a scheduler's plan, and the arrays that a worker makes of it."""
