"""The scales at which the paper is reproduced. To add one, add an entry to SCALES."""

import functools
from dataclasses import dataclass

from config import ROOT, Config, load


@dataclass(frozen=True)
class Scale:
    """The runs at one scale. `settings` apply to every run, in addition to the config's own; the other values to the figures.

    A figure whose values are empty is left out at this scale.
    """

    config: str
    settings: dict
    batches: dict[int, int]  # figure b: updates at each batch size
    rates: tuple[float, ...]  # figures c and g: learning rates
    layers: tuple[int, ...]  # figure d
    grid: dict[int, dict[int, int]]  # figure f: for each context, updates at each batch size
    threshold: float  # value of `copying` that counts as its onset
    samples: int  # of the copy test, for each checkpoint
    warmups: tuple[int, ...] = ()  # figure k: updates
    repeats: tuple[float, ...] = ()  # figure l: shares of the training tokens in inserted copies, 0 first
    weights: tuple[float, ...] = ()  # figure m: weights of repeated targets in the loss, 1 among them
    copying: str = "copy_exact_full"  # the measure of copying
    attention: float | None = None  # induction_max that counts as a second onset, by attention; None: only by copying
    keep_weights: bool = False  # after they have been measured
    data: str = ""  # arguments that prepare data for another context than the config's, where it needs its own
    seeds: int = 3
    base_seeds: int = 0  # of the base, where it has more

    def load(self, settings: dict) -> Config:
        return load([str(ROOT / self.config), *(f"--{k}={v}" for k, v in (self.settings | settings).items())])

    @functools.cached_property
    def base(self) -> Config:
        return self.load({})

    @property
    def context(self) -> int:
        """The context of the copy test: the shortest of all runs, so that all are asked the same questions."""
        return min(*self.grid, self.base.seq_len)

    def each_onset(self) -> list[tuple[str, str, float]]:
        """(suffix of claims, column, threshold) for each definition of onset."""
        if self.attention is None:
            return [("", self.copying, self.threshold)]
        return [(" (by copying)", self.copying, self.threshold), (" (by attention)", "induction_max", self.attention)]


SCALES = {
    "tiny": Scale(
        "configs/tiny.py", settings=dict(schedule="constant", n_heads=4, eval_batches=8),
        batches={8: 4000, 16: 2000, 32: 2000}, rates=(1.25e-3, 2.5e-3, 5e-3, 1e-2), layers=(4,),
        grid=dict.fromkeys((128, 256), {16: 1200, 32: 1200, 64: 600}),
        threshold=0.3, samples=100, keep_weights=True, data="repeats --length={context}",
    ),
    "text": Scale(
        "configs/text.py",
        settings=dict(schedule="constant", max_steps=5000),
        batches={4: 5000, 8: 2500, 16: 1250, 32: 880}, rates=(1.5e-3, 3e-3, 6e-3), layers=(2, 4, 8),
        grid={128: {4: 7000, 8: 3500, 16: 1750}, 256: {4: 5000, 8: 2500, 16: 1250}, 512: {4: 2500, 8: 1250, 16: 875}},
        warmups=(100, 400, 1600), repeats=(0, 0.005, 0.02, 0.08, 0.32, 0.75), weights=(0, 1, 10, 40),
        copying="copy_token_top128", threshold=0.3, attention=0.3, samples=50, base_seeds=5,
    ),
    "gpu": Scale(
        "configs/paper/gpu.py", settings={},
        batches={16: 16000, 32: 8000, 64: 8000}, rates=(2.5e-4, 5e-4, 1e-3, 2e-3), layers=(12,),
        grid=dict.fromkeys((256, 512, 1024), {16: 8000, 32: 8000, 64: 8000}),
        copying="copy_token_top128", threshold=0.3, attention=0.3, samples=100,
    ),
    "paper": Scale(
        "configs/llama162m.py", settings={},
        batches={256: 152588, 512: 76294, 1024: 76294}, rates=(1e-4, 2e-4, 4e-4), layers=(12,),
        grid=dict.fromkeys((512, 1024, 2048), {256: 76294, 512: 76294, 1024: 76294}),
        threshold=0.2, samples=500,
    ),
}  # fmt: skip
