"""What the machine of test_prefix_cache_machine.py hardly comes upon, step by step."""

from tests.integration.scheduler.prefix_cache.test_machine import PrefixCacheMachine
from vllm_sepllm.policy.visibility import Policy


def test_a_request_that_ends_in_its_window_keeps_what_a_longer_one_overwrites() -> None:
    """It shares full blocks, but not those of a running request whose ring will go round."""
    machine = PrefixCacheMachine()
    machine.start(Policy(3, 17, 1000), num_blocks=80, interval=64, num_groups=1, others="alone")
    long, short = 0, 1
    machine.arrive(num_shared=12, own=[0, 1], apart=1, window=None, max_tokens=30)
    machine.step([long], [40], preempts=False)
    machine.arrive(num_shared=12, own=[1], apart=1, window=None, max_tokens=7)
    machine.step([short], [40], preempts=False)
    assert machine.requests["r2"].num_computed_tokens == 13
    # a + n = 20: tokens 20 to 22 go over the long request's first block
    for _ in range(9):
        machine.step([long], [1], preempts=False)
    for _ in range(6):
        machine.step([short], [1], preempts=False)
    machine.blocks_are_counted_right()
    # what was moved away from the long one nobody overwrites: short ones share it
    for number in (2, 3):
        machine.arrive(num_shared=12, own=[0], apart=1, window=None, max_tokens=7)
        machine.step([number], [40], preempts=False)
    own, other = (machine.kv.get_block_ids(name)[0] for name in ("r3", "r4"))
    assert own[:2] == other[:2]


def test_a_request_that_is_preempted_in_its_step_overwrites_nothing() -> None:
    """Two started from its first blocks, which are pinned; then it enters a step and leaves it."""
    machine = PrefixCacheMachine()
    machine.start(Policy(3, 17, 1000), num_blocks=80, interval=64, num_groups=1, others="alone")
    machine.arrive(num_shared=18, own=[0, 1], apart=1, window=None, max_tokens=30)
    machine.step([0], [40], preempts=False)
    for number in (1, 2):
        machine.arrive(num_shared=12, own=[number % 2, 1], apart=1, window=None, max_tokens=30)
        machine.step([number], [40], preempts=False)
    request = machine.requests["r1"]
    part = machine.schedule(request, 1)
    assert part is not None
    assert part.start == machine.policy.num_dense
    machine.kv.free(request)
    request.num_computed_tokens = 0
    machine.execute([])
    machine.blocks_are_counted_right()
    for _ in range(3):
        machine.step([0, 1, 2], [40, 1, 1], preempts=False)
        machine.blocks_are_counted_right()
