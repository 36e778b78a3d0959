"""llama162m's model at a batch of 32 sequences, for one GPU: 262 million tokens of the Python source text on the machine."""

data = "data/packages"
prepare = "python-packages --tokenizer=bpe --vocab_size=32000"

# The paper uses 512; if copying depends on the number of updates, as it claims, a batch of 32 needs a sixteenth of the tokens.
batch_size = 32
micro_batch_size = 32
max_steps = 8000
learning_rate = 1e-3
warmup_steps = 200
schedule = "constant"
beta2 = 0.99

eval_interval = 200
eval_batches = 8
copy_eval_interval = 200
log_interval = 20
ckpt_interval = 1000  # 1.95 GB each
