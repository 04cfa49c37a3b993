"""Models: pure Flax modules, from patches and token ids to embeddings."""
