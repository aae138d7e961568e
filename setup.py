"""Packages are named one by one: the Triton kernels live in kernels/triton and are shipped as lorap.kernels.

``kernels/`` itself must never become a package, because transformers imports an installed package of that name.
"""

from setuptools import setup

setup(
    packages=["lorap", "lorap.calibration", "lorap.integrations", "lorap.kernels"],
    package_dir={"lorap": "lorap", "lorap.kernels": "kernels/triton"},
    package_data={"lorap": ["py.typed"], "lorap.calibration": ["texts/*"]},
)
