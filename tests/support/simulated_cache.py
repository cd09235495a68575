"""One request's compact cache without tensors: which position each entry holds, step by step."""

import numpy as np
from hypothesis import strategies as st

from tests.support.labelled_cache import LabelledCache
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy, visible_mask

SEPARATORS = TokenSeparators((1,))  # token id 1 is the separator

policies = st.builds(
    Policy,
    initial_tokens=st.integers(0, 6),
    window=st.integers(1, 17),
    max_separators=st.none() | st.integers(0, 6),
)


class Cache:
    """One request's compact cache: which position each entry holds."""

    def __init__(self, policy: Policy, token_ids: list[int]) -> None:
        self.policy = policy
        self.token_ids = token_ids
        self.index = SeparatorIndex(policy, SEPARATORS)
        self.mask = visible_mask(policy, np.array(token_ids, dtype=bool))
        self.cache = LabelledCache()
        self.entries: dict[int, int] = self.cache.memory  # type: ignore[assignment]
        self.num_tokens = 0

    def step(self, num_new_tokens: int, tile_size: int) -> None:
        builder = StepPlanBuilder(self.policy)
        start, end = self.num_tokens, self.num_tokens + num_new_tokens
        # an asynchronous scheduler does not know the newest tokens of a decode step
        known = self.token_ids[: end if num_new_tokens > 1 else max(0, end - self.policy.window)]
        builder.add("request", self.index, known, start, num_new_tokens)
        rows = builder.build().of(np.arange(1), 0)
        step = plan_batch(rows, np.array([0, num_new_tokens]), num_new_tokens, 16)
        reads = self.cache.play(step, range(start, end), lambda row, entry: entry, tile_size)
        for position, read in zip(range(start, end), reads, strict=True):
            assert sorted(read) == np.flatnonzero(self.mask[position]).tolist()
        self.num_tokens = end
        assert sorted(self.entries) == list(range(self.mask[end - 1].sum()))
