"""Aims at a short time to copying on one GPU: llama162m's model on the Python source text of the machine, in small batches.

    python bench.py copy configs/copyrun.py

Aoyama et al. 2025 find copying after tokens ~ sqrt(batch x context), so both are small; the rate is high for this size and its
warm-up short. docs/speed.md has what each of these does to the demo, and the first 2,117 updates on an H200.
"""

data = "data/packages"
prepare = "python-packages --tokenizer=bpe --vocab_size=32000"

seq_len = 512
batch_size = 16
micro_batch_size = 16
max_steps = 30000
learning_rate = 1e-3
warmup_steps = 100
schedule = "constant"
beta2 = 0.99

eval_interval = 0  # validation takes time and is not needed here
copy_eval_interval = 1000  # the test takes as long as 250 updates
log_interval = 50
ckpt_interval = 5000
