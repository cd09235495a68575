"""What bench.cpu_prefill times is right: both kinds of attention against the dense mask."""

import numpy as np
import pytest
import torch

from vllm_sepllm.integration.rigs.prefill_rig import PrefillRig
from vllm_sepllm.ops import reference
from vllm_sepllm.policy.visibility import Policy, visible_mask

POLICY = Policy(4, 70)


def test_both_are_the_dense_mask() -> None:
    is_separator = np.random.default_rng(0).random(300) < 0.2
    rig = PrefillRig((6, 2, 64), is_separator, POLICY, 32)
    exact = (tensor.double() for tensor in (rig.query, rig.key, rig.value))
    query, key, value = exact
    masks = {
        rig.stock: torch.ones(300, 300, dtype=torch.bool).tril(),
        rig.sepllm: torch.from_numpy(visible_mask(POLICY, is_separator)),
    }
    for run, mask in masks.items():
        out = torch.full_like(rig.query, float("nan"))
        run(out)
        wanted = reference.attend(query, key, value, mask, 64**-0.5)
        assert (out.double() - wanted).abs().max() < 3e-2  # bfloat16: as in test_sequences.py


def test_what_the_kernel_cannot_do() -> None:
    with pytest.raises(ValueError, match="in a window of 20; sepllm masks tiles there"):
        PrefillRig((6, 2, 64), np.zeros(300, dtype=np.bool_), Policy(4, 20), 32)
