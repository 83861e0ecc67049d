"""What pyproject.toml cannot say: recipes/ and dashboards/ of the repository lie inside launcher in the wheel."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("recipes", "dashboards")

setup(
    packages=[
        *find_namespace_packages(include=["launcher*", "dsv3_megatron*", "parallel*"], exclude=["*.__pycache__*"]),
        *(f"launcher.{package}" for package in find_namespace_packages(include=[f"{name}*" for name in FOLDERS])),
    ],
    package_dir={f"launcher.{name}": name for name in FOLDERS},
    package_data={"": ["*.yaml", "py.typed"]},
)
