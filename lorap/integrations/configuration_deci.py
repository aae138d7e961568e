"""Config of a Llama whose layers differ in width. vLLM's DeciLMForCausalLM reads what each layer has as attributes."""

from typing import Any

from transformers import LlamaConfig


class Block(dict):
    """A JSON object whose fields are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return Block(self[name]) if isinstance(self[name], dict) else self[name]


class DeciConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **options: Any) -> None:
        super().__init__(**options)
        self.block_configs = [Block(block) for block in block_configs]
