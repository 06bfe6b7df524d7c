"""What fits on which card, as arithmetic: no torch, no files, and no card needed."""
