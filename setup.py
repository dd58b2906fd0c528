"""Packaging shim: everything is declared in pyproject.toml but the linked package.

``msf_fast/kernels`` is a symbolic link to ``kernels`` (see README, "Layout"), so the packages are found here, through the link.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["msf_fast", "msf_fast.*"]))
