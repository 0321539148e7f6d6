"""Imports Hugging Face models from safetensors or GGUF, and exports them. families/ has one file per family."""
