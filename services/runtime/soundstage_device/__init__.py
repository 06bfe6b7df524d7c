"""What the torch stages share: device, dtype, strict weights, linear layers. soundstage_runtime itself has no torch."""

import logging

# Once torchao is installed, diffusers and transformers import it at every start, and tell of its parts for other cards.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(_name).setLevel(logging.ERROR)
