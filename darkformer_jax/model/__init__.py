"""The transformer, and what is asked of it: sizes, trainable sets, low-rank updates, sampling."""
