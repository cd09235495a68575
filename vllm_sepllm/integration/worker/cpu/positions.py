"""Positions that the model gets for the tokens of a step, where they are renumbered."""

from typing import Any

import numpy as np
import torch

from vllm_sepllm.integration.worker.current_step import CurrentStep


def shift_positions(runner: Any, step: CurrentStep) -> None:
    """Subtract each row's shift from the positions on their way to the model.

    GPUModelRunner._model_forward is the one place where Model Runner V1 calls the model in a step
    of requests, behind everything that goes by positions in the text and outside of what
    torch.compile traces. The buffer is vLLM's own, which it fills anew in each step. To be dropped
    when a model runner takes positions from a hook.
    """
    model_forward = runner._model_forward

    def model_forward_with_shift(
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        batch = runner.input_batch
        shift = step.shift_of(batch.req_ids[: batch.num_reqs])
        if shift.any():
            assert positions is not None, "M-RoPE is refused"
            num_new = np.diff(runner.query_start_loc.np[: batch.num_reqs + 1])
            of_tokens = torch.from_numpy(np.repeat(shift, num_new))
            positions[: len(of_tokens)] -= of_tokens
        return model_forward(input_ids, positions, *args, **kwargs)

    runner._model_forward = model_forward_with_shift
