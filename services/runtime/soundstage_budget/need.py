"""What a service needs of its device's memory, part by part: formulas with coefficients that were measured.

On a CPU the coefficients are of peaks measured at several sizes (tests/budget); on a card, of what the same code has
alive at once. They say what is in use; what an allocator keeps beside it is in the context.
"""

from dataclasses import dataclass
from typing import Final, Literal

from soundstage_budget.engine_choice import EngineName
from soundstage_budget.models import BYTES, DitModel, LmModel, TransformerShape, VaeModel
from soundstage_runtime.score import CODE_RATE_HZ, LATENT_CHANNELS, MAX_LATENT_FRAMES, SAMPLES_PER_LATENT

Offload = Literal["none", "model", "layer"]
Quantization = Literal["none", "int8", "fp8"]

MIB: Final = 1 << 20
KEPT_BYTES: Final = 64 * MIB  # of songs that were made, to be aligned: more than ten of the longest
LATENT_RATE_HZ: Final = 25
FRAMES_PER_TOKEN: Final = 2
_CUDA_CONTEXT: Final = 450 * MIB  # driver, cuBLAS and cuDNN; torch's allocator does not see it
_CPU_CONTEXT: Final = 64 * MIB  # calls, tables, and what malloc keeps
_CPU_TOKENIZER: Final = 160 * MIB  # the libraries around a tokenizer, its tables, and what malloc keeps of reading it
_CPU_KERNELS: Final = 288 * MIB  # made for the lengths of songs that were met, oneDNN's 64 latest and others
LAYERS_AT_ONCE: Final = 2  # of a transformer that is offloaded: the one at work and the next
_SCALES: Final = 1.01  # of quantised weights, a scale a row
_PAGE: Final = 64  # tokens, of the planner's cache
_WORDS: Final = 1096  # tokens of a song beside its codes
_JUDGED_AT_ONCE: Final = 128  # tokens
_CONDITIONS: Final = 256 + 2048 + 1  # of a song: words, lyrics and a timbre, at most
_PASS_BYTES: Final = 3 * MIB  # of a forward pass with fused kernels, however short
BATCHED_TOKENS: Final = 4096  # that vLLM reads in a step: both prompts of a song, or the codes of ten minutes
_ENGINE_ROOM: Final = 512 * MIB  # of vLLM, for its graphs and what its kernels work in; meant as a bound, not measured
_SAMPLED_BYTES: Final = 24  # of a number of vLLM's logits: in float32, sorted, and with places
_ENCODED_AT_ONCE: Final = 2560  # tokens of lyrics, or of codes, before the first step of a song


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes by part; `loading` is what the weights take while they are read, beside the context.

    A card then holds no more than what stays: weights become what they are to be in the CPU's memory.
    """

    weights: int
    kv: int = 0
    activations: int
    workspace: int = 0
    context: int
    loading: int = 0

    @property
    def total(self) -> int:
        """What is in use at most while serving."""
        return self.weights + self.kv + self.activations + self.workspace + self.context

    @property
    def peak(self) -> int:
        """What is in use at most at any time."""
        return max(self.total, self.loading + self.context)


def context_bytes(*, on_card: bool) -> int:
    """Return what a process takes before it holds a model."""
    return _CUDA_CONTEXT if on_card else _CPU_CONTEXT


# --- the codec


def codec_piece_steps(*, on_card: bool) -> int:
    """Return how many steps of 8 samples the codec's layers at audio rate work on at once.

    A CPU's caches hold what they become, 4 MB in float32; a card wants more work at a time.
    """
    return 4096 if on_card else 1024


def tile_bytes(model: VaeModel, window_frames: int, *, tiles: int = 1, itemsize: int, on_card: bool) -> int:
    """Return what a tile takes that is encoded, or tiles that are decoded together, whichever is more."""
    return max(
        encode_bytes(model, window_frames, itemsize=itemsize, on_card=on_card),
        decode_bytes(model, window_frames, tiles=tiles, itemsize=itemsize, on_card=on_card),
    )


def encode_bytes(model: VaeModel, window_frames: int, *, itemsize: int, on_card: bool) -> int:
    """Return what a tile takes that is encoded."""
    tensors = 5.1 if itemsize == 4 else 8.0
    return _pass_bytes(model, window_frames, tensors=tensors, itemsize=itemsize, on_card=on_card) + 5 * MIB


def decode_bytes(model: VaeModel, window_frames: int, *, tiles: int = 1, itemsize: int, on_card: bool) -> int:
    """Return what tiles take that are decoded together."""
    # A card's convolutions want room of their own; what that is has not been measured.
    tensors = (5.1 if on_card else 4.0) if itemsize == 4 else 8.0
    frames = tiles * window_frames
    return _pass_bytes(model, frames, tiles=tiles, tensors=tensors, itemsize=itemsize, on_card=on_card) + 2 * MIB


def _pass_bytes(
    model: VaeModel, num_frames: int, *, tiles: int = 1, tensors: float, itemsize: int, on_card: bool
) -> int:
    """Return what the layers take that work on so many frames.

    That is those below audio rate, so many tensors at their widest; or what those give, and a piece at audio rate
    beside it; or the largest layer's weights once more, which convolutions lay out anew.
    """
    frames = num_frames * model.frame_values * itemsize
    samples = num_frames * SAMPLES_PER_LATENT * 2 * 4
    piece = min(tiles * codec_piece_steps(on_card=on_card) * 8, num_frames * SAMPLES_PER_LATENT) * model.channels * 4
    return round(max(tensors * frames, frames + 5.1 * piece + samples, model.largest_tensor * itemsize))


def codec_call_bytes(window_frames: int, max_duration_s: int) -> int:
    """Return what a call holds beside its tile: a window of sound, its noise, and what is on its way."""
    noise = max_duration_s * LATENT_RATE_HZ * LATENT_CHANNELS * 4
    return 2 * window_frames * SAMPLES_PER_LATENT * 2 * 4 + noise + 4 * MIB


def need_vae(
    model: VaeModel,
    *,
    dtype: str,
    window_frames: int,
    max_tiles: int = 1,
    max_batch: int,
    max_duration_s: int,
    offload: Offload,
    on_card: bool,
) -> Need:
    """Say what a codec needs."""
    itemsize = BYTES[dtype]
    halves = (model.encoder_parameters, model.decoder_parameters)
    weights = (sum(halves) if offload == "none" else max(halves)) * itemsize
    return Need(
        weights=weights,
        activations=tile_bytes(model, window_frames, tiles=max_tiles, itemsize=itemsize, on_card=on_card),
        # What calls hold is on the host.
        workspace=0 if on_card else max_batch * codec_call_bytes(window_frames, max_duration_s),
        context=context_bytes(on_card=on_card),
        loading=0 if on_card else model.file_bytes + sum(halves) * 4,
    )


# --- the planner


def song_tokens(duration_s: int) -> int:
    """Return how many tokens one row of a song takes: codes, and words before them."""
    return duration_s * CODE_RATE_HZ + _WORDS


def page_bytes(shape: TransformerShape, itemsize: int) -> int:
    """Return what a page of the planner's cache takes."""
    return shape.kv_bytes(_PAGE, itemsize)


def row_bytes(shape: TransformerShape, *, duration_s: int, itemsize: int) -> int:
    """Return what the keys and values of one row of a song take, in whole pages; a guided song has two rows."""
    return -(-song_tokens(duration_s) // _PAGE) * page_bytes(shape, itemsize)


def token_step_bytes(shape: TransformerShape, *, cached_tokens: int, itemsize: int) -> int:
    """Return what a step takes in which every row reads a token: scores and mixed values of every page."""
    pages = -(-cached_tokens // _PAGE)
    return pages * shape.heads * (3 * _PAGE + 5 * shape.head_dim) * 4 + MIB


def piece_bytes(shape: TransformerShape, *, length: int, piece: int, itemsize: int) -> int:
    """Return what reading `piece` tokens takes, the last of `length`: gathered keys and values, and the layers."""
    gathered = 4 * length * shape.kv_heads * shape.head_dim * itemsize
    layers = piece * (4 * shape.width + 3 * shape.mlp_width + 4 * shape.heads * shape.head_dim) * 4
    return gathered + layers + piece * length + MIB


def need_lm(
    model: LmModel, *, dtype: str, max_batch: int, max_duration_s: int, on_card: bool, engine: EngineName = "torch"
) -> Need:
    """Say what a planner needs that writes so many songs at once; PyTorch's scores one text beside them.

    vLLM's process has a context on the card, and the process that started it none.
    """
    if engine == "vllm" and on_card:
        return _need_vllm(model, dtype=dtype, max_batch=max_batch, max_duration_s=max_duration_s)
    itemsize, shape = BYTES[dtype], model.shape
    tokens = song_tokens(max_duration_s)
    words = model.vocabulary - model.num_codes
    # Rows of the embedding that are kept once more: on a CPU, laid out for it, those of every set of tokens.
    heads = words if on_card else model.num_codes + 4 * words
    weights = (model.parameters + heads * shape.width) * itemsize
    row = row_bytes(shape, duration_s=max_duration_s, itemsize=itemsize)
    converted = model.file_bytes if model.file_bytes != model.parameters * itemsize else 0
    return Need(
        weights=weights,
        kv=2 * max_batch * row + row,
        activations=token_step_bytes(shape, cached_tokens=2 * max_batch * tokens, itemsize=itemsize)
        + piece_bytes(shape, length=tokens, piece=1024 if on_card else 128, itemsize=itemsize),
        workspace=_JUDGED_AT_ONCE * model.vocabulary * (itemsize + 9),
        context=context_bytes(on_card=on_card) + (0 if on_card else _CPU_TOKENIZER),
        loading=0 if on_card else model.file_bytes + converted + model.parameters * itemsize,
    )


def _need_vllm(model: LmModel, *, dtype: str, max_batch: int, max_duration_s: int) -> Need:
    itemsize, shape = BYTES[dtype], model.shape
    of_a_token = 4 * shape.width + 3 * shape.mlp_width + 4 * shape.heads * shape.head_dim
    row = row_bytes(shape, duration_s=max_duration_s, itemsize=itemsize)
    return Need(
        weights=model.parameters * itemsize,
        kv=2 * max_batch * row + page_bytes(shape, itemsize),  # a page is the engine's own
        activations=BATCHED_TOKENS * of_a_token * itemsize
        + 2 * max_batch * model.vocabulary * (itemsize + _SAMPLED_BYTES),
        workspace=_ENGINE_ROOM,
        context=context_bytes(on_card=True),
    )


# --- the diffusion


def velocity_bytes(shape: TransformerShape, *, tokens: int, longest: int, itemsize: int, in_blocks: bool) -> int:
    """Return what one forward pass takes over `tokens` of songs, the longest of `longest`.

    `in_blocks` is how a CPU attends; a card does with fused kernels. In 16 bits a CPU's is from above: it rotates, and
    adds up, in float32.
    """
    if not in_blocks:
        return tokens * _token_bytes(shape, itemsize) + _PASS_BYTES
    width, queries, keys = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    groups = shape.heads // shape.kv_heads
    scores = 2 * 4 * max(min(3 << 18, groups * longest**2), longest) * (1 if itemsize == 4 else shape.kv_heads)
    fed = 2 * 4 * min(tokens, 768) * shape.mlp_width
    return round(tokens * 4 * (3 * width + 2.5 * queries + 4 * keys + 500)) + scores + fed + 3 * MIB


def velocity_tokens(shape: TransformerShape, *, free_bytes: float, itemsize: int) -> float:
    """Return how many tokens a forward pass has room for that attends with fused kernels; below 0 for none."""
    return (free_bytes - _PASS_BYTES) / _token_bytes(shape, itemsize)


def _token_bytes(shape: TransformerShape, itemsize: int) -> int:
    width, queries, keys = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attended = itemsize * (4 * width + 8 * queries + 5 * keys // 2) + 1700
    fed = itemsize * (4 * width + 2 * shape.mlp_width) + 1700
    return max(attended, fed)


def song_bytes(
    shape: TransformerShape,
    *,
    num_frames: int,
    num_conditions: int,
    itemsize: int,
    channels: int = LATENT_CHANNELS,
    context_channels: int = 2 * LATENT_CHANNELS,
    sets: int = 1,
    reference_frames: int = 0,
) -> int:
    """Return, from above, what a song keeps while it is made: latents, contexts, and what is remembered of its words.

    `sets` counts the sets of conditions with words; those without take one vector, and no context of their own.
    """
    kept = 8 * num_frames * channels * 4  # latents, velocities, and what samplers keep of the step before
    references = reference_frames * channels * 4
    context = num_frames * context_channels * itemsize
    remembered = shape.kv_bytes(num_conditions, itemsize)
    joined = remembered // shape.layers  # a layer's at a time are laid beside those of other songs
    return kept + references + sets * (context + remembered + joined)


def need_dit(
    model: DitModel,
    *,
    dtype: str,
    quantization: Quantization,
    offload: Offload,
    max_batch: int,
    max_duration_s: int,
    max_tokens: int,
    on_card: bool,
) -> Need:
    """Say what a diffusion model needs; a step takes `max_tokens`, or one song that is longer."""
    itemsize, shape = BYTES[dtype], model.shape
    matrices = shape.layers * model.layer_parameters
    matrix_bytes = matrices * (itemsize if quantization == "none" else _SCALES)
    ends = (model.parameters - matrices) * itemsize
    match offload:
        case "none":
            weights = ends + matrix_bytes + sum(model.beside) * itemsize
        case "model":
            weights = ends + matrix_bytes + model.largest_piece * itemsize
        case "layer":
            layers = matrix_bytes * LAYERS_AT_ONCE / shape.layers
            weights = ends + max(layers, model.largest_piece * itemsize)
    frames = min(max_duration_s * LATENT_RATE_HZ, MAX_LATENT_FRAMES)
    longest = -(-frames // FRAMES_PER_TOKEN)
    # A CPU has one velocity at a time.
    of_a_song = longest * (2 if model.is_guided and on_card else 1)
    at_once = min(max_tokens, max_batch * of_a_song) if on_card else 0
    tokens = max(of_a_song, at_once, _ENCODED_AT_ONCE)
    longest = max(longest, _ENCODED_AT_ONCE)
    silence = MAX_LATENT_FRAMES * LATENT_CHANNELS * itemsize
    all_weights = (model.parameters + sum(model.beside)) * itemsize
    return Need(
        weights=round(weights) + silence,
        kv=max_batch * song_bytes(shape, num_frames=frames, num_conditions=_CONDITIONS, itemsize=itemsize),
        activations=velocity_bytes(shape, tokens=tokens, longest=longest, itemsize=itemsize, in_blocks=not on_card),
        workspace=0 if on_card else KEPT_BYTES,
        context=context_bytes(on_card=on_card) + (0 if on_card else _CPU_TOKENIZER + _CPU_KERNELS),
        loading=0 if on_card else model.file_bytes + all_weights,
    )
