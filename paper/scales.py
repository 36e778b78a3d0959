"""The scales at which the paper is reproduced. To add one, add an entry to SCALES."""

import functools
from dataclasses import dataclass

from config import ROOT, Config, load


@dataclass(frozen=True)
class Scale:
    """The runs at one scale. `settings` apply to every run, beside the config's own; the other values to the figures."""

    config: str
    settings: dict
    batches: tuple[int, ...]  # figure b
    rates: tuple[float, ...]  # learning rates of figures c and g
    layers: int  # figure d
    grid: tuple[tuple[int, ...], tuple[int, ...]]  # batch sizes and contexts of figure f
    grid_steps: tuple[int, ...]  # at each of its batch sizes
    threshold: float  # value of `copying` that counts as its onset
    samples: int  # of the copy test, for each checkpoint
    warmups: tuple[int, ...] = ()  # updates, figure k, which the other scales do without
    copying: str = "copy_exact_full"  # the measure of copying
    attention: float | None = None  # induction_max that counts as a second onset, by attention; None: copying alone
    keep_weights: bool = False  # after they have been measured
    data: str = ""  # arguments that prepare data for another context than the config's, where it needs its own
    seeds: int = 3
    base_seeds: int = 0  # of the base, where it has more

    def load(self, settings: dict) -> Config:
        return load([str(ROOT / self.config), *(f"--{k}={v}" for k, v in (self.settings | settings).items())])

    @functools.cached_property
    def base(self) -> Config:
        return self.load({})

    def each_onset(self) -> list[tuple[str, str, float]]:
        """(suffix of claims, column, threshold) for each definition of onset."""
        if self.attention is None:
            return [("", self.copying, self.threshold)]
        return [(" (by copying)", self.copying, self.threshold), (" (by attention)", "induction_max", self.attention)]


SCALES = {
    "tiny": Scale(
        "configs/tiny.py", settings=dict(schedule="constant", n_heads=4, eval_batches=8),
        batches=(8, 16, 32), rates=(1.25e-3, 2.5e-3, 5e-3, 1e-2), layers=4,
        grid=((16, 32, 64), (128, 256)), grid_steps=(1200, 1200, 600),
        threshold=0.3, samples=100, keep_weights=True, data="repeats --length={context}",
    ),
    "text": Scale(
        "configs/text.py", settings=dict(schedule="constant"),
        batches=(4, 8, 16, 32), rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3), layers=8,
        grid=((4, 8, 16), (128, 256, 512)), grid_steps=(30000, 15000, 7500), warmups=(100, 400, 1600),
        copying="copy_token_top128", threshold=0.3, attention=0.3, samples=50, base_seeds=5,
    ),
    "gpu": Scale(
        "configs/paper/gpu.py", settings={},
        batches=(16, 32, 64), rates=(2.5e-4, 5e-4, 1e-3, 2e-3), layers=12,
        grid=((16, 32, 64), (256, 512, 1024)), grid_steps=(8000, 8000, 8000),
        threshold=0.5, samples=100,
    ),
    "paper": Scale(
        "configs/llama162m.py", settings={},
        batches=(256, 512, 1024), rates=(1e-4, 2e-4, 4e-4), layers=12,
        grid=((256, 512, 1024), (512, 1024, 2048)), grid_steps=(76294, 76294, 76294),
        threshold=0.2, samples=500,
    ),
}  # fmt: skip
