"""The model of "Language Models 'Grok' to Copy" (arXiv 2409.09281), 162,417,408 parameters, on 40 billion tokens.

    torchrun --nproc_per_node=8 train.py configs/llama162m.py

Stated in the paper: layers, heads, dim, hidden_dim, context, vocabulary, batch, betas, warm-up, clipping, tokens.
Each choice that it leaves open has its reason beside it.
"""

data = "data/redpajama"

dim = 768
n_layers = 12
n_heads = 12
hidden_dim = 3072
vocab_size = 32000
seq_len = 1024
tie_embeddings = False  # only untied matrices give the stated 162M parameters; tied ones give 138M
rope_theta = 10000.0  # Llama's, and that of the public model of this shape (llama-160m)
norm_eps = 1e-6  # the same

batch_size = 512  # "64 per GPU" on 8 GPUs: 524,288 tokens per update
micro_batch_size = 64
max_steps = 76294  # 40 billion tokens
learning_rate = 4e-4  # the text says 0.1, which does not train; Figure 5 compares 1e-4, 2e-4 and 4e-4
schedule = "constant"  # not stated; a constant rate keeps the effects of batch size and learning rate apart
warmup_steps = 2000
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0  # not stated; the paper adds a decay of 0.1 as a treatment
attn_dropout = 0.0  # likewise: 10% is a treatment
grad_clip = 1.0

eval_interval = 1000
eval_batches = 4
copy_eval_interval = 1000
ckpt_interval = 1000
ckpt_milestones = True  # 0.65 GB each, 55 GB in all; early weights are what studies of emergence need
