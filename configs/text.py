"""Real text: the source of Python's standard library and the names of the world's towns; 0.8 million parameters, half an hour
on one CPU core.

The model forms an induction head after 2 million tokens and then learns to copy random tokens: docs/text.md has the figures.
"""

data = "data/text"
prepare = "python-and-places --tokenizer=bpe --vocab_size=2048"

dim = 128
n_layers = 4
n_heads = 2  # heads of 64 channels copy sooner than four of 32
hidden_dim = 32  # wider feed-forward layers strengthen the prior against which copying has to win
vocab_size = 2048
seq_len = 256
rope_theta = 1e6

batch_size = 4
micro_batch_size = 4
max_steps = 12000
learning_rate = 3e-3
warmup_steps = 100
schedule = "cosine"
beta2 = 0.99
optimizer = "muon"  # copies after a quarter of the tokens that AdamW needs

eval_interval = 250
eval_batches = 16
copy_eval_interval = 250
log_interval = 100
ckpt_interval = 1000
