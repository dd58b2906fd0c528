"""Matching, voting and selecting: Triton kernels, chunked torch twins, and their registration with torch.

One file an operation (`match`, `vote`, `select`): kernel, launcher, registration. `torch_backend` computes the same in
chunked torch, on any device; `reference` holds the eager definitions that both are held against. Nothing here imports
the rest of the library; the public functions are in `msf_fast.ops`.
"""
