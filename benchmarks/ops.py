"""`bench.py kernels` times each Triton op on a GPU against its baselines, `bench.py tiles` under other tile sizes.

The shape is B = 64, T = 1024, D = 768, 12 heads of 64, F = 3072, V = 32000 in bf16, then a sweep of T and D. Each result is
compared with the definition before it is timed. Times are medians of triton.testing.do_bench, which clears the L2 cache before
each call; `graph_ms` is the time in a CUDA graph, without the host. GB/s count each input read once and each output written
once, TFLOP/s the causal half; shares are of what a large copy and a large matmul reach on the same GPU in the same run.
"""

import json
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import machine
from config import ROOT

SHAPE = dict(B=64, T=1024, D=768, H=12, F=3072, V=32000)
SWEEP = [dict(T=T, B=65536 // T) for T in (256, 512, 2048, 4096)] + [dict(D=64 * H, H=H, F=256 * H) for H in (8, 16, 32)]
EPS = 1e-6
OPS = ("rms_norm", "add_rms_norm", "rotary", "swiglu", "attention", "linear_cross_entropy")


def randn(*shape, scale=1.0):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(scale).requires_grad_()


def case(name, B, T, D, H, F, V):  # noqa: N803
    """Returns for an op: its function of an op set, the inputs, and the work forward and backward: bytes, attention's FLOPs."""
    N, x, Dh = B * T, 2 * B * T * D, D // H  # x: the bytes of one activation (N, D)
    if name in ("rotary", "attention"):
        q, k, v = (t.requires_grad_() for t in randn(B, T, 3 * D).detach().unflatten(-1, (3 * H, Dh)).split(H, 2))
    if name == "rotary":
        angles = torch.outer(torch.arange(T), 10000.0 ** -(torch.arange(0, Dh, 2) / Dh)).cuda()
        return lambda ops, q, k: ops.rotary(q, k, angles.cos(), angles.sin()), [q, k], 4 * x, 4 * x
    if name == "attention":
        flops = 2 * B * H * T * T * Dh
        return lambda ops, *qkv: ops.causal_attention(*qkv), [q, k, v], flops, 2.5 * flops
    if name == "swiglu":
        return lambda ops, g: ops.swiglu(g), [randn(N, 2 * F)], 6 * N * F, 10 * N * F
    if name == "linear_cross_entropy":
        targets = torch.randint(0, V, (N,), device="cuda")
        return lambda ops, x, w: ops.linear_cross_entropy(x, w, targets), [randn(N, D), randn(V, D, scale=0.02)], None, None
    weight = torch.rand(D, device="cuda").add(0.5).requires_grad_()
    if name == "rms_norm":
        return lambda ops, x, w: ops.rms_norm(x, w, EPS), [randn(N, D), weight], 2 * x, 3 * x
    return lambda ops, x, r, w: ops.add_rms_norm(x, r, w, EPS), [randn(N, D), randn(N, D), weight], 4 * x, 4 * x


def baselines(name, op, inputs):
    """Returns {name: function of the inputs} of the kernel and of everything it is timed against."""
    from kernels import eager, fused, sdpa

    found = {
        "fused": lambda *xs: op(fused, *xs),
        "eager": lambda *xs: op(eager, *xs),
        "compile": torch.compile(lambda *xs: op(sdpa, *xs)),
    }
    if name == "attention":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            found[f"sdpa {backend.name.lower()}"] = sdpa_kernel(backend)(lambda *xs: op(sdpa, *xs))
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as LinearCrossEntropy
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as RMSNorm
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as SiLUMul
    except ImportError:
        return found
    targets = torch.randint(0, inputs[1].shape[0], inputs[0].shape[:1], device="cuda") if len(inputs) > 1 else None
    liger = {
        "rms_norm": lambda x, w: RMSNorm.apply(x, w, EPS),
        "swiglu": lambda g: SiLUMul.apply(*g.chunk(2, -1)),
        "linear_cross_entropy": lambda x, w: LinearCrossEntropy.apply(x, w, targets)[0],
    }
    return found | ({"liger": liger[name]} if name in liger else {})


def outputs(f, inputs) -> tuple:
    out = f(*inputs)
    return out if isinstance(out, tuple) else (out,)


def median_ms(f) -> float:
    from triton.testing import do_bench

    return do_bench(f, warmup=50, rep=200, return_mode="median")


def measure(f, inputs) -> dict:
    """Returns the ms of forward, backward and both, of both in a CUDA graph (None if f cannot be captured), and peak memory."""
    from triton.testing import do_bench_cudagraph

    wanted = [x for x in inputs if x.requires_grad]
    out = outputs(f, inputs)
    grads = [torch.randn_like(o) for o in out]

    def both():
        return torch.autograd.grad(outputs(f, inputs), wanted, grads)

    row = dict(
        forward_ms=median_ms(torch.no_grad()(lambda: f(*inputs))),
        backward_ms=median_ms(lambda: torch.autograd.grad(out, wanted, grads, retain_graph=True)),
        both_ms=median_ms(both),
    )
    out = None  # not counted as peak memory
    try:
        row["graph_ms"] = do_bench_cudagraph(both, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        row["graph_ms"] = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    return row | dict(peak_bytes=torch.cuda.max_memory_allocated() - before)


def check(name, shape):
    """Compares a Triton op with its definition on a smaller problem; raises RuntimeError if it differs by more than 2%."""
    from kernels import eager, fused

    op, inputs, _, _ = case(name, **(shape | dict(B=2, T=min(shape["T"], 512))))
    results = []
    for ops in (fused, eager):
        torch.manual_seed(0)
        out = outputs(lambda *xs: op(ops, *xs), inputs)  # noqa: B023
        grads = [torch.randn(o.shape, device=o.device).to(o.dtype) for o in out]  # the same, whatever the layout of out
        results.append([*out, *torch.autograd.grad(out, inputs, grads)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not error < 2e-2:
            raise RuntimeError(f"{name}: result {i} differs from the definition by {error:.1e}; it was not timed")


def ceilings() -> dict:
    """Returns the GB/s of a large copy and the TFLOP/s of a large bf16 matmul, on random data."""
    a, m = torch.randn(2**30, device="cuda"), randn(8192, 8192).detach()
    b = torch.empty_like(a)
    copy, matmul = median_ms(lambda: b.copy_(a)), median_ms(lambda: m @ m)
    return dict(copy_gb_s=2 * 4 * 2**30 / copy / 1e6, matmul_tflop_s=2 * 8192**3 / matmul / 1e9)


def rates(row, is_flops, forward, backward, top) -> dict:
    """Returns a row's GB/s or TFLOP/s and their shares of the GPU's ceiling."""
    unit, scale, ceiling = ("tflop_s", 1e9, top["matmul_tflop_s"]) if is_flops else ("gb_s", 1e6, top["copy_gb_s"])
    found = {}
    for way, work in dict(forward=forward, backward=backward, both=forward + backward).items():
        found[f"{way}_{unit}"] = work / row[f"{way}_ms"] / scale
        found[f"{way}_share"] = found[f"{way}_{unit}"] / ceiling
    return found


def sweep_shapes(top) -> list[dict]:
    """Times every op against its baselines at the main shape, then at other T and D."""
    results = []
    for change in [{}, *SWEEP]:
        shape, rows = SHAPE | change, {}
        print(f"\n{shape}\n{'':<36}{'forward ms':>11}{'backward ms':>12}{'both ms':>9}{'graph ms':>9}{'share':>7}")
        for name in OPS:
            check(name, shape)
            op, inputs, forward, backward = case(name, **shape)
            for who, f in baselines(name, op, inputs).items():
                try:
                    row = measure(f, inputs)
                    row |= rates(row, name == "attention", forward, backward, top) if forward else {}
                except RuntimeError as e:  # out of memory, or a backend that does not take this shape
                    row = dict(failed=str(e).splitlines()[0])
                rows[f"{name}: {who}"] = row
                figures = (row.get(k) for k in ("forward_ms", "backward_ms", "both_ms", "graph_ms", "forward_share"))
                print(f"{name + ': ' + who:<36}" + "".join(f"{'' if v is None else format(v, '.3f'):>10}" for v in figures))
            torch.compiler.reset()
            torch.cuda.empty_cache()
        results.append(dict(shape=shape, rows=rows))
    return results


def tiles() -> list[tuple]:
    """Returns (op, pass, where its launch constant is stored, the key there, values to try) of every constant to be decided.

    Attention's are (queries, keys, warps, stages) by head dim: of the forward, then of dq, then of dk and dv.
    """
    from kernels import attention, cross_entropy, rmsnorm, rotary, swiglu

    dh = SHAPE["D"] // SHAPE["H"]
    table = attention.tiles(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    forward = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
    dq = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)]
    dkdv = [(32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)]
    powers = [2**i for i in range(10, 15)]
    norms = [(op, way, vars(rmsnorm), way.upper(), powers) for op in OPS[:2] for way in ("forward", "backward")]
    return norms + [
        ("attention", "forward", table["forward"], dh, forward),
        ("attention", "backward", table["dq"], dh, dq),
        ("attention", "backward", table["dkdv"], dh, dkdv),
        ("rotary", "forward", vars(rotary), "BLOCK_T", [8, 16, 32, 64]),
        ("swiglu", "forward", vars(swiglu), "BLOCK", [512, 1024, 2048, 4096]),
        ("swiglu", "backward", vars(swiglu), "BLOCK", [512, 1024, 2048, 4096]),
        ("linear_cross_entropy", "both", vars(cross_entropy), "BLOCK", [2048, 4096, 8192, 16384]),
        ("linear_cross_entropy", "both", vars(cross_entropy), "WARPS", [4, 8, 16]),
    ]


def sweep_tiles() -> list[dict]:
    """Times each op with every value of each launch constant, the others at their defaults."""
    from kernels import fused

    rows = []
    for name, way, where, key, values in tiles():
        op, inputs, _, _ = case(name, **SHAPE)
        default = where[key]
        for value in values:
            where[key] = value
            row = dict(op=name, constant=str(key), way=way, value=value, default=value == default)
            try:
                check(name, SHAPE)
                row |= measure(lambda *xs: op(fused, *xs), inputs)  # noqa: B023
            except Exception as e:  # wrong, or too much shared memory or too many registers: Triton has a class for each
                row |= dict(failed=str(e).splitlines()[0])
            rows.append(row)
            figure = row.get("failed") or f"{row[f'{way}_ms']:.3f} ms"
            print(f"{name:<22}{way:<10}{key!s:<10}{value!s:<20}{'default' if value == default else '':<9}{figure}", flush=True)
        where[key] = default
    return rows


def main(what: str) -> int:
    """Times `kernels` or `tiles` and writes results/bench/<card>-<what>.json. Returns exit status 2 if there is no GPU."""
    if not torch.cuda.is_available():
        print(f"bench.py {what}: times need an NVIDIA GPU, and there is none here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    record = machine() | dict(ceilings=ceilings())
    record["results"] = sweep_shapes(record["ceilings"]) if what == "kernels" else sweep_tiles()
    path = ROOT / "results/bench" / f"{record['card'].replace(' ', '-')}-{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")
    return 0
