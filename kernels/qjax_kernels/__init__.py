"""Kernels on plain arrays: arrays in, arrays out. This package never imports qjax."""
