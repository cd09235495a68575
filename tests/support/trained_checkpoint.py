"""A tiny checkpoint in the format of the authors' ``sepllm_gpt_neox`` models, random weights."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.support.trained_fields import PLAIN

SEPARATORS = [7, 11, 13]
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_trained(folder: Path, **changed: Any) -> tuple[Path, Path]:
    """Write the checkpoint; return its folder and that of the same weights as plain GPT-NeoX.

    The second is for the oracle. ``changed`` are fields of the policy.
    """
    torch.manual_seed(0)
    # transformers' own defaults for the rotary fields are not the authors' converter's
    rotary = {"rotary_pct": 0.25, "rotary_emb_base": 10000.0}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**(_SIZES | rotary)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embed_in" in name else 0.2)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
    plain, theirs = folder / "plain", folder / "trained"
    model.save_pretrained(plain)
    theirs.mkdir()
    weights = {_their_name(name): weight for name, weight in model.state_dict().items()}
    # buffers that checkpoints of that time hold
    for layer in range(_SIZES["num_hidden_layers"]):
        attention = f"sepllm_gpt_neox.layers.{layer}.attention"
        weights[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        weights[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    fields = PLAIN | {"separator_token_ids": SEPARATORS} | changed
    config = _SIZES | rotary | fields
    config |= {"model_type": "sepllm_gpt_neox", "architectures": ["SepLLMGPTNeoXForCausalLM"]}
    config |= {"torch_dtype": "float32", "transformers_version": "4.38.0.post1+sepllm"}
    (theirs / "config.json").write_text(json.dumps(config))
    return theirs, plain


def _their_name(name: str) -> str:
    head, _, rest = name.partition(".")
    return {"gpt_neox": "sepllm_gpt_neox", "lm_head": "embed_out"}[head] + "." + rest
