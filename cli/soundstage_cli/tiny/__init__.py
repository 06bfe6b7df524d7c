"""Small random checkpoints in the released layouts, for tests and the demo. They make noise, not music."""

import soundstage_device as soundstage_device  # first: it keeps diffusers from telling of torchao's other cards
