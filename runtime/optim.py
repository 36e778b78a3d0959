"""The learning rate, AdamW, Muon for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and loss scaling."""

import math

import torch

from config import Config

MOMENTUM = 0.95  # of Muon
NEWTON_SCHULZ_STEPS = 5


def learning_rate(step: int, c: Config) -> float:
    """Returns the learning rate of update number `step`, 1 .. max_steps: linear warm-up, then the schedule."""
    if step <= c.warmup_steps:
        return c.learning_rate * step / c.warmup_steps
    start = {"constant": c.max_steps, "cosine": c.warmup_steps, "wsd": max(c.warmup_steps, round(0.8 * c.max_steps))}
    progress = min(1.0, max(0, step - start[c.schedule]) / max(1, c.max_steps - start[c.schedule]))
    down = (1 - math.cos(math.pi * progress)) / 2 if c.schedule == "cosine" else progress
    return c.learning_rate + (c.min_lr - c.learning_rate) * down


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Returns the optimizer of config.optimizer. Matrices decay by weight_decay; norm weights and biases do not.

    With `muon`, the matrices of the blocks are updated by Muon, each head's query, key, value and output projections
    separately; the embedding, the output head, the norms and the biases are updated by AdamW.
    """
    muon = {}
    if config.optimizer == "muon":
        for block in model.blocks:
            muon[block.attention.wqkv.weight] = (config.n_heads + 2 * config.n_kv_heads, 0)
            muon[block.attention.wo.weight] = (config.n_heads, 1)
            muon[block.mlp.gate_up.weight] = (2, 0)
            muon[block.mlp.down.weight] = (1, 0)
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p not in muon]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    return Muon(muon, adamw, config.learning_rate, config.weight_decay) if muon else adamw


def apply_gradients(optimizer: torch.optim.Optimizer, grad_scale: torch.Tensor, found_inf: torch.Tensor):
    """Makes an update with the gradients divided by grad_scale; if found_inf is 1, parameters and state stay unchanged.

    Both are fp32 scalars on the device. The optimizer divides as it reads the gradients, so that clipping and loss scaling cost
    no pass over them, and the host does not wait for the device.
    """
    if grad_scale.device.type == "mps":  # Metal's fused AdamW ignores both
        if found_inf.item():
            return
        torch._foreach_div_([p.grad for group in optimizer.param_groups for p in group["params"]], grad_scale)
        grad_scale = found_inf = None
    optimizer.grad_scale = grad_scale
    optimizer.found_inf = found_inf
    optimizer.step()


class LossScale:
    """The factor on the loss that keeps gradients in fp16 from underflow (Micikevicius et al. 2018).

    Halves, down to 1, after an update whose gradients are not finite, and doubles after GROWTH finite ones in a row. It stays 1
    for other dtypes. Both numbers stay on the device.
    """

    GROWTH = 2000

    def __init__(self, dtype: torch.dtype, device):
        self.used = dtype == torch.float16
        self.scale = torch.tensor(2.0**16 if self.used else 1.0, device=device)
        self.in_a_row = torch.zeros((), device=device)  # finite updates since the scale last changed

    def update(self, found_inf: torch.Tensor):
        if self.used:
            in_a_row = (self.in_a_row + 1) * (1 - found_inf)
            grown = torch.where(in_a_row == self.GROWTH, self.scale * 2, self.scale)
            self.scale = torch.where(found_inf > 0, (self.scale / 2).clamp(min=1), grown)
            self.in_a_row = in_a_row % self.GROWTH

    def state(self) -> torch.Tensor:
        return torch.stack((self.scale, self.in_a_row)).cpu()

    def load_state(self, state: torch.Tensor):
        self.scale, self.in_a_row = state.to(self.scale)


class Muon(torch.optim.Optimizer):
    """Muon: the update of a matrix is its Nesterov momentum, orthogonalized; AdamW updates the other parameters.

    `weights` maps each weight to (n, dim): it is n matrices concatenated along dim, each of which is orthogonalized separately.

    The update is scaled to the root mean square of AdamW's (0.2 sqrt(max(shape)), Liu et al. 2025, arXiv 2502.16982), so that
    one learning rate and one weight decay serve both. It takes `grad_scale` and `found_inf` as fused AdamW does.
    """

    grad_scale = None
    found_inf = None

    def __init__(self, weights: dict, adamw: torch.optim.AdamW, lr: float, weight_decay: float):
        self.adamw = adamw
        self.parts = weights
        super().__init__(list(weights), dict(lr=lr, weight_decay=weight_decay, muon=True))
        self.param_groups += adamw.param_groups

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum"]
            grad = p.grad if self.grad_scale is None else p.grad / self.grad_scale
            momentum = buffer.lerp(grad, 1 - MOMENTUM)
            n, dim = self.parts[p]
            matrices = torch.stack(grad.lerp(momentum, MOMENTUM).chunk(n, dim))
            update = torch.cat(orthogonalize(matrices).unbind(), dim) * (0.2 * max(matrices.shape[1:]) ** 0.5)
            new = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
            skip = torch.zeros((), device=p.device) if self.found_inf is None else self.found_inf
            p.copy_(torch.where(skip > 0, p, new))
            buffer.copy_(torch.where(skip > 0, buffer, momentum))
        # load_state_dict replaces both of these, and AdamW works on the same ones.
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Approximates U V^T of each x = U S V^T (k, n, m) by a quintic Newton-Schulz iteration: singular values of 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    y = x.bfloat16() if x.is_cuda else x
    y = y.mT if tall else y
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)
