"""`bench.py bytes`: the bytes that a training step moves outside of matmuls, counted from the shapes of its tensors.

The step of a config (llama162m at a batch of 64, in bf16) runs on fake tensors, which have shapes and no data: it needs neither
a GPU nor memory. Each of torch's ops, and each Triton kernel that an op launches, counts every tensor that it reads and every
tensor that it writes once; views and matmuls count nothing. What a kernel reads again, from the L2 cache or not, is not
counted, and what torch.compile would fuse is counted op by op.
"""

from collections import Counter
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Config
from kernels import cross_entropy, fused
from model import Llama
from runtime.optim import apply_gradients, make_optimizer

FREE = {f"aten.{name}" for name in "mm matmul bmm addmm _unsafe_view detach empty new_empty empty_like".split()}


def nbytes(*trees) -> int:
    """Returns the bytes of all tensors in some arguments; one that is passed twice counts once."""
    return sum({id(x): x.nbytes for x in tree_leaves(trees) if isinstance(x, torch.Tensor)}.values())


class Traffic(TorchDispatchMode):
    """Adds up the bytes of each op and kernel in `bytes`, a Counter by name."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "copyllama":
            with self:
                return OPDEFS[op._schema.name]._init_fn(*args, **kwargs)  # its own code, to see what it launches
        out = op(*args, **kwargs)
        if op.namespace == "aten" and not op.is_view and str(op.overloadpacket) not in FREE:
            named = [*zip((a.name for a in op._schema.arguments), args, strict=False), *kwargs.items()]
            written = {a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write}
            if kwargs.get("grad_scale") is None:
                written.discard("grads")  # which fused AdamW writes only if it has to scale them
            returned = [] if written else out  # an op in place returns what it has overwritten
            self.bytes[str(op.overloadpacket)] += nbytes(args, kwargs) + nbytes([x for n, x in named if n in written], returned)
        return out

    def launch(self, kernel, args, kwargs):
        tensors = {n: x for n, x in zip(kernel.arg_names, args, strict=False) if isinstance(x, torch.Tensor)}
        count = nbytes(tensors)
        if "logits_ptr" in tensors:  # overwritten by its gradient
            count += nbytes(tensors["logits_ptr"])
        if "dqkv_ptr" in tensors:  # one kernel writes dq, the other dk and dv
            count -= nbytes(tensors["dqkv_ptr"])
            count += nbytes(tensors["q_ptr"]) if "out_ptr" in tensors else 2 * nbytes(tensors["k_ptr"])
        self.bytes[kernel.__name__] += count


def step_bytes(config: Config) -> Counter:
    """Returns {op or kernel: bytes} of one update of batch_size sequences in one micro-batch, with clipping and AdamW."""
    from triton.runtime.jit import KernelInterface

    traffic = Traffic()

    def launch(kernel, grid):
        return lambda *args, **kwargs: traffic.launch(kernel, args, kwargs)

    whole = patch.object(cross_entropy, "chunk_rows", lambda x, weight: len(x))  # as on a GPU that holds the logits
    with patch.object(KernelInterface, "__getitem__", launch), whole, FakeTensorMode():
        model = Llama(config.model(), fused, torch.bfloat16).train()
        optimizer = make_optimizer(model, config)
        tokens = torch.zeros(config.batch_size, config.seq_len, dtype=torch.int64)
        seed = torch.zeros(config.batch_size, dtype=torch.int64) if config.attn_dropout else None
        for _ in range(2):  # the first update creates the optimizer's state
            traffic.bytes.clear()
            with traffic:
                model(tokens, tokens, seed).backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
                apply_gradients(optimizer, (norm / config.grad_clip).clamp(min=1), norm.isinf().float())
                optimizer.zero_grad()
    return traffic.bytes


def table(config: Config) -> str:
    moved = step_bytes(config)
    rows = [*((name, n) for name, n in moved.most_common() if n >= 5e6), ("sum", moved.total())]
    return "\n".join(f"{name:<36}{n / 1e9:>8.2f} GB" for name, n in rows)
