"""Kernels for NVIDIA GPUs, written in Mosaic GPU (Pallas)."""
