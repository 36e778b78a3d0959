"""A Llama whose weights are set by hand so that it copies, and one that knows nothing: what eval_copy.py is checked against.

How an induction head works (Elhage et al. 2021, Olsson et al. 2022), on a text that said "... a b c d e ..." before and
now says "... a b c d": the likely next token is e, and two layers of attention find it.

  layer 0   Head d (d = 1..K) looks back exactly d positions, whatever the tokens are, and copies the token it sees into
            a room of its own in the residual stream. Head 1 is the previous-token head. Every position now knows its
            own token and its K predecessors: the first e says "I follow d, before that c, b, a".
  layer 1   The induction head asks, at the last position, "who follows d, before that c, b, a?" Its query is the
            token here and its K - 1 predecessors, the keys are the K predecessors of each position: the scalar
            product counts agreements, and K of them are found at e alone. The value is that position's own token, which
            moves to the room that the output head reads: e.

A classical induction head has K = 1. Among random tokens that fails, since each single token has stood in many places;
four in a row have not. The residual stream, D channels of which these are used (M a token):

    one | bos | token | 1 back | 2 back | ... | K back | prediction
"""

import torch

from config import ModelConfig
from kernels import eager
from model import Llama

K = 4  # tokens that must agree
M = 11  # channels of a token's code: a unit vector in a random direction, so that two codes are nearly orthogonal
HEAD_DIM = 64
PAIRS = HEAD_DIM // 2
# Rotary turns the channel pair (i, i + PAIRS) of q and k by position * THETA^(-i / PAIRS). With this base the first pairs turn
# fast and tell positions apart, while the others turn by less than 0.1 in 1000 positions: they can compare content.
THETA, FAST = 1e16, 8
SLOW = [*range(FAST, PAIRS), *range(PAIRS + FAST, HEAD_DIM)]


def room(i):
    """The residual channels of the token i back (0: the token itself); K + 1 is the prediction."""
    return slice(2 + M * i, 2 + M * (i + 1))


@torch.no_grad()
def induction_model(vocab_size, seq_len, bos=None):
    """-> (model, previous_token_head, induction_head), each head as (layer, head). All other heads of layer 1 are idle.

    The induction head attends to the one position whose K predecessors are the K tokens up to here, and the model
    predicts the token there. With a `bos` id it rests on that token wherever fewer than 3 of the K agree, as trained
    heads do, and all logits are then 0; without, it attends to whatever agrees best.
    """
    model = blank_model(vocab_size, seq_len)
    one, is_bos = 0, 1
    identity = torch.eye(M)

    codes = torch.randn(vocab_size, M, generator=torch.Generator().manual_seed(0))
    codes /= codes.norm(dim=1, keepdim=True)
    model.embed.weight[:, one] = 1
    model.embed.weight[:, room(0)] = codes
    model.lm_head.weight[:, room(K + 1)] = 20 * codes  # the token's own code has the largest scalar product
    if bos is not None:
        model.embed.weight[bos, room(0)], model.embed.weight[bos, is_bos] = 0, 1

    # RMSNorm divides by the norm / sqrt(D) of a stream that holds `one` and a known number of unit vectors: a constant,
    # which its gain gives back. What the heads read below is the stream itself.
    set_gain(model, model.blocks[0].attention_norm, 2)
    set_gain(model, model.blocks[1].attention_norm, 2 + K)
    set_gain(model, model.norm, 3 + K)

    # Layer 0. q and k are constants, read from `one`. Turned by rotary they give a pair's share of the score at distance
    # n as cos(w n + phase): with phase = -w d all pairs peak at n = d, and only there do they all peak.
    speeds = THETA ** (-torch.arange(FAST) / PAIRS)
    for d in range(1, K + 1):
        q, k, v, wo = head_weights(model, 0, d - 1)
        q[:FAST, one] = 40 * HEAD_DIM**0.5 * torch.cos(-speeds * d)
        q[PAIRS : PAIRS + FAST, one] = 40 * HEAD_DIM**0.5 * torch.sin(-speeds * d)
        k[:FAST, one] = 1
        v[:M, room(0)] = identity
        wo[room(d), :M] = identity

    # Layer 1, head 0. Each agreement is worth 20 nats.
    q, k, v, wo = head_weights(model, 1, 0)
    for i in range(K):
        channels = SLOW[M * i : M * (i + 1)]
        q[channels, room(i)] = 20 * HEAD_DIM**0.5 * identity
        k[channels, room(i + 1)] = identity
    # A place to rest, worth 2.5 agreements. (A `bos` at position 0 sees nothing but itself: its stream holds 2 unit vectors
    # instead of 2 + K, so the norm enlarges it.)
    q[SLOW[-1], one] = 20 * HEAD_DIM**0.5 * 2.5
    k[SLOW[-1], is_bos] = (2 / (2 + K)) ** 0.5
    v[:M, room(0)] = identity
    wo[room(K + 1), :M] = identity
    return model, (0, 0), (1, 0)


@torch.no_grad()
def uniform_model(vocab_size, seq_len):
    """A model that knows nothing: every logit is 0, every head attends equally to all it may see."""
    model = blank_model(vocab_size, seq_len)
    model.embed.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def blank_model(vocab_size, seq_len):
    """Two layers of K heads, with zero in every matrix: no head writes, the feed-forward layers add nothing."""
    model = Llama(
        ModelConfig(
            dim=K * HEAD_DIM, n_layers=2, n_heads=K, hidden_dim=2, vocab_size=vocab_size, seq_len=seq_len, rope_theta=THETA
        ),
        eager,
    ).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.zeros_(p)
    return model


def set_gain(model, norm, unit_vectors):
    norm.fill_((unit_vectors / model.config.dim + model.config.norm_eps) ** 0.5)


def head_weights(model, layer, head):
    """Views of one head's q, k, v (Dh, D) and output (D, Dh) matrices."""
    attention = model.blocks[layer].attention
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    q, k, v = attention.wqkv.weight.view(3, -1, model.config.dim)[:, rows]
    return q, k, v, attention.wo.weight[:, rows]
