"""Policies of a batch whose requests choose more than the plug-in lets them choose yet."""

from dataclasses import dataclass

from vllm_sepllm.policy.visibility import IntArray, Policy


@dataclass(frozen=True)
class MixedPolicies:
    """The policies of a batch's rows, each with a and n of its own; s is the engine's.

    Attributes:
        initial_tokens: [num_rows].
        window: [num_rows].
        max_separators: as in :class:`Policy`.
    """

    initial_tokens: IntArray
    window: IntArray
    max_separators: int | None = None

    def of_rows(self, rows: IntArray | slice) -> "MixedPolicies":
        return MixedPolicies(self.initial_tokens[rows], self.window[rows], self.max_separators)

    def of_row(self, row: int) -> Policy:
        return Policy(int(self.initial_tokens[row]), int(self.window[row]), self.max_separators)
