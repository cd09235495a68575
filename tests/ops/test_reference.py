"""The prefill oracle against the rule over whole prompts, in float64; no kernel runs here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_cases import DEVICE, Shape, make_case, random_prompt
from vllm_sepllm import ops
from vllm_sepllm.ops import reference
from vllm_sepllm.policy.visibility import BatchPolicy


@settings(deadline=None, max_examples=40)
@given(
    initial_tokens=st.lists(st.sampled_from([0, 3, 4, 300]), min_size=2, max_size=2),
    windows=st.lists(st.sampled_from([1, 5, 16, 200]), min_size=2, max_size=2),
    max_separators=st.sampled_from([None, 0, 1, 3]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    use_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_prefill_is_the_rule(
    initial_tokens, windows, max_separators, density, soft_cap, use_sinks, seed
) -> None:
    policy = BatchPolicy(np.array(initial_tokens), np.array(windows), max_separators)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, 2)
    prompts = [random_prompt(rng, n, int(rng.integers(0, n + 1)), density) for n in lengths]
    case = make_case(policy, prompts, Shape(dtype=torch.float64), seed)
    sinks = torch.randn(2) if use_sinks else None
    options = {"soft_cap": soft_cap, "sinks": None if sinks is None else sinks.to(DEVICE)}
    out = torch.full_like(case.query, float("nan"))
    logits = ops.Logits(0.25, **options)
    kv = case.key, case.value, case.cache, case.block_table
    reference.prefill(case.query, *kv, case.metadata, logits, out)
    assert torch.allclose(
        out.cpu(), case.dense(torch.float64, soft_cap=soft_cap, sinks=sinks), rtol=0, atol=1e-12
    )


def test_attend_by_hand() -> None:
    """Two keys with logits 0 and log 3 weigh 1/4 and 3/4."""
    query, value = torch.ones(1, 1, 1), torch.tensor([[[4.0]], [[8.0]]])
    key = torch.tensor([0.0, float(np.log(3.0))]).view(2, 1, 1)
    visible = torch.ones(1, 2, dtype=torch.bool)
    assert reference.attend(query, key, value, visible, 1.0).item() == pytest.approx(7.0)
    hidden = torch.tensor([[True, False]])
    assert reference.attend(query, key, value, hidden, 1.0).item() == pytest.approx(4.0)
    # a sink with the same logit as the only key takes half the weight
    sinks = torch.zeros(1)
    assert reference.attend(query, key, value, hidden, 1.0, 0.0, sinks).item() == pytest.approx(2.0)
