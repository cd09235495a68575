"""What a request may choose for itself, as API server and scheduler both read it.

The choice rides in vLLM's ``SamplingParams.extra_args`` (``vllm_xargs`` in the OpenAI API), so
nothing carries it but vLLM. The API server refuses nonsense with HTTP 400 (frontend/), the
scheduler ends with an error what got past that, and gives the policy of everything else.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from vllm_sepllm.config import MIN_WINDOW, ResolvedConfig
from vllm_sepllm.integration.wire.spec import num_staging
from vllm_sepllm.integration.wire.trained_config import is_trained
from vllm_sepllm.policy import epochs
from vllm_sepllm.policy.choice import RequestLimits, is_unprotected, request_policy
from vllm_sepllm.policy.visibility import Policy

_SALT = "sepllm="


def request_limits(vllm_config: VllmConfig, config: ResolvedConfig) -> RequestLimits:
    """What the requests of an engine may choose."""
    return RequestLimits(
        config.policy,
        config.initial,
        max_model_len=vllm_config.model_config.max_model_len,
        min_window=max(MIN_WINDOW, num_staging(vllm_config)),
        is_trained=is_trained(vllm_config.model_config),
    )


def policy_of(limits: RequestLimits, request: EngineCoreRequest | Request) -> Policy:
    """The policy of a request.

    Raises:
        ValueError: if the request asks for what the engine does not serve.
    """
    given, prompt = _given(request)
    policy = request_policy(limits, given, prompt, is_session=request.resumable)
    if policy != limits.engine:
        assert request.sampling_params is not None, "sepllm serves no pooling models"
        longest = len(prompt) + (request.sampling_params.max_tokens or 0)
        _check_positions(policy, min(longest, limits.max_model_len))
    return policy


def _check_positions(policy: Policy, num_tokens: int) -> None:
    """Refuse a policy that keeps more tokens than there are positions for.

    A request that never renumbers its positions has room whatever it keeps. Sessions, which may go
    on for ever, have the engine's policy.
    """
    most = policy.max_position
    if most is not None and num_tokens > most and not epochs.has_room(policy):
        raise ValueError(
            f"a request of {num_tokens} tokens, max_tokens included, has positions below {most}, "
            f"where its window of {policy.window} and {policy.initial_tokens} initial tokens leave "
            f"no room; ask for a smaller sepllm_window or sepllm_initial_tokens, or for {most} "
            "tokens at most"
        )


def forgets_its_beginning(limits: RequestLimits, request: Request) -> bool:
    """Whether a served request has no prefix to protect, although the engine protects one."""
    return is_unprotected(limits, *_given(request))


def _given(request: EngineCoreRequest | Request) -> tuple[dict[str, Any] | None, list[int]]:
    """``extra_args`` and prompt."""
    assert request.sampling_params is not None, "sepllm serves no pooling models"
    assert request.prompt_token_ids is not None, "prompt embeddings are refused"
    return request.sampling_params.extra_args, request.prompt_token_ids


def salted(limits: RequestLimits, policy: Policy, cache_salt: str | None) -> str | None:
    """The ``cache_salt`` under which vLLM hashes the blocks of a request.

    Layers of other kinds are found by vLLM's hashes alone, and their KV depends on what the SepLLM
    layers before them read. No two policies and salts give the same string.
    """
    is_taken = cache_salt is not None and cache_salt.startswith(_SALT)
    if policy == limits.engine and not is_taken:
        return cache_salt
    return f"{_SALT}{policy.initial_tokens},{policy.window}:{cache_salt or ''}"


def check_fits(num_needed: int, num_blocks: int, num_tokens: int) -> None:
    """Refuse a request that the KV cache could not hold even alone: it would wait for ever.

    Raises:
        ValueError: one sentence.
    """
    if num_needed > num_blocks:
        raise ValueError(
            f"a request of {num_tokens} tokens, max_tokens included, needs up to {num_needed} KV "
            f"blocks with the policy that it asks for and the engine has {num_blocks}; ask for a "
            "smaller sepllm_window, sepllm_initial_tokens or max_tokens, or give the engine more "
            "KV cache memory"
        )


def check_prompt_logprobs(vllm_config: VllmConfig, params: SamplingParams) -> None:
    """Refuse log-probabilities of a prompt whose beginning may come out of the prefix cache.

    vLLM 0.32 and 0.33 leave it out by themselves, unless they are told to read the cache; then what
    they return for the tokens found there is memory that nobody wrote.

    Raises:
        ValueError: one sentence.
    """
    is_cached = vllm_config.cache_config.enable_prefix_caching
    wants = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
    if is_cached and wants and not params.skip_reading_prefix_cache:
        raise ValueError(
            "prompt_logprobs of tokens in the prefix cache do not exist, and this request sets "
            "skip_reading_prefix_cache to False; leave it out"
        )
