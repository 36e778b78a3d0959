"""The demo: a model of 0.1 million parameters that learns to copy within two minutes on two CPU cores."""

data = "data/tiny"
prepare = "repeats"

dim = 64
n_layers = 2
n_heads = 2  # heads of 32 channels copy better, and sooner, than four of 16
hidden_dim = 192
vocab_size = 65  # an alphabet of 64 characters, and bos
seq_len = 128
rope_theta = 1e6  # most channels turn little within 128 positions, and can match tokens at any distance; 1e4 copies less

batch_size = 16
micro_batch_size = 16
max_steps = 2000
learning_rate = 5e-3
warmup_steps = 100
schedule = "cosine"
beta2 = 0.99
weight_decay = 0.0  # at this size 0.1 stalls copying

eval_interval = 100
eval_batches = 4
copy_eval_interval = 100
log_interval = 100
ckpt_interval = 500
compile = "off"  # compiling takes some 35 s the first time, more than it saves here
