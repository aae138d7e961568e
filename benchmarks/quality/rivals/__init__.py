"""Other methods than lorap's, whose shapes its checkpoints do not hold, as contenders of the quality benchmark.

A model is changed in memory and judged there. Each method says how many parameters its own shapes would save, so that all are
compared at equal parameters: no more than 1 - sparsity of those of the decoder layers' projections, as with lorap. Written
from the papers, for models built as LLaMA is; no code of their authors is in here.
"""

from __future__ import annotations

from rivals.modegpt import MoDeGPT
from rivals.slicegpt import SliceGPT

# By the name of the contender; each is a frozen dataclass of options, with compress(context, windows).
RIVALS = {"modegpt": MoDeGPT, "slicegpt": SliceGPT}
# Others have norms of heads, or of another kind, that neither paper's formulas know.
BUILT_AS_LLAMA = ("llama", "mistral")
