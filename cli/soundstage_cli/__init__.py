"""`soundstage`: up, generate, demo, models."""
