"""Real text: the source of Python's standard library, 1.0 million parameters, about two hours on one CPU core.

The model forms an induction head and copies some random tokens, not yet whole sequences: docs/text.md has what was measured.
"""

data = "data/text"
prepare = "python-stdlib --tokenizer=bpe --vocab_size=2048"

dim = 128
n_layers = 4
n_heads = 2  # heads of 64 channels copy sooner than four of 32
hidden_dim = 128  # wider feed-forward layers cost time and bring no copying
vocab_size = 2048
seq_len = 256
rope_theta = 1e6

batch_size = 4
micro_batch_size = 4
max_steps = 30000
learning_rate = 3e-3
warmup_steps = 100
schedule = "constant"
beta2 = 0.99
optimizer = "muon"  # copies after half the tokens that AdamW needs

eval_interval = 1000
eval_batches = 16
copy_eval_interval = 1000
log_interval = 100
ckpt_interval = 1000
