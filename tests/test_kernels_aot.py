"""What the compiler makes of each kernel at the training shapes: B = 64, T = 1024, 12 heads of 64, F = 3072, V = 32000.

No GPU is needed. A process of its own compiles (this one may have Triton's interpreter on): `python -m tests.test_kernels_aot
[capability] [head dim] [odd | gqa]` prints the table that docs/kernels.md records. For another Triton, install it into a folder
(`pip install --no-deps --target=DIR triton==3.6.0`) and set PYTHONPATH=DIR, for this command or for pytest.
Shared memory per multiprocessor: CUDA programming guide, compute capabilities.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB per multiprocessor
MATMUL = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # tensor-core instructions
COLUMNS = "loop registers spills shared resident matmuls loads loads128 stores stores128 instructions".split()


def kernels(capability, head_dim=64, D=768, V=32000, T=1024, GROUP=1):  # noqa: N803
    """Returns name -> (kernel, pointer types, constants, launch options). Other arguments are integers, or eps and scale."""
    from kernels import attention, cross_entropy, rmsnorm, rotary, swiglu

    def bf16(names, **others):
        return {f"{n}_ptr": "*bf16" for n in names.split()} | {f"{n}_ptr": t for n, t in others.items()}

    def norm(kernel, types, elements):
        options = rmsnorm.tile(D, elements)
        warps = dict(num_warps=options.pop("num_warps"))
        return kernel, types, dict(D=D, **options), warps

    w, F = dict(weight="*fp32"), dict(F=3072, BLOCK=swiglu.BLOCK)
    rows = dict(num_warps=4)
    forward, backward = rmsnorm.rms_norm_forward_kernel, rmsnorm.rms_norm_backward_kernel
    stride = -(-V // cross_entropy.ALIGNED) * cross_entropy.ALIGNED
    ce = dict(V=V, STRIDE=stride, BLOCK=cross_entropy.BLOCK, GRADIENT=True, IGNORED=-100)
    turn = dict(H=12, HKV=12 // GROUP, HALF=32, BLOCK_T=rotary.BLOCK_T)
    table = {
        "rms_norm": norm(forward, bf16("x h y", **w), rmsnorm.FORWARD),
        "add_rms_norm": norm(forward, bf16("x residual h y", **w), rmsnorm.FORWARD),
        "rms_norm backward": norm(backward, bf16("h dy dx", dw="*fp32", **w), rmsnorm.BACKWARD),
        "add_rms_norm backward": norm(backward, bf16("h dy dh dx", dw="*fp32", **w), rmsnorm.BACKWARD),
        "rotary": (rotary.rotary_kernel, bf16("q k q_out k_out", cos="*fp32", sin="*fp32"), turn, rows),
        "swiglu": (swiglu.swiglu_forward_kernel, bf16("gate_up y"), F, rows),
        "swiglu backward": (swiglu.swiglu_backward_kernel, bf16("gate_up dy dgate_up"), F, rows),
        "cross_entropy": (
            cross_entropy.cross_entropy_kernel,
            bf16("logits", targets="*i64", loss="*fp32"),
            ce,
            dict(num_warps=cross_entropy.WARPS),
        ),
    }
    import torch

    pointers = {
        "forward": bf16("q k v out", lse="*fp32"),
        "dq": bf16("q k v out do dqkv", lse="*fp32", stats="*fp32", cos="*fp32", sin="*fp32"),
        "dkdv": bf16("q k v do dqkv", stats="*fp32", cos="*fp32", sin="*fp32"),
    }
    table_of_tiles = attention.TILES[max(c for c in attention.TILES if c <= capability)]
    for name, types in pointers.items():
        for dropped in (0, 26):
            options = attention.tile(table_of_tiles, name, torch.bfloat16, head_dim, dropped / 256, GROUP)
            queries, keys = options.pop("QUERIES"), options.pop("KEYS")
            constants = dict(H=12, GROUP=GROUP, D=head_dim, DROPPED=dropped, QUERIES=queries, KEYS=keys, RAGGED=T % queries > 0)
            seed = dict(seed_ptr="*i64") if dropped else {}
            label = f"attention {name}" + (" dropout" if dropped else "")
            table[label] = (getattr(attention, f"attention_{name}_kernel"), types | seed, constants, options)
    return table


def compile(kernel, types, constants, options, capability, odd=()):
    """Compiles ahead of time. Pointers, strides and sizes are multiples of 16, as the launcher finds them, but for `odd`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {p.name: types.get(p.name, "constexpr") for p in kernel.params}  # a pointer that is not given is None
    for p in kernel.params:
        if not p.is_constexpr and not p.name.endswith("_ptr"):
            signature[p.name] = "fp32" if p.name in ("eps", "scale") else "i32"
    constants = {n: constants.get(n) for n, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n] not in ("constexpr", "fp32") and n not in odd
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read(compiled, capability, warps):
    """Registers, spills, shared memory, resident blocks and instructions of a compiled kernel."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        quiet = dict(text=True, stderr=subprocess.DEVNULL)
        usage, sass = (subprocess.check_output([tool, a, file.name], **quiet) for a in ("-res-usage", "-sass"))
    used = {n: int(v) for n, v in re.findall(r"(REG|STACK):(\d+)", usage)}

    def count(pattern):
        return len(re.findall(pattern, sass))

    loops = inner_matmul_loops(sass)
    shared = compiled.metadata.shared
    registers = -(-used["REG"] // 8) * 8 * 32 * warps
    resident = min(65536 // registers, SHARED_MEMORY[capability] * 1024 // (shared + 1024), 2048 // (32 * warps))
    return dict(
        registers=used["REG"],
        spills=used["STACK"] + count(r"\b(?:LDL|STL)\b"),
        shared=shared,
        resident=resident,
        matmuls=count(rf"\b{MATMUL[capability]}\b"),
        loads=count(r"\bLDG\.") + count(r"\bLDGSTS\."),
        loads128=count(r"\bLDG\.\S*128") + count(r"\bLDGSTS\.\S*128"),
        stores=count(r"\bSTG\."),
        stores128=count(r"\bSTG\.\S*128"),
        instructions=count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+\S"),
        loop=32 * warps * min(loops, default=0),
    )


def inner_matmul_loops(sass):
    """Returns the number of instructions of each innermost loop with a matmul: attention's, masked and not."""
    code = [(int(at, 16), text) for at, text in re.findall(r"(?m)^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?);", sass)]
    loops = []
    for end, text in code:
        back = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if back and int(back[1], 16) < end:
            body = [t for at, t in code if int(back[1], 16) <= at <= end]
            if any("MMA" in t for t in body):
                loops.append((int(back[1], 16), end, len(body)))
    return [n for start, end, n in loops if not any((start, end) != (a, b) and start <= a and b <= end for a, b, _ in loops)]


def narrow_products(ttir):
    """The 32-bit multiplications in a kernel's TTIR that a program id goes into."""
    tainted, found = set(), []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w:]+).* = (.*)", line)
        if not match:
            continue
        name, rest = match.group(1).split(":")[0], match.group(2)
        if "tt.get_program_id" in rest:
            tainted.add(name)
        elif tainted & set(re.findall(r"%\w+", rest)) and "arith.extsi" not in rest and rest.split(" : ")[-1].count("i32"):
            tainted.add(name)
            if "arith.muli" in rest:
                found.append(line.strip())
    return found


SHAPES = {  # the other shapes, and the kernels that they concern
    "odd": (dict(D=8192, V=50257, T=1000), ("attention", "rms_norm", "add_rms_norm", "cross_entropy")),
    "gqa": (dict(GROUP=3), ("attention", "rotary")),
}


def report(capability=90, head_dim=64, shape=""):
    """Returns a row of figures for each kernel; with another head dim or shape, of those that it concerns."""
    rows = {}
    sizes, concerned = SHAPES.get(shape, ({}, ()))
    integers = ("Tq", "Tk") if shape == "odd" else ()
    for name, (kernel, types, constants, options) in kernels(capability, head_dim, **sizes).items():
        if (head_dim != 64 and "attention" not in name) or (concerned and name.split()[0] not in concerned):
            continue
        compiled = compile(kernel, types, constants, options, capability, integers)
        label = f"sm_{capability} {name}" + (f" Dh={head_dim}" if head_dim != 64 else "") + f" {shape}".rstrip()
        rows[label] = read(compiled, capability, options["num_warps"])
        rows[label]["narrow"] = narrow_products(compiled.asm["ttir"])
        rows[label]["loop"] /= constants.get("QUERIES", 1) * constants.get("KEYS", 1)
    return rows


def show(rows):
    lines = [f"Triton {version('triton')}", f"{'kernel':<36}" + "".join(f"{c:>13}" for c in COLUMNS)]
    return "\n".join(lines + [f"{n:<36}" + "".join(f"{round(r[c], 2):>13}" for c in COLUMNS) for n, r in rows.items()])


def compiled_elsewhere(*arguments):
    """The report of a process without the interpreter and, as the kernels are written for a GPU, without its patch."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernels_aot", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=[80, 90, 100, *(pytest.param(c, marks=pytest.mark.soak) for c in (86, 89, 120))])
def table(request):
    rows = compiled_elsewhere(request.param)
    print("\n" + show(rows))
    return rows


RESIDENT = {  # blocks per multiprocessor, at least, on sm_90; registers and shared memory set them
    "rms_norm": 8,
    "add_rms_norm": 8,
    "rms_norm backward": 4,
    "add_rms_norm backward": 4,
    "rotary": 12,
    "swiglu": 16,
    "swiglu backward": 16,
    "cross_entropy": 4,
    "attention forward": 2,
    "attention dq": 2,
    "attention dkdv": 2,
    "attention forward dropout": 3,
    "attention dq dropout": 2,
    "attention dkdv dropout": 2,
}

# Instructions of all threads per (query, key) in the unmasked loop, at most. Triton's tutorial 06 has 8.03 (forward), 8.31 (dq)
# and 10.16 (dk, dv) on sm_90, and 10.28, 11.62 and 18.72 on sm_80, where all three spill; flash-linear-attention has 11.66,
# 9.38, 13.28 and 15.16, 12.72, 16.91. For tiles of fewer than 64 queries, as on sm_80, Triton 3.6 spends more instructions
# than 3.7 on loading lse and delta. The tiles of sm_90 are the fastest on an H200, not those with the fewest instructions.
OLD = version("triton").startswith("3.6.") if importlib.util.find_spec("triton") else False
LOOP = {"sm_90 attention forward": 9.1, "sm_90 attention dq": 8.0, "sm_90 attention dkdv": 9.1,
        "sm_80 attention forward": 9.6, "sm_80 attention dq": 10.7, "sm_80 attention dkdv": 15.9 if OLD else 14.9}  # fmt: skip


# Kernels that spill and are faster on an H200 than with a tile that does not: with dropout by 11%, with grouped queries by 15%.
# With both it has the tile of dropout, which was not timed so.
FASTER = ("sm_90 attention dkdv dropout", "sm_90 attention dkdv gqa")


def spills(name, row):
    return row["spills"] > 0 and not name.startswith(FASTER)


def test_kernels_meet_their_static_gates(table):
    for name, row in table.items():
        capability, kernel = name.split(" ", 1)
        assert not spills(name, row), f"{name} spills"
        assert row["narrow"] == [], f"{name} multiplies a program id in 32 bits"
        assert row["shared"] <= 101_376, f"{name}: more shared memory than 8.6, 8.9 and 12.x have"
        if kernel.startswith("attention"):
            assert row["matmuls"] > 0, f"{name} does not use {MATMUL[int(capability[3:])]}"
            assert row["resident"] >= 2, f"{name}: {row['resident']} resident"
        elif kernel == "cross_entropy":  # the target, its logit and the loss are single numbers
            assert row["loads"] - row["loads128"] <= 2 and row["stores"] - row["stores128"] <= 1, f"{name}: narrow access"
        else:
            assert row["loads"] == row["loads128"] > 0, f"{name}: narrow loads"
            assert row["stores"] == row["stores128"] > 0, f"{name}: narrow stores"
        if name in LOOP:
            assert 0 < row["loop"] <= LOOP[name], f"{name}: {row['loop']:.2f} instructions per query and key"
        if capability == "sm_90":
            assert row["resident"] >= RESIDENT[kernel], f"{name}: {row['resident']} resident"


@pytest.mark.soak
@pytest.mark.parametrize("shape", ["", "odd"])
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_other_head_dims_do_not_spill(head_dim, shape):
    for capability in SHARED_MEMORY:
        for name, row in compiled_elsewhere(capability, head_dim, shape).items():
            assert row["spills"] == 0, f"{name} spills"
            assert row["shared"] <= 101_376, f"{name}: more shared memory than 8.6, 8.9 and 12.x have"


@pytest.mark.parametrize("shape", ["odd", pytest.param("gqa", marks=pytest.mark.soak)])
@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.soak) for c in (80, 86, 89, 100, 120))])
def test_other_shapes_neither_spill_nor_split_their_loads(capability, shape):
    """T = 1000, which is no multiple of 16; V = 50257, which is odd; D = 8192. Twelve heads of queries on four of keys."""
    for name, row in compiled_elsewhere(capability, 64, shape).items():
        assert not spills(name, row), f"{name} spills"
        assert row["shared"] <= 101_376, f"{name}: more shared memory than 8.6, 8.9 and 12.x have"
        if "cross_entropy" in name:
            assert row["loads"] - row["loads128"] <= 2 and row["stores"] - row["stores128"] <= 1, f"{name}: narrow access"


def test_a_program_id_multiplied_in_32_bits_is_found():
    ttir = """
    %0 = tt.get_program_id x : i32
    %1 = arith.addi %0, %c1_i32 : i32
    %2 = arith.muli %1, %arg3 : i32
    """
    assert len(narrow_products(ttir)) == 1
    assert narrow_products(ttir.replace("%1 = arith.addi %0, %c1_i32 : i32", "%1 = arith.extsi %0 : i32 to i64")) == []


if __name__ == "__main__":
    rows = report(*(int(a) if a.isdigit() else a for a in sys.argv[1:] if a != "--json"))
    print(json.dumps(rows) if "--json" in sys.argv else show(rows))
