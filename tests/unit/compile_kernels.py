"""Compiles the kernels of shared decoding for an H100, without one, and prints bytes of stack and of shared memory of each."""

import json
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2] / "pgrpo" / "rollout" / "vllm"))  # without pgrpo, which imports torch
import shared_kernels  # pyright: ignore[reportMissingImports]

SIZES = {
    "HEADS": 32, "KEY_HEADS": 8, "DIM": 128, "PAGE": 16, "TILE": 64, "OWN_TILE": 16, "BLOCK": 64, "MOST": 16, "WIDTH": 256,
    "TOGETHER": 8, "BITS": 13,
}  # fmt: skip
TYPES = (
    dict.fromkeys(("Q", "K", "V", "OUT"), "*bf16")
    | dict.fromkeys(("SHARED_OUT", "SHARED_LSE", "OWN_OUT", "OWN_LSE"), "*fp32")
    | {"scale": "fp32"}
)
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def usage(kernel, folder: Path, tile: int = 64, **options: int) -> dict[str, int]:
    """Bytes; a stack is where registers are spilled to."""
    names = kernel.arg_names
    constants = {(i,): (SIZES | {"TILE": tile})[name] for i, name in enumerate(names) if kernel.params[i].is_constexpr}
    types = {name: TYPES.get(name, "*i32" if name.isupper() else "i32") for name in names}
    types |= {names[i]: "constexpr" for (i,) in constants}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*" or "stride" in name
    }
    made = triton.compile(
        ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    printed = subprocess.run([TOOL, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    stack, local = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", printed)[0]
    return {"stack": int(stack) + int(local), "shared": made.metadata.shared}


folder = Path(sys.argv[1])
simple = {
    name: usage(getattr(shared_kernels, f"{name}_kernel"), folder)
    for name in ("ranks", "common", "groups", "steps", "merge")
}
parts = {
    f"parts {tile}": usage(shared_kernels.parts_kernel, folder, tile, num_warps=4, num_stages=3)
    for tile in (16, 32, 64)
}
print(json.dumps(simple | parts))
