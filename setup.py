"""The build: metadata lives in pyproject.toml; the CUDA extension joins here once `csrc/` has sources."""

from setuptools import setup

setup()
