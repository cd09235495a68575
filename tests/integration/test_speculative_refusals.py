"""Which drafters sepllm does not know, and how many drafts are too many."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.integration.test_refusals import check_sentence
from vllm_sepllm.integration.refusals import _speculative_reasons


@pytest.mark.parametrize(
    ("speculative", "what", "remedy"),
    [
        ({"method": "eagle"}, "speculative decoding with 'eagle'", "use one of"),
        ({"num_speculative_tokens": 9}, "9 draft tokens with a window of 16", "7 or less"),
    ],
)
def test_speculative_decoding_on_gpus(speculative: dict[str, Any], what: str, remedy: str) -> None:
    """On a CPU vLLM has no runner for it, so the rows are asked directly."""
    drafts = SimpleNamespace(**({"method": "ngram", "num_speculative_tokens": 2} | speculative))
    vllm_config: Any = SimpleNamespace(
        speculative_config=drafts,
        num_speculative_tokens=drafts.num_speculative_tokens,
        use_v2_model_runner=True,
        additional_config={"sepllm": {"window": 16}},
    )
    found = [text for is_unsupported, text in _speculative_reasons(vllm_config) if is_unsupported]
    assert len(found) == 1
    check_sentence(f"sepllm does not support {found[0]}", what, remedy)
