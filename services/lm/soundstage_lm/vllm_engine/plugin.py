"""What vLLM's plug-in entry point calls in every process of the engine."""

from typing import Final

ARCHITECTURE: Final = "SoundstagePlanner"


def register() -> None:
    """Make the planner's network known to vLLM, by name only."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "soundstage_lm.vllm_engine.model:Planner")
