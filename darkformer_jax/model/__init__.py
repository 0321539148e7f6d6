"""The transformer, with its sizes, trainable sets, low-rank updates and sampling."""
