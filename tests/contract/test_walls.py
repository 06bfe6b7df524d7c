"""The two walls: a process that holds no weights never loads torch, and stages know nothing of each other."""

import ast
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STAGES = ("soundstage_lm", "soundstage_dit", "soundstage_vae")
TORCHLESS = ("soundstage_gateway", "soundstage_runtime", "soundstage_budget")


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def modules_of(package: str) -> list[str]:
    return [package] + [
        module.name for module in pkgutil.walk_packages([str(folder_of(package))], prefix=f"{package}.")
    ]


def import_and_report(modules: list[str]) -> str:
    """Import modules in a fresh interpreter; answer the first of them after which torch was loaded."""
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return done.stderr.strip()


def imports_of(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def files_of(package: str) -> list[Path]:
    files = sorted(folder_of(package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("package", TORCHLESS)
def test_no_module_loads_torch(package: str) -> None:
    assert import_and_report(modules_of(package)) == ""


@pytest.mark.parametrize("package", STAGES)
def test_a_stages_servicer_and_settings_do_without_torch(package: str) -> None:
    assert import_and_report([package, f"{package}.servicer", f"{package}.settings"]) == ""


def test_the_probe_would_see_torch() -> None:
    assert import_and_report(["json", "torch"]) == "torch"


@pytest.mark.parametrize("package", STAGES)
def test_no_stage_imports_another_stage_or_the_gateway(package: str) -> None:
    others = {*STAGES, "soundstage_gateway", "soundstage_cli"} - {package}
    assert {path.name: imports_of(path) & others for path in files_of(package) if imports_of(path) & others} == {}


@pytest.mark.parametrize(
    "package", ["soundstage_gateway", "soundstage_runtime", "soundstage_budget", "soundstage_device"]
)
def test_nobody_imports_a_stage(package: str) -> None:
    assert {path.name for path in files_of(package) if imports_of(path) & set(STAGES)} == set()


def test_the_runtime_imports_nothing_of_ours_but_the_contract() -> None:
    ours = {
        name for path in files_of("soundstage_runtime") for name in imports_of(path) if name.startswith("soundstage")
    }
    assert ours == {"soundstage", "soundstage_runtime"}
