"""From the wire to a Diffusion: what a variant of the model is asked to do at each step."""

from typing import Final

from soundstage.type.v1 import options_pb2
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage_dit.schedule import custom_times, nearest_turbo_times, schedule
from soundstage_dit.song import Diffusion, Guidance, GuidanceMethod, Retake, Sampler, Wavelet, WaveletMode
from soundstage_runtime.variant import is_turbo

TURBO_STEPS, TURBO_SHIFT = 8, 3.0
STEPS, SHIFT = 50, 1.0
GUIDANCE_SCALE: Final = 7.0

_SAMPLERS: Final = {
    options_pb2.SAMPLER_UNSPECIFIED: Sampler.EULER,
    options_pb2.SAMPLER_EULER: Sampler.EULER,
    options_pb2.SAMPLER_HEUN: Sampler.HEUN,
    options_pb2.SAMPLER_SDE: Sampler.SDE,
}
_METHODS: Final = {
    options_pb2.GUIDANCE_METHOD_UNSPECIFIED: GuidanceMethod.APG,
    options_pb2.GUIDANCE_METHOD_APG: GuidanceMethod.APG,
    options_pb2.GUIDANCE_METHOD_CFG: GuidanceMethod.CFG,
    options_pb2.GUIDANCE_METHOD_ADG: GuidanceMethod.ADG,
    options_pb2.GUIDANCE_METHOD_ADG_NORMED: GuidanceMethod.ADG_NORMED,
    options_pb2.GUIDANCE_METHOD_ADG_UNCLIPPED: GuidanceMethod.ADG_UNCLIPPED,
}
_WAVELET_MODES: Final[dict[options_pb2.WaveletMode.ValueType, WaveletMode]] = {
    options_pb2.WAVELET_MODE_UNSPECIFIED: "double",
    options_pb2.WAVELET_MODE_DOUBLE: "double",
    options_pb2.WAVELET_MODE_LOW: "low",
    options_pb2.WAVELET_MODE_HIGH: "high",
    options_pb2.WAVELET_MODE_PIXEL: "pixel",
}


def read_diffusion(options: DiffusionOptions, *, variant: str) -> Diffusion:
    """Fill in what checked options leave open, as fits the variant."""
    return Diffusion(
        times=_times(options, variant),
        sampler=_SAMPLERS[options.sampler],
        guidance=_guidance(options.guidance, variant),
        velocity_norm_threshold=options.velocity_norm_threshold,
        velocity_ema_factor=options.velocity_ema_factor,
        wavelet=_wavelet(options.wavelet_correction) if options.HasField("wavelet_correction") else None,
        latent_shift=options.latent_shift,
        latent_rescale=options.latent_rescale if options.HasField("latent_rescale") else 1.0,
        is_mask_explicit=options.mask_mode != options_pb2.MASK_MODE_AUTO,
        retake=_retake(options.retake) if options.HasField("retake") else None,
    )


def _times(options: DiffusionOptions, variant: str) -> tuple[float, ...]:
    if options.timesteps:
        return tuple((nearest_turbo_times if is_turbo(variant) else custom_times)(options.timesteps))
    steps, shift = (TURBO_STEPS, TURBO_SHIFT) if is_turbo(variant) else (STEPS, SHIFT)
    return tuple(
        schedule(
            options.steps if options.HasField("steps") else steps,
            options.shift if options.HasField("shift") else shift,
        )
    )


def _guidance(guidance: options_pb2.Guidance, variant: str) -> Guidance:
    scale = 1.0 if is_turbo(variant) else GUIDANCE_SCALE
    return Guidance(
        scale=guidance.scale if guidance.HasField("scale") else scale,
        method=_METHODS[guidance.method],
        start=guidance.interval_start,
        end=guidance.interval_end if guidance.HasField("interval_end") else 1.0,
    )


def _wavelet(correction: options_pb2.WaveletCorrection) -> Wavelet:
    default = Wavelet()
    return Wavelet(
        mode=_WAVELET_MODES[correction.mode],
        scale=correction.scale if correction.HasField("scale") else default.scale,
        high_scale=correction.high_scale if correction.HasField("high_scale") else default.high_scale,
    )


def _retake(retake: options_pb2.Retake) -> Retake:
    return Retake(seed=retake.seed, variance=retake.variance if retake.HasField("variance") else 0.5)
