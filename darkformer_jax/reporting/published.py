"""Accuracies that others published on the benchmarks, each with its source. None was measured with this library.

A figure is in percent, of the metric that the benchmark's name stands for (`reporting.benchmarks.BENCHMARKS`).
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Where figures were published, and the models that they are of; "" = not known here."""

    name: str
    models: str


class Published(NamedTuple):
    """A published figure."""

    model: str
    figure: float
    source: Source


_LRA = Source(
    "README of google-research/long-range-arena (arXiv 2011.04006)",
    "ListOps: 4 layers of width 512, 5,000 steps of 32; "
    "CIFAR-10: 1 layer of width 128 (Reformer: 4 of width 64), 35,000 steps of 256; "
    "Text: 4 layers of width 256, 20,000 steps of 32; Retrieval: 4 layers of width 128, 5,000 steps of 32; "
    "Pathfinder: models of several sizes, 62,400 steps of 512",
)
_NYSTROM = Source("img/LRA.png in mlpen/Nystromformer", "2 layers of width 64, 2 heads; CIFAR-10: 35,000 steps")
_XFORMERS = Source("BENCHMARKS.md of facebookresearch/xformers", "2 layers, one setting for all tasks")
_S4 = Source("S4 paper (v2)", "bidirectional, 6 layers or more of width 128 to 512; CIFAR-10: pixels as real numbers")
_S5 = Source("S5 paper", "bidirectional, 6 layers or more of width 128 to 512; CIFAR-10: pixels as real numbers")
_LRU = Source("LRU paper", "")
_MEGA = Source("MEGA paper", "CIFAR-10: pixels as real numbers")
_METALA = Source("MetaLA paper", "")
_XLSTM = Source("xLSTM paper, as quoted in the LION paper", "")
_MLRA = Source("report of fluderm/MLRA", "0.1 to 0.9 million parameters")
_AMOS = Source("arXiv 2310.02980, as quoted in the report of fluderm/MLRA", "")
_AMOS_PRETRAINED = Source("arXiv 2310.02980, as quoted in the RTF paper", "sizes of Long Range Arena, causal")
_LION = Source("LION paper", "bidirectional")
_LLAMA = Source(
    "model card of nkiyohara/lra-image-softmax-noncausal", "bidirectional, 6 layers of width 512, 200 epochs"
)
_BERT = Source(
    "examples/pytorch/text-classification/README.md of huggingface/transformers",
    "bert-base-cased, an encoder, fine-tuned on the task alone; development split",
)
_GPT2 = Source("models of fusion_bench", "GPT-2 small, a head on the last token; development split")
_LION_GLUE = Source("LION paper", "110 million parameters, bidirectional linear attention, pretrained")
_NYSTROM_GLUE = Source("Nystromformer paper", "pretrained, an encoder")

_SELF_PRETRAINED = "Transformer, causal, after self-pretraining"

PUBLISHED: dict[str, tuple[Published, ...]] = {  # by the benchmark's name
    "listops": (
        Published("Transformer", 36.37, _LRA),
        Published("Performer", 18.01, _LRA),
        Published("Linear Transformer", 16.13, _LRA),
        Published("Linformer", 35.70, _LRA),
        Published("Reformer", 37.27, _LRA),
        Published("BigBird", 36.05, _LRA),
        Published("Transformer", 37.10, _NYSTROM),
        Published("Nystromformer", 37.15, _NYSTROM),
        Published("Reformer", 19.05, _NYSTROM),
        Published("Linformer", 37.25, _NYSTROM),
        Published("Performer", 18.80, _NYSTROM),
        Published("Transformer", 37.5, _XFORMERS),
        Published("Nystromformer, 128 landmarks", 36.29, _XFORMERS),
        Published("Performer, m 256", 19.56, _XFORMERS),
        Published("Linformer", 36.69, _XFORMERS),
        Published("S4", 59.60, _S4),
        Published("S5", 62.15, _S5),
        Published("LRU", 60.2, _LRU),
        Published("MEGA", 63.14, _MEGA),
        Published("MEGA-chunk", 58.76, _MEGA),
        Published("Mamba", 38.02, _METALA),
        Published("Mamba", 32.5, _XLSTM),
        Published("Mamba", 44.86, _MLRA),
        Published("Transformer, rotary positions", 38.86, _MLRA),
        Published("Transformer, rotary positions", 47.90, _AMOS),
        Published(_SELF_PRETRAINED, 59.15, _AMOS_PRETRAINED),
        Published("LION-LIT, linear attention", 16.78, _LION),
    ),
    "cifar10": (
        Published("Transformer", 42.44, _LRA),
        Published("Performer", 42.77, _LRA),
        Published("Linear Transformer", 42.34, _LRA),
        Published("Linformer", 38.56, _LRA),
        Published("Reformer", 38.07, _LRA),
        Published("BigBird", 40.83, _LRA),
        Published("Transformer", 38.20, _NYSTROM),
        Published("Nystromformer", 41.58, _NYSTROM),
        Published("Reformer", 43.29, _NYSTROM),
        Published("Linformer", 37.84, _NYSTROM),
        Published("Performer", 37.07, _NYSTROM),
        Published("Transformer", 38.69, _XFORMERS),
        Published("Nystromformer, 128 landmarks", 42.86, _XFORMERS),
        Published("Performer, m 256", 36.09, _XFORMERS),
        Published("Linformer", 35.57, _XFORMERS),
        Published("S4", 88.65, _S4),
        Published("S5", 88.00, _S5),
        Published("LRU", 89.0, _LRU),
        Published("MEGA", 90.44, _MEGA),
        Published("MEGA-chunk", 85.80, _MEGA),
        Published("Mamba", 69.82, _METALA),
        Published("Mamba", 68.9, _XLSTM),
        Published("Mamba", 68.74, _MLRA),
        Published("Transformer, rotary positions", 67.70, _MLRA),
        Published("Transformer, rotary positions", 75.04, _AMOS),
        Published(_SELF_PRETRAINED, 76.00, _AMOS_PRETRAINED),
        Published("LION-LIT, linear attention", 43.29, _LION),
        Published("softmax, bidirectional", 69.87, _LLAMA),
    ),
    "cola": (Published("BERT base", 56.53, _BERT), Published("LION-LIT", 49.2, _LION_GLUE)),
    "sst2": (
        Published("BERT base", 92.32, _BERT),
        Published("GPT-2 small", 91.2, _GPT2),
        Published("LION-LIT", 91.7, _LION_GLUE),
        Published("Nystromformer", 91.4, _NYSTROM_GLUE),
    ),
    "mrpc": (Published("BERT base", 88.85, _BERT), Published("Nystromformer", 88.1, _NYSTROM_GLUE)),
    "stsb": (Published("BERT base", 88.48, _BERT),),
    "qqp": (Published("BERT base", 87.49, _BERT),),
    "mnli": (
        Published("BERT base", 83.91, _BERT),
        Published("GPT-2 small", 82.1, _GPT2),
        Published("LION-LIT", 82.5, _LION_GLUE),
    ),
    "qnli": (
        Published("BERT base", 90.66, _BERT),
        Published("GPT-2 small", 88.3, _GPT2),
        Published("LION-LIT", 89.3, _LION_GLUE),
        Published("Nystromformer", 88.7, _NYSTROM_GLUE),
    ),
    "rte": (
        Published("BERT base", 65.70, _BERT),
        Published("GPT-2 small", 65.3, _GPT2),
        Published("LION-LIT", 63.5, _LION_GLUE),
    ),
    "wnli": (Published("BERT base", 56.34, _BERT),),
}

# Figures of Text, Retrieval, Pathfinder (32 pixels per row) and Path-X; None = not published, or chance.
_MORE_OF_LONG_RANGE_ARENA: tuple[tuple[str, Source, tuple[float | None, ...]], ...] = (
    ("Transformer", _LRA, (64.27, 57.46, 71.40, None)),
    ("Performer", _LRA, (65.40, 53.82, 77.05, None)),
    ("Linear Transformer", _LRA, (65.90, 53.09, 75.30, None)),
    ("Linformer", _LRA, (53.94, 52.27, 76.34, None)),
    ("Reformer", _LRA, (56.10, 53.40, 68.50, None)),
    ("BigBird", _LRA, (64.02, 59.29, 74.87, None)),
    ("Transformer", _NYSTROM, (65.02, 79.35, 74.16, None)),
    ("Nystromformer", _NYSTROM, (65.52, 79.56, 70.94, None)),
    ("Reformer", _NYSTROM, (64.88, 78.64, 69.36, None)),
    ("Linformer", _NYSTROM, (55.91, 79.37, 67.60, None)),
    ("Performer", _NYSTROM, (63.81, 78.62, 69.87, None)),
    ("Transformer", _XFORMERS, (62.66, 79.24, 70.37, None)),
    ("Nystromformer, 128 landmarks", _XFORMERS, (63.24, 78.18, 67.49, None)),
    ("Performer, m 256", _XFORMERS, (62.76, 81.1, 67.23, None)),
    ("Linformer", _XFORMERS, (57.39, 76.41, 65.12, None)),
    ("S4", _S4, (86.82, 90.90, 94.20, 96.35)),
    ("S5", _S5, (89.31, 91.40, 95.33, 98.58)),
    ("LRU", _LRU, (89.4, 89.9, 95.1, 94.2)),
    ("MEGA", _MEGA, (90.43, 91.25, 96.01, 97.98)),
    ("MEGA-chunk", _MEGA, (90.19, 90.97, 94.41, 93.81)),
    ("Mamba", _METALA, (82.98, 72.14, 69.26, 67.32)),
    ("Mamba", _XLSTM, (None, 90.2, 99.2, None)),
    ("Mamba", _MLRA, (81.27, 86.51, 74.17, None)),
    ("Transformer, rotary positions", _MLRA, (65.79, 74.30, 68.44, None)),
    ("Transformer, rotary positions", _AMOS, (79.08, 82.31, 76.64, 84.72)),
    (_SELF_PRETRAINED, _AMOS_PRETRAINED, (88.81, 90.38, 88.49, 88.05)),
    ("LION-LIT, linear attention", _LION, (65.21, 54.00, 72.78, None)),
)
PUBLISHED |= {
    name: tuple(
        Published(model, figure, source)
        for model, source, figures in _MORE_OF_LONG_RANGE_ARENA
        if (figure := figures[place]) is not None
    )
    for place, name in enumerate(("text", "retrieval", "lra_pathfinder32", "lra_pathfinder128"))
}
