"""The resolved configuration on its way to every process, inside a VllmConfig."""

from vllm.config import VllmConfig

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, ResolvedConfig

SCHEDULER = "vllm_sepllm.integration.scheduler.scheduler.SepLLMScheduler"
ASYNC_SCHEDULER = "vllm_sepllm.integration.scheduler.scheduler.SepLLMAsyncScheduler"


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether the engine runs sepllm, so that there is a resolved configuration to read.

    Our key in additional_config does not tell: a user may write it without selecting sepllm.
    """
    return vllm_config.scheduler_config.scheduler_cls in (SCHEDULER, ASYNC_SCHEDULER)


def write_config(vllm_config: VllmConfig, config: ResolvedConfig) -> None:
    """Put the configuration where the user's was; vLLM hashes the dictionary as JSON."""
    given = vllm_config.additional_config
    assert isinstance(given, dict), "refusals.check_engine_args lets only a dict pass"
    vllm_config.additional_config = {**given, ADDITIONAL_CONFIG_KEY: config.to_json()}


def read_config(vllm_config: VllmConfig) -> ResolvedConfig:
    """The configuration of an engine that runs sepllm; components read it once and pass it on."""
    written = vllm_config.additional_config
    assert isinstance(written, dict), "write_config() wrote a dict"
    return ResolvedConfig.from_json(written[ADDITIONAL_CONFIG_KEY])
