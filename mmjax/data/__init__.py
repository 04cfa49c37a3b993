"""Data: sources, decoding, tokenizers, the deterministic input pipeline."""
