"""The inputs of every op at a shape, and the errors of an op against its definition: shared by benchmarks and tests."""

import torch

SHAPE = dict(B=64, T=1024, D=768, H=12, F=3072, V=32000)  # a step of llama162m
OPS = ("rms_norm", "add_rms_norm", "rotary", "swiglu", "causal_attention", "rotary_attention", "linear_cross_entropy")
HEAD_OPS = ("rotary", "causal_attention", "rotary_attention")  # those whose inputs have heads
EPS = 1e-6


def case(name, B, T, D, H, F, V, HKV=None, device="cuda", dtype=torch.bfloat16, dropout=0.0):  # noqa: N803
    """Returns for an op (f, inputs, forward, backward): f(ops, *inputs) calls it; the work in bytes, of attention in FLOPs."""
    N, Dh, HKV = B * T, D // H, HKV or H  # noqa: N806
    x = N * D * dtype.itemsize  # bytes of one activation (N, D)

    def randn(*shape, scale=1.0):
        return torch.randn(shape, device=device).mul_(scale).to(dtype).requires_grad_()

    if name in HEAD_OPS:
        packed = randn(B, T, (H + 2 * HKV) * Dh).detach().unflatten(-1, (-1, Dh))  # as the model's projection
        q, k, v = (t.requires_grad_() for t in packed.split((H, HKV, HKV), 2))
        angles = torch.outer(torch.arange(T), 10000.0 ** -(torch.arange(0, Dh, 2) / Dh)).to(device)
        seed = torch.arange(B, device=device) + 2**40 if dropout else None
        flops = 2 * B * H * T * T * Dh
    if name == "rotary":
        work = 2 * x + 2 * x * HKV // H
        return lambda ops, q, k: ops.rotary(q, k, angles.cos(), angles.sin()), [q, k], work, work
    if name == "causal_attention":
        return lambda ops, q, k, v: ops.causal_attention(q, k, v, dropout, seed), [q, k, v], flops, 2.5 * flops
    if name == "rotary_attention":
        op = lambda ops, qkv: ops.rotary_attention(qkv, angles.cos(), angles.sin(), HKV, dropout, seed)  # noqa: E731
        return op, [packed.requires_grad_()], flops, 2.5 * flops
    if name == "swiglu":
        y = N * F * dtype.itemsize
        return lambda ops, g: ops.swiglu(g), [randn(N, 2 * F)], 3 * y, 5 * y
    if name == "linear_cross_entropy":
        targets = torch.randint(0, V, (N,), device=device)
        targets[0] = -100
        return lambda ops, x, w: ops.linear_cross_entropy(x, w, targets), [randn(N, D), randn(V, D, scale=0.02)], None, None
    weight = torch.rand(D, device=device).add(0.5).requires_grad_()
    if name == "rms_norm":
        return lambda ops, x, w: ops.rms_norm(x, w, EPS), [randn(N, D), weight], 2 * x, 3 * x
    return lambda ops, x, r, w: ops.add_rms_norm(x, r, w, EPS), [randn(N, D), randn(N, D), weight], 4 * x, 4 * x


def outputs(f, inputs) -> tuple:
    out = f(*inputs)
    return out if isinstance(out, tuple) else (out,)


def run(f, inputs, grads) -> tuple:
    """Returns the outputs of f and the gradients of the inputs that require one, given the outputs' gradients."""
    out = outputs(f, inputs)
    return *out, *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grads)


def in_fp64(inputs):
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def error(a, b, floor=0.0) -> float:
    """Returns the relative error ||a - b|| / ||b||, with ||b|| at least `floor`."""
    assert a.shape == b.shape
    return ((a.double() - b).norm() / b.norm().clamp(min=floor)).item()


def errors(functions, definition, inputs, grads, floor=0.0) -> list[list[float]]:
    """Returns for each function the errors of its results (see `run`) against those of the definition in fp64.

    Raises AssertionError if the functions do not agree in their dtypes.
    """
    exact = run(definition, in_fp64(inputs), [g.double() for g in grads])
    found, dtypes = [], []
    for f in functions:
        results = run(f, inputs, grads)
        found.append([error(a, b, floor) for a, b in zip(results, exact, strict=True)])
        dtypes.append([a.dtype for a in results])
    assert all(kinds == dtypes[-1] for kinds in dtypes), f"results are {dtypes}"
    return found
