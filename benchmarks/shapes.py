"""What is measured and tested: the tensors of models by name, vocabularies, rows."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def gpt2(layers: int, width: int) -> list[Shape]:
    """Radford et al. 2019, with the vocabulary of 50257 and 1024 places; the head is the embedding."""
    block = [
        *[(width,), (width,)],  # ln_1
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],  # attention
        *[(width,), (width,)],  # ln_2
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],  # mlp
    ]
    return [(50257, width), (1024, width), *(block * layers), (width,), (width,)]


def llama(layers: int, width: int, hidden: int, key_width: int, vocabulary: int, tied: bool) -> list[Shape]:
    """Touvron et al. 2023; `key_width` is that of all key heads together."""
    block = [
        *[(width, width), (key_width, width), (key_width, width), (width, width)],  # q, k, v, o
        *[(hidden, width), (hidden, width), (width, hidden)],  # gate, up, down
        *[(width,), (width,)],
    ]
    head = [] if tied else [(vocabulary, width)]
    return [(vocabulary, width), *(block * layers), (width,), *head]


def vit(layers: int, width: int) -> list[Shape]:
    """Dosovitskiy et al. 2021: patches of 16 x 16 in images of 224 x 224, 1000 classes."""
    block = [
        *[(width,), (width,)],
        *[(3 * width, width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],
    ]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*stem, *(block * layers), (width,), (width,), (1000, width), (1000,)]


def sharded(shapes: list[Shape], ranks: int) -> list[Shape]:
    """What the first rank holds of each tensor under FSDP2: a part of its first dimension, the larger where uneven."""
    return [(-(-shape[0] // ranks), *shape[1:]) for shape in shapes]


_LLAMA_1B = llama(16, 2048, 8192, 512, 128256, tied=True)
_LLAMA_7B = llama(32, 4096, 11008, 4096, 32000, tied=False)

MODELS: dict[str, list[Shape]] = {
    "gpt2-small": gpt2(12, 768),  # 148 tensors, 124 M parameters
    "gpt2-xl": gpt2(48, 1600),  # 580, 1.56 B
    "llama-1b-shard": sharded(_LLAMA_1B, 8),  # 146, 154 M: a rank of 8
    "llama-7b-shard": sharded(_LLAMA_7B, 16),  # 291, 421 M: a rank of 16
    "vit-tiny": vit(12, 192),  # 152, 5.7 M: many small ones
    "one-128m": [(1 << 27,)],
    "one-1b": [(1 << 30,)],
    "2000x64": [(64,)] * 2000,  # nothing but finding them
    "2000x1000": [(1000,)] * 2000,
}
TITLES = {
    "gpt2-small": "GPT-2 small",
    "gpt2-xl": "GPT-2 XL",
    "llama-1b-shard": "1/8 of Llama 1B",
    "llama-7b-shard": "1/16 of Llama 7B",
    "vit-tiny": "ViT-Ti, 152 small tensors",
    "one-128m": "one tensor of 128 M",
    "one-1b": "one tensor of 1 G",
    "2000x64": "2000 tensors of 64",
    "2000x1000": "2000 tensors of 1000",
}
TENSOR_COUNTS = (1, 10, 100, 1000, 10000)  # of 64 elements each: time against the number of tensors

VOCABULARIES = {"32k": 32768, "gpt2": 50257, "llama-3": 128256, "gemma": 262144}
LINEAR = [(2048, 512, 32000)]  # rows, hidden width, vocabulary
LINEAR_ON_GPU = [(8192, 4096, 128256), (4096, 4096, 128256), (8192, 2048, 32768)]
IMAGES = (8, 21, 512, 512)  # of segmentation: batch, classes, height, width
DENSE_ELEMENTS = 64 << 20  # of a mean squared error


def numel(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def smaller(shapes: list[Shape], by: int) -> list[Shape]:
    """As many tensors of as many dimensions, each dimension a `by`-th, at least 1: what a test has time for."""
    return [tuple(max(1, size // by) for size in shape) for shape in shapes]
