"""Real text: the source of Python's standard library, 1.3 million parameters, tens of minutes on a laptop's CPU."""

data = "data/pycode"
prepare = "python-stdlib --tokenizer=bpe --vocab_size=2048"

dim = 128
n_layers = 4
n_heads = 4
hidden_dim = 384
vocab_size = 2048
seq_len = 256

batch_size = 16
micro_batch_size = 8  # on 2 cores two micro-batches of 8, which stay in the cache, are faster than one of 16
max_steps = 4000
learning_rate = 3e-3
warmup_steps = 100
schedule = "cosine"
beta2 = 0.99

eval_interval = 250
eval_batches = 8
copy_eval_interval = 250
log_interval = 50
ckpt_interval = 500
