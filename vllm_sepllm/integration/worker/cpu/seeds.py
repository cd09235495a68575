"""Random generators of seeded requests whose prompt is cut into chunks."""

from typing import Any

import numpy as np


def keep_seeds_of_chunks(runner: Any) -> None:
    """Let a chunk that is not a prompt's last draw nothing from its request's generator.

    vLLM 0.32 and 0.33: GPUModelRunner.sample_tokens samples for every row, throws away what such a
    chunk got, and rewinds its generator with ``set_offset``, which CPU generators do not have: the
    engine dies. Without its generator the row draws from the global one. To be dropped when vLLM
    samples for no such row, or rewinds by ``set_state``.
    """
    sample_tokens = runner.sample_tokens

    def sample_tokens_without_chunks(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        chunks = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        generators = batch.generators
        held = {row: generators.pop(row) for row in chunks if row in generators}
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            generators.update(held)

    runner.sample_tokens = sample_tokens_without_chunks
