"""The model of "Language Models 'Grok' to Copy" (arXiv 2409.09281), 162,417,408 parameters, on 40 billion tokens.

    torchrun --nproc_per_node=8 train.py configs/llama162m.py

Its settings are the defaults of config.py. The paper states layers, heads, dim, hidden_dim, context, vocabulary, betas,
warm-up, clipping, tokens, and the batch: "64 per GPU" on 8 GPUs, 524,288 tokens per update. What it leaves open:

tie_embeddings   untied: only then there are the stated 162M parameters; tied matrices give 138M
rope_theta       Llama's, as in the public model of this shape (llama-160m); norm_eps likewise
learning_rate    4e-4: the text says 0.1, which does not train; Figure 5 compares 1e-4, 2e-4 and 4e-4
schedule         constant, which keeps the effects of batch size and learning rate apart
weight_decay     none: the paper adds a decay of 0.1 as a treatment; attn_dropout likewise, with 10%
"""

data = "data/redpajama"
ckpt_milestones = True  # 0.65 GB each, 55 GB in all; early weights are what studies of emergence need
