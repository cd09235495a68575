"""What a request may choose for itself: read and refused, in API server and scheduler alike.

The choice rides in vLLM's ``SamplingParams.extra_args`` (``vllm_xargs`` in the OpenAI API), so
nothing carries it but vLLM. The process that takes requests in refuses nonsense with HTTP 400, the
scheduler ends with an error what got past that, and gives the policy of everything else.
"""

import functools
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError
from vllm.utils.math_utils import cdiv
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, MIN_WINDOW
from vllm_sepllm.integration.wire.spec import max_proposed
from vllm_sepllm.integration.wire.trained_config import is_trained
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.choice import RequestLimits, chosen_keys, request_policy
from vllm_sepllm.policy.step import staging
from vllm_sepllm.policy.visibility import Policy

_SALT = "sepllm_window="


class RequestRefused(VLLMClientError, ValueError):
    """HTTP 400 in vLLM's server, a ValueError offline."""


def request_limits(vllm_config: VllmConfig) -> RequestLimits:
    """What requests may choose, from the configuration that the selection completed."""
    resolved = _resolved(vllm_config)
    assert resolved is not None, "sepllm is selected"
    staged = staging.num_entries(max_proposed(vllm_config))
    return RequestLimits(
        Policy(resolved["initial_tokens"], resolved["window"], resolved["max_separators"]),
        max_model_len=vllm_config.model_config.max_model_len,
        min_window=max(MIN_WINDOW, staged),
        is_trained=is_trained(vllm_config.model_config),
    )


def policy_of(limits: RequestLimits, request: Request) -> Policy:
    """The policy of a request that reached the scheduler.

    Raises:
        ValueError: if the request asks for what the engine does not serve.
    """
    assert request.sampling_params is not None, "sepllm serves no pooling models"
    given = request.sampling_params.extra_args
    return request_policy(limits, given, is_session=request.resumable)


def salted(limits: RequestLimits, policy: Policy, cache_salt: str | None) -> str | None:
    """The ``cache_salt`` under which vLLM hashes the blocks of a request.

    Layers of other kinds are found by vLLM's hashes alone, and their KV depends on what the SepLLM
    layers before them read. No two pairs of window and salt give the same string.
    """
    is_taken = cache_salt is not None and cache_salt.startswith(_SALT)
    if policy == limits.engine and not is_taken:
        return cache_salt
    return f"{_SALT}{policy.window}:{cache_salt or ''}"


def install() -> None:
    """Check requests where vLLM takes them in; once per process.

    ``Platform.validate_request`` is meant for such checks, but sees neither the configuration nor
    the resolved max_tokens, and belongs to the platform.
    """
    original = InputProcessor.process_inputs
    if getattr(original, "is_sepllm", False):
        return

    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = original(self, *args, **kwargs)
        if request.sampling_params is not None and _resolved(self.vllm_config) is not None:
            _check(self.vllm_config, request)
        return request

    setattr(process_inputs, "is_sepllm", True)  # noqa: B010  # a function has no such field
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]


def _resolved(vllm_config: VllmConfig) -> Mapping[str, Any] | None:
    """Our configuration as the selection completed it; None: another backend is selected."""
    given = vllm_config.additional_config
    return given.get(ADDITIONAL_CONFIG_KEY) if isinstance(given, dict) else None


def _check(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse what cannot be served.

    Raises:
        RequestRefused: one sentence.
    """
    params = request.sampling_params
    assert params is not None, "the caller looked"
    if not chosen_keys(params.extra_args):
        return
    limits = request_limits(vllm_config)
    try:
        policy = request_policy(limits, params.extra_args, is_session=request.resumable)
        num_blocks = vllm_config.cache_config.num_gpu_blocks
        if policy != limits.engine and num_blocks and _are_layers_alike(vllm_config):
            assert request.prompt_token_ids is not None, "prompt embeddings are refused"
            longest = len(request.prompt_token_ids) + (params.max_tokens or 0)
            longest = min(longest, limits.max_model_len)
            entries = layout.max_compact_length(policy, longest)
            entries += staging.num_entries(max_proposed(vllm_config))
            # of several engines behind one server vLLM tells the sum, so this is the most it can be
            check_fits(cdiv(entries, vllm_config.cache_config.block_size), num_blocks - 1, longest)
    except ValueError as error:
        raise RequestRefused(str(error)) from None


def check_fits(num_needed: int, num_blocks: int, num_tokens: int) -> None:
    """Refuse a request that the KV cache could not hold even alone: it would wait for ever.

    Raises:
        ValueError: one sentence.
    """
    if num_needed > num_blocks:
        raise ValueError(
            f"a request of {num_tokens} tokens, max_tokens included, needs up to {num_needed} KV "
            f"blocks with the window that it asks for and the engine has {num_blocks}; ask for a "
            "smaller sepllm_window or max_tokens, or give the engine more KV cache memory"
        )


def _are_layers_alike(vllm_config: VllmConfig) -> bool:
    """Whether all layers are SepLLM layers, which makes a block of the pool one of theirs.

    Where they are not, only the scheduler knows how many blocks a request needs.
    """
    resolved = _resolved(vllm_config)
    if resolved is None or resolved["full_layers"]:
        return False
    kinds = vllm_config.model_config.hf_text_config.to_dict().get("layer_types")
    has_others = bool(kinds) and set(kinds) != {"full_attention"}
    return not has_others and vllm_config.speculative_config is None
