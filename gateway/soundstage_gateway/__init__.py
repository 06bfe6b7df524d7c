"""The gateway: the public door. It checks, admits, orchestrates the stages, and streams. Never imports torch."""
