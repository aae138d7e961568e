"""What to do to a model, as one frozen object of independent choices.

A recipe is nothing but a named set of values for :class:`CompressionConfig`: every choice that a recipe makes can be read in
one place, and replaced by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval, MinLen, MultipleOf

from lorap.errors import ConfigError
from lorap.jsonio import Count, Size, check_fields, shown
from lorap.weights import KINDS, MIXES, TRELLIS, bits_of, coding_of

SUBLAYERS = ("self_attn", "mlp")
DEFAULT_RECIPE = "best"

# The paper, exactly (arXiv 2404.09695, sections 3 and 4).
_LORAP: Mapping[str, Any] = {
    "sublayers": SUBLAYERS,
    "allocation": "paper",
    "vo_to_qk_ratio": 3.0,
    "shapes": "free",
    "rank_multiple": 1,
    "width_multiple": 1,
    "attention_method": "awsvd",
    "metric_shrinkage": 0.0,
    "output_weighting": "none",
    "token_weighting": "none",
    "anchor": "none",
    "mlp_method": "prune",
    "channel_score": "lorap",
    "least_important_kept": 0.01,
    "repair": False,
    "repair_ridge": 0.0,
    "bias_compensation": False,
    "sequential": "layer",
    "storage": "factors",
    "correction_steps": 0,
    "scale_steps": 0,
    "weights": "float",
    "group_size": 64,
    "target": "lorap",
}

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # What kept the most quality at equal parameters, on texts unlike the calibration (docs/results.md).
        "best": MappingProxyType(
            {
                **_LORAP,
                "allocation": "loss",
                "rank_multiple": "auto",
                "width_multiple": "auto",
                "attention_method": "second_moment",
                "metric_shrinkage": "auto",
                "output_weighting": "loss",
                "least_important_kept": 0.0,
                "repair": True,
                "repair_ridge": "auto",
                "storage": "pivoted",
                "correction_steps": 8,
            }
        ),
        "lorap": MappingProxyType(_LORAP),
        # SVD-LLM (arXiv 2403.07378): the whitened truncated SVD of every linear, one kept share everywhere.
        "svd-llm": MappingProxyType(
            {**_LORAP, "allocation": "even", "attention_method": "second_moment", "mlp_method": "factorize"}
        ),
        # AA-SVD (arXiv 2604.02119) without its tuning of each block: as SVD-LLM, but each part of a layer is fitted to what the
        # dense model has there.
        "aa-svd": MappingProxyType(
            {
                **_LORAP,
                "allocation": "even",
                "attention_method": "second_moment",
                "anchor": "dense",
                "mlp_method": "factorize",
                "sequential": "sublayer",
            }
        ),
        # FLAP (arXiv 2312.11983) on the FFN: fluctuation score, one threshold for all layers, mean output into a bias.
        "flap": MappingProxyType(
            {
                **_LORAP,
                "allocation": "flap",
                "channel_score": "fluctuation",
                "least_important_kept": 0.0,
                "bias_compensation": True,
            }
        ),
    }
)

Auto = Literal["auto"]
_FROM_RECIPE: Final[Any] = None
_FROM_BUDGET: Final[Any] = None
DEFAULT_SPARSITY = 0.2
# Of bytes, one of which may be given in place of a sparsity.
BUDGETS = ("size", "bits_per_weight")


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Options of one compression run. What is not given is taken from the recipe.

    Args:
        recipe: where the other options come from: ``best``, ``lorap`` (the paper, exactly), ``svd-llm``, ``aa-svd`` or
            ``flap``.
        sparsity: fraction of the parameters of the compressed sub-layers to remove, in [0, 1); 0.2 unless given. With ``size`` or
            ``bits_per_weight`` the least to remove, 0 unless given.
        size: bytes that the folder's weights take at most, a number or text like ``1.2GB``. ``weights``, unless given, and the
            sparsity follow from it: first as few bits as it takes, down to 3, then sparsity.
        bits_per_weight: the same in bits on disk for each weight that the dense decoder layers' projections have, with all that
            belongs to them, such as scales.
        sublayers: which of ``self_attn`` and ``mlp`` to compress.
        allocation: who gets the parameters that stay. ``paper``: every layer and both sub-layers keep the same share, {v, o} get
            ``vo_to_qk_ratio`` times what {q, k} get. ``even``: every matrix keeps the same share. ``loss``: ranks and widths of
            all layers share one budget, such that the estimated increase of the loss is least; needs a backward pass over a
            part of the calibration text, which takes about as long as the compression itself. ``flap``: attention stays dense
            and one threshold on the standardised channel scores cuts the FFNs of all layers.
        vo_to_qk_ratio: for ``paper``: parameters given to {v, o} for each one given to {q, k}; the paper uses 3.
        shapes: ``free`` lets every layer have its own ranks and width; ``uniform`` gives all layers the same, which some hosts
            want and which costs a little quality.
        rank_multiple: ranks are multiples of this, or as large as the matrix allows; ``auto`` is 64 where the model is large
            enough to afford it, less in small ones. GPU kernels load 16 bytes and multiply tiles at once.
        width_multiple: the same for FFN widths. With ``target="stock"`` it is ``auto`` unless given: 256 where the FFN is wide,
            else 32, because quantized formats of other hosts need whole blocks.
        attention_method: the norm in which a matrix is approximated. ``awsvd``: input channels weighted by their norm (the
            paper). ``second_moment``: by the full second moment of the inputs, see ``metric_shrinkage``. ``svd``: unweighted.
            ``afm``: principal components of the outputs.
        metric_shrinkage: share of its diagonal in the second moment, in [0, 1]: 0 fits the calibration text most closely, 1 is
            ``awsvd``. ``auto`` chooses per layer, judged on texts other than those that the statistics come from.
        output_weighting: ``loss`` weights errors of a projection's outputs by the second moment of their gradients, for factors,
            and for channels with ``channel_score="output"``, from the same backward pass as ``allocation="loss"``; gate and up
            always count plain, and with ``none`` all do.
        token_weighting: ``residual`` weighs each token by the inverse square norm of the hidden state it is added to, because
            the next normalisation divides by it; without, a few tokens of huge norm decide. ``none``: all tokens count alike.
        anchor: what a factor pair is fitted to. ``none``: the outputs of the dense matrix on the inputs that it has behind the
            compressed layers before it. ``dense``: its outputs on the inputs that it has in the dense model, which makes up for
            a part of what was lost before. A second, dense stream of hidden states goes beside the compressed one. Needs
            ``attention_method="second_moment"``.
        mlp_method: ``prune`` removes whole FFN channels, ``factorize`` makes the three FFN matrices low-rank.
        channel_score: which channels stay. ``lorap``: sum of three weighted norms (the paper). ``output``: what the channel adds
            to the FFN's output. ``fluctuation``: variance of the channel times the norm of its output
            weights (FLAP).
        least_important_kept: fraction of FFN channels, those of least importance, that stay; the paper keeps 1 %.
        repair: refit down_proj by least squares to the output of all channels. Over-fits with few calibration tokens.
        repair_ridge: pull of the refit towards the old weights, relative to the mean channel energy; ``auto`` as for
            ``metric_shrinkage``.
        bias_compensation: add the mean output of the dropped channels to the bias of down_proj, which gains one if need be.
        sequential: ``sublayer`` lets o_proj see the compressed q, k, v and down_proj the compressed attention; ``layer`` takes
            all statistics of a layer before changing it (the paper).
        storage: ``pivoted`` stores a rank-r matrix (m, n) in r (m + n - r) numbers instead of r (m + n), without loss. Not with
            ``weights="int4"`` or less, which is ``factors`` unless given: 4 bits are too few for the coefficients of pivoted
            storage.
        correction_steps: when all layers are compressed, so many small steps of all weights towards what the dense model predicts
            on the calibration windows, 1,536 tokens a step, none of them twice; fewer and smaller steps where there are fewer
            tokens, and none that further windows, not calibrated on, do not confirm. Sizes do not change.
        scale_steps: when the weights are rounded, where they are, so many such steps of their scales alone.
        weights: how many bits they have in the end, in every linear layer of the decoder: ``float`` as many as the model's dtype,
            ``int8``, ``int4``, or ``tcq6`` to ``tcq2``, codes on a trellis, which lose less in as many bits and take longer;
            with ``size`` or ``bits_per_weight`` also ``mixed``, 8 for those matrices where they help most for their bytes and 4
            for the others, ``tcq``, likewise 2 to 6 on the trellis, or ``auto``, the most that fit without sparsity, else 3,
            of codes below int8. They are rounded last, behind correction steps, layer by layer on the calibration windows. The
            sparsity counts parameters, not bits; at 0 the result is the quantized dense model.
        group_size: how many weights in few bits of a row share a scale, a multiple of 32. Unless given 64 of int8 and int4, and
            256 on the trellis; ``auto`` until the weights are known.
        target: who is to open the result. ``lorap``: hosts that have lorap. ``stock``: every host. Attention stays dense and all
            FFNs get one width, narrow enough for the whole sparsity, so ``allocation`` decides nothing and ``shapes`` is
            uniform; the same model costs more quality, and all of the saving is real without any plug-in. Weights in int8 or int4
            are stored as compressed-tensors has them, whose package the host needs; it has no codes on a trellis.
        num_calibration_samples: how many token windows the statistics come from.
        calibration_seq_len: tokens in each window.
        seed: which windows are drawn.

    Raises:
        ConfigError: a value is out of range, or two choices exclude each other.
    """

    recipe: str = DEFAULT_RECIPE
    sparsity: Annotated[float, Interval(ge=0, lt=1)] = _FROM_BUDGET
    size: Union[Size, None] = None
    bits_per_weight: Union[Annotated[float, Interval(gt=0, lt=math.inf)], None] = None
    sublayers: Annotated[tuple[Literal["self_attn", "mlp"], ...], MinLen(1)] = _FROM_RECIPE
    allocation: Literal["paper", "even", "loss", "flap"] = _FROM_RECIPE
    vo_to_qk_ratio: Annotated[float, Interval(gt=0, lt=math.inf)] = _FROM_RECIPE
    shapes: Literal["free", "uniform"] = _FROM_RECIPE
    rank_multiple: Union[Size, Auto] = _FROM_RECIPE
    width_multiple: Union[Size, Auto] = _FROM_RECIPE
    attention_method: Literal["awsvd", "svd", "afm", "second_moment"] = _FROM_RECIPE
    metric_shrinkage: Union[Annotated[float, Interval(ge=0, le=1)], Auto] = _FROM_RECIPE
    output_weighting: Literal["none", "loss"] = _FROM_RECIPE
    token_weighting: Literal["none", "residual"] = _FROM_RECIPE
    anchor: Literal["none", "dense"] = _FROM_RECIPE
    mlp_method: Literal["prune", "factorize"] = _FROM_RECIPE
    channel_score: Literal["lorap", "output", "fluctuation"] = _FROM_RECIPE
    least_important_kept: Annotated[float, Interval(ge=0, lt=1)] = _FROM_RECIPE
    repair: bool = _FROM_RECIPE
    repair_ridge: Union[Annotated[float, Interval(ge=0, lt=math.inf)], Auto] = _FROM_RECIPE
    bias_compensation: bool = _FROM_RECIPE
    sequential: Literal["layer", "sublayer"] = _FROM_RECIPE
    storage: Literal["factors", "pivoted"] = _FROM_RECIPE
    correction_steps: Count = _FROM_RECIPE
    scale_steps: Count = _FROM_RECIPE
    weights: Literal["float", "int8", "int4", "tcq6", "tcq5", "tcq4", "tcq3", "tcq2", "mixed", "tcq", "auto"] = (
        _FROM_RECIPE
    )
    group_size: Union[Annotated[int, Interval(ge=32, le=2**31 - 1), MultipleOf(32)], Auto] = _FROM_RECIPE
    target: Literal["lorap", "stock"] = _FROM_RECIPE
    num_calibration_samples: Size = 128
    calibration_seq_len: Annotated[int, Interval(ge=2, lt=2**63)] = 128
    seed: Count = 0

    def __post_init__(self) -> None:
        known = isinstance(self.recipe, str) and self.recipe in RECIPES
        _check(known, f"unknown recipe {shown(self.recipe)}; known: {', '.join(RECIPES)}")
        shapes, width_multiple, storage, weights = self.shapes, self.width_multiple, self.storage, self.weights
        chosen_group = self.group_size not in (_FROM_RECIPE, "auto")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is _FROM_RECIPE:
                object.__setattr__(self, name, value)
        if self.has_byte_budget and weights is _FROM_RECIPE:
            object.__setattr__(self, "weights", "auto")
        if not chosen_group:
            coding = coding_of(str(self.weights))
            usual = coding.group_size if coding else RECIPES[self.recipe]["group_size"]
            object.__setattr__(self, "group_size", "auto" if self.weights == "auto" else usual)
        if (self.is_coarse or self.weights == "auto") and storage is _FROM_RECIPE:
            object.__setattr__(self, "storage", "factors")
        if self.sparsity is _FROM_BUDGET:
            object.__setattr__(self, "sparsity", 0.0 if self.has_byte_budget else DEFAULT_SPARSITY)
        if isinstance(self.size, str):
            from lorap.system import parse_bytes  # brings torch with it

            object.__setattr__(self, "size", parse_bytes(self.size))
        if self.target == "stock" and shapes is _FROM_RECIPE:
            object.__setattr__(self, "shapes", "uniform")
        if self.target == "stock" and width_multiple is _FROM_RECIPE:
            object.__setattr__(self, "width_multiple", "auto")
        names = self.sublayers
        names = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else names
        object.__setattr__(self, "sublayers", names)
        check_fields(self)
        self._check_combinations()

    def _check_combinations(self) -> None:
        _check(
            self.mlp_method == "prune" or self.allocation in ("paper", "even"),
            f"allocation {self.allocation} decides on FFN widths, but mlp_method is {self.mlp_method}; "
            "use allocation paper or even",
        )
        _check(
            "mlp" in self.sublayers or self.allocation != "flap",
            "allocation flap takes everything from the FFN; compress mlp too, or use another allocation",
        )
        _check(
            not self.is_coarse or self.storage == "factors",
            f"{self.weights} weights are too coarse for pivoted storage; use storage factors, or weights int8",
        )
        self._check_anchor()
        self._check_budget()
        if self.target == "stock":
            self._check_stock()
        _check(
            self.shapes == "free" or self.allocation != "flap",
            "allocation flap gives every layer its own FFN width; use shapes free, or another allocation",
        )

    def _check_anchor(self) -> None:
        _check(
            self.anchor == "none" or self.attention_method == "second_moment",
            f"anchor dense is a regression on all inputs of a matrix, but attention_method is {self.attention_method}; use "
            "second_moment, or anchor none",
        )
        _check(
            self.anchor == "none" or self.token_weighting == "none",
            f"anchor dense counts all tokens alike, but token_weighting is {self.token_weighting}; use none, or anchor none",
        )

    def _check_budget(self) -> None:
        _check(
            self.size is None or self.bits_per_weight is None,
            f"size {self.size} and bits_per_weight {self.bits_per_weight} are two budgets of bytes; give one of them",
        )
        _check(
            self.has_byte_budget or not (self.is_mixed or self.weights == "auto"),
            f"weights {self.weights} follow from a budget of bytes; give size or bits_per_weight, or weights float, "
            f"{', '.join(KINDS)}",
        )
        _check(
            not self.has_byte_budget or self.allocation != "flap",
            "allocation flap decides on widths by scores, so their bytes are not known before; with size or bits_per_weight "
            "use allocation loss, even or paper",
        )

    def _check_stock(self) -> None:
        _check(
            self.weights != "mixed",
            "weights mixed make a folder that needs lorap; for target stock choose int4 or int8, one for all matrices",
        )
        _check(
            coding_of(self.weights) is not TRELLIS,
            f"weights {self.weights} are codes on a trellis, which compressed-tensors does not have, so that only lorap opens "
            "them; for target stock choose int4 or int8",
        )
        _check(
            "mlp" in self.sublayers, "target stock takes everything from the FFN; compress mlp too, or use target lorap"
        )
        _check(
            self.mlp_method == "prune",
            "mlp_method factorize makes low-rank layers, which stock model classes do not have; use mlp_method prune, "
            "or target lorap",
        )
        _check(
            self.allocation != "flap",
            "allocation flap gives every layer its own FFN width, and stock model classes have one for all; use allocation "
            "paper, even or loss, or target lorap",
        )
        _check(
            self.shapes == "uniform",
            "stock model classes have one FFN width for all layers; use shapes uniform, or target lorap",
        )

    @property
    def corrects(self) -> bool:
        """Whether weights move when all layers are compressed."""
        return self.correction_steps > 0 and self.sparsity > 0

    @property
    def rescales(self) -> bool:
        """Whether scales move when all weights are rounded."""
        return self.scale_steps > 0 and self.weights != "float"

    @property
    def has_byte_budget(self) -> bool:
        """Whether bytes are asked for, which decide on what is left open."""
        return self.size is not None or self.bits_per_weight is not None

    @property
    def budget_text(self) -> str:
        """The budget of bytes in words; empty where there is none."""
        if self.size is not None:
            return f"a size of {self.size:,} bytes"
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits for each weight of the dense decoder layers"
        return ""

    @property
    def bits(self) -> int | None:
        """Of rounded weights, the fewest where they are mixed; None where they stay floating point."""
        return bits_of(str(self.weights))

    @property
    def group(self) -> int:
        """``group_size``, once the weights are known."""
        return int(self.group_size)

    @property
    def is_mixed(self) -> bool:
        """Whether a budget of bytes decides on the bits of each matrix."""
        return self.weights in MIXES

    @property
    def is_coarse(self) -> bool:
        """Whether weights get fewer than 8 bits, which are too few for pivoted storage."""
        return self.bits is not None and self.bits < 8

    @classmethod
    def from_recipe(cls, recipe: str, **overrides: Any) -> CompressionConfig:
        """The named recipe, with single options replaced. Options that are None keep the recipe's value."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(overrides) - known)
        _check(not unknown, f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(recipe=recipe, **{name: value for name, value in overrides.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; budgets of bytes only where there are any."""
        values = {**asdict(self), "sublayers": list(self.sublayers)}
        return {name: value for name, value in values.items() if value is not None or name not in BUDGETS}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# Options that name one of a few ways of doing something.
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: get_args(hint) for name, hint in get_type_hints(CompressionConfig).items() if get_origin(hint) is Literal}
)
