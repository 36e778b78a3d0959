"""`bench.py check`: the first command on a new card.

It compares every op of each op set that runs here, forward and backward, with its definition in fp64: on a GPU at training
shapes, which builds every Triton kernel, and then times them; on a CPU at small shapes in Triton's interpreter, in fp32 and
fp16 (it cannot multiply bf16), without times. The last line says which settings are right.
"""

import torch

import kernels
from benchmarks import ops
from benchmarks.cases import HEAD_OPS, OPS, SHAPE, case, outputs, run
from benchmarks.machine import machine
from errors import first_line


def problems(device: torch.device) -> list[tuple[str, dict]]:
    """Returns (op, shape) of everything to compare: even and odd T, grouped queries, dropout, and the dtypes of the device."""
    if device.type == "cuda":
        shape, even, odd, group = SHAPE | dict(B=2), 1024, 1000, 4
        dtypes = [torch.bfloat16] * torch.cuda.is_bf16_supported(including_emulation=False) + [torch.float16, torch.float32]
    else:
        shape, even, odd, group = dict(B=2, D=64, H=4, F=96, V=100), 48, 37, 2
        dtypes = [torch.float32, torch.float16]
    found = []
    for dtype in dtypes:
        common = shape | dict(device=device, dtype=dtype)
        found += [(name, common | dict(T=T)) for name in OPS for T in (even, odd)]
        found += [(name, common | dict(T=odd, HKV=shape["H"] // group)) for name in HEAD_OPS]
        for name in ("causal_attention", "rotary_attention"):
            found.append((name, common | dict(T=even, dropout=0.1)))
            found.append((name, common | dict(T=odd, dropout=0.1, HKV=shape["H"] // group)))
    return found


def compare(op_sets: dict, device) -> dict[str, list[str]]:
    """Prints a row for each op and op set; returns {op set: names of its wrong ops}, those that cannot be built among them."""
    wrong = {who: [] for who in op_sets}
    print(f"{'':<24}{'op set':<8}{'problems':>9}{'error':>10}{'allowed':>10}")
    for name in OPS:
        for who, op_set in op_sets.items():
            worst, count, notes = (0.0, 1.0), 0, []
            for _, shape in (p for p in problems(device) if p[0] == name):
                count += 1
                what = ", ".join(f"{k}={v}" for k, v in shape.items() if k in ("dtype", "T", "HKV", "dropout"))
                try:
                    found = ops.check(name, op_set, shape)
                except Exception as e:  # each way in which a kernel cannot be built or launched has a class of its own
                    notes.append(f"  {what}: {type(e).__name__}: {first_line(e)}")
                    continue
                if not found[0] <= found[1]:
                    notes.append(f"  {what}: error {found[0]:.1e}, allowed {found[1]:.1e}")
                worst = max(worst, found, key=lambda pair: pair[0] / pair[1])
            print(f"{name:<24}{who:<8}{count:>9}{worst[0]:>10.1e}{worst[1]:>10.1e}{'  WRONG' if notes else ''}", flush=True)
            if notes:
                print("\n".join(notes))
                wrong[who].append(name)
    return wrong


def times(op_sets: dict) -> dict[str, float]:
    """Prints the ms of each op, forward and backward, in bf16 at 16 x 1,024 tokens; returns the sums of fused and compiled."""
    top = ops.ceilings()
    total = dict.fromkeys((*op_sets, "compile"), 0.0)
    print(f"\ncopy {top['copy_gb_s']:,.0f} GB/s, matmul {top['matmul_tflop_s']:,.0f} TFLOP/s")
    print(f"{'ms forward and backward':<24}" + "".join(f"{who:>10}" for who in total))
    for name in OPS:
        op, inputs, forward, backward = case(name, **SHAPE | dict(B=16))
        functions = {who: lambda *xs, s=op_set: op(s, *xs) for who, op_set in op_sets.items()}  # noqa: B023
        functions["compile"] = torch.compile(functions["sdpa"])
        grads = [torch.randn_like(o) for o in outputs(functions["sdpa"], inputs)]
        found = [ops.median_ms(lambda f=f: run(f, inputs, grads)) for f in functions.values()]  # noqa: B023
        total = {who: total[who] + ms for who, ms in zip(functions, found, strict=True)}
        row = "".join(f"{ms:>10.3f}" for ms in found)
        if forward:
            row += f"{ops.share(found[0], forward + backward, name.endswith('attention'), top):>8.0%} of the ceiling"
        print(f"{name:<24}{row}", flush=True)
        torch.compiler.reset()
    return total


def verdict(auto: str, wrong: dict[str, list[str]], total: dict[str, float], where: str) -> tuple[str, int]:
    """Returns the last line and the exit status: 0, or 4 if an op is wrong."""
    if any(wrong.values()):
        names = "; ".join(f"{who}: {', '.join(ops)}" for who, ops in wrong.items() if ops)
        right = next(who for who in (auto, "sdpa", "eager") if not wrong.get(who))
        return f"pass --kernels={right}: these ops are wrong on {where} ({names})", 4
    if auto == "fused" and total and total["compile"] < total["fused"]:
        slower, faster = total["fused"], total["compile"]
        return f"pass --kernels=sdpa: its ops take {faster:.2f} ms where the Triton kernels take {slower:.2f}", 0
    return f"these settings are right for {where}: --kernels=auto takes {auto}", 0


def main(device: torch.device) -> int:
    about = machine()
    where = about["card"] if device.type == "cuda" else "this CPU"
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    torch.manual_seed(0)
    head_dim = SHAPE["D"] // SHAPE["H"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    op_sets = {"sdpa": kernels.choose("sdpa", device, head_dim)}
    if reason := kernels.why_not_fused(device, head_dim):
        print(f"the Triton kernels do not run here: {reason}")
    else:
        op_sets = {"fused": kernels.choose("fused", device, head_dim, say=print)} | op_sets
    auto = kernels.choose("auto", device, head_dim, dtype, say=print).__name__.removeprefix("kernels.")
    wrong = compare(op_sets, device)
    total = times(op_sets) if device.type == "cuda" and not any(wrong.values()) else {}
    line, status = verdict(auto, wrong, total, where)
    print("\n" + line)
    return status
