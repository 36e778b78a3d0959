"""The dropout mask that every kernel regenerates: its random numbers against known answers, and what they do to the mask."""

import numpy as np
import pytest
import torch

from kernels import eager


def philox_numpy(key, counter, rounds):
    """Philox4x32 of Salmon et al. 2011, section 3.3, in Python integers: key (2 words), counter (4 words) -> 4 words."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def philox_mask_numpy(seeds, shape, dropped):
    """The mask as its docstring says it: byte (key mod 16) of the call for (query position, head, key div 16)."""
    B, H, Tq, Tk = shape
    mask = np.empty(shape)
    for b, h, i, j in np.ndindex(*shape):
        key = seeds[b] % 2**32, (seeds[b] >> 32) % 2**32
        words = philox_numpy(key, (Tk - Tq + i, h, j // 16, 0), rounds=7)
        byte = words[j % 16 // 4] >> (j % 4 * 8) & 0xFF
        mask[b, h, i, j] = 0 if byte < dropped else 256 / (256 - dropped)
    return mask


# Known answers of Random123 (kat_vectors, philox4x32 with 10 and 7 rounds): counter, key, result.
ONES = 0xFFFFFFFF
KNOWN = [
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
]


@pytest.mark.parametrize("rounds, counter, key, answer", KNOWN)
def test_the_tests_own_philox_gives_the_known_answers_of_random123(rounds, counter, key, answer):
    assert philox_numpy(key, counter, rounds) == answer


@pytest.mark.parametrize("rounds, counter, key, answer", [known for known in KNOWN if known[1][3] == 0])
def test_philox_gives_the_known_answers_of_random123_whose_last_counter_word_is_0(rounds, counter, key, answer):
    words = eager.philox(torch.tensor([key[0] + (key[1] << 32)]), *torch.tensor(counter[:3]), rounds=rounds)
    assert tuple(w.item() for w in words) == answer


@pytest.mark.parametrize("rounds", [7, 10])
def test_philox_equals_python_integers(rounds):
    rng = np.random.default_rng(0)
    keys = [0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), *rng.integers(-(2**63), 2**63 - 1, 30).tolist()]
    counters = rng.integers(0, 2**32, (len(keys), 3)).tolist()
    counters[:3] = [0, 0, 0], [ONES] * 3, [1, 2, 3]
    words = eager.philox(torch.tensor(keys), *torch.tensor(counters).T, rounds=rounds)
    for key, counter, *ours in zip(keys, counters, *(w.tolist() for w in words), strict=True):
        assert tuple(ours) == philox_numpy((key % 2**32, (key >> 32) % 2**32), (*counter, 0), rounds)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 2, 3, 37), (2, 1, 1, 16), (1, 1, 17, 17)])
def test_dropout_mask_is_the_philox_bytes_of_its_docstring(shape):
    seeds = [123456789012345, -5][: shape[0]]
    mask = eager.dropout_mask(torch.tensor(seeds), shape, 0.25)
    assert mask.dtype == torch.float32
    np.testing.assert_allclose(mask.numpy(), philox_mask_numpy(seeds, shape, dropped=64), rtol=1e-7)


def test_dropout_mask_of_the_last_queries_is_the_end_of_the_whole_mask():
    seed = torch.tensor([1, 2])
    whole = eager.dropout_mask(seed, (2, 3, 40, 40), 0.5)
    assert torch.equal(eager.dropout_mask(seed, (2, 3, 7, 40), 0.5), whole[:, :, 33:])
    assert torch.equal(eager.dropout_mask(seed, (2, 3, 33, 33), 0.5), whole[:, :, :33, :33])
    assert torch.equal(eager.dropout_mask(seed[1:], (1, 3, 40, 40), 0.5), whole[1:])


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9, 0.001])
def test_dropout_drops_its_share_in_256ths_and_keeps_the_mean(p):
    share = round(p * 256) / 256
    mask = eager.dropout_mask(torch.tensor([3, 4, 5, 6]), (4, 4, 128, 128), p)
    n = mask.numel()
    error = 5 * (share * (1 - share) / n) ** 0.5  # five standard errors
    assert abs((mask == 0).double().mean().item() - share) <= error
    assert abs(mask.double().mean().item() - 1) <= error / (1 - share) + 1e-6
    assert set(mask.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - share)).item()}
    # No key position, query, head or sequence is favoured.
    for dim in range(4):
        rows = (mask == 0).double().transpose(0, dim).flatten(1).mean(1)
        assert (rows - share).abs().max().item() <= error * len(rows) ** 0.5


def test_dropout_masks_of_different_seeds_sequences_heads_and_queries_are_uncorrelated():
    mask = (eager.dropout_mask(torch.tensor([0, 1, 2**32, 2**33]), (4, 4, 64, 64), 0.5) > 0).double() * 2 - 1
    for rows in (mask.flatten(1), mask.transpose(0, 1).flatten(1), mask.transpose(0, 2).flatten(1)):
        correlation = rows @ rows.T / rows.shape[1] - torch.eye(len(rows), dtype=torch.float64)
        assert correlation.fill_diagonal_(0).abs().max() < 5 / rows.shape[1] ** 0.5
