"""Requests that cannot be served, refused with HTTP 400."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError
from vllm.utils.math_utils import cdiv
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_sepllm.config import ResolvedConfig
from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.integration.wire.choices import (
    check_fits,
    check_prompt_logprobs,
    policy_of,
    request_limits,
)
from vllm_sepllm.integration.wire.config import is_selected, read_config
from vllm_sepllm.integration.wire.spec import num_staging
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.choice import chosen_keys
from vllm_sepllm.policy.visibility import Policy


class RequestRefused(VLLMClientError, ValueError):
    """HTTP 400 in vLLM's server, a ValueError offline."""


def install() -> None:
    """Check requests where vLLM takes them in; once per process.

    ``Platform.validate_request`` is meant for such checks, but sees neither the configuration nor
    the resolved max_tokens, and belongs to the platform.
    """
    wrap_once(InputProcessor, "process_inputs", _process_inputs)


class RequestCheck:
    """Holds requests against what their engine can serve."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = read_config(vllm_config)
        self._limits = request_limits(vllm_config, config)
        self._cache_config = vllm_config.cache_config
        self._num_staging = num_staging(vllm_config)
        self._are_layers_alike = _are_layers_alike(vllm_config, config)

    def check(self, request: EngineCoreRequest) -> None:
        """Refuse what cannot be served.

        Raises:
            RequestRefused: one sentence.
        """
        try:
            policy = policy_of(self._limits, request)
            if policy != self._limits.engine:
                self._check_size(request, policy)
        except ValueError as error:
            raise RequestRefused(str(error)) from None

    def _check_size(self, request: EngineCoreRequest, policy: Policy) -> None:
        num_blocks = self._cache_config.num_gpu_blocks
        if not (num_blocks and self._are_layers_alike):
            return  # only the scheduler knows how many blocks the request needs
        assert request.prompt_token_ids is not None, "prompt embeddings are refused"
        assert request.sampling_params is not None, "sepllm serves no pooling models"
        longest = len(request.prompt_token_ids) + (request.sampling_params.max_tokens or 0)
        longest = min(longest, self._limits.max_model_len)
        entries = layout.max_compact_length(policy, longest) + self._num_staging
        # with several engines behind one server it is their sum: an upper bound
        check_fits(cdiv(entries, self._cache_config.block_size), num_blocks - 1, longest)


# made at the first request that chooses: by then vLLM has settled max_model_len
_checks: WeakKeyDictionary[InputProcessor, RequestCheck] = WeakKeyDictionary()


def _process_inputs(
    original: Callable[..., EngineCoreRequest], self: InputProcessor, *args: Any, **kwargs: Any
) -> EngineCoreRequest:
    request = original(self, *args, **kwargs)
    params = request.sampling_params
    if params is None or not is_selected(self.vllm_config):
        return request
    try:
        check_prompt_logprobs(self.vllm_config, params)
    except ValueError as error:
        raise RequestRefused(str(error)) from None
    if chosen_keys(params.extra_args):
        if self not in _checks:
            _checks[self] = RequestCheck(self.vllm_config)
        _checks[self].check(request)
    return request


def _are_layers_alike(vllm_config: VllmConfig, config: ResolvedConfig) -> bool:
    """Whether all layers are SepLLM layers, so that every block of the pool is theirs."""
    if config.full_layers:
        return False
    kinds = vllm_config.model_config.hf_text_config.to_dict().get("layer_types")
    has_others = bool(kinds) and set(kinds) != {"full_attention"}
    return not has_others and vllm_config.speculative_config is None
