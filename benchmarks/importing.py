"""The peak memory of an import, as a share of the model's own size.

    python -m benchmarks.importing --source=SmolLM2-135M-Instruct.Q4_1.gguf     # limit: 1.5 of its float32 size
    python -m benchmarks.importing --synthetic_gb=3 --devices=8                 # limit: 1.3 of 3 GB, kept in bfloat16

Runs `python -m darkformer_jax.convert` in a process of its own and reads its peak resident size, which includes Python,
JAX and the devices' memory (on a CPU, the host's). A synthetic checkpoint is a Llama of random bfloat16 weights in
shards of 500 MB, written to --scratch and removed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import tokenizers as hf
import tqdm

from darkformer_jax.pretrained.safetensors_files import ArrayToWrite, shard, write_safetensors
from darkformer_jax.runs.load import load_model
from darkformer_jax.runs.workdir import Workdir

WIDTH, MLP, HEADS, KV_HEADS, VOCAB = 2048, 8192, 16, 4, 32000
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """The arrays of one Llama layer."""
    kv = WIDTH * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (WIDTH,),
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (kv, WIDTH),
        "self_attn.v_proj": (kv, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "post_attention_layernorm": (WIDTH,),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_synthetic(directory: Path, num_bytes: float) -> None:
    """Writes a sharded Hugging Face directory of about `num_bytes`."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    per_layer = sum(np.prod(shape) for shape in layer_shapes(0).values()) * BFLOAT16.itemsize
    layers = max(1, round((num_bytes - VOCAB * WIDTH * BFLOAT16.itemsize) / per_layer))
    for layer in range(layers):
        shapes |= layer_shapes(layer)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    hf.Tokenizer(hf.models.WordLevel(words, unk_token="w2")).save(str(directory / "tokenizer.json"))
    arrays = [ArrayToWrite(name, shape, BFLOAT16) for name, shape in shapes.items()]

    def values() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for array in tqdm.tqdm(arrays, desc="writing the checkpoint", unit="array"):
            yield (rng.random(array.shape, np.float32) - 0.5).astype(BFLOAT16)

    write_safetensors(directory, "model", shard(arrays, 500 * 10**6), values())


def peak_of_import(source: str, workdir: str, devices: int) -> int:
    """The largest resident size, in bytes, of the process that imports `source`."""
    environment = dict(os.environ)
    if devices > 1:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flag}".strip()}
    command = [sys.executable, "-m", "darkformer_jax.convert", f"--source={source}", f"--workdir={workdir}"]
    subprocess.run(command, env=environment, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    """Imports, measures, prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", help="a source for `convert --source`")
    what.add_argument("--synthetic_gb", type=float, help="size of a checkpoint that is made for the measurement")
    parser.add_argument("--devices", type=int, default=1, help="emulated CPU devices to spread it over (default: 1)")
    parser.add_argument("--scratch", type=Path, help="an existing directory for all that is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        source, workdir = args.source, os.path.join(scratch, "workdir")
        if source is None:
            source = os.path.join(scratch, "checkpoint")
            os.mkdir(source)
            write_synthetic(Path(source), args.synthetic_gb * 1e9)
        peak = peak_of_import(source, workdir, args.devices)
        model = load_model(Workdir(workdir))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    sizes = f"model {size / 1e6:,.0f} MB, peak {peak / 1e6:,.0f} MB on {args.devices} devices"
    print(f"{sizes}: {peak / size:.2f} of its size")


if __name__ == "__main__":
    main()
