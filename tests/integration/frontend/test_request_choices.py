"""What requests choose, through vLLM's scheduler and configuration; no model is loaded."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request, RequestStatus

from tests.support import tiny_models
from vllm_sepllm.integration.frontend import request_choices
from vllm_sepllm.integration.frontend.request_choices import RequestCheck, RequestRefused
from vllm_sepllm.integration.rigs.scheduler_rig import Load, SchedulerRig
from vllm_sepllm.integration.wire.plan import attached_plan


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> SchedulerRig:
    """Two requests of 300 tokens decode with the engine's window of 252; there is room for more."""
    model = tiny_models.write("llama", tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        made = SchedulerRig(model, Load(6, 300, 0.2, enable_prefix_caching=False), is_sepllm=True)
    scheduler = made.scheduler
    scheduler.finish_requests(list(scheduler.requests)[2:], RequestStatus.FINISHED_ABORTED)
    return made


def request(name: str, extra_args: dict[str, Any], max_tokens: int = 16) -> Request:
    params = SamplingParams(max_tokens=max_tokens, extra_args=extra_args)
    return Request(name, [2 + i % 50 for i in range(60)], params, None)


def test_the_scheduler_plans_windows_and_ends_what_it_cannot_serve(rig: SchedulerRig) -> None:
    """The choice is read from extra_args; who cannot be served ends with an error at once."""
    scheduler = rig.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    scheduler.add_request(request("small", {"sepllm_window": 32}))
    scheduler.add_request(request("initial", {"sepllm_initial_tokens": 40}))
    scheduler.add_request(request("unknown", {"sepllm_size": 32}))
    num_blocks, pool.num_gpu_blocks = pool.num_gpu_blocks, 3
    scheduler.add_request(request("unfit", {"sepllm": False}))
    pool.num_gpu_blocks = num_blocks
    output = scheduler.schedule()
    assert "small" in output.num_scheduled_tokens
    assert not {"unknown", "unfit"} & set(output.num_scheduled_tokens)
    plan = attached_plan(output)
    assert plan.policy.window[plan.rows["small"]] == 32
    assert plan.policy.initial_tokens[plan.rows["initial"]] == 40
    assert sorted(np.unique(plan.policy.initial_tokens)) == [4, 40]
    assert sorted(np.unique(plan.policy.window)) == [32, 252]
    ended = {
        made.request_id: made.finish_reason
        for part in rig_outputs(rig, output).values()
        for made in part.outputs
        if made.finish_reason is not None
    }
    assert ended == {"unknown": FinishReason.ERROR, "unfit": FinishReason.ERROR}
    assert "unknown" not in scheduler.requests
    scheduler.add_request(request("full", {"sepllm": False}))
    plan = attached_plan(scheduler.schedule())
    assert plan.policy.window[plan.rows["full"]] == rig.config.model_config.max_model_len


def rig_outputs(rig: SchedulerRig, output: Any) -> Any:
    """What the engine would send to its clients after the step."""
    sent: list[Any] = []
    update = rig.scheduler.update_from_output
    rig.scheduler.update_from_output = lambda *given: sent.append(update(*given))  # type: ignore[method-assign]
    rig.finish(output)
    return sent[0]


def test_front_ends_refuse_with_an_error_of_the_client(rig: SchedulerRig) -> None:
    """vLLM's server makes HTTP 400 of it; it is a ValueError as well."""
    blocks = rig.config.cache_config.num_gpu_blocks
    for extra_args, num_prompt, sentence in (
        ({"sepllm": False}, 3000, "needs up to"),
        ({"sepllm_window": 5}, 3, "sepllm_window must be at least 16 here, got 5"),
        ({"sepllm_initial_tokens": 2900}, 3000, "a smaller .* sepllm_initial_tokens or max_tokens"),
        ({"sepllm_initial_tokens": -1}, 3, "sepllm_initial_tokens must be at least 0 here, got -1"),
        ({"sepllm_initial_tokens": "4"}, 3, "sepllm_initial_tokens must be an integer number"),
    ):
        asked: Any = SimpleNamespace(
            sampling_params=SamplingParams(max_tokens=16, extra_args=extra_args),
            prompt_token_ids=[1] * num_prompt,
            resumable=False,
        )
        rig.config.cache_config.num_gpu_blocks = 12
        with pytest.raises(VLLMClientError, match=sentence) as refused:
            RequestCheck(rig.config).check(asked)
        assert isinstance(refused.value, ValueError)
        rig.config.cache_config.num_gpu_blocks = blocks
        asked.sampling_params = SamplingParams(max_tokens=16, extra_args={"seed": 3})
        RequestCheck(rig.config).check(asked)


def test_the_configuration_is_read_once_by_a_front_end(
    rig: SchedulerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never for an engine with another backend, whatever its requests ask for."""
    reads = []
    read = request_choices.read_config
    monkeypatch.setattr(request_choices, "read_config", lambda c: reads.append(c) or read(c))
    processor = InputProcessor.__new__(InputProcessor)
    processor.vllm_config = rig.config

    def take_in(extra_args: dict[str, Any]) -> Any:
        asked = request("r", extra_args)
        return request_choices._process_inputs(lambda _self: asked, processor)

    take_in({"seed": 3})
    assert not reads
    take_in({"sepllm_window": 64})
    for _ in range(2):
        with pytest.raises(RequestRefused, match="at least 16 here, got 5"):
            take_in({"sepllm_window": 5})
    assert len(reads) == 1
    monkeypatch.setattr(rig.config.scheduler_config, "scheduler_cls", None)
    assert take_in({"sepllm_window": 5}) is not None


@pytest.mark.parametrize("asks", [{"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [3]}])
def test_prompt_logprobs_are_not_read_from_the_prefix_cache(
    rig: SchedulerRig, monkeypatch: pytest.MonkeyPatch, asks: dict[str, Any]
) -> None:
    """Where there is one; vLLM leaves it out by itself unless it is told not to."""
    cache_config = rig.config.cache_config
    processor = InputProcessor.__new__(InputProcessor)
    processor.vllm_config = rig.config

    def take_in(**fields: Any) -> Any:
        params = SamplingParams(max_tokens=16, **fields)
        asked = Request("logprobs", [2] * 60, params, None)
        return request_choices._process_inputs(lambda _self: asked, processor)

    reading = asks | {"skip_reading_prefix_cache": False}
    assert take_in(**reading) is not None
    monkeypatch.setattr(cache_config, "enable_prefix_caching", True)
    assert take_in(**asks) is not None
    assert take_in(skip_reading_prefix_cache=False) is not None
    with pytest.raises(RequestRefused, match="this request sets skip_reading_prefix_cache"):
        take_in(**reading)
    # by another way than a front end's
    rig.scheduler.add_request(Request("raw", [2] * 60, SamplingParams(**reading), None))
    live = rig.scheduler._live["raw"]
    assert live.refusal is not None
    assert "skip_reading_prefix_cache" in live.refusal
    rig.scheduler.finish_requests(["raw"], RequestStatus.FINISHED_ABORTED)
