"""The networks of the diffusion stage: tensors in, tensors out. Parameters have the released checkpoints' names."""
