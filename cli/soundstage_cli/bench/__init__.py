"""Measurements, each against another way to do the same on the same machine."""

import soundstage_device as soundstage_device  # first: it keeps diffusers from telling of torchao's other cards
