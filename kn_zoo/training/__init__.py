"""Training from recipes: data, one resumable run, seeds and searches."""
