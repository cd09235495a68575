"""Columns of the tables that the kernels of a prefill step read; every one is int32.

This is the only place that orders them: numpy reads and writes a column by its name, and
csrc_triton/columns.py numbers the same names for the kernels.
"""

import numpy as np

# The keys that a tile reads of one source, cache or chunk: three runs of entries in the lists of
# keys, which follow each other in this order. Each run is its first entry and its length.
RUNS = np.dtype(
    [
        # initial tokens before the windows of the tile's queries
        ("first_initial", np.int32),
        ("num_initial", np.int32),
        # far separators: separators before these windows
        ("first_far", np.int32),
        ("num_far", np.int32),
        # all positions from the first query's window on
        ("first_near", np.int32),
        ("num_near", np.int32),
        # keys from the first one on that every query of the tile sees: no mask is needed
        ("num_sure", np.int32),
    ]
)

# A tile: consecutive query tokens of one request, and the keys that they read.
TILE = np.dtype(
    [
        ("query_start", np.int32),  # row of the first token in the activations
        ("num_tokens", np.int32),  # 0: padding of a persistent buffer, skipped
        ("position", np.int32),  # of the first token
        ("chunk_query_start", np.int32),  # row of the first token of its request's chunk
        ("chunk_offset", np.int32),  # tokens of the chunk before it
        ("cached", RUNS),
        ("chunk", RUNS),
    ]
)

# A request with a chunk in the step, and its list of keys: what any of its tiles reads. The parts
# of a list follow each other: initial tokens, far separators, window (these lie in the cache), far
# separators of the chunk, the chunk itself.
REQUEST = np.dtype(
    [
        ("initial_tokens", np.int32),
        ("window", np.int32),
        ("table_row", np.int32),  # of the block table
        ("query_start", np.int32),  # row of the chunk's first token in the activations
        ("chunk_start", np.int32),  # position of the chunk's first token
        ("chunk_end", np.int32),
        ("window_start", np.int32),  # first position in the window of the chunk's first token
        ("num_spilled", np.int32),  # separators that left the window before the step
        ("separators_start", np.int32),  # offset in the table of separators
        ("num_separators", np.int32),  # listed there
        ("until_start", np.int32),  # offset of position 0 in the table of until
        # ranks of the far separators: up to rank_split in the cache, from there on in the chunk
        ("rank_start", np.int32),
        ("rank_split", np.int32),
        ("rank_end", np.int32),
        ("keys_start", np.int32),  # offset in the lists of all requests
        ("num_keys", np.int32),  # length of the list, 0 if the chunk is empty
        # entries of the list at which its parts begin; the first begins at 0
        ("far_from", np.int32),
        ("window_from", np.int32),
        ("chunk_far_from", np.int32),
        ("chunk_from", np.int32),
    ]
)


def numbers(table: np.dtype[np.void]) -> dict[str, int]:
    """Name -> int32 words of a row before the column, and ``num_columns``: words of a row."""
    assert table.fields is not None, f"{table} has no columns"
    word = np.dtype(np.int32).itemsize
    found = {name: offset // word for name, (_, offset, *_) in table.fields.items()}
    return found | {"num_columns": table.itemsize // word}
