"""The musical vocabulary of the models: rates, ranges and the values a field may take."""

from typing import Final

SAMPLE_RATE_HZ: Final = 48_000
CHANNELS: Final = 2
LATENT_CHANNELS: Final = 64
SAMPLES_PER_LATENT: Final = 1_920
CODE_RATE_HZ: Final = 5
LATENTS_PER_CODE: Final = 5
NUM_CODES: Final = 64_000

BPM_RANGE: Final = (30, 300)
DURATION_RANGE_S: Final = (1.0, 600.0)
MAX_LATENT_FRAMES: Final = 15_000
MAX_REFERENCES: Final = 4
REFERENCE_LATENTS: Final = 750  # of each reference 30 s are heard
SPREAD_RANGE: Final = (0.01, 1.0)

KEY_SCALES: Final = tuple(
    f"{note}{accidental} {mode}"
    for note in "ABCDEFG"
    for accidental in ("", "#", "b", "♯", "♭")
    for mode in ("major", "minor")
)
TIME_SIGNATURES: Final = ("2", "3", "4", "6")
LANGUAGES: Final = tuple(
    "ar az bg bn ca cs da de el en es fa fi fr he hi hr ht hu id is it ja ko la lt ms ne nl no pa pl pt ro ru sa sk sr "
    "sv sw ta te th tl tr uk ur vi yue zh unknown".split()
)
INSTRUMENTAL: Final = "[Instrumental]"
