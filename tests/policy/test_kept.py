"""What pictures show is the rule: states and lengths against what each query reads."""

import numpy as np
import pytest

from tests.support.rule import visible
from vllm_sepllm.policy.kept import State, kept_lengths, token_states
from vllm_sepllm.policy.visibility import Policy

POLICIES = [
    Policy(3, 5),
    Policy(0, 1),
    Policy(4, 7, 0),
    Policy(2, 6, 3),
    Policy(9, 200),
    Policy(3, 5, 1000),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_states_and_lengths_are_the_visible_sets(policy: Policy, density: float) -> None:
    is_separator = np.random.default_rng(7).random(100) < density
    lengths = kept_lengths(policy, is_separator)
    for query in range(100):
        states = token_states(policy, is_separator, query)
        is_kept = np.isin(states, [State.INITIAL, State.SEPARATOR, State.WINDOW])
        assert np.flatnonzero(is_kept).tolist() == visible(policy, is_separator.tolist(), query)
        assert lengths[query] == is_kept.sum()
        assert (states[query + 1 :] == State.FUTURE).all()


def test_states_of_a_small_text() -> None:
    is_separator = np.array([0, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    # a = 1, n = 3: the query at 6 reads 0, the separators 1 and 3, and 4 to 6
    assert token_states(Policy(1, 3), is_separator, 6).tolist() == [0, 1, 3, 1, 2, 2, 2, 4]
    # of the separators that left the window only the last
    assert token_states(Policy(1, 3, 1), is_separator, 6).tolist() == [0, 3, 3, 1, 2, 2, 2, 4]
    assert kept_lengths(Policy(1, 3), is_separator).tolist() == [1, 2, 3, 4, 5, 5, 6, 6]
