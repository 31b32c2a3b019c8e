"""The manifest of trained checkpoints: finding, checking, loading, bundling and publishing them."""
