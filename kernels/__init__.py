"""Matching, voting and selecting: Triton kernels, chunked torch twins, and their registration with torch.

Each operation has one file: kernel, launcher, registration. `torch_backend` computes the same in chunked torch, on any device.
`reference` holds the eager definitions against which both are tested. Nothing here imports the rest of the library; the public
functions are in `msf_fast.ops`.
"""
