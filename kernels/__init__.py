"""Operators of LT2. One folder per operator: a plain PyTorch reference, the GPU path, and one public function.

Nothing is imported here, so that `lt2titan.kernels.config` can be read without torch.
"""
