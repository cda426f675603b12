"""Compiles the Triton kernels for GPUs that need not be there, and prints a line for each: `python -m testing.kernel_binaries`.

What a kernel computes is for Triton's interpreter to show. This shows that a GPU could run it: types, pointers and the assembler.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_ssn.sharing import kernels

CAPABILITIES = (80, 90)
PRECISIONS = (("fp32", "bf16"), ("fp64", "fp64"))
"""Of the bank, and of the weights."""
TABLES = ("places", "entries", "firsts", "lines")


def compiled(name: str, bank: str, weights: str, capability: int, **constants: Any) -> int:
    """Bytes of one kernel's binary."""
    function = getattr(kernels, name)
    function = getattr(function, "fn", function) if hasattr(function, "configs") else function
    types = {"scales": "*fp32", "size": "i32", "out": f"*{weights}", "grad": f"*{weights}"}
    types |= {table: "*i64" for table in TABLES}
    constants = {**constants, "CHUNK": 16, "SUM": getattr(tl, f"float{bank[2:]}")}
    constants = {argument: constants[argument] for argument in function.arg_names if argument in constants}
    signature = {argument: types.get(argument, f"*{bank}") for argument in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(function.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


def main() -> None:
    for capability in CAPABILITIES:
        for bank, weights in PRECISIONS:
            for flag in (False, True):
                for name in ("_generate", "_pull_back", "_row_gains", "_column_gains"):
                    size = compiled(name, bank, weights, capability, GAINS=flag, SMALL=flag)
                    print(capability, bank, weights, name, size)


if __name__ == "__main__":
    main()
