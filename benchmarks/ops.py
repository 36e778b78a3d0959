"""Times each kernel on a GPU: `bench.py kernels`, and with other tiles: `bench.py tiles`. Correctness first, then medians, in
one run with the card's own ceilings.

At B = 64, T = 1024, D = 768, 12 heads of 64, F = 3072, V = 32000 in bf16, and over a sweep of T and D. A time is the median of
CUDA events around the call, the L2 cache flushed before each; `graph_ms` is one replay of a CUDA graph that holds 10 calls, a
tenth of it: with no host in it. GB/s count each input read once and each output written once; TFLOP/s the causal half.
Shares are of what a large copy and a large matmul reach on the same card in the same run.
"""

import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import machine
from config import ROOT

SHAPE = dict(B=64, T=1024, D=768, H=12, F=3072, V=32000)
SWEEP = [dict(T=T, B=65536 // T) for T in (256, 512, 2048, 4096)] + [dict(D=64 * H, H=H, F=256 * H) for H in (8, 16, 32)]
EPS = 1e-6
OPS = ("rms_norm", "add_rms_norm", "rotary", "swiglu", "attention", "linear_cross_entropy")


def randn(*shape, grad=True):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def cases(B, T, D, H, F, V):  # noqa: N803
    """op -> (its function of an op set, inputs, forward work, backward work); work is bytes, or FLOPs for attention."""
    N, x, Dh = B * T, 2 * B * T * D, D // H  # x: bytes of one activation (N, D)
    weight = torch.rand(D, device="cuda").add(0.5).requires_grad_()
    angles = torch.outer(torch.arange(T), 10000.0 ** -(torch.arange(0, Dh, 2) / Dh)).cuda()
    table = angles.cos(), angles.sin()
    flops = 2 * B * H * T * T * Dh

    def qkv():
        return randn(B, T, 3 * D).detach().unflatten(-1, (3 * H, Dh)).split(H, 2)

    def leaves(*tensors):
        return [t.requires_grad_() for t in tensors]

    return {
        "rms_norm": (lambda ops, x, w: ops.rms_norm(x, w, EPS), [randn(N, D), weight], 2 * x, 3 * x),
        "add_rms_norm": (
            lambda ops, x, r, w: ops.add_rms_norm(x, r, w, EPS),
            [randn(N, D), randn(N, D), weight],
            4 * x,
            4 * x,
        ),
        "rotary": (lambda ops, q, k: ops.rotary(q, k, *table), leaves(*qkv()[:2]), 4 * x, 4 * x),
        "swiglu": (lambda ops, g: ops.swiglu(g), [randn(N, 2 * F)], 6 * N * F, 10 * N * F),
        "attention": (lambda ops, q, k, v: ops.causal_attention(q, k, v), leaves(*qkv()), flops, 2.5 * flops),
        "linear_cross_entropy": (
            lambda ops, x, w, t: ops.linear_cross_entropy(x, w, t),
            [randn(N, D), randn(V, D).detach().mul_(0.02).requires_grad_(), torch.randint(0, V, (N,), device="cuda")],
            None,
            None,
        ),
    }


def sdpa(backend):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            heads = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    return attention


def liger(name):
    """Liger's function for an op, where Liger is installed."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None

    def linear_cross_entropy(x, w, targets):
        return LigerFusedLinearCrossEntropyFunction.apply(x, w, targets)[0]

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS),
        "swiglu": lambda g: LigerSiLUMulFunction.apply(*g.chunk(2, -1)),
        "linear_cross_entropy": linear_cross_entropy,
    }.get(name)


def median_ms(f, runs=50):
    """Median time of f() after a warm-up, the L2 cache overwritten before each run."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for i in range(runs + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def graph_ms(f, calls=10):
    """Time of one f() in the replay of a CUDA graph of ten; None where f cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            f()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                f()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return median_ms(graph.replay, runs=20) / calls


def measure(f, inputs):
    """Forward, backward and both, in ms, and the peak of memory above what stood before."""
    wanted = [x for x in inputs if x.requires_grad]

    def outputs():
        out = f(*inputs)
        return out if isinstance(out, tuple) else (out,)

    grads = [torch.randn_like(o) for o in outputs()]

    def both():
        return torch.autograd.grad(outputs(), wanted, grads)

    def backward_ms():
        out = outputs()
        return median_ms(lambda: torch.autograd.grad(out, wanted, grads, retain_graph=True))

    def forward():
        with torch.no_grad():
            return f(*inputs)

    row = dict(forward_ms=median_ms(forward), backward_ms=backward_ms(), both_ms=median_ms(both))
    row["graph_both_ms"] = graph_ms(both)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    return row | dict(peak_bytes=torch.cuda.max_memory_allocated() - before)


def check(f, reference, inputs):
    """Refuses to time what is wrong: a smaller problem against eager, in the norm."""
    wanted = [x for x in inputs if x.requires_grad]
    results = []
    for op in (f, reference):
        torch.manual_seed(0)
        out = op(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        grads = [torch.randn(o.shape, device=o.device).to(o.dtype) for o in out]  # the same, whatever the layout of out
        results.append([*out, *torch.autograd.grad(out, wanted, grads)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not error < 2e-2:
            raise SystemExit(f"bench.py: result {i} is wrong by {error:.1e}: nothing was timed")


def ceilings():
    """GB/s of a large copy and TFLOP/s of a large bf16 matmul, on random data."""
    a, m = torch.randn(2**30, device="cuda"), randn(8192, 8192, grad=False)
    b = torch.empty_like(a)
    copy, matmul = median_ms(lambda: b.copy_(a)), median_ms(lambda: m @ m)
    return dict(copy_gb_s=2 * 4 * 2**30 / copy / 1e6, matmul_tflop_s=2 * 8192**3 / matmul / 1e9)


def rates(row, kind, work, top):
    """Adds GB/s or TFLOP/s and their share of the card's ceiling to a row of times."""
    unit, scale, ceiling = ("tflop_s", 1e9, top["matmul_tflop_s"]) if kind == "flops" else ("gb_s", 1e6, top["copy_gb_s"])
    for way, amount in work.items():
        row[f"{way}_{unit}"] = amount / row[f"{way}_ms"] / scale
        row[f"{way}_share"] = row[f"{way}_{unit}"] / ceiling


def baselines(name, op, eager, fused):
    """name -> function of the inputs, for everything that is timed against the kernel."""
    found = {
        "fused": lambda *xs: op(fused, *xs),
        "eager": lambda *xs: op(eager, *xs),
        "compile": torch.compile(lambda *xs: op(eager, *xs)),
    }
    if name == "attention":
        found |= {"sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION), "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
        del found["compile"]  # eager's definition holds (B, H, T, T) in fp32: SDPA is what torch would be used for
    if liger(name):
        found["liger"] = liger(name)
    return found


def loss_and_dlogits_alone(N, V, top):
    from kernels.cross_entropy import loss_and_dlogits

    logits, targets = randn(N, V, grad=False), torch.randint(0, V, (N,), device="cuda")
    row = dict(forward_ms=median_ms(lambda: loss_and_dlogits(logits, targets), runs=20))
    rates(row, "bytes", dict(forward=2 * 2 * N * V), top)
    return row


def bench(shape, top):
    from kernels import eager, fused

    rows = {}
    for name in OPS:
        small_op, small, _, _ = cases(**(shape | dict(B=2, T=min(shape["T"], 512))))[name]
        check(lambda *xs, op=small_op: op(fused, *xs), lambda *xs, op=small_op: op(eager, *xs), small)
        op, inputs, forward, backward = cases(**shape)[name]
        for who, f in baselines(name, op, eager, fused).items():
            try:
                row = measure(f, inputs)
            except (torch.OutOfMemoryError, RuntimeError) as e:
                rows[f"{name}: {who}"] = dict(failed=str(e).splitlines()[0])
                continue
            if forward:
                work = dict(forward=forward, backward=backward, both=forward + backward)
                rates(row, "flops" if name == "attention" else "bytes", work, top)
            rows[f"{name}: {who}"] = row
        torch.compiler.reset()
        torch.cuda.empty_cache()
    rows["loss and dlogits: fused"] = loss_and_dlogits_alone(shape["B"] * shape["T"], shape["V"], top)
    return rows


def tiles():
    """(op, way, where its launch constant stands, its key there, what to try): every choice that a time has to decide.

    Attention's are (queries, keys, warps, stages) by head dim: of the forward, then of dq, then of dk and dv.
    """
    from kernels import attention, cross_entropy, rmsnorm, rotary, swiglu

    dh = SHAPE["D"] // SHAPE["H"]
    forward = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
    dq = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)]
    dkdv = [(32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)]
    powers = [2**i for i in range(10, 15)]
    return [
        ("attention", "forward", attention.TILES["forward"], dh, forward),
        ("attention", "backward", attention.TILES["dq"], dh, dq),
        ("attention", "backward", attention.TILES["dkdv"], dh, dkdv),
        ("rms_norm", "forward", vars(rmsnorm), "FORWARD", powers),
        ("add_rms_norm", "forward", vars(rmsnorm), "FORWARD", powers),
        ("rms_norm", "backward", vars(rmsnorm), "BACKWARD", powers),
        ("add_rms_norm", "backward", vars(rmsnorm), "BACKWARD", powers),
        ("rotary", "forward", vars(rotary), "BLOCK_T", [8, 16, 32, 64]),
        ("swiglu", "forward", vars(swiglu), "BLOCK", [512, 1024, 2048, 4096]),
        ("swiglu", "backward", vars(swiglu), "BLOCK", [512, 1024, 2048, 4096]),
        ("linear_cross_entropy", "both", vars(cross_entropy), "BLOCK", [2048, 4096, 8192, 16384]),
        ("linear_cross_entropy", "both", vars(cross_entropy), "WARPS", [4, 8, 16]),
    ]


def sweep_tiles():
    """Times each op under every choice of each launch constant, the others as they stand. A wrong result is not timed."""
    from kernels import eager, fused

    rows = []
    for name, way, where, key, choices in tiles():
        small_op, small, _, _ = cases(**(SHAPE | dict(B=2, T=512)))[name]
        op, inputs, _, _ = cases(**SHAPE)[name]
        stands = where[key]
        for choice in choices:
            where[key] = choice
            row = dict(op=name, constant=str(key), way=way, choice=choice, stands=choice == stands)
            try:
                check(lambda *xs: small_op(fused, *xs), lambda *xs: small_op(eager, *xs), small)  # noqa: B023
                row |= measure(lambda *xs: op(fused, *xs), inputs)  # noqa: B023
            except (
                Exception,
                SystemExit,
            ) as e:  # wrong, or too much shared memory, too many registers: each of Triton's errors has its own class
                row |= dict(failed=str(e).splitlines()[0])
            rows.append(row)
            figure = row.get("failed") or f"{row[f'{way}_ms']:.3f} ms"
            print(f"{name:<22}{way:<10}{key!s:<10}{choice!s:<20}{'now  ' if choice == stands else '     '}{figure}", flush=True)
        where[key] = stands
    return rows


def sweep_shapes(top):
    """Times every op against its baselines at the paper's shape, then with other T and D."""
    results = []
    for change in [{}, *SWEEP]:
        shape = SHAPE | change
        rows = bench(shape, top)
        results.append(dict(shape=shape, rows=rows))
        print(f"\n{shape}\n{'':<34}{'forward ms':>11}{'backward ms':>12}{'both ms':>9}{'graph ms':>9}{'share':>7}")
        for name, row in rows.items():
            figures = (row.get(k) for k in ("forward_ms", "backward_ms", "both_ms", "graph_both_ms", "forward_share"))
            print(f"{name:<34}" + "".join(f"{'' if v is None else format(v, '.3f'):>10}" for v in figures))
    return results


def main(what: str) -> int:
    """Times `kernels` or `tiles` and writes results/bench/<card>-<what>.json. Exit status 2 where there is no GPU."""
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
