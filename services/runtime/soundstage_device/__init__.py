"""What the torch stages share: device and dtype, strict weights. Kept out of soundstage_runtime, which has no torch."""
