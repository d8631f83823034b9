"""Loading a 1 GB Llama checkpoint beside plain reading of the file, safetensors, transformers; prints JSON.

    python bench/load.py [--what cold warm cold-fp32] [--rounds 5] [--threads N] [--output FILE]

The file holds 0.5 billion bf16 weights (1.0 GB). "cold": its pages are dropped from the system's cache first;
"warm": it was read just before; "cold-fp32": cold, and the weights are wanted in fp32, twice the memory.

`disk` is the disk alone: the bytes of the file past the system's cache, into one small buffer. `read` is the
plainest loader: one thread reads the bytes in order into fresh memory.

Some loaders map the file and read nothing until a weight is used, so all contenders look at one byte of every
page of every weight before the clock stops. A child process loads once, imports are not counted; the best
round counts. The rate is bytes of the file per second.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import race

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PIECE, PAGE = 8 << 20, 4096
LOADERS = ["read", "ours", "safetensors", "transformers"]
CONTENDERS = {"cold": ["disk", *LOADERS], "warm": LOADERS, "cold-fp32": ["disk", *LOADERS]}


def write_inputs(folder: Path) -> None:
    """A folder of the shape above. The values do not matter to a loader."""
    import torch

    from caravan.model import checkpoint
    from caravan.model.decoder import Decoder
    from caravan.model.families import llama

    with torch.device("meta"):
        model = Decoder(llama.spec(CONFIG), "llama", dict(CONFIG))
    noise = torch.randn(1 << 20).mul(0.02).bfloat16()
    full = {
        name: noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view(p.shape)
        for name, p in model.named_parameters()
    }
    model.load_state_dict(full, assign=True)
    checkpoint.save_model(model, folder)
    os.sync()  # pages that are not written yet cannot be dropped


def prepare(what: str, files: list[Path]) -> None:
    """Put the files into the system's cache, or out of it."""
    buffer = bytearray(PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if what == "warm":
                while file.readinto(buffer):  # type: ignore[attr-defined]
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contend(what: str, who: str, folder: Path, steps: int, threads: int) -> race.Result:
    """One contender, in this process."""
    from collections.abc import Callable, Iterable

    import torch

    dtype = torch.float32 if what == "cold-fp32" else torch.bfloat16
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)

    def read() -> Iterable[torch.Tensor]:
        whole = torch.empty(size * (2 if what == "cold-fp32" else 1), dtype=torch.uint8)
        target, at = whole.numpy().data, 0
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(target[at : at + PIECE]):  # type: ignore[attr-defined]
                    at += count
        return [whole]

    def disk() -> Iterable[torch.Tensor]:
        buffer = mmap.mmap(-1, PIECE)  # whole pages, as reading past the cache demands
        for path in files:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
            while os.readv(handle, [buffer]) == PIECE:
                pass
            os.close(handle)
        return []

    def ours() -> Iterable[torch.Tensor]:
        return checkpoint.load_model(folder, dtype).parameters()

    def safetensors() -> Iterable[torch.Tensor]:
        return [t.to(dtype) for path in files for t in load_file(path).values()]

    def transformers() -> Iterable[torch.Tensor]:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).parameters()

    load: Callable[[], Iterable[torch.Tensor]] = locals()[who]
    if who == "ours":
        from caravan.model import checkpoint
    elif who == "safetensors":
        from safetensors.torch import load_file
    elif who == "transformers":
        from transformers import LlamaForCausalLM
    prepare(what, files)
    start = time.perf_counter()
    loaded = list(load())
    for tensor in loaded:
        tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].max()
    seconds = time.perf_counter() - start
    rate = size / seconds / 1e9
    return {"rate": rate, "unit": "GB/s", "seconds": seconds, "peak_rss_mb": race.peak_rss_mb()}


if __name__ == "__main__":
    race.main(__file__, __doc__ or "", CONTENDERS, write_inputs, contend)
