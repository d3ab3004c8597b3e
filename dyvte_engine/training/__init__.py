"""Training code: the embedded model (`nano`) and the exit heads of any LLaVA-type checkpoint."""
