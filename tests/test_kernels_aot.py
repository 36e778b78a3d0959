"""What the compiler makes of each kernel at the training shapes: B = 64, T = 1024, 12 heads of 64, F = 3072, V = 32000.

No GPU is needed. A process of its own compiles (this one may have Triton's interpreter on): `python -m tests.test_kernels_aot`
prints the table that docs/speed.md records. Shared memory per multiprocessor: CUDA programming guide, compute capabilities.
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
SHARED_MEMORY = {80: 164, 90: 228, 100: 228}  # KiB per multiprocessor
MATMUL = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the tensor-core instruction of each generation
COLUMNS = ("registers", "spills", "shared", "resident", "matmuls", "loads", "loads128", "stores", "stores128", "instructions")


def kernels(capability, head_dim=64):
    """name -> (kernel, pointer types, constants, launch options). The integers left are all multiples of 16 here."""
    from kernels import attention, cross_entropy, rmsnorm, rotary, swiglu

    def bf16(names, **others):
        return {f"{n}_ptr": "*bf16" for n in names.split()} | {f"{n}_ptr": t for n, t in others.items()}

    def tiled(elements):
        block, rows = rmsnorm.tile(768, elements)
        return dict(D=768, BLOCK_D=block, ROWS=rows)

    w, F = dict(weight="*fp32"), dict(F=3072, BLOCK=swiglu.BLOCK)
    rows = dict(num_warps=4)
    forward, backward = tiled(rmsnorm.FORWARD), tiled(rmsnorm.BACKWARD)
    ce = dict(V=32000, BLOCK=cross_entropy.BLOCK, GRADIENT=True, IGNORED=-100)
    turn = dict(H=12, HKV=12, HALF=32, BLOCK_T=rotary.BLOCK_T, INVERSE=False)
    table = {
        "rms_norm": (rmsnorm.rms_norm_forward_kernel, bf16("x y", **w), forward, rows),
        "add_rms_norm": (rmsnorm.rms_norm_forward_kernel, bf16("x residual h y", **w), forward, rows),
        "rms_norm backward": (rmsnorm.rms_norm_backward_kernel, bf16("h dy dx", dw="*fp32", **w), backward, rows),
        "add_rms_norm backward": (rmsnorm.rms_norm_backward_kernel, bf16("h dy dh dx", dw="*fp32", **w), backward, rows),
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
        "dq": bf16("q k v out do dq", lse="*fp32", delta="*fp32"),
        "dkdv": bf16("q k v do dk dv", lse="*fp32", delta="*fp32"),
    }
    for name, types in pointers.items():
        for dropped in (0, 26):
            options = attention.tile(name, torch.bfloat16, head_dim, dropped / 256, capability)
            constants = dict(
                H=12, GROUP=1, D=head_dim, DROPPED=dropped, QUERIES=options.pop("QUERIES"), KEYS=options.pop("KEYS")
            )
            seed = dict(seed_ptr="*i64") if dropped else {}
            label = f"attention {name}" + (" dropout" if dropped else "")
            table[label] = (getattr(attention, f"attention_{name}_kernel"), types | seed, constants, options)
    return table


def compile(kernel, types, constants, options, capability):
    """Ahead of time, each pointer, stride and size marked as a multiple of 16, as the launcher finds them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {p.name: types.get(p.name, "constexpr") for p in kernel.params}  # a pointer that is not given is None
    for p in kernel.params:
        if not p.is_constexpr and not p.name.endswith("_ptr"):
            signature[p.name] = "fp32" if p.name in ("eps", "scale") else "i32"
    constants = {n: constants.get(n) for n, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n] not in ("constexpr", "fp32")
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
    )


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


def report(capabilities, head_dims):
    rows = {}
    for capability in capabilities:
        for head_dim in head_dims:
            for name, (kernel, types, constants, options) in kernels(capability, head_dim).items():
                if head_dim != 64 and "attention" not in name:
                    continue
                compiled = compile(kernel, types, constants, options, capability)
                figures = read(compiled, capability, options["num_warps"])
                rows[f"sm_{capability} {name}" + (f" Dh={head_dim}" if head_dim != 64 else "")] = figures | {
                    "narrow": narrow_products(compiled.asm["ttir"])
                }
    return rows


def show(rows):
    lines = [f"Triton {version('triton')}", f"{'kernel':<36}" + "".join(f"{c:>13}" for c in COLUMNS)]
    return "\n".join(lines + [f"{n:<36}" + "".join(f"{r[c]:>13}" for c in COLUMNS) for n, r in rows.items()])


def compiled_elsewhere(*arguments):
    """The report of a process without the interpreter and, as the kernels are written for a GPU, without its patch."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernels_aot", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=[80, 90, 100])
def table(request):
    rows = compiled_elsewhere(str(request.param))
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
    "attention forward": 4,
    "attention dq": 3,
    "attention dkdv": 2,
    "attention forward dropout": 3,
    "attention dq dropout": 2,
    "attention dkdv dropout": 2,
}


def test_kernels_meet_their_static_gates(table):
    for name, row in table.items():
        capability, kernel = name.split(" ", 1)
        assert row["spills"] == 0, f"{name} spills"
        assert row["narrow"] == [], f"{name} multiplies a program id in 32 bits"
        if kernel.startswith("attention"):
            assert row["matmuls"] > 0, f"{name} does not use {MATMUL[int(capability[3:])]}"
            assert row["resident"] >= 2, f"{name}: {row['resident']} resident"
        elif kernel == "cross_entropy":  # the target, its logit and the loss are single numbers
            assert row["loads"] - row["loads128"] <= 2 and row["stores"] - row["stores128"] <= 1, f"{name}: narrow access"
        else:
            assert row["loads"] == row["loads128"] > 0, f"{name}: narrow loads"
            assert row["stores"] == row["stores128"] > 0, f"{name}: narrow stores"
        if capability == "sm_90":
            assert row["resident"] >= RESIDENT[kernel], f"{name}: {row['resident']} resident"


@pytest.mark.soak
@pytest.mark.parametrize("head_dim", ["32", "128"])
def test_other_head_dims_do_not_spill_without_dropout(head_dim):
    for capability in ("80", "90", "100"):
        for name, row in compiled_elsewhere(capability, head_dim).items():
            assert row["spills"] == 0 or "dropout" in name, f"{name} spills"


def test_a_program_id_multiplied_in_32_bits_is_found():
    ttir = """
    %0 = tt.get_program_id x : i32
    %1 = arith.addi %0, %c1_i32 : i32
    %2 = arith.muli %1, %arg3 : i32
    """
    assert len(narrow_products(ttir)) == 1
    assert narrow_products(ttir.replace("%1 = arith.addi %0, %c1_i32 : i32", "%1 = arith.extsi %0 : i32 to i64")) == []


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--json"]
    rows = report([int(a) for a in arguments[:1]] or [80, 90, 100], [int(a) for a in arguments[1:]] or [64])
    print(json.dumps(rows) if "--json" in sys.argv else show(rows))
