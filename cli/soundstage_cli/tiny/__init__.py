"""Small random checkpoints in the released layouts, for tests and the demo. They make noise, not music."""
