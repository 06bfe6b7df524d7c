"""What `soundstage bench` measures."""

import soundstage_device as soundstage_device  # first: it keeps diffusers from telling of torchao's other cards
