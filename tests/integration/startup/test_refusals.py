"""Whatever sepllm cannot serve exactly is refused at start-up: what, why, what to do instead."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.compatibility import REFUSED, refused
from tests.support.model_folders import Models
from tests.support.refusals import Setting, check_sentence, refusal, refused_settings
from tests.support.tiny_models import ADDITIONAL_CONFIG, SEPARATORS, engine_args, selected

pytest.importorskip("vllm")

import vllm.config.cache
import vllm.config.vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVQuantMode

from vllm_sepllm.integration.startup.refusals import check_renumbered
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.policy.initial import Initial

ELSEWHERE = "serve this model without --attention-backend sepllm"
MODELS: list[tuple[str, str, dict[str, Any], str]] = [
    ("MLA (DeepSeek-V2)", "deepseek", {}, "MLA models, whose KV cache holds latents"),
    (
        "Encoder-decoder models (Whisper)",
        "whisper",
        {"max_model_len": 448},
        "encoder-decoder models, whose cross attention",
    ),
    ("Recurrent state (Mamba)", "mamba", {}, "recurrent state"),
    (
        "Pooling models",
        "llama",
        {"runner": "pooling"},
        "pooling models, which read all tokens of a request once",
    ),
    (
        "Reference sliding window",
        "reference-window",
        {},
        "reference sliding window attention",
    ),
    ("Prefix-LM attention", "prefix-lm", {}, "attend in both directions inside an image"),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "what"),
    [pytest.param(*row, marks=refused(feature, row[-1], ELSEWHERE)) for feature, *row in MODELS],
    ids=[row[-1] for row in MODELS],
)
def test_models(models: Models, kind: str, arguments: dict[str, Any], what: str) -> None:
    check_sentence(refusal(models(kind), **arguments), what, ELSEWHERE)


@refused("Images, audio and video", "images, audio and video", "add --language-model-only")
def test_multimodal(models: Models) -> None:
    """Images and speech are refused; text through the same model is not."""
    text = refusal(models("qwen2-audio"))
    check_sentence(text, "images, audio and video", "add --language-model-only")
    args = selected(models("qwen2-audio"), language_model_only=True)
    assert args.create_engine_config().scheduler_config.scheduler_cls is not None


@pytest.mark.compatibility(
    "Sleep mode", f"{REFUSED}“Sleep mode is not supported on current platform”, by stock vLLM too"
)
def test_sleep_mode(models: Models) -> None:
    """Stock vLLM refuses it on CPUs, and is left to."""
    for make in (engine_args, selected):
        args = make(models("llama"), enable_sleep_mode=True)
        with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
            args.create_engine_config()


SETTINGS: list[Setting] = [
    ({"enable_prompt_embeds": True}, "prompt embeddings", "remove --enable-prompt-embeds"),
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding under Model Runner V1",
        "remove --speculative-config",
    ),
    (
        {
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
            "async_scheduling": True,
        },
        "speculative decoding with asynchronous scheduling",
        "remove --async-scheduling",
    ),
    ({"diffusion_config": {"canvas_length": 32}}, "diffusion language models", ELSEWHERE),
    (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        "context parallelism, which spreads the tokens of a request by position",
        "set --decode-context-parallel-size and --prefill-context-parallel-size to 1",
    ),
    (
        {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
        "micro-batches",
        "remove --enable-dbo and --ubatch-size",
    ),
    (
        {
            "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
            "kv_offloading_size": 1.0,
        },
        "KV offloading beside a KV connector",
        "remove --kv-offloading-size",
    ),
    *[
        ({"kv_offloading_size": size}, f"KV offloading of {size} GiB", "set --kv-offloading-size")
        for size in (-1.0, math.nan, math.inf)
    ],
    (
        {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        "KV offloading with 'lmcache', which knows blocks by the tokens in them",
        "set --kv-offloading-backend to native",
    ),
    (
        {"kv_offloading_size": 1.0, "enable_prefix_caching": False},
        "KV offloading without prefix caching",
        "remove --kv-offloading-size",
    ),
    (
        {"kv_offloading_size": 1.0, "pipeline_parallel_size": 2},
        "KV offloading with pipeline parallelism",
        "remove --kv-offloading-size",
    ),
    ({"kv_sharing_fast_prefill": True}, "fast prefill", "remove --kv-sharing-fast-prefill"),
    ({"kv_cache_dtype": "fp8"}, "a KV cache in fp8", "remove --kv-cache-dtype"),
    (
        {"kv_cache_dtype": "bfloat16"},
        "KV cache in bfloat16 for a model in torch.float32, which vLLM's CPU kernels misread",
        "remove --kv-cache-dtype",
    ),
    ({"block_size": 16}, "block size 16 on CPU", "set --block-size 32, or leave it out"),
    ({"block_size": 48}, "block size 48 on CPU", "set --block-size 32, or leave it out"),
    (
        {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        "needs its own scheduler",
        "remove it or do not select sepllm",
    ),
    (
        {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
        "needs its own worker",
        "remove it or do not select sepllm",
    ),
    (
        {"attention_config": {"backend": "sepllm"}},
        "attention_backend and attention_config.backend are both set",
        "set one of them",
    ),
    (
        {"attention_config": {"backend_per_kind": {"full_attention": "sepllm"}}},
        "sepllm cannot be a backend of one kind of layer",
        "use --attention-backend sepllm",
    ),
]


@pytest.mark.parametrize(("arguments", "what", "remedy"), refused_settings(SETTINGS))
def test_settings(models: Models, arguments: dict[str, Any], what: str, remedy: str) -> None:
    if arguments == {"kv_cache_dtype": "bfloat16"} and hasattr(
        vllm.config.cache, "KV_CACHE_DTYPES"
    ):
        pytest.skip("vLLM refuses it first since 0.33")
    check_sentence(refusal(models("llama"), **arguments), what, remedy)


class HashedConfig:
    """vLLM also takes an object that can hash itself."""

    def compute_hash(self) -> str:
        return "x"


def policy(**fields: Any) -> dict[str, Any]:
    return {"sepllm": {"separators": SEPARATORS} | fields}


VALUES: list[tuple[Any, str, str]] = [
    (policy(window=15), "window: ", "greater than or equal to 16, got 15"),
    (policy(initial_tokens=-1), "initial_tokens: ", "greater than or equal to 0, got -1"),
    (policy(max_separators=-1), "max_separators: ", "greater than or equal to 0, got -1"),
    (policy(windows=64), "unknown key 'windows'", "valid keys are ['initial_tokens', 'protect', "),
    (policy(full_layers=[2]), "full_layers: ", "has layers -2 to 1, got [2]"),
    (policy(full_layers=[-3, 0]), "full_layers: ", "has layers -2 to 1, got [-3]"),
    (policy(full_layers=[0, -1]), "names all 2 layers", "without --attention-backend sepllm"),
    (policy(separators=[128]), "token ids in [0, 128), the vocabulary, got [128]", "take the ids"),
    (policy(separators=[-1]), "token ids in [0, 128), the vocabulary, got [-1]", "take the ids"),
    (policy(separators="all"), "separators must be", "'sentences', a list of strings"),
    (policy(separators=[7, "."]), "separators must be", "'sentences', a list of strings"),
    (
        {"sepllm": {"preset": "streaming-llm", "separators": SEPARATORS}},
        "preset 'streaming-llm' keeps no separators",
        "remove one of the two",
    ),
    (
        {"sepllm": {"preset": "fixed-interval"}},
        'preset "fixed-interval" and interval go together',
        "set both",
    ),
    ({}, "separators='sentences' must be read from a tokenizer", "give token ids"),
    (policy(separators="paper"), "separators='paper' must be read", "give token ids"),
    (policy(separators=["."]), "must be read from a tokenizer", "give token ids"),
    (policy(protect="</s>"), "protect='</s>' must be read from a tokenizer", "give the token's id"),
    (
        policy(protect=128),
        "protect must be a token id in [0, 128), the vocabulary, got 128",
        "id in",
    ),
    (policy(protect=""), "protect: ", "at least 1 character, got ''"),
    (policy(protect=True), "protect: ", "a valid string, got True"),
    (policy(protect=7, max_protected=0), "max_protected: ", "greater than or equal to 1, got 0"),
    ({"sepllm": [7]}, "must be an object with any of ['initial_tokens'", "got [7]"),
    (HashedConfig(), "additional_config as a dict, got HashedConfig", "pass a dict"),
]


@pytest.mark.parametrize(("additional", "what", "remedy"), VALUES, ids=[str(v[1:]) for v in VALUES])
def test_values(models: Models, additional: Any, what: str, remedy: str) -> None:
    check_sentence(refusal(models("llama"), additional_config=additional), what, remedy)


RENUMBERED: list[tuple[dict[str, Any], str, str]] = [
    ({"full_layers": [0]}, "full_layers keep every token", 'set positions to "text"'),
    ({"max_position": 4097}, "a model that was trained on 4096", "set max_position to 4096"),
    ({"max_position": 300}, "renumbered positions below 300 have no room", "set max_separators"),
]


@pytest.mark.parametrize(
    ("fields", "what", "remedy"),
    [
        pytest.param(
            *row, marks=refused(f'`positions: "renumbered"` with `{json.dumps(row[0])}`', *row[1:])
        )
        for row in RENUMBERED
    ],
    ids=[str(row[0]) for row in RENUMBERED],
)
def test_renumbered_positions(
    models: Models, fields: dict[str, Any], what: str, remedy: str
) -> None:
    given = policy(positions="renumbered", **fields)
    check_sentence(refusal(models("llama"), additional_config=given), what, remedy)


ON_GPUS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("Model Runner V1", "under Model Runner V1 on GPUs", "unset VLLM_USE_V2_MODEL_RUNNER", {}),
    (
        "speculative decoding",
        "with speculative decoding, whose drafts wait",
        "remove --speculative-config",
        {"speculative_config": SimpleNamespace()},
    ),
    (
        "`--kv-cache-dtype fp8`",
        "with a quantised KV cache, whose keys each epoch would round",
        "remove --kv-cache-dtype",
        {"cache_config": SimpleNamespace(cache_dtype="fp8")},
    ),
]


@pytest.mark.parametrize(
    ("what", "remedy", "fields"),
    [
        pytest.param(
            what,
            remedy,
            fields,
            marks=refused(f'`positions: "renumbered"` on GPUs: {name}', what, remedy),
            id=name,
        )
        for name, what, remedy, fields in ON_GPUS
    ],
)
def test_renumbered_positions_on_gpus(
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    remedy: str,
    fields: dict[str, Any],
) -> None:
    """Served under Model Runner V2, with neither drafts nor rounded keys."""
    config = selected(models("llama")).create_engine_config()
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: False)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda _self: True))
    check_renumbered(config, None)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda _self: bool(fields)))
    for name, value in fields.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(ValueError, match="sepllm does not support renumbered") as caught:
        check_renumbered(config, None)
    check_sentence(str(caught.value), what, remedy)


@refused('`positions: "renumbered"` with M-RoPE', "M-RoPE", 'set positions to "text"')
def test_renumbered_positions_of_several_a_token(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelConfig, "uses_mrope", property(lambda _: True))
    given = policy(positions="renumbered")
    text = refusal(models("llama"), additional_config=given)
    check_sentence(text, "several positions a token (M-RoPE)", 'set positions to "text"')


def test_separator_of_several_tokens(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string that the model's tokenizer splits cannot be looked for in a request's tokens."""
    from tokenizers import Tokenizer
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(33 + i): i for i in range(90)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(token_models.BPE(vocabulary, merges=[]))
    )
    from vllm_sepllm.integration.startup import selection

    monkeypatch.setattr(selection, "cached_tokenizer_from_config", lambda _config: tokenizer)
    text = refusal(models("llama"), additional_config=policy(separators=[".", "and"]))
    check_sentence(text, "separators", "'and'")
    assert "one token" in text


@pytest.mark.parametrize("templates", ["one", "by name"])
def test_a_protected_prefix_that_no_token_ends(
    models: Models, monkeypatch: pytest.MonkeyPatch, templates: str
) -> None:
    """The control tokens of the chat template are named; one of them is taken."""
    from tokenizers import Tokenizer
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    from vllm_sepllm.integration.startup import selection

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(token_models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>", "<|pad|>"]})
    template = "<|turn|>{{ messages }}<|end|>"
    tokenizer.chat_template = template if templates == "one" else {"tool_use": template}
    monkeypatch.setattr(selection, "cached_tokenizer_from_config", lambda _config: tokenizer)
    for given in ("<|END|>", "<|end|><|end|>", "a a"):
        text = refusal(models("llama"), additional_config=policy(protect=given))
        check_sentence(text, "protect must be the text of one token", f"got {given!r}")
        assert "; its chat template has '<|end|>', '<|turn|>'" in text
    chosen = policy(protect="<|end|>", max_protected=5000)
    config = read_config(selected(models("llama"), additional_config=chosen).create_engine_config())
    assert config.initial == Initial(4, tokenizer.convert_tokens_to_ids("<|end|>"), 512)


@refused("Model Runner V2 on CPUs", "Model Runner V2 on CPU yet", "unset VLLM_USE_V2_MODEL_RUNNER")
def test_model_runner_v2(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses it first where Triton has no driver, so the test pretends that it has one."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", True)
    text = refusal(models("llama"))
    check_sentence(text, "Model Runner V2 on CPU yet", "unset VLLM_USE_V2_MODEL_RUNNER")
    # Model Runner V1 does not know it, and vLLM says so first
    text = refusal(models("llama"), prefill_context_parallel_size=2)
    check_sentence(text, "context parallelism", "--prefill-context-parallel-size to 1")


@refused("`VLLM_BATCH_INVARIANT=1`", "batch invariance", "unset VLLM_BATCH_INVARIANT")
def test_batch_invariance(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are equal in any batch up to rounding, not bit by bit."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    check_sentence(refusal(models("llama")), "batch invariance", "unset VLLM_BATCH_INVARIANT")


@refused("`VLLM_USE_RUST_FRONTEND=1`", "Rust front end", "unset VLLM_USE_RUST_FRONTEND")
def test_rust_front_end(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no requests through the classes that sepllm wraps."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    check_sentence(refusal(models("llama")), "Rust front end", "unset VLLM_USE_RUST_FRONTEND")


def test_models_that_group_their_own_layers(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ModelConfig, "supports_kv_cache_grouping", property(lambda _: True), raising=False
    )
    text = refusal(models("llama"))
    check_sentence(text, "models that group the layers of their KV cache themselves", ELSEWHERE)


def test_platforms_that_group_layers(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = classmethod(lambda _cls, _config: "their.Builder")
    monkeypatch.setattr(
        type(current_platform), "get_kv_cache_config_builder_cls", ask, raising=False
    )
    check_sentence(refusal(models("llama")), "the KV cache of their.Builder", "serve without")


def test_kv_formats_of_other_plugins(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under a name of vLLM's, which such a plugin may take over."""
    handlers = {"auto": SimpleNamespace(quant_mode=lambda: KVQuantMode.NONE)}
    monkeypatch.setattr(
        vllm.config.cache, "get_kv_cache_dtype_handler", handlers.get, raising=False
    )
    text = refusal(models("llama"))
    check_sentence(text, "a KV cache in auto, which another plugin", "remove --kv-cache-dtype")


def test_other_platforms(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: False)
    check_sentence(refusal(models("llama")), "runs on CUDA, ROCm and x86 CPUs", "serve without")


def test_a_choice_of_backends_that_the_platform_lacks(models: Models) -> None:
    policy = ADDITIONAL_CONFIG["sepllm"] | {"decode_backend": "FLASHINFER"}
    text = refusal(models("llama"), additional_config={"sepllm": policy})
    check_sentence(text, "vLLM has one attention backend on CPU", "remove decode_backend")


@pytest.mark.parametrize("additional", [ADDITIONAL_CONFIG, {"sepllm": {}}, {"sepllm": None}])
def test_settings_without_selection(models: Models, additional: dict[str, Any]) -> None:
    text = refusal(models("llama"), attention_backend=None, additional_config=additional)
    check_sentence(text, "set but sepllm is not selected", "add --attention-backend sepllm")


def test_name_for_one_kind_of_layer_without_selection(models: Models) -> None:
    per_kind = {"backend_per_kind": {"full_attention": "sepllm"}}
    arguments = {"attention_backend": None, "additional_config": {}, "attention_config": per_kind}
    text = refusal(models("llama"), **arguments)
    check_sentence(text, "cannot be a backend of one kind", "use --attention-backend sepllm")
