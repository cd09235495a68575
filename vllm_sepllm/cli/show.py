"""``vllm-sepllm show``: a page of a text with what the cache keeps of it at any position."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console
from vllm_sepllm.cli.page import build_page
from vllm_sepllm.cli.tokens import load_tokenizer, tokenise
from vllm_sepllm.config import MAX_SENTENCES, most_sentences
from vllm_sepllm.policy.epochs import MIN_EPOCH, epochs_of, has_room
from vllm_sepllm.policy.initial import Initial, protected_end
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.policy.visibility import BoolArray, Policy

_MAX_ATTENTION = 4096


def show(
    model: options.Model,
    file: Annotated[Path, typer.Argument(help="Text to show, UTF-8.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write; default: FILE-kept.html.")
    ] = None,
    separators: options.Separators = str(options.DEFAULTS.separators),
    initial_tokens: options.InitialTokens = options.DEFAULTS.initial_tokens,
    protect: Annotated[
        str | None,
        typer.Option(help="Control token that ends a protected prefix, such as '<|im_end|>'."),
    ] = None,
    max_protected: Annotated[
        int, typer.Option(min=1, help="Most tokens that --protect keeps.")
    ] = options.DEFAULTS.max_protected,
    window: options.Window = options.DEFAULTS.window,
    max_separators: options.MaxSeparators = None,
    max_position: options.MaxPosition = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            parser=options.as_tokens,
            metavar="TOKENS",
            help="Show no more tokens than these; default: the whole text.",
        ),
    ] = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Run the model in full and say how much attention each class of tokens gets.",
        ),
    ] = False,
) -> None:
    """Write an HTML page of a text that colours what the KV cache keeps, at any position.

    Without --max-separators the latest 256 of the rule "sentences" stay, and all of any other.
    """
    if max_separators is None and separators == "sentences":
        max_separators = MAX_SENTENCES if max_position is None else most_sentences(max_position)
    text = options.read_text(file)
    page = output or Path(f"{file.stem}-kept.html")
    if page.resolve() == file.resolve():
        raise typer.BadParameter(f"--output {page} is FILE itself; name another file")
    if page.is_dir() or not page.parent.is_dir():
        raise typer.BadParameter(f"--output {page} is no file in a folder that exists")
    if protect is None and max_protected != options.DEFAULTS.max_protected:
        raise typer.BadParameter(
            "--max-protected bounds the prefix that --protect keeps; give both, or neither"
        )
    tokenizer = load_tokenizer(model)
    tokens = tokenise(tokenizer, text)
    ids, pieces = tokens.ids[:max_tokens], tokens.pieces[:max_tokens]
    initial = Initial(initial_tokens)
    with options.refusing():
        is_separator = token_separators(separators, tokenizer).mask(ids)
        if protect is not None:
            end_id = protected_end(protect, tokenizer, len(tokenizer))
            initial = Initial(initial_tokens, end_id, max_protected)
    policy = Policy(initial.of(ids), window, max_separators, max_position)
    if max_position is not None and not has_room(policy):
        raise typer.BadParameter(
            f"--max-position {max_position} leaves no room for {policy.initial_tokens} initial "
            f"tokens, a window of {window}, the separators and {MIN_EPOCH} new tokens; set "
            "--max-separators lower"
        )
    is_protected = protect is not None and initial.is_in(ids)
    kind = "protected" if is_protected else "initial"
    bound = "" if max_separators is None else f" (at most {max_separators:,})"
    part = "" if len(ids) == len(tokens.ids) else f"the first of {len(tokens.ids):,}, "
    subtitle = (
        f"{len(ids):,} tokens of {Path(model).name}, {part}{policy.initial_tokens:,} {kind}, "
        f"window {window}, {separators} separators{bound}{_epochs(policy, is_separator)}"
    )
    note = _attention(model, ids, is_separator, policy) if attention else ""
    made = build_page(file.name, subtitle, pieces, is_separator, policy, note, kind)
    try:
        page.write_text(made, "utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {page}: {error.strerror}") from None
    unprotected = ""
    if protect is not None and not is_protected:
        unprotected = (
            f"{protect!r} is none of the first {max_protected:,} tokens shown, so no prefix of "
            "this text is protected."
        )
    for line in filter(None, (f"{page}: {subtitle}", unprotected, note)):
        make_console().print(line, markup=False, soft_wrap=True)


def _epochs(policy: Policy, is_separator: BoolArray) -> str:
    """How often positions begin anew."""
    if policy.max_position is None:
        return ""
    number = len(epochs_of(policy, is_separator))
    return f", {number:,} epochs of positions below {policy.max_position:,}"


def _attention(model: str, ids: list[int], is_separator: BoolArray, policy: Policy) -> str:
    """A sentence with the attention mass of each class, measured with full attention."""
    if len(ids) > _MAX_ATTENTION:
        raise typer.BadParameter(
            f"--attention needs memory for the square of {len(ids):,} tokens; give "
            f"--max-tokens {_MAX_ATTENTION} or less"
        )
    from transformers import AutoModelForCausalLM

    from vllm_sepllm.eval.attention_mass import measure

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype="float32", attn_implementation="eager"
    ).eval()
    with options.refusing():
        found = measure(loaded, ids, is_separator, policy)
    parts = [f"{m.name} {m.mass:.1%} ({m.share:.1%} of the tokens)" for m in found]
    return (
        "Full attention, mean over layers, heads and 64 positions, goes to: "
        + ", ".join(parts)
        + "."
    )
