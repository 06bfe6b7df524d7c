"""What is installed that a plan may count on; found without importing it, which takes seconds."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Final

from soundstage_budget.engine_choice import VLLM_VERSIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """vLLM's version, None where it is not there, and whether weights can be rounded."""

    vllm_version: str | None
    has_torchao: bool


ALL: Final = Installed(vllm_version=".".join(map(str, VLLM_VERSIONS[0])), has_torchao=True)


def find_installed() -> Installed:
    """Look around in this environment."""
    return Installed(vllm_version=find_vllm(), has_torchao=importlib.util.find_spec("torchao") is not None)


def find_vllm() -> str | None:
    """Return the version of the vLLM that is installed, whatever its build calls itself."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in importlib.metadata.packages_distributions().get("vllm", []):
        return importlib.metadata.version(name)
    return "of unknown version"
