"""The engine core: which blocks a request holds, and the plan of each step."""
