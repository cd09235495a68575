"""Block accounting with vLLM's own pool and coordinator, no engine."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.support.moved import get_kv_cache_groups, is_kv_cache_spec_uniform
from tests.support.rule import num_kept
from vllm_sepllm.integration.scheduler import coordinator
from vllm_sepllm.integration.scheduler.coordinator import SepLLMCoordinator
from vllm_sepllm.integration.scheduler.live_requests import LiveRequests
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.visibility import Policy

BLOCK = 16
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)


class FakeRequest:
    """The fields of vLLM's Request that block accounting reads."""

    def __init__(self, request_id: str, token_ids: list[int]) -> None:
        self.request_id = request_id
        self._all_token_ids = token_ids
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_prompt_tokens = self.num_tokens = len(token_ids)
        self.status = None
        self.shared_prefix_boundary = 0
        self.max_tokens = 4096
        self.resumable = False
        self.block_hashes: list[bytes] = []


def make_manager(
    policy: Policy,
    num_blocks: int,
    requests: dict[str, FakeRequest],
    policies: dict[str, Policy] | None = None,
) -> KVCacheManager:
    spec = SepLLMSpec.from_full_attention(FULL, policy)
    config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    manager = KVCacheManager(
        config,
        max_model_len=4096,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=False,
    )
    live = LiveRequests(TokenSeparators((1,)), policy)
    for name, request in requests.items():
        live.add(request, (policies or {}).get(name, policy))  # type: ignore[arg-type]
    SepLLMCoordinator(manager.coordinator, live, 256)
    return manager


@settings(max_examples=100, deadline=None)
@given(
    policy=st.builds(
        Policy,
        initial_tokens=st.integers(0, 5),
        window=st.integers(16, 60),
        max_separators=st.none() | st.integers(0, 40),
    ),
    requests=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=300), max_size=6),
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90)), max_size=40),
    frees=st.sets(st.integers(0, 39)),
    choices=st.lists(
        st.tuples(st.sampled_from([0, 3, 16, 50, 200]), st.sampled_from([16, 33, 100, 4096])),
        max_size=3,
    ),
)
def test_held_blocks_are_those_of_the_compact_length(
    policy: Policy,
    requests: list[list[int]],
    steps: list[tuple[int, int]],
    frees: set[int],
    choices: list[tuple[int, int]],
) -> None:
    """Invariant 3, whatever the pool is, whoever is freed, whatever a and n requests choose."""
    live = {f"r{i}": FakeRequest(f"r{i}", t) for i, t in enumerate(requests)}
    own = {f"r{i}": Policy(a, n, policy.max_separators) for i, (a, n) in enumerate(choices)}
    manager = make_manager(policy, num_blocks=24, requests=live, policies=own)
    pool = manager.block_pool
    for number, (which, size) in enumerate(steps):
        request = live.get(f"r{which}")
        if request is None:
            continue
        if number in frees:
            manager.free(request)
            request.num_computed_tokens = 0
        size = min(size, len(request._all_token_ids) - request.num_computed_tokens)
        if size == 0:
            continue
        end = request.num_computed_tokens + size
        its = own.get(request.request_id, policy)
        needed = math.ceil(num_kept(its, request._all_token_ids, end) / BLOCK)
        (ours,) = manager.coordinator.single_type_managers
        assert needed <= ours.most_blocks(its, end)
        held = len(manager.get_block_ids(request.request_id)[0])
        free = pool.get_num_free_blocks()
        blocks = manager.allocate_slots(request, size)
        assert (blocks is None) == (needed - held > free)
        if blocks is not None:
            request.num_computed_tokens = end
            assert len(manager.get_block_ids(request.request_id)[0]) == max(needed, held) == needed
    for request in live.values():
        manager.free(request)
    assert pool.get_num_free_blocks() == 23


def test_admission_asks_for_the_whole_prompt_at_its_compact_length() -> None:
    policy = Policy(4, 28, 1000)
    token_ids = ([0] * 9 + [1]) * 100
    request = FakeRequest("r", token_ids)
    needed = math.ceil(num_kept(policy, token_ids, 1000) / BLOCK)
    for num_blocks, fits in ((needed + 1, True), (needed, False)):
        manager = make_manager(policy, num_blocks, {"r": request})
        blocks = manager.allocate_slots(request, 64, full_sequence_must_fit=True)
        assert (blocks is not None) is fits


def test_full_attention_layers_are_a_group_of_their_own() -> None:
    """FullAttentionSpec.merge takes subclasses and drops their fields: ours must not be one."""
    sepllm = SepLLMSpec.from_full_attention(FULL, Policy(4, 252, 100))
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LBHNC"
    for specs in ({"a": FULL, "b": sepllm}, {"a": sepllm, "b": FULL}):
        assert not is_kv_cache_spec_uniform(dict(specs))
        groups = get_kv_cache_groups(config, dict(specs))
        assert sorted(type(g.kv_cache_spec).__name__ for g in groups) == [
            "FullAttentionSpec",
            "SepLLMSpec",
        ]
        assert all(len(g.layer_names) == 1 for g in groups)


def test_layers_of_one_policy_merge_and_of_two_do_not() -> None:
    one = SepLLMSpec.from_full_attention(FULL, Policy(4, 252, 100))
    two = SepLLMSpec.from_full_attention(FULL, Policy(4, 60, 100))
    assert SepLLMSpec.merge([one, one]) == one
    with pytest.raises(AssertionError):
        SepLLMSpec.merge([one, two])


def test_vllm_keeps_its_own_managers() -> None:
    assert KVCacheSpecRegistry.get_manager_class(FULL).__name__ == "FullAttentionManager"


def test_vllm_asks_a_group_for_no_more_than_a_manager_has() -> None:
    """coordinator.py puts instances where the hybrid coordinator expects classes."""
    asked = re.findall(r"manager_cls\.(\w+)", inspect.getsource(HybridKVCacheCoordinator))
    assert set(asked) == {"find_longest_cache_hit", "supports_fine_grained_hash_lookup"}


@pytest.mark.parametrize(("interval", "taken"), [(160, 160), (200, 224)])
def test_an_interval_that_is_rounded_up_is_said(
    interval: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16 and 32 have a common boundary every 32 tokens."""
    lines = []
    monkeypatch.setattr(
        coordinator.logger, "warning", lambda text, *values: lines.append(text % values)
    )
    policy = Policy(4, 28, 1000)
    wide = FullAttentionSpec(
        block_size=2 * BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    specs = [wide, SepLLMSpec.from_full_attention(FULL, policy)]
    manager = KVCacheManager(
        KVCacheConfig(64, [], [KVCacheGroupSpec([f"layer {i}"], s) for i, s in enumerate(specs)]),
        max_model_len=4096,
        scheduler_block_size=2 * BLOCK,
        hash_block_size=BLOCK,
        enable_caching=True,
    )
    live = LiveRequests(TokenSeparators((1,)), policy)
    ours = coordinator.SepLLMCoordinator(manager.coordinator, live, interval)
    assert ours.prefix_cache.interval_of(policy) == taken
    said = [line for line in lines if f"every {taken} tokens, not every {interval}" in line]
    assert len(said) == (taken != interval) == len(lines)
