"""The planner's network: tensors in, tensors out."""
