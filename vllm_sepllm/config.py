"""The configuration: what a user writes, and what an engine runs once it is resolved.

``--additional-config '{"sepllm": {...}}'`` is validated as a :class:`SepLLMConfig`; at start-up
:meth:`SepLLMConfig.resolve` makes the :class:`ResolvedConfig` of it that every process works with.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from vllm_sepllm.policy import epochs
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.separators.definition import (
    IntervalSeparators,
    Separators,
    TokenSeparators,
)
from vllm_sepllm.policy.separators.rules import RULES, SeparatorRule
from vllm_sepllm.policy.visibility import Policy

ADDITIONAL_CONFIG_KEY = "sepllm"
MIN_WINDOW = 16
# more tokens than any request has, and few enough that sums of them fit the kernels' 32 bits
_MAX_TOKENS = 2**30 - 1
_MAX_PROTECTED = 4096
# of the rule "sentences", unless max_separators is set: more did not help in long texts
MAX_SENTENCES = 256
# a longest request's tokens over the separators that it may have by default
_SHARE = 4

Count = Annotated[StrictInt, Field(ge=0, le=_MAX_TOKENS)]


def most_sentences(longest: int) -> int:
    """Default of ``max_separators`` for "sentences" in requests of at most ``longest`` tokens."""
    return min(MAX_SENTENCES, longest // _SHARE)


class SepLLMConfig(BaseModel):
    """What a user may set: the policy and where it applies.

    Attributes:
        initial_tokens: tokens at the start of a request that every query reads.
        protect: a control token of the model's chat template, such as ``"<|im_end|>"``, or its id:
            every query reads everything up to and including its first occurrence in the prompt,
            which is the system prompt with its tool schemas.
        max_protected: most tokens that are protected; a prompt without the token among its first
            ``max_protected`` tokens has ``initial_tokens`` alone.
        window: most recent tokens that a query reads, itself included. With
            initial_tokens + window a multiple of the block size no block mixes ring and tail.
        separators: "paper", "extended", "unwrapped" or "sentences" (rules applied to the model's
            tokenizer), or a list of strings that are one token each, or a list of token ids, or an
            object with the fields of TokenSeparators.
        preset: another method in the same engine, with no separators of its own: "streaming-llm"
            keeps initial tokens and window alone, "fixed-interval" every ``interval``-th token
            besides (the paper's FixLLM).
        interval: of "fixed-interval": tokens at positions that it divides are kept as separators
            are.
        max_separators: separators older than the window that stay visible, the latest. None: 256
            of the rule "sentences"; of any other a quarter of max_model_len, which the text of a
            request reaches only if more than one token in four is a separator; 0 if there are
            none; enough for every token of an ``interval``. vLLM sizes and admits by it, so a
            request always fits.
        full_layers: layers that keep full attention, negative ones counted from the last.
        checkpoint_interval: with prefix caching, tokens between the regular checkpoints of a
            request; must be a multiple of the block size. None: eight times initial_tokens +
            window, rounded up, so that the checkpoints of a long text, of which each holds the
            ring, stay an eighth of what full attention would cache, and with 256 separators that
            are a ring as well a fifth. Others are left where prompts part, at the end of each
            prompt and of each request.
        decode_backend: vLLM's attention backend that decodes on a GPU, by its name. None: the one
            that vLLM would choose without us; on ROCm TRITON_ATTN.
        positions: "text", those in the request, or "renumbered": whenever the next position would
            be ``max_position``, the kept tokens are numbered anew from 0, so that a request may be
            longer than the texts that the model was trained on.
        max_position: with "renumbered", positions end before it. None: the model's trained length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial_tokens: Count = 4
    protect: Annotated[str, Field(strict=True, min_length=1)] | StrictInt | None = None
    max_protected: Annotated[StrictInt, Field(ge=1, le=_MAX_TOKENS)] = _MAX_PROTECTED
    window: Annotated[StrictInt, Field(ge=MIN_WINDOW, le=_MAX_TOKENS)] = 508
    separators: (
        SeparatorRule
        | TokenSeparators
        | tuple[StrictInt, ...]
        | tuple[Annotated[str, Field(strict=True, min_length=1)], ...]
    ) = "sentences"
    preset: Literal["streaming-llm", "fixed-interval"] | None = None
    interval: Annotated[StrictInt, Field(ge=1)] | None = None
    max_separators: Count | None = None
    full_layers: tuple[StrictInt, ...] = ()
    checkpoint_interval: Annotated[StrictInt, Field(ge=1)] | None = None
    decode_backend: Annotated[str, Field(strict=True, min_length=1)] | None = None
    positions: Literal["text", "renumbered"] = "text"
    max_position: Annotated[StrictInt, Field(ge=1, le=_MAX_TOKENS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_separators(cls, given: object) -> object:
        """A preset has no separators, and an interval belongs to one preset."""
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        if (preset == "fixed-interval") != (given.get("interval") is not None):
            raise ValueError(
                'preset "fixed-interval" and interval go together: set both, such as '
                '{"preset": "fixed-interval", "interval": 8}, or neither'
            )
        if preset is None:
            return given
        needless: dict[str, tuple[object, ...]] = {"separators": ((), [])}
        if preset == "streaming-llm":  # the other one has tokens to bound
            needless["max_separators"] = (None, 0)
        for name, none in needless.items():
            if name in given and given[name] not in none:
                raise ValueError(
                    f"preset {preset!r} keeps no separators, got {name}={given[name]!r}; remove "
                    "one of the two"
                )
        return {**given, "separators": ()}

    @model_validator(mode="after")
    def _bounds_a_protected_prefix(self) -> Self:
        """``max_protected`` alone would protect nothing."""
        if self.protect is None and self.max_protected != _MAX_PROTECTED:
            raise ValueError(
                "max_protected bounds the prefix that protect keeps, and protect is not set: set "
                'both, such as {"protect": "<|im_end|>", "max_protected": 8192}, or neither'
            )
        return self

    @model_validator(mode="after")
    def _renumbers_as_a_whole(self) -> Self:
        """``max_position`` belongs to renumbered positions, which no full layer can have."""
        if self.positions == "text" and self.max_position is not None:
            raise ValueError(
                'max_position is where renumbered positions begin anew, and positions is "text": '
                'set both, such as {"positions": "renumbered", "max_position": 8192}, or neither'
            )
        if self.positions == "renumbered" and self.full_layers:
            raise ValueError(
                "full_layers keep every token, more than there are positions below max_position: "
                'remove full_layers, or set positions to "text"'
            )
        return self

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "SepLLMConfig":
        """Read ``additional_config["sepllm"]``; absent means all defaults.

        Args:
            additional_config: vLLM's, a dictionary or an object of another plugin.

        Raises:
            ValueError: naming every field that is wrong, what it should be and the valid fields.
        """
        given: object = {}
        if isinstance(additional_config, Mapping):
            given = additional_config.get(ADDITIONAL_CONFIG_KEY, {})
        if not isinstance(given, Mapping):
            raise ValueError(
                f'additional_config["sepllm"] must be an object with any of '
                f"{list(cls.model_fields)}, got {given!r}"
            )
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise ValueError(_explain(error)) from None

    def resolve(
        self,
        *,
        separators: TokenSeparators,
        end_id: int | None = None,
        num_layers: int,
        max_model_len: int,
        block_size: int,
        trained_length: int | None = None,
    ) -> "ResolvedConfig":
        """The same policy with nothing left to derive.

        Args:
            separators: what ``separators`` means for the model's tokenizer.
            end_id: the token that ``protect`` names; None: none.
            num_layers: attention layers of the model.
            max_model_len: tokens of the longest request.
            block_size: tokens of a KV block.
            trained_length: positions that the model was trained on, at which renumbered positions
                begin anew unless ``max_position`` is set; None: not known.

        Raises:
            ValueError: if ``full_layers`` names a layer that the model does not have, or all, if
                ``checkpoint_interval`` is no multiple of the block size, or if kept tokens leave
                no room below ``max_position``.
        """
        interval = self.interval
        initial = Initial(self.initial_tokens)
        if end_id is not None:
            most = min(self.max_protected, max_model_len)
            initial = Initial(self.initial_tokens, end_id, most)
        max_position = self._resolved_position(trained_length)
        longest = max_model_len if max_position is None else min(max_model_len, max_position)
        bound = self._resolved_bound(longest)
        resolved = ResolvedConfig(
            initial=initial,
            window=self.window,
            max_separators=bound,
            separators=separators if interval is None else IntervalSeparators(interval),
            full_layers=self._resolved_layers(num_layers),
            checkpoint_interval=self._resolved_checkpoints(block_size),
            max_position=max_position,
        )
        if max_position is not None and not epochs.has_room(resolved.largest_policy):
            raise ValueError(
                f"renumbered positions below {max_position} have no room: {initial.most} "
                f"initial tokens, a window of {self.window}, {bound} separators and "
                f"{epochs.MIN_EPOCH} new tokens are more; set max_separators, window"
                f"{', max_protected' if end_id is not None else ''} or initial_tokens lower"
            )
        return resolved

    def _resolved_position(self, trained_length: int | None) -> int | None:
        if self.positions == "text":
            return None
        if self.max_position is None and trained_length is None:
            raise ValueError(
                "the model's config.json does not say on how many positions it was trained, so "
                'set where renumbered positions begin anew, such as {"max_position": 8192}'
            )
        return self.max_position or trained_length

    def _resolved_bound(self, max_model_len: int) -> int:
        if self.max_separators is not None:
            return self.max_separators
        if self.separators == () and self.interval is None:
            return 0
        if self.separators == "sentences":
            return most_sentences(max_model_len)
        return max_model_len // min(_SHARE, self.interval or _SHARE)

    def _resolved_checkpoints(self, block_size: int) -> int:
        if self.checkpoint_interval is None:
            return -(-8 * (self.initial_tokens + self.window) // block_size) * block_size
        if self.checkpoint_interval % block_size:
            raise ValueError(
                f"checkpoint_interval must be a multiple of the block size {block_size}, got "
                f"{self.checkpoint_interval}"
            )
        return self.checkpoint_interval

    def _resolved_layers(self, num_layers: int) -> tuple[int, ...]:
        wrong = [layer for layer in self.full_layers if not -num_layers <= layer < num_layers]
        if wrong:
            raise ValueError(
                f"full_layers: the model has layers {-num_layers} to {num_layers - 1}, got {wrong}"
            )
        layers = tuple(sorted({layer % num_layers for layer in self.full_layers}))
        if len(layers) == num_layers:
            raise ValueError(
                f"full_layers names all {num_layers} layers, which leaves nothing for sepllm; "
                "serve without --attention-backend sepllm instead"
            )
        return layers


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The policy that an engine runs and where it applies: nothing is left open.

    Attributes:
        initial: how many tokens at the start of a prompt every query reads.
        window: as in :class:`SepLLMConfig`.
        max_separators: separators older than the window that stay visible.
        separators: which tokens are separators.
        full_layers: layers that keep full attention, counted from 0, ascending.
        checkpoint_interval: tokens between the regular checkpoints of a request.
        max_position: where positions are renumbered; None: they are those in the text.
    """

    initial: Initial
    window: int
    max_separators: int
    separators: Separators
    full_layers: tuple[int, ...]
    checkpoint_interval: int
    max_position: int | None = None

    @property
    def policy(self) -> Policy:
        """The engine's policy, of a request that chooses none and protects no prefix."""
        return Policy(
            self.initial.least, self.window, self.max_separators, max_position=self.max_position
        )

    @property
    def largest_policy(self) -> Policy:
        """The policy of a request with as long a protected prefix as there may be."""
        return replace(self.policy, initial_tokens=self.initial.most)

    def to_json(self) -> dict[str, Any]:
        """JSON values under the keys of :class:`SepLLMConfig`, which would resolve to this."""
        separators: dict[str, Any]
        if isinstance(self.separators, IntervalSeparators):
            separators = {"preset": "fixed-interval", "interval": self.separators.interval}
        elif self.separators.line_breaks:
            separators = {"separators": asdict(self.separators)}
        else:
            separators = {"separators": list(self.separators.token_ids)}
        protected: dict[str, Any] = {}
        if self.initial.end_id is not None:
            protected = {
                "protect": self.initial.end_id,
                "max_protected": self.initial.max_tokens,
            }
        positions: dict[str, Any] = {}
        if self.max_position is not None:
            positions = {"positions": "renumbered", "max_position": self.max_position}
        return {
            "initial_tokens": self.initial.least,
            **protected,
            "window": self.window,
            **separators,
            "max_separators": self.max_separators,
            "full_layers": list(self.full_layers),
            "checkpoint_interval": self.checkpoint_interval,
            **positions,
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "ResolvedConfig":
        """The configuration that :meth:`to_json` wrote; nothing is checked again."""
        separators: Separators
        if "interval" in written:
            separators = IntervalSeparators(written["interval"])
        elif isinstance(written["separators"], Mapping):
            ids = {name: tuple(own) for name, own in written["separators"].items()}
            separators = TokenSeparators(**ids)
        else:
            separators = TokenSeparators(tuple(written["separators"]))
        protected = written.get("protect"), written.get("max_protected", 0)
        return cls(
            initial=Initial(written["initial_tokens"], *protected),
            window=written["window"],
            max_separators=written["max_separators"],
            separators=separators,
            full_layers=tuple(written["full_layers"]),
            checkpoint_interval=written["checkpoint_interval"],
            max_position=written.get("max_position"),
        )


def _explain(error: ValidationError) -> str:
    """One sentence per wrong field, in the user's words."""
    valid = list(SepLLMConfig.model_fields)
    problems: dict[str, str] = {}
    for item in error.errors():
        field = str(item["loc"][0]) if item["loc"] else ADDITIONAL_CONFIG_KEY
        if item["type"] == "value_error":
            problems[field] = str(item["ctx"]["error"])
        elif item["type"] == "extra_forbidden":
            problems[field] = f"unknown key {field!r}, valid keys are {valid}"
        elif field == "separators":
            problems[field] = (
                f"separators must be one of {', '.join(map(repr, RULES))}, a list of strings or a "
                "list of token ids"
            )
        else:
            problems.setdefault(field, f"{field}: {item['msg']}, got {item['input']!r}")
    return f'additional_config["{ADDITIONAL_CONFIG_KEY}"]: ' + "; ".join(problems.values())
