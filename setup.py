"""What pyproject.toml cannot say: `configs/` is installed as `pr1_jax/configs`."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["pr1_jax*"]), "pr1_jax.configs"],
    package_dir={"pr1_jax.configs": "configs"},
)
