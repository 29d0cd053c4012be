"""Takes the machine code of our CUDA kernels apart: what each needs, and its instructions, counted by kind."""

from __future__ import annotations

import re
from pathlib import Path

from cuda_toolkit import ToolError, find_binary, run

from hlip_kernels.machine_code import Instruction, fullest_turns, parse

RESERVED_SHARED_MEMORY = 1024  # of each block, by the system, from sm_80 on


def read_cubin(path: Path, arch: str) -> dict[str, dict[str, int]]:
    """Mangled name -> figures, of every kernel in a cubin, by their names in :class:`cuda_resources.Resources`."""
    usage = run(find_binary("cuobjdump"), "--dump-resource-usage", path)
    elf = run(find_binary("cuobjdump"), "--dump-elf", path)
    sass = run(find_binary("nvdisasm"), "-c", path)
    # From sm_90 on, what the system keeps is counted as the kernel's.
    reserved = RESERVED_SHARED_MEMORY if int(arch.removeprefix("sm_")) >= 90 else 0
    threads = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.M)[1:]:
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)", section)
        if bounds:
            x, y, z = (int(b, 16) for b in bounds.groups())
            threads[section.split(None, 1)[0]] = x * y * z
    code = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, flags=re.M | re.S))
    kernels = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code[name], flags=re.M)
        if not instructions:
            raise ToolError(f"no instructions of {name} found in what nvdisasm prints: read_cubin has to learn its new form")
        if name not in threads:
            raise ToolError(f"{name} does not say how many threads a block has: give it __launch_bounds__")

        def count(pattern, instructions=instructions):
            return sum(re.match(pattern, i) is not None for i in instructions)

        kernels[name] = dict(
            threads=threads[name],
            registers=number["REG"],
            stack=number["STACK"] + number["LOCAL"],
            local_loads=count(r"LDL\b"),
            local_stores=count(r"STL\b"),
            static_shared=number["SHARED"] - reserved,
            products=count(r"HMMA\b"),
            matrix_loads=count(r"LDSM\b"),
            exponentials=count(r"MUFU\.EX2\b"),
            issued=" ".join(f"{products}/{all_}" for products, all_ in _turns(code[name], "HMMA")),
            copying="/".join(map(str, max(_turns(code[name], "LDGSTS.E.BYPASS"), default=()))),
        )
    return kernels


def _turns(code: str, of: str) -> list[tuple[int, int]]:
    """Of the innermost loops with such instructions, by address: how many a turn has, and how many instructions in all. Of a
    turn that leaves nothing out (it packs and stores as well), and does nothing that only some do, such as masking."""

    def worth(instruction: Instruction) -> int:
        return 1000 * instruction.name.startswith(of) + instruction.name.startswith(("F2FP", "STG"))

    return [(most // 1000, fewest) for most, fewest in fullest_turns(parse(code), worth) if most >= 1000]


def parse_name(mangled: str) -> tuple[str, str, int, int, int]:
    """(kernel, dtype, head dim, keys, step) of a mangled name: element type and head dim come first, then, of the backward
    kernel for whole segments, its warps, which keep 32 rows each, and its step."""
    found = re.match(r"_ZN4hlip\d+(short_attention_[a-z_]+)I(6__half|13__nv_bfloat16)((?:L[a-z]\d+E)+)E", mangled)
    if found is None:
        raise ToolError(f"{mangled} is not a name of csrc/short_attention as it was: parse_name has to learn it")
    kernel, element, numbers = found.groups()
    values = [int(v) for v in re.findall(r"L[a-z](\d+)E", numbers)]
    keys, step = (32 * values[1], values[2]) if kernel.endswith("whole_backward") else (0, 0)
    return kernel, {"6__half": "float16", "13__nv_bfloat16": "bfloat16"}[element], values[0], keys, step
