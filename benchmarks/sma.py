"""What SMA costs: forward and backward time and peak memory against attention without it and with a dense bias.

    python benchmarks/sma.py

In one run, in turn: plain ``scaled_dot_product_attention``; SMA (`mild.model.attention`); the N x N bias of eq. 3,
built from the same four scalars and given as ``attn_mask``. Once for the attention alone and once for SDXL's whole
attention layer (projections too, as a UNet runs it). Medians of the rounds and of the rounds' ratios go to
``benchmarks/results/sma-cpu.json`` or ``sma-DEVICE.json``. float32 on a CPU, bfloat16 on a GPU. Targets for the
attention alone at N = 4096: on a GPU within 1.05x of the plain one in time and 1.1x in memory, on a CPU 1.15x in time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from mild.model.attention import SpatialAttention, SpatialModulation, modulated_attention
from mild.versions import software_versions

HEADS, DIMENSION = 10, 64
"""Of SDXL's attention at its finest level; N = 4096 is a picture of 1024 x 1024 there."""
SEED = 0
WIDTH = HEADS * DIMENSION
VARIANTS = ("plain", "sma", "dense")
SCOPES = ("attention", "layer")


class Case:
    """One variant at one N: `run` is a forward and a backward pass, with gradients of the input and alphas."""

    def __init__(self, scope: str, variant: str, tokens: int, device: str) -> None:
        torch.manual_seed(SEED)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.alpha = nn.Parameter(torch.tensor([[0.1, -0.5], [-0.5, 0.1]], device=device))
        self.mask = (torch.rand(1, tokens, device=device) > 0.7).float()
        attend: dict[str, Callable[..., torch.Tensor]] = {"plain": self.plain, "sma": self.sma, "dense": self.dense}
        if scope == "attention":
            self.function = attend[variant]
            self.inputs = [
                torch.randn(1, tokens, HEADS, DIMENSION, device=device, dtype=dtype).requires_grad_() for _ in range(3)
            ]
            self.probe = torch.randn_like(self.inputs[0])
        else:
            processors = {
                "plain": AttnProcessor2_0(),
                "sma": SpatialAttention(SpatialModulation([]), self.alpha),
                "dense": Dense(self),
            }
            layer = Attention(WIDTH, heads=HEADS, dim_head=DIMENSION, processor=processors[variant])
            layer = layer.to(device, dtype).requires_grad_(False)
            given = {} if variant == "plain" else {"attention_mask": self.mask[:, None]}
            self.function = lambda x: layer(x, **given)
            self.inputs = [torch.randn(1, tokens, WIDTH, device=device, dtype=dtype).requires_grad_()]
            self.probe = torch.randn_like(self.inputs[0])

    def plain(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)

    def sma(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return modulated_attention(query, key, value, self.mask, self.alpha)

    def dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        region = torch.stack([1 - self.mask, self.mask])
        bias = torch.einsum("st,sbi,tbj->bij", self.alpha, region, region)[:, None].to(query.dtype)
        return self.plain(query, key, value, bias)

    def run(self) -> None:
        for leaf in (*self.inputs, self.alpha):
            leaf.grad = None
        self.function(*self.inputs).backward(self.probe)


class Dense:
    """The processor with the dense bias."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> torch.Tensor:
        layers = (attn.to_q, attn.to_k, attn.to_v)
        heads = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers)
        return attn.to_out[0](self.case.dense(*heads).flatten(2))


def timings(scope: str, tokens: int, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by variant; variants take turns, in both directions."""
    cases = {variant: Case(scope, variant, tokens, device) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(-2, rounds):
        for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            cases[variant].run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[variant].append(time.perf_counter() - started)
    return seconds


def peaks(scope: str, variant: str, sizes: list[int], device: str) -> dict[int, int]:
    """Peak bytes by N, inputs and gradients included: of the CUDA allocator, or growth of this process (Linux)."""
    Case(scope, variant, 64, device).run()
    found = {}
    for tokens in sizes:
        if device == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            Case(scope, variant, tokens, device).run()
            found[tokens] = torch.cuda.max_memory_allocated() - held
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            held = resident("VmRSS")
            Case(scope, variant, tokens, device).run()
            found[tokens] = resident("VmHWM") - held
    return found


def resident(field: str) -> int:
    """Bytes of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    """Time, measure memory (a process a variant), print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peaks", nargs=2, metavar=("SCOPE", "VARIANT"), help="print peak bytes by N and stop")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [256, 1024, 4096, 9216] if device == "cuda" else [256, 1024, 4096]
    if given.peaks:
        scope, variant = given.peaks
        print(json.dumps(peaks(scope, variant, sizes, device)))
        return
    rows = []
    load = os.getloadavg()[0]
    for scope in SCOPES:
        memory = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--peaks", scope, variant]
            # Freed memory goes back to the system at once, or a later peak would hide in it.
            allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | allocator)
            memory[variant] = {int(tokens): held for tokens, held in json.loads(done.stdout).items()}
        for tokens in sizes:
            seconds = timings(scope, tokens, device, given.rounds)
            ratios = {
                variant: median(own / plain for own, plain in zip(seconds[variant], seconds["plain"], strict=True))
                for variant in VARIANTS
            }
            for variant in VARIANTS:
                held = memory[variant][tokens]
                row = {
                    "scope": scope,
                    "tokens": tokens,
                    "variant": variant,
                    "seconds": median(seconds[variant]),
                    "time_ratio": ratios[variant],
                    "peak_bytes": held,
                    "memory_ratio": held / max(1, memory["plain"][tokens]),
                }
                rows.append(row)
                print(
                    f"{scope:9} N={tokens:5} {variant:5} {1e3 * row['seconds']:9.2f} ms {row['time_ratio']:6.3f}x"
                    f" {held / 2**20:9.1f} MiB {row['memory_ratio']:6.3f}x",
                    flush=True,
                )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    result = {
        "command": f"python benchmarks/sma.py --rounds {given.rounds}",
        "machine": {
            "device": name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_at_start": load,
        },
        "software": software_versions(),
        "settings": {
            "batch": 1,
            "heads": HEADS,
            "head_dimension": DIMENSION,
            "dtype": "bfloat16" if device == "cuda" else "float32",
            "seed": SEED,
        },
        "rows": rows,
    }
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") if device == "cuda" else "cpu"
    target = Path(__file__).parent / f"results/sma-{label}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
