"""Exit heads: their weights, and the threshold that keeps a promise."""
