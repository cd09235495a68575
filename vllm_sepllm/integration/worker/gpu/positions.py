"""Positions that Model Runner V2 hands to the model, where they are renumbered."""

from typing import Any

import numpy as np
import torch
import vllm.utils.torch_utils as vllm_torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_sepllm.integration.worker.current_step import CurrentStep


class ModelPositions:
    """Positions in the cache, in a buffer that keeps its address, as a CUDA graph needs it.

    vLLM's own buffer keeps positions in the text: sampling draws by them after the forward.
    """

    def __init__(self, of_text: torch.Tensor) -> None:
        """``of_text`` is vLLM's buffer, [max_num_tokens] int64."""
        self._positions = torch.zeros_like(of_text)
        self._shift = torch.zeros_like(of_text)

    def none(self, num_tokens: int) -> torch.Tensor:
        """Those of a run without requests, whose contexts may go beyond the rotary table."""
        return self._positions[:num_tokens].zero_()

    def of(self, batch: InputBatch, step: CurrentStep) -> torch.Tensor:
        """Those of a batch, [batch.num_tokens_after_padding]; of padding 0."""
        positions = self.none(batch.num_tokens_after_padding)
        if step.is_made_up:
            return positions
        num_tokens = batch.num_tokens
        shift = np.repeat(step.shift_of(batch.req_ids), batch.num_scheduled_tokens)
        # by attribute: vLLM's CPU platform replaces the function
        of_tokens = vllm_torch.async_tensor_h2d(shift, out=self._shift[:num_tokens])
        torch.sub(batch.positions[:num_tokens], of_tokens, out=positions[:num_tokens])
        return positions


def shift_positions(runner: Any, step: CurrentStep) -> None:
    """Hand the model positions less each row's shift.

    ModelState.prepare_inputs is where a model replaces what vLLM hands it (M-RoPE does): asked in
    every run, outside of what torch.compile traces and before a graph is replayed. What
    prepare_dummy_inputs answers is what a graph captures. To be dropped when a model runner takes
    positions from a hook.
    """
    state, made = runner.model_state, ModelPositions(runner.input_buffers.positions)
    prepare_inputs, prepare_dummy_inputs = state.prepare_inputs, state.prepare_dummy_inputs

    def prepare_inputs_shifted(input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        return _replaced(prepare_inputs(input_batch, req_states), made.of(input_batch, step))

    def prepare_dummy_inputs_shifted(num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return _replaced(prepare_dummy_inputs(num_reqs, num_tokens), made.none(num_tokens))

    state.prepare_inputs = prepare_inputs_shifted
    state.prepare_dummy_inputs = prepare_dummy_inputs_shifted


def _replaced(inputs: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
    assert "positions" not in inputs, "models with positions of their own are refused"
    return inputs | {"positions": positions}
