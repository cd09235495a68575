"""Both sides of the comparison run, in miniature, and sepllm holds fewer blocks."""

import json
from pathlib import Path

import pytest

from vllm_sepllm.demo.offline import BLOCK_SIZE, Result, scale
from vllm_sepllm.processes import run_in_process

# three documents of about 2,000 tokens instead of six of 6,700, and shorter answers, of which
# nobody asks that they be right
SHORTER = """
from vllm_sepllm.demo import offline

# the KV cache holds no longer request of this model
engine = offline.scale().engine | {"max_model_len": 4096, "kv_cache_memory_bytes": 330 << 20}
small = offline.Scale(("glow-worm", "redwoods", "revere"), 8400, engine)
offline.scale = lambda: small
offline.MAX_ANSWER_TOKENS = 16
offline.main()
"""


def measured(backend: str, model: Path, folder: Path) -> Result:
    out = folder / f"{backend}.json"
    command = ["-c", SHORTER, "--model", str(model), "--backend", backend, "--out", str(out)]
    run_in_process(command, folder / f"{backend}.log")
    return Result(**json.loads(out.read_text()))


@pytest.mark.slow
def test_both_backends_answer_and_sepllm_holds_less(four_layers_path: Path, tmp_path: Path) -> None:
    stock = measured("stock", four_layers_path, tmp_path)
    sepllm = measured("sepllm", four_layers_path, tmp_path)
    for result in (stock, sepllm):
        assert list(result.answers) == ["glow-worm", "redwoods", "revere"]
        assert all(result.answers.values())
        assert result.num_running == 3
    assert (stock.num_blocks, stock.block_bytes) == (sepllm.num_blocks, sepllm.block_bytes)
    assert stock.num_prompt_tokens == sepllm.num_prompt_tokens
    # stock vLLM holds every token; the separators and the window are under half of them here
    assert stock.blocks_per_request * BLOCK_SIZE >= stock.num_prompt_tokens / 3
    assert sepllm.blocks_per_request < stock.blocks_per_request / 2


@pytest.mark.parametrize(
    ("has_bfloat16", "is_gpu_build", "dtype", "num_characters"),
    [
        (True, False, "bfloat16", None),
        (False, False, "float32", 8400),
        (False, True, "bfloat16", None),
    ],
)
def test_bfloat16_where_it_is_not_emulated(
    has_bfloat16: bool,
    is_gpu_build: bool,
    dtype: str,
    num_characters: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: is_gpu_build)
    assert (scale().engine["dtype"], scale().num_characters) == (dtype, num_characters)
