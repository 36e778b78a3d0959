"""`bench.py kernels` times each Triton op on a GPU against its baselines, `bench.py tiles` with other tile sizes.

The shape is that of llama162m at 64 x 1,024 tokens in bf16, then other T and D. Each result is compared with the definition
before it is timed. Times are medians of triton.testing.do_bench_cudagraph, in which the host launches no single kernel; the
tensors are larger than the L2 cache. `share` is the rate as a share of a large copy's, with each input and output counted once,
or for attention of a large matmul's, with the causal half counted.
"""

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import OPS, SHAPE, case, errors, outputs, run
from errors import UserError, first_line

SWEEP = [dict(T=T, B=65536 // T) for T in (256, 512, 2048, 4096)] + [dict(D=64 * H, H=H, F=256 * H) for H in (8, 16, 32)]


def baselines(name, op):
    """Returns {name: function of the inputs} of the kernel and of everything it is timed against."""
    from kernels import eager, fused, sdpa

    found = {
        "fused": lambda *xs: op(fused, *xs),
        "eager": lambda *xs: op(eager, *xs),
        "compile": torch.compile(lambda *xs: op(sdpa, *xs)),
    }
    if name.endswith("attention"):
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            found[f"sdpa {backend.name.lower()}"] = sdpa_kernel(backend)(lambda *xs: op(sdpa, *xs))
    return found


def median_ms(f) -> float:
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(f, rep=20, return_mode="median")  # ten times as long


def measure(f, inputs) -> dict[str, float]:
    """Returns the ms of forward, of forward and backward, and of backward, which is the difference."""
    grads = [torch.randn_like(o) for o in outputs(f, inputs)]
    forward, both = median_ms(torch.no_grad()(lambda: f(*inputs))), median_ms(lambda: run(f, inputs, grads))
    return dict(forward=forward, backward=both - forward, both=both)


def allowed(dtype: torch.dtype, own: float, terms: int) -> float:
    """Returns the error that an op may have if its definition, computed in this dtype, has the error `own`.

    In 16 bits three roundings, of at most eps / 4 each in the norm, follow one another: of attention's probabilities, of their
    gradients and of the result. In fp32 a sum of n random terms, one added after the other, is off by about eps sqrt(n) / 5:
    each of the additions rounds a partial sum, by eps / sqrt(12) of it in the mean. `terms` is the longest such sum.
    """
    eps = torch.finfo(dtype).eps
    return max(max(1e-6, 0.25 * eps * terms**0.5) if dtype == torch.float32 else 0.75 * eps, 1.5 * own)


def check(name, who, shape) -> tuple[float, float]:
    """Returns the largest error of an op of the op set `who` against the definition in fp64, and what it is allowed there."""
    from kernels import eager

    op, inputs, _, _ = case(name, **shape)
    theirs, definition = (lambda *xs, ops=ops: op(ops, *xs) for ops in (who, eager))
    grads = [torch.randn(o.shape, device=o.device).to(o.dtype) for o in outputs(definition, inputs)]
    found = zip(*errors([theirs, definition], definition, inputs, grads), strict=True)
    terms = shape["T"] * shape["H"] // shape.get("HKV", shape["H"]) if name.endswith("attention") else 1  # of dk, dv
    pairs = [(e, allowed(inputs[0].dtype, own, terms)) for e, own in found]
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))


def refuse_if_wrong(name, shape):
    from kernels import fused

    error, most = check(name, fused, shape | dict(B=2, T=min(shape["T"], 512)))
    if not error <= most:
        raise RuntimeError(f"{name}: a result is off by {error:.1e}, allowed {most:.1e}; it was not timed")


def ceilings() -> dict:
    """Returns the GB/s of an elementwise kernel on large tensors, and the TFLOP/s of a large bf16 matmul, on random data."""
    a, m = torch.randn(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda").bfloat16()
    b = torch.empty_like(a)
    copy, matmul = median_ms(lambda: torch.neg(a, out=b)), median_ms(lambda: m @ m)
    return dict(copy_gb_s=2 * 4 * a.numel() / copy / 1e6, matmul_tflop_s=2 * 8192**3 / matmul / 1e9)


def share(ms: float, work: float, is_flops: bool, top: dict) -> float:
    """Returns the rate of `work`, in FLOPs or bytes, done in `ms`, as a share of the GPU's ceiling."""
    return work / ms / (1e9 * top["matmul_tflop_s"] if is_flops else 1e6 * top["copy_gb_s"])


def sweep_shapes(top) -> Iterator[list[dict]]:
    """Times every op against its baselines at the main shape, then at other T and D; yields the results after each shape."""
    results = []
    for change in [{}, *SWEEP]:
        shape, rows = SHAPE | change, {}
        print(f"\n{shape}\n{'ms':<36}{'forward':>10}{'backward':>10}{'both':>10}{'share':>10}")
        for name in OPS:
            refuse_if_wrong(name, shape)
            op, inputs, forward, backward = case(name, **shape)
            for who, f in baselines(name, op).items():
                try:
                    row = measure(f, inputs)
                    if forward:
                        row["share"] = share(row["both"], forward + backward, name.endswith("attention"), top)
                    figures = "".join(f"{x:>10.3f}" for x in row.values())
                except RuntimeError as e:  # out of memory, or a backend that does not take this shape
                    row = dict(failed=first_line(e))
                    figures = row["failed"]
                rows[f"{name}: {who}"] = row
                print(f"{name + ': ' + who:<36}{figures}", flush=True)
            torch.compiler.reset()
            torch.cuda.empty_cache()
        results.append(dict(shape=shape, rows=rows))
        yield results


def tiles() -> list[tuple]:
    """Returns a tuple for each launch constant: (op, change of the shape, pass, where it is stored, its key, values to try).

    Attention's are (queries, keys, warps, stages) by head dim: of the forward, then of dq, then of dk and dv.
    """
    from kernels import attention, cross_entropy, rmsnorm, rotary, swiglu

    dh = SHAPE["D"] // SHAPE["H"]
    table = attention.tiles(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dropout, grouped = dict(dropout=0.1), dict(HKV=SHAPE["H"] // 3)
    forward = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3)]
    forward += [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)]
    dq = [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3)]
    dq += [(128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
    dkdv = [(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3)]
    dkdv += [(64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2)]
    powers = [2**i for i in range(10, 15)]
    kernels = [("forward", "forward", forward), ("dq", "backward", dq), ("dkdv", "backward", dkdv)]
    found = [("causal_attention", {}, way, table[kernel], dh, values) for kernel, way, values in kernels]
    found.append(("linear_cross_entropy", {}, "both", vars(cross_entropy), "BLOCK", [2048, 4096, 8192, 16384, 32768]))
    found.append(("linear_cross_entropy", {}, "both", vars(cross_entropy), "WARPS", [4, 8, 16]))
    found += [(op, {}, way, vars(rmsnorm), way.upper(), powers) for op in OPS[:2] for way in ("forward", "backward")]
    found += [("swiglu", {}, way, vars(swiglu), "BLOCK", [512, 1024, 2048, 4096]) for way in ("forward", "backward")]
    found.append(("rotary", {}, "forward", vars(rotary), "BLOCK_T", [8, 16, 32, 64]))
    found += [("causal_attention", dropout, way, table[f"{kernel} dropout"], dh, values) for kernel, way, values in kernels]
    found.append(("causal_attention", grouped, "backward", table["dkdv grouped"], dh, dkdv))
    return found


def sweep_tiles() -> Iterator[list[dict]]:
    """Times each op with every value of each launch constant, the others at their defaults; yields the rows after each op."""
    from kernels import fused

    rows = []
    for name, change, way, where, key, values in tiles():
        shape = SHAPE | change
        op, inputs, _, _ = case(name, **shape)
        default = where[key]
        for value in values:
            where[key] = value
            row = dict(op=name, shape=change, constant=str(key), way=way, value=value, default=value == default)
            try:
                refuse_if_wrong(name, shape)
                row |= measure(lambda *xs: op(fused, *xs), inputs)  # noqa: B023
            except Exception as e:  # wrong, or too much shared memory or too many registers: Triton has a class for each
                row |= dict(failed=first_line(e))
            rows.append(row)
            figure = row.get("failed") or f"{row[way]:.3f} ms"
            label = " ".join([name, *change])
            mark = "default" if value == default else ""
            print(f"{label:<26}{way:<10}{key!s:<10}{value!s:<20}{mark:<9}{figure}", flush=True)
        where[key] = default
        yield rows


def sweep(what: str) -> Iterator[dict]:
    """Times `kernels` or `tiles`, printed as they come; yields the results so far. Raises UserError if there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError(f"bench.py {what}: times need an NVIDIA GPU, and there is none here")
    torch.manual_seed(0)
    top = ceilings()
    for results in sweep_shapes(top) if what == "kernels" else sweep_tiles():
        yield dict(ceilings=top, results=results)
