"""Requests with different policies never share: vLLM's hashes have the policy in them."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.integration.wire.choices import salted
from vllm_sepllm.policy.choice import RequestLimits
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.visibility import Policy

POLICY = Policy(initial_tokens=4, window=28, max_separators=100)
SALTS = st.none() | st.text(max_size=4) | st.sampled_from(["sepllm=4,28:", "sepllm=0,9:a"])


OWN = st.tuples(st.sampled_from([0, 4, 28, 99]), st.sampled_from([4, 9, 28, 99]), SALTS)


@given(OWN, OWN)
def test_no_two_policies_have_a_cache_salt_in_common(
    one: tuple[int, int, str | None], two: tuple[int, int, str | None]
) -> None:
    """Layers of other kinds are found by it; users may write what they like. Empty is none."""
    limits = RequestLimits(POLICY, Initial(4), max_model_len=99, min_window=4)
    a, b = (
        salted(limits, dataclasses.replace(POLICY, initial_tokens=initial, window=window), salt)
        for initial, window, salt in (one, two)
    )
    are_same = (*one[:2], one[2] or "") == (*two[:2], two[2] or "")
    assert ((a or "") == (b or "")) is are_same
    assert salted(limits, POLICY, "mine") == "mine"
    assert salted(limits, POLICY, None) is None
