"""What turns a model into a process: serve, settings, logs, errors, tensors. Never imports torch."""
