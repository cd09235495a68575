"""``vllm-sepllm plan``: bytes and concurrent requests, full attention against sepllm."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console, print_json, print_table, quiet_vllm
from vllm_sepllm.cli.kv_sizes import (
    DTYPE_BYTES,
    Deployment,
    Estimate,
    KVShape,
    check_layers,
    estimate,
    load_shape,
)
from vllm_sepllm.cli.sizes import format_bytes
from vllm_sepllm.config import ResolvedConfig, SepLLMConfig
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.separators.definition import TokenSeparators

LABEL = "arithmetic, not a measurement"
WINDOWS = (252, 508, 1020, 2044)
PROTECTED = (0, 1024, 4096)
DENSITIES = (0.05, 0.13, 0.25)
# vLLM's InputBatch: an id of 4 bytes and a flag for each token that a request may have
HOST_BYTES = 5
# vLLM's default, which its backends for GPUs take
GPU_BLOCK_SIZE = 16
FULL_LAYERS = ((), (0, -1), (0, 1, -2, -1))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of effects: ``setting`` differs from the plan in one value."""

    setting: str
    is_plan: bool
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the command prints.

    Attributes:
        kind: always LABEL.
        density: assumed share of separators among the tokens that left the window.
        block_origin: where the block size comes from.
        config: resolved, without the separators, which the arithmetic does not need.
        worst: sepllm when every token is a separator.
        effects: the same with one setting changed at a time.
    """

    kind: str
    model: str
    density: float
    block_origin: str
    shape: KVShape
    deployment: Deployment
    config: dict[str, Any]
    full: Estimate
    sepllm: Estimate
    worst: Estimate
    effects: list[Row]


def plan(
    model: options.Model,
    kv_memory: options.KvMemory,
    context: options.Context,
    density: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of separators among the tokens beyond the window."),
    ] = 0.05,
    initial_tokens: options.InitialTokens = options.DEFAULTS.initial_tokens,
    protected: Annotated[
        int, typer.Option(min=0, help="Tokens of the prefix that `protect` keeps of each request.")
    ] = 0,
    window: options.Window = options.DEFAULTS.window,
    separators: options.Separators = str(options.DEFAULTS.separators),
    max_separators: options.MaxSeparators = None,
    max_position: options.MaxPosition = None,
    full_layers: options.FullLayers = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share KV heads.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the KV cache: auto, bfloat16, float16 or float32.")
    ] = "auto",
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a KV block; default: as on this machine. GPUs take 16."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Memory of a request, and how many fit: arithmetic from the model's config alone.

    Without --max-separators they are bounded as in an engine: the latest 256 of the rule
    "sentences", a quarter of --context with any other.
    """
    try:
        shape = load_shape(model)
    except ValueError as error:
        raise typer.BadParameter(f"no plan for {model!r}: {error}") from None
    kv_dtype = _resolved_dtype(dtype, shape)
    size, origin = (block_size, "--block-size") if block_size else _platform_block_size()
    deployment = Deployment(kv_memory, context, tensor_parallel, kv_dtype, size)
    config = options.make_config(
        initial_tokens=initial_tokens,
        window=window,
        separators=separators,
        max_separators=max_separators,
        positions="text" if max_position is None else "renumbered",
        max_position=max_position,
        full_layers=options.layer_indices(full_layers),
    )
    with options.refusing():
        made = make_plan(model, shape, deployment, config, density, protected, origin)
    if as_json:
        print_json(asdict(made))
    else:
        _print(made)


def make_plan(
    model: str,
    shape: KVShape,
    deployment: Deployment,
    config: SepLLMConfig,
    density: float,
    protected: int,
    block_origin: str,
) -> Plan:
    """All estimates for one model and deployment.

    Raises:
        ValueError: if the settings do not go with the model.
    """
    resolved = _resolve(config, shape, deployment, protected)
    settings = resolved.to_json()
    del settings["separators"]  # of a configuration without a preset
    return Plan(
        kind=LABEL,
        model=model,
        density=density,
        block_origin=block_origin,
        shape=shape,
        deployment=deployment,
        config=settings,
        full=estimate(shape, deployment, None, density),
        sepllm=estimate(shape, deployment, resolved, density),
        worst=estimate(shape, deployment, resolved, 1.0),
        effects=list(effects(shape, deployment, config, density, protected)),
    )


def _platform_block_size() -> tuple[int, str]:
    """Tokens of a block with which sepllm would run here, and of what platform that is."""
    quiet_vllm()
    try:
        from vllm_sepllm.integration.startup.block_size import platform_block_size
    except ImportError:
        return GPU_BLOCK_SIZE, "GPUs, as no vLLM is installed here; CPUs take 32"
    name, size = platform_block_size()
    return size, f"this platform, {name}"


def _resolved_dtype(dtype: str, shape: KVShape) -> str:
    """``auto`` as vLLM takes it: the config's, but 16 bits for a model in float32."""
    if dtype == "auto":
        return shape.dtype if shape.dtype in ("bfloat16", "float16") else "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise typer.BadParameter(f"--dtype must be auto or one of {list(DTYPE_BYTES)}, got {dtype}")
    return dtype


def _resolve(
    config: SepLLMConfig, shape: KVShape, deployment: Deployment, protected: int
) -> ResolvedConfig:
    """As an engine resolves it, for requests with a protected prefix of ``protected`` tokens."""
    resolved = config.resolve(
        separators=TokenSeparators(()),
        num_layers=shape.num_layers,
        max_model_len=deployment.context,
        block_size=deployment.block_size,
    )
    check_layers(shape, resolved.full_layers)
    return replace(resolved, initial=Initial(max(config.initial_tokens, protected)))


def effects(
    shape: KVShape, deployment: Deployment, config: SepLLMConfig, density: float, protected: int
) -> Iterator[Row]:
    """The plan with one value changed at a time; values that the model cannot take are left out."""

    def row(
        setting: str, changed: SepLLMConfig, density: float, is_plan: bool, kept: int = protected
    ) -> Row:
        resolved = _resolve(changed, shape, deployment, kept)
        return Row(setting, is_plan, estimate(shape, deployment, resolved, density))

    for window in sorted({*WINDOWS, config.window}):
        changed = config.model_copy(update={"window": window})
        try:
            yield row(f"window {window}", changed, density, window == config.window)
        except ValueError:
            continue  # no room below max_position
    for kept in sorted({*PROTECTED, protected}):
        yield row(f"protected {kept:,} tokens", config, density, kept == protected, kept)
    for value in sorted({*DENSITIES, density}):
        yield row(f"separators {value:.0%} of tokens", config, value, value == density)
    if config.positions == "renumbered":
        return  # no layer keeps full attention
    for layers in sorted({*FULL_LAYERS, config.full_layers}, key=len):
        changed = config.model_copy(update={"full_layers": layers})
        name = ", ".join(map(str, layers)) or "none"
        try:
            yield row(f"full layers {name}", changed, density, layers == config.full_layers)
        except ValueError:
            continue  # fewer layers than that


def _print(made: Plan) -> None:
    console = make_console()
    context = made.deployment.context
    title = f"{made.model}: KV cache of a request of {context:,} tokens ({LABEL})"
    print_table(console, title, _summary(made))
    print_table(console, "One setting changed at a time (* is the plan)", _effects(made))
    console.print(_assumptions(made), style="dim")


def _summary(made: Plan) -> Table:
    table = Table()
    table.add_column("")
    for name in ("full attention", "sepllm", "sepllm, every token a separator"):
        table.add_column(name, justify="right")
    columns = (made.full, made.sepllm, made.worst)
    table.add_row("entries a layer", *(f"{e.entries:,}" for e in columns))
    table.add_row("bytes a request", *(format_bytes(e.request_bytes) for e in columns))
    memory = format_bytes(made.deployment.kv_memory)
    table.add_row(f"requests at once in {memory}", *(f"{e.concurrent:,}" for e in columns))
    table.add_row("share of full attention", *(_share(e, made) for e in columns))
    return table


def _share(estimated: Estimate, made: Plan) -> str:
    return f"{estimated.request_bytes / made.full.request_bytes:.1%}"


def _effects(made: Plan) -> Table:
    table = Table()
    table.add_column("setting")
    for name in ("entries a layer", "bytes a request", "requests at once", "of full attention"):
        table.add_column(name, justify="right")
    kind = ""
    for row in made.effects:
        if kind and kind != row.setting.split()[0]:
            table.add_section()
        kind = row.setting.split()[0]
        table.add_row(
            f"{row.setting} *" if row.is_plan else row.setting,
            f"{row.estimate.entries:,}",
            format_bytes(row.estimate.request_bytes),
            f"{row.estimate.concurrent:,}",
            _share(row.estimate, made),
        )
    return table


def _assumptions(made: Plan) -> str:
    """What the numbers rest on, in sentences."""
    shape, deployment, config = made.shape, made.deployment, made.config
    lines = [
        f"This is {LABEL}. It assumes that {made.density:.0%} of the tokens beyond the window are "
        "separators; `vllm-sepllm separators MODEL FILE` counts them in your text.",
        f"{len(shape.full)} of {shape.num_layers} layers have full attention, {shape.num_kv_heads} "
        f"KV heads of {shape.head_size}, {deployment.dtype}, on each of "
        f"{deployment.tensor_parallel} device(s).",
        f"Blocks of {deployment.block_size} tokens ({made.block_origin}).",
        ", ".join(f"{name} {value}" for name, value in config.items()) + ".",
        "Weights, activations and what vLLM pads when layers of several kinds share a pool are "
        "not in it.",
    ]
    if "max_position" in config:
        row = format_bytes(deployment.context * HOST_BYTES)
        lines.append(
            "The KV cache of a request is constant from there on, however long it gets. In host "
            f"memory each worker reserves {row} for each of --max-num-seqs requests of that length."
        )
    elif 0 < shape.max_positions < deployment.context:
        lines.append(f"The model's config ends at {shape.max_positions:,} positions.")
    return "\n".join(lines)
