"""The step and loop levels: fixed KV buffers, CUDA graphs of a decode step, the loop of tokens."""
