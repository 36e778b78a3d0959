"""Real text: the source of Python's standard library, 2.5 million parameters, tens of minutes on a laptop's CPU."""

data = "data/pycode"
prepare = "python-stdlib --tokenizer=bpe --vocab_size=2048"

dim = 192
n_layers = 4
n_heads = 4
hidden_dim = 512
vocab_size = 2048
seq_len = 256

batch_size = 8
micro_batch_size = 8
max_steps = 5000
learning_rate = 2e-3
min_lr = 1e-4
warmup_steps = 100
schedule = "cosine"
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
eval_batches = 16
copy_eval_interval = 250
log_interval = 50
ckpt_interval = 250
