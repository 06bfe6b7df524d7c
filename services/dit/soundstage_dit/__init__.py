"""The diffusion stage: words and audio codes in, latents out."""
