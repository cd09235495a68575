"""sepllm is on exactly when a user names it, in every way that vLLM takes a backend's name."""

import copy
import dataclasses
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from tests.support.tiny_configs import llama_config
from tests.support.tiny_models import ADDITIONAL_CONFIG, SEPARATORS, engine_args, selected, write

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from tests.support.moved import SINCE_0_33, make_arg_parser
from vllm_sepllm.integration.startup.lengths import trained_length
from vllm_sepllm.integration.wire.backend_name import register_backend_name
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.wire.host_memory import num_host_slots

SCHEDULER = "vllm_sepllm.integration.scheduler.scheduler.SepLLMScheduler"
WORKER = "vllm_sepllm.integration.worker.cpu.worker.SepLLMCPUWorker"
STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write("llama", tmp_path_factory.mktemp("llama")))


def from_command_line(model: str, *options: str) -> AsyncEngineArgs:
    """What ``vllm serve MODEL ...`` makes of its command line."""
    parser = make_arg_parser(FlexibleArgumentParser())
    common = ["--load-format=dummy", "--skip-tokenizer-init", "--dtype=float32"]
    args = parser.parse_args(["--model", model, "--max-model-len=512", *common, *options])
    return AsyncEngineArgs.from_cli_args(args)


def check_is_selected(config: VllmConfig) -> None:
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.parallel_config.worker_cls == WORKER
    assert config.cache_config.block_size == 32
    # the model is built with the platform's own backend, which the worker wraps
    assert config.attention_config.backend is None
    assert config.additional_config["sepllm"]["separators"] == SEPARATORS


def check_is_stock(config: VllmConfig) -> None:
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == STOCK_WORKER
    # the CPU platform of vLLM 0.33 chooses its own later
    assert config.cache_config.block_size == (16 if SINCE_0_33 else 128)
    assert config.cache_config.enable_prefix_caching is True


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_backend": "sepllm"},
        {"attention_backend": "SEPLLM"},
        {"attention_backend": "SepLLM"},
        {"attention_backend": register_backend_name()},
        {"attention_config": {"backend": "sepllm"}},
        {"attention_config": {"backend": register_backend_name(), "flash_attn_version": 2}},
    ],
    ids=str,
)
def test_selected_from_python(llama: str, arguments: dict[str, Any]) -> None:
    args = engine_args(llama, additional_config=ADDITIONAL_CONFIG, **arguments)
    check_is_selected(args.create_engine_config())


@pytest.mark.parametrize(
    "options",
    [
        ("--attention-backend", "sepllm"),
        ("--attention-backend", "SEPLLM"),
        ("--attention-backend=sepllm",),
        ("--attention-config", '{"backend": "sepllm"}'),
        ("-ac", '{"backend": "SEPLLM"}'),
        ("--attention-config.backend", "sepllm"),
    ],
    ids=" ".join,
)
def test_selected_from_the_command_line(llama: str, options: tuple[str, ...]) -> None:
    policy = ("--additional-config", json.dumps(ADDITIONAL_CONFIG))
    check_is_selected(from_command_line(llama, *options, *policy).create_engine_config())


def test_policy_is_read_from_dotted_options(llama: str) -> None:
    options = ["--additional-config.sepllm.window", "60"]
    options += ["--additional-config.sepllm.separators", json.dumps(SEPARATORS)]
    args = from_command_line(llama, "--attention-backend", "sepllm", *options)
    assert args.create_engine_config().additional_config["sepllm"]["window"] == 60


@pytest.mark.parametrize(
    "arguments",
    [{}, {"attention_backend": "auto"}, {"attention_backend": "CPU_ATTN"}],
    ids=str,
)
def test_not_selected_means_stock(llama: str, arguments: dict[str, Any]) -> None:
    check_is_stock(engine_args(llama, **arguments).create_engine_config())


def test_stock_and_sepllm_alternate_in_one_process(llama: str) -> None:
    for _ in range(2):
        check_is_selected(selected(llama).create_engine_config())
        check_is_stock(engine_args(llama).create_engine_config())


def test_policy_is_resolved_once_for_every_process(llama: str) -> None:
    policy = {"separators": SEPARATORS, "full_layers": [-1], "window": 28}
    additional = {"sepllm": policy, "other": 1}
    config = selected(llama, additional_config=additional).create_engine_config()
    assert config.additional_config == {
        "other": 1,
        "sepllm": {
            "initial_tokens": 4,
            "window": 28,
            "separators": SEPARATORS,
            "max_separators": 128,  # a quarter of max_model_len
            "checkpoint_interval": 256,  # eight times initial_tokens + window
            "full_layers": [1],
        },
    }
    json.dumps(config.additional_config)  # vLLM hashes it as JSON
    assert additional == {"sepllm": policy, "other": 1}


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_block_size_of_the_user_stays(llama: str, block_size: int) -> None:
    config = selected(llama, block_size=block_size).create_engine_config()
    assert config.cache_config.block_size == block_size


def test_engine_args_stay_as_the_user_wrote_them(llama: str) -> None:
    """vLLM's API servers and data-parallel ranks create the configuration again from them."""
    args = selected(llama, attention_backend=None, attention_config={"backend": "sepllm"})
    attention_config = args.attention_config
    first = args.create_engine_config()
    assert args.attention_backend is None
    assert args.attention_config is attention_config
    assert attention_config.backend is AttentionBackendEnum["SEPLLM"]
    assert args.block_size is None
    assert (args.scheduler_cls, args.worker_cls) == (None, "auto")
    assert args.additional_config == ADDITIONAL_CONFIG
    second = args.create_engine_config()
    check_is_selected(second)
    assert first.additional_config == second.additional_config


def test_host_memory_makes_no_connector(llama: str) -> None:
    """Proves it from the command line, on two ranks; vLLM would give blocks by their tokens."""
    options = ("--attention-backend=sepllm", "--kv-offloading-size=0.5", "-tp=2")
    config_option = f"--additional-config={json.dumps(ADDITIONAL_CONFIG)}"
    args = from_command_line(llama, *options, config_option)
    config = args.create_engine_config()
    assert config.kv_transfer_config is None
    assert args.kv_offloading_size == 0.5
    caches = KVCacheConfig(10, [KVCacheTensor(10 << 20, ["layer 0"], 0, 0)], [])
    assert num_host_slots(config, caches) == 256
    assert num_host_slots(selected(llama).create_engine_config(), caches) is None


def test_engine_args_come_back_after_a_failure(llama: str) -> None:
    args = selected(llama, max_model_len=1 << 20)
    with pytest.raises(ValueError, match="max_model_len"):
        args.create_engine_config()
    assert args.attention_backend == "sepllm"
    assert args.block_size is None


@pytest.mark.parametrize(("given", "is_on"), [(None, True), (True, True), (False, False)])
def test_prefix_caching_is_on_unless_the_user_says_no(
    llama: str, given: bool | None, is_on: bool
) -> None:
    config = selected(llama, enable_prefix_caching=given).create_engine_config()
    assert config.cache_config.enable_prefix_caching is is_on


@pytest.mark.parametrize("is_on", [True, False])
def test_checkpoints_without_prefix_caching_are_warned_of(
    llama: str, is_on: bool, caplog: pytest.LogCaptureFixture
) -> None:
    policy = ADDITIONAL_CONFIG["sepllm"] | {"checkpoint_interval": 64}
    args = selected(llama, enable_prefix_caching=is_on, additional_config={"sepllm": policy})
    args.create_engine_config()
    assert ("checkpoint_interval has no effect" in caplog.text) is not is_on


@pytest.mark.parametrize(("preset", "has_separators"), [(None, True), ("streaming-llm", False)])
def test_the_log_says_what_vllms_concurrency_counts_on(
    llama: str,
    preset: str | None,
    has_separators: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ADDITIONAL_CONFIG if preset is None else {"sepllm": {"preset": preset}}
    with caplog.at_level(logging.INFO, "vllm"):
        selected(llama, additional_config=given).create_engine_config()
    assert ("vLLM's maximum concurrency counts on that many" in caplog.text) is has_separators


@pytest.mark.parametrize("max_model_len", [4096, 4097])
def test_positions_beyond_the_trained_length_are_warned_of(
    llama: str,
    max_model_len: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    selected(llama, max_model_len=max_model_len).create_engine_config()
    warnings = {message for message in caplog.messages if "not positions" in message}
    assert len(warnings) == (max_model_len > 4096)
    expected = "beyond the max_position_embeddings=4096 of the model's config.json"
    assert all(expected in warning for warning in warnings)


def test_renumbered_positions_lift_the_bound_of_the_trained_length(
    llama: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Proves it without vLLM's override variable, for the one engine that asks for it."""
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    given = {"sepllm": ADDITIONAL_CONFIG["sepllm"] | {"positions": "renumbered"}}
    config = selected(llama, max_model_len=4_000_000, additional_config=given)
    made = config.create_engine_config()
    assert made.model_config.max_model_len == 4_000_000
    policy = read_config(made).policy
    assert (policy.max_position, policy.max_separators) == (4096, 1024)
    assert not any("not positions" in message for message in caplog.messages)
    assert any("positions begin anew at 4096" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="max_model_len"):
        selected(llama, max_model_len=4_000_000).create_engine_config()


def test_the_trained_length_is_the_one_before_yarn(tmp_path: Path) -> None:
    fields = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    for rope, length in ((fields, 1024), (None, 4096)):
        folder = tmp_path / str(length)
        rope_parameters = None if rope is None else rope | {"rope_theta": 1e4}
        llama_config(rope_parameters=rope_parameters).save_pretrained(folder)
        model = selected(str(folder)).create_engine_config().model_config
        assert trained_length(model) == length


def test_hybrid_kv_cache_manager_stays_on(llama: str) -> None:
    args = selected(llama, disable_hybrid_kv_cache_manager=True)
    config = args.create_engine_config()
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is False
    assert args.disable_hybrid_kv_cache_manager is True


def test_registering_again_changes_nothing() -> None:
    import vllm_sepllm

    wrapped = EngineArgs.create_engine_config
    lookup = CpuPlatform.get_attn_backend_cls
    members = list(AttentionBackendEnum)
    vllm_sepllm.register()
    vllm_sepllm.register_backend_name()
    assert EngineArgs.create_engine_config is wrapped
    assert CpuPlatform.get_attn_backend_cls == lookup
    assert list(AttentionBackendEnum) == members
    assert register_backend_name() is AttentionBackendEnum["SEPLLM"]


def test_configuration_that_engine_args_did_not_make_is_refused(llama: str) -> None:
    """vLLM's CPU platform would ignore the name and serve with full attention."""
    config = engine_args(llama).create_engine_config()
    config.attention_config.backend = register_backend_name()
    with (
        set_current_vllm_config(config),
        pytest.raises(
            RuntimeError, match=r"scheduler and worker.*EngineArgs\.create_engine_config"
        ),
    ):
        Attention(num_heads=2, head_size=32, scale=1.0, prefix="model.layers.0.self_attn.attn")
    with pytest.raises(RuntimeError, match=r"EngineArgs\.create_engine_config"):
        register_backend_name().get_class().get_builder_cls()


LOAD = """
import pickle, sys
for path in sys.argv[1:]:
    member, args, config = pickle.load(open(path, "rb"))
    import vllm.plugins
    assert not vllm.plugins.plugins_loaded, "the test must load before the plugins"
    assert member.name == "SEPLLM" and type(member)["SEPLLM"] is member
    assert args.attention_config.backend is member
    print(config.scheduler_config.scheduler_cls, config.additional_config["sepllm"]["window"])
"""


def test_pickles_load_before_plugins(llama: str, tmp_path: Path) -> None:
    """vLLM's spawned processes unpickle their arguments before they load a plugin."""
    args = selected(llama, attention_backend=None, attention_config={"backend": "sepllm"})
    config = args.create_engine_config()
    config.attention_config.backend = register_backend_name()
    things = (register_backend_name(), args, config)
    files = [tmp_path / "pickle", tmp_path / "cloudpickle"]
    for pickler, file in zip((pickle, cloudpickle), files, strict=True):
        file.write_bytes(pickler.dumps(things))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, files)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"{SCHEDULER} 252"] * 2


def test_member_copies_to_itself() -> None:
    member = register_backend_name()
    assert copy.copy(member) is member
    assert copy.deepcopy({"backend": member})["backend"] is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


def test_not_selected_touches_no_field(llama: str) -> None:
    """The wrapper hands stock arguments to vLLM unchanged."""
    args = engine_args(llama)
    ours = args.create_engine_config()
    stock = EngineArgs.create_engine_config.__wrapped__(engine_args(llama))  # type: ignore[attr-defined]
    for field in dataclasses.fields(ours):
        if field.name != "instance_id":
            mine, theirs = (repr(getattr(c, field.name)) for c in (ours, stock))
            assert mine == theirs, field.name
