"""Weights in one byte a number, by torchao: half the memory of 16 bits. Arithmetic keeps its type."""

from soundstage_budget.need import Quantization
from soundstage_device.linear import Linear
from soundstage_dit.model.dit import Dit
from soundstage_runtime.errors import StartError


class QuantizationError(StartError):
    """The weights cannot be quantised here."""


def quantize(dit: Dit, to: Quantization) -> None:
    """Round the linear layers of the blocks, in place, a scale for every row; raises QuantizationError.

    Time, conditions, the way in and the way out keep their weights: they are few, and all tokens depend on them. What
    adapters add is beside the weights, so it is not rounded.
    """
    if to == "none":
        return
    try:
        # Only where it is wanted: the import takes a second, and warns of parts for other cards.
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise QuantizationError(
            f"quantization is {to!r}, which needs torchao ({error}); "
            "pip install 'soundstage[dit-quantized]', or take none"
        ) from error
    # Without changing the settings of torch's compiler for the whole process.
    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[to](set_inductor_config=False)
    try:
        quantize_(dit, config, filter_fn=lambda module, _: isinstance(module, Linear))
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise QuantizationError(f"quantization is {to!r}, which does not work here: {error}; take none") from error
