"""Compiles Triton kernels for given cards as their launchers would, on a machine without any."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# What a program may have of a multiprocessor's shared memory, in bytes.
SHARED = {"8.0": 163 * 1024, "8.9": 99 * 1024, "9.0": 227 * 1024, "12.0": 99 * 1024}
SPILLED = 8
"""Registers that a thread may lay aside in memory."""
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def compiled(
    kernel: Any, card: str, arguments: dict[str, Any], options: dict[str, int]
) -> tuple[int, int]:
    """(bytes of shared memory, registers spilled) of the kernel as a launch with these arguments
    would compile it."""
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
    made = triton.compile(source, target=target, options=options)
    return made.metadata.shared, spilled(made.asm["ptx"])


def spilled(ptx: str) -> int:
    """Registers that the assembler lays aside in memory."""
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    ptxas = get_ptxas(int(architecture[3:5])).path
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/kernel.ptx"
        with open(source, "w") as file:
            file.write(ptx)
        # As Triton calls it.
        options = ["-v", "--regAllocOptLevel=2", f"--gpu-name={architecture}"]
        command = [ptxas, *options, source, "-o", f"{folder}/kernel"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", said)[1]) // 4


def recorder(kernel: Any, card: str, title: str) -> Any:
    """Stands in for a kernel: compiles instead of launching, and prints `fits` or `refused`."""

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def start(*args: Any, **kwargs: Any) -> None:
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
                arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
                try:
                    shared, registers = compiled(kernel, card, arguments, options)
                    fits = shared <= SHARED[card] and registers <= SPILLED
                    verdict = "fits" if fits else "refused"
                    found = f"{shared} bytes, {registers} registers spilled"
                except Exception as error:  # what the compiler raises has many types
                    verdict, found = "refused", f"{error!r:.300}"
                print(f"{verdict}: {kernel.fn.__name__}, {card}, {title}, {found}")  # noqa: T201

            return start

    return Recorder()
