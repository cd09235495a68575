"""Requests with different policies never share: vLLM's hashes have the policy in them."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.integration.wire.choices import salted
from vllm_sepllm.policy.choice import RequestLimits
from vllm_sepllm.policy.visibility import Policy

POLICY = Policy(initial_tokens=4, window=28, max_separators=100)
SALTS = (
    st.none() | st.text(max_size=4) | st.sampled_from(["sepllm_window=28:", "sepllm_window=9:a"])
)


@given(*[st.tuples(st.sampled_from([9, 28, 99]), SALTS) for _ in range(2)])
def test_no_two_windows_have_a_cache_salt_in_common(
    one: tuple[int, str | None], two: tuple[int, str | None]
) -> None:
    """Layers of other kinds are found by it; users may write what they like. Empty is none."""
    limits = RequestLimits(POLICY, max_model_len=99, min_window=4)
    a, b = (
        salted(limits, dataclasses.replace(POLICY, window=window), salt)
        for window, salt in (one, two)
    )
    are_same = (one[0], one[1] or "") == (two[0], two[1] or "")
    assert ((a or "") == (b or "")) is are_same
    assert salted(limits, POLICY, "mine") == "mine"
    assert salted(limits, POLICY, None) is None
