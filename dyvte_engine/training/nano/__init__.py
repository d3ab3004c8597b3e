"""The embedded default model: its pictures, its tokenizer, its training and its evaluation."""
