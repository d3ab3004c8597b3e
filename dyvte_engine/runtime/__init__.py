"""How rows run through the layers: prefill, decoding, the K/V cache, sampling. Knows tokens, not pictures."""
