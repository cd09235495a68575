"""Configurations of tiny random models, one per kind of attention that vLLM knows."""

from collections.abc import Callable
from typing import Any

import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 32,
}
# for configurations that divide hidden_size by the number of heads: as wide as vLLM's kernels need
_HEADS_OF_32 = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}


def _config(kind: str, architecture: str, **fields: Any) -> Any:
    given = {n: v for n, v in (_SIZES | fields).items() if n != "head_dim" or v is not None}
    config = getattr(transformers, kind)(**given)
    config.architectures = [architecture]
    return config


def llama_config(**fields: Any) -> Any:
    """The tiny Llama, ``fields`` instead of its own."""
    return _config("LlamaConfig", "LlamaForCausalLM", **fields)


def _deepseek() -> Any:
    return _config(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=2,
        first_k_dense_replace=2,
        num_key_value_heads=4,
    )


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=1500,
        max_target_positions=448,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    config.architectures = ["WhisperForConditionalGeneration"]
    return config


def _mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8, bos_token_id=0
    )
    config.architectures = ["MambaForCausalLM"]
    return config


def _qwen2_audio() -> Any:
    """Speech before text."""
    config = transformers.Qwen2AudioConfig(
        text_config=_qwen2(),
        audio_config={"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2},
    )
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    return config


def _gemma2() -> Any:
    """Alternating sliding and full layers, scores bounded by tanh."""
    return _config(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        num_hidden_layers=4,
        sliding_window=64,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=True,
    )


def _bloom() -> Any:
    """ALiBi."""
    config = transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=2)
    config.architectures = ["BloomForCausalLM"]
    return config


def _gemma3n() -> Any:
    """The last layers read the KV cache of earlier ones."""
    return _config(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        num_hidden_layers=4,
        intermediate_size=[96] * 4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        tie_word_embeddings=True,
    )


def _qwen2() -> Any:
    """Biases on query, key and value."""
    return _config("Qwen2Config", "Qwen2ForCausalLM", **_HEADS_OF_32)


def _phi() -> Any:
    """Half of each head rotates; attention and MLP in parallel."""
    sizes = _HEADS_OF_32 | {"num_key_value_heads": 2}
    return _config("PhiConfig", "PhiForCausalLM", partial_rotary_factor=0.5, **sizes)


def _gemma3() -> Any:
    """Sliding and full layers with a rotary base of their own each."""
    return _config(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
    )


def _gpt_neox() -> Any:
    """Pythia's architecture; a quarter of each head rotates."""
    config = transformers.GPTNeoXConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    config.architectures = ["GPTNeoXForCausalLM"]
    return config


def _gpt_oss() -> Any:
    """Attention sinks, sliding and full layers, experts."""
    return _config(
        "GptOssConfig",
        "GptOssForCausalLM",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


TINY_MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama_config,
    "llama-four-layers": lambda: llama_config(num_hidden_layers=4),
    "llama-mha": lambda: llama_config(num_key_value_heads=4),
    "llama-mqa": lambda: llama_config(num_key_value_heads=1),
    "qwen2": _qwen2,
    # normalised queries and keys
    "qwen3": lambda: _config("Qwen3Config", "Qwen3ForCausalLM"),
    # as later Mistral models: no sliding window
    "mistral-full": lambda: _config("MistralConfig", "MistralForCausalLM", sliding_window=None),
    "phi": _phi,
    # query, key and value in one matrix
    "phi3": lambda: _config("Phi3Config", "Phi3ForCausalLM", pad_token_id=0, **_HEADS_OF_32),
    "gemma": lambda: _config("GemmaConfig", "GemmaForCausalLM", tie_word_embeddings=True),
    "gemma3": _gemma3,
    "gpt-neox": _gpt_neox,
    "gpt-oss": _gpt_oss,
    "deepseek": _deepseek,
    "whisper": _whisper,
    "mamba": _mamba,
    "qwen2-audio": _qwen2_audio,
    "gemma2": _gemma2,
    # every layer has a sliding window
    "mistral": lambda: _config("MistralConfig", "MistralForCausalLM", sliding_window=64),
    "bloom": _bloom,
    "gemma3n": _gemma3n,
    "reference-window": lambda: llama_config(rswa_window=64),
    "prefix-lm": lambda: llama_config(is_mm_prefix_lm=True),
}
