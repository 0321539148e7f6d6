"""Models of the Hugging Face world: in from safetensors or GGUF, and out again. One family a file, in families/."""
