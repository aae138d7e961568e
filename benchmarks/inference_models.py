"""Models that decoding is measured on, in every host alike: random weights in the shapes of real models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A model to measure: shapes, decoder layers, vocabulary, tied embeddings."""

    shapes: str
    layers: int
    vocab_size: int
    tie: bool


MODELS = {
    "SmolLM2-135M": Size("smollm2-135m", 30, 49152, True),
    "LLaMA-7B, 4 layers": Size("llama-7b", 4, 32000, False),
}
QUICK = {"tiny": Size("tiny", 2, 1024, True)}
