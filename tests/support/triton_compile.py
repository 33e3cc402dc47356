"""Compiles the Triton kernels for given cards, on a machine without any, as their launchers would.

`python triton_compile.py 8.0 9.0` takes the usual block in bf16, with `all` every table of block
sizes. Prints a line per launch: `fits` or `refused`, and its shared memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixlora_exp.kernels.triton import launch, router, tiles

KERNELS: dict[str, Any] = {
    name: value
    for module in (launch, router)
    for name, value in vars(module).items()
    if isinstance(value, triton.JITFunction)
}

# What a program may have of a multiprocessor's shared memory, in bytes.
SHARED = {"8.0": 163 * 1024, "8.9": 99 * 1024, "9.0": 227 * 1024, "12.0": 99 * 1024}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def compiled(kernel: Any, card: str, arguments: dict[str, Any], options: dict[str, int]) -> int:
    """Shared memory of the kernel as a launch with these arguments would compile it."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    major, minor = card.split(".")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(major) * 10 + int(minor), 32)
    return triton.compile(source, target=target, options=options).metadata.shared


def recorder(kernel: Any, card: str, title: str) -> Any:
    """Stands in for a kernel: compiles instead of launching."""

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def start(*args: Any, **kwargs: Any) -> None:
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
                arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
                try:
                    shared = compiled(kernel, card, arguments, options)
                    verdict = "fits" if shared <= SHARED[card] else "refused"
                except Exception as error:  # what the compiler raises has many types
                    shared, verdict = None, f"refused ({error!r:.300})"
                name = kernel.fn.__name__
                print(f"{verdict}: {name}, {card}, {title}, {shared} bytes")  # noqa: T201

            return start

    return Recorder()


def compile_block(
    card: str,
    dtype: torch.dtype,
    rank: int,
    slots: int = 2,
    dora: bool = False,
    masked: bool = True,
    biased: bool = False,
) -> None:
    """One forward and backward pass of 256 tokens, F = 1024, E = 8."""
    title = f"{dtype}, E R = {8 * rank}, K = {slots}, DoRA {dora}, bias {biased}"
    tokens, inner, columns = 256, 1024, 8 * rank
    for name, kernel in KERNELS.items():
        setattr(launch, name, recorder(kernel, card, title))
    low = torch.empty(inner, columns, dtype=dtype)
    wide = torch.empty(tokens, inner, dtype=dtype)
    scale = torch.empty(8, inner, dtype=dtype) if dora else None
    bias = torch.empty(inner, dtype=dtype) if biased else None
    operands = launch.Operands(
        wide,
        wide,
        torch.empty(tokens, 2 * columns, dtype=dtype),
        low,
        low,
        low,
        scale,
        scale,
        bias,
        bias,
        torch.empty(tokens, slots, dtype=torch.int64),
        torch.empty(tokens, slots),
        torch.empty(tokens, inner, dtype=torch.uint8) if masked else None,
        2.0,
        2.0,
        8,
        rank,
        "silu" if slots > 1 else "gelu",
        dora,
    )
    launch.forward(operands)
    shape = (tokens, slots, inner) if dora else (tokens, inner)
    q = torch.empty(tokens, columns, dtype=dtype)
    launch.backward_inner(operands, torch.empty(shape, dtype=dtype), q)
    launch.backward_tokens(operands, torch.empty(shape, dtype=dtype), q)


def main(cards: list[str], everything: bool) -> None:
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=100)
    for card in cards:
        capability = tuple(int(part) for part in card.split("."))
        torch.cuda.get_device_capability = lambda device, known=capability: known
        router._router_kernel = recorder(KERNELS["_router_kernel"], card, "E = 8")
        router._Route.apply(torch.empty(64, 256).bfloat16(), torch.empty(8, 256), 2)
        compile_block(card, torch.bfloat16, 16)
        compile_block(card, torch.bfloat16, 16, dora=True, biased=True)
        if not everything:
            continue
        compile_block(card, torch.bfloat16, 16, dora=True)
        for width in sorted(tiles.HALF_TILES["forward"].keys() - {128}):
            compile_block(card, torch.bfloat16, width // 8)
        for slots in (1, 3, 8):
            compile_block(card, torch.float16, 16, slots, masked=False)
        for width in tiles.FULL_TILES:
            compile_block(card, torch.float32, width // 8)


if __name__ == "__main__":
    main([card for card in sys.argv[1:] if card != "all"], "all" in sys.argv)
