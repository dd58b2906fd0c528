"""Packaging shim: pyproject.toml declares everything except the linked package and the description's links.

``msf_fast/kernels`` is a symbolic link to ``kernels``: a top-level package of that name would clash with a published one. The packages are found
here, through the link. A package index shows the README away from the repository, so its pictures and links need absolute addresses: for a
release, set the environment variable REPOSITORY to the repository's web address (https://HOST/OWNER/NAME).
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup


def description() -> str:
    """The README with links to files of the repository, if its address is known."""
    text, repository = Path(__file__).with_name("README.md").read_text(), os.environ.get("REPOSITORY")
    if not repository:
        return text
    pictures = re.sub(r"!\[([^\]]*)\]\((?!http)", rf"![\1]({repository}/raw/main/", text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!http)", rf"[\1]({repository}/blob/main/", pictures)


setup(
    packages=find_packages(include=["msf_fast", "msf_fast.*"]),
    long_description=description(),
    long_description_content_type="text/markdown",
)
