"""Prunable sets by the name of an architecture: `preset:vit` in a recipe's targets.

The sets are those of oViT (arXiv 2210.09223, section 5, appendices D, K and M): attention, MLPs, convolutions. A weight
belongs to a preset where a pattern of one of its roles matches the end of its name. Whatever the patterns say, only
matrices of Linear, convolution and MultiheadAttention modules are taken: depthwise convolutions, embeddings, position
tables and norms stay dense.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from ovit_engine.utils.suggest import suggest
from ovit_engine.utils.warn import warn

PREFIX = "preset:"

# What every preset leaves dense: it grows with the classes of the data, so it says nothing about how a preset fits.
_CLASSIFIER = re.compile(r"(head\w*|classifier|fc)(\.[a-z_]+)*\.weight")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerRole:
    """Weights that play one role. A required role that matches nothing says that the model is another.

    `patterns` are regular expressions, each over whole components at the end of a name. An optional role is one that
    not every model of the family has. With `spares_first` the first weight that matches stays dense: it sees the image.
    """

    def __init__(self, *patterns: str, is_optional: bool = False, spares_first: bool = False) -> None:
        self.patterns = patterns
        self.is_optional = is_optional
        self._spares_first = spares_first
        self._compiled = re.compile(rf"(?:.*\.)?(?:{'|'.join(patterns)})")

    def find(self, names: Collection[str]) -> list[str]:
        """Return those of `names` that have the role, in their order."""
        return [name for name in names if self._compiled.fullmatch(name)][self._spares_first :]


@dataclass(frozen=True, kw_only=True)
class TargetPreset:
    """The prunable set of a family of models."""

    # Which models it is for.
    models: str
    # What is pruned, by role.
    roles: Mapping[str, LayerRole]
    # What stays dense beside norms, embeddings and depthwise convolutions.
    dense: str

    def find(self, names: Collection[str]) -> dict[str, list[str]]:
        """Return those of `names` that have each role."""
        return {part: rule.find(names) for part, rule in self.roles.items()}

    def take(self, names: Collection[str]) -> set[str]:
        """Return those of `names` that have any role."""
        return {name for found in self.find(names).values() for name in found}

    def missing(self, names: Collection[str]) -> list[str]:
        """Required roles of which none of `names` is."""
        return [part for part, found in self.find(names).items() if not found and not self.roles[part].is_optional]


# What torch.nn.MultiheadAttention and the Transformers library call it.
_QKV = r"(in_proj_weight|[qkv]_proj_weight|[qkv]_proj\.weight)"

_ENCODER = r"\w*(encoder|transformer)\.layers\.\d+"

_BERT = r"encoder\.layer\.\d+"

TARGET_PRESETS: Mapping[str, TargetPreset] = {
    "vit": TargetPreset(
        models="ViT, DeiT, BEiT, EVA of timm; ViT of torchvision and Transformers",
        roles={
            "qkv": LayerRole(
                r"blocks\.\d+\.attn\.(qkv|[qkv]_proj)\.weight",
                rf"encoder_layer_\d+\.self_attention\.{_QKV}",
                rf"{_BERT}\.attention\.attention\.(query|key|value)\.weight",
            ),
            "proj": LayerRole(
                r"blocks\.\d+\.attn\.proj\.weight",
                r"encoder_layer_\d+\.self_attention\.out_proj\.weight",
                rf"{_BERT}\.attention\.output\.dense\.weight",
            ),
            "fc1": LayerRole(
                r"blocks\.\d+\.mlp\.(fc1|fc1_g|fc1_x)\.weight",
                r"encoder_layer_\d+\.mlp\.(0|linear_1)\.weight",
                rf"{_BERT}\.intermediate\.dense\.weight",
            ),
            "fc2": LayerRole(
                r"blocks\.\d+\.mlp\.fc2\.weight",
                r"encoder_layer_\d+\.mlp\.(3|linear_2)\.weight",
                rf"{_BERT}\.output\.dense\.weight",
            ),
        },
        dense="patch embedding, head",
    ),
    "xcit": TargetPreset(
        models="XCiT of timm",
        roles={
            "qkv": LayerRole(r"blocks\.\d+\.attn\.qkv\.weight"),
            "proj": LayerRole(r"blocks\.\d+\.attn\.proj\.weight"),
            "class attention": LayerRole(r"cls_attn_blocks\.\d+\.attn\.(q|k|v|proj)\.weight"),
            "fc1": LayerRole(r"(cls_attn_)?blocks\.\d+\.mlp\.fc1\.weight"),
            "fc2": LayerRole(r"(cls_attn_)?blocks\.\d+\.mlp\.fc2\.weight"),
        },
        dense="patch and position embedding, local patch interaction (depthwise), head",
    ),
    "swin": TargetPreset(
        models="Swin and Swin V2 of timm",
        roles={
            "qkv": LayerRole(r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight"),
            "proj": LayerRole(r"layers\.\d+\.blocks\.\d+\.attn\.proj\.weight"),
            "fc1": LayerRole(r"layers\.\d+\.blocks\.\d+\.mlp\.fc1\.weight"),
            "fc2": LayerRole(r"layers\.\d+\.blocks\.\d+\.mlp\.fc2\.weight"),
            "downsample": LayerRole(r"layers\.\d+\.downsample\.reduction\.weight"),
        },
        dense="patch embedding, head",
    ),
    "efficientformer": TargetPreset(
        models="EfficientFormer of timm",
        roles={
            "qkv": LayerRole(r"stages\.\d+\.blocks\.\d+\.token_mixer\.qkv\.weight"),
            "proj": LayerRole(r"stages\.\d+\.blocks\.\d+\.token_mixer\.proj\.weight"),
            "fc1": LayerRole(r"stages\.\d+\.blocks\.\d+\.mlp\.fc1\.weight"),
            "fc2": LayerRole(r"stages\.\d+\.blocks\.\d+\.mlp\.fc2\.weight"),
        },
        dense="stem, downsampling convolutions, heads",
    ),
    "convnext": TargetPreset(
        models="ConvNeXt of timm",
        roles={
            "fc1": LayerRole(r"stages\.\d+\.blocks\.\d+\.mlp\.fc1\.weight"),
            "fc2": LayerRole(r"stages\.\d+\.blocks\.\d+\.mlp\.fc2\.weight"),
            "downsample": LayerRole(r"stages\.\d+\.downsample\.\d+\.weight"),
        },
        dense="stem, head",
    ),
    "resnet": TargetPreset(
        models="ResNet, ResNet-D and ResNeXt of timm and torchvision",
        roles={
            "conv": LayerRole(r"layer\d+\.\d+\.conv\d+\.weight"),
            "downsample": LayerRole(r"layer\d+\.\d+\.downsample\.\d+\.weight"),
            "deep stem": LayerRole(r"conv1\.\d+\.weight", is_optional=True, spares_first=True),
        },
        dense="first convolution, classifier",
    ),
    "efficientnetv2": TargetPreset(
        models="EfficientNetV2 of timm",
        roles={
            "conv": LayerRole(r"blocks\.\d+\.\d+\.conv\.weight"),
            "conv_exp": LayerRole(r"blocks\.\d+\.\d+\.conv_exp\.weight"),
            "conv_pw": LayerRole(r"blocks\.\d+\.\d+\.conv_pw\.weight"),
            "conv_pwl": LayerRole(r"blocks\.\d+\.\d+\.conv_pwl\.weight"),
            "squeeze-excite": LayerRole(r"blocks\.\d+\.\d+\.se\.conv_(reduce|expand)\.weight"),
            "conv_head": LayerRole(r"conv_head\.weight"),
        },
        dense="stem, classifier",
    ),
    "detr": TargetPreset(
        models="DETR of its own repository or of Transformers, or one built from torch.nn.Transformer",
        roles={
            "backbone": LayerRole(r"backbone\..+\.weight", spares_first=True),
            "encoder qkv": LayerRole(rf"encoder\.layers\.\d+\.self_attn\.{_QKV}"),
            "encoder out_proj": LayerRole(r"encoder\.layers\.\d+\.self_attn\.out_proj\.weight"),
            "encoder ffn": LayerRole(r"encoder\.layers\.\d+\.(linear[12]|fc[12])\.weight"),
            "decoder qkv": LayerRole(rf"decoder\.layers\.\d+\.self_attn\.{_QKV}"),
            "decoder cross qkv": LayerRole(rf"decoder\.layers\.\d+\.(multihead_attn|encoder_attn)\.{_QKV}"),
            "decoder out_proj": LayerRole(
                r"decoder\.layers\.\d+\.(self_attn|multihead_attn|encoder_attn)\.out_proj\.weight"
            ),
            "decoder ffn": LayerRole(r"decoder\.layers\.\d+\.(linear[12]|fc[12])\.weight"),
        },
        dense="first convolution of the backbone, input projection, query embedding, class and box heads",
    ),
    "roberta": TargetPreset(
        models="RoBERTa and BERT of Transformers, or an encoder built from torch.nn.TransformerEncoder",
        roles={
            "qkv": LayerRole(
                rf"{_BERT}\.attention\.self\.(query|key|value)\.weight",
                rf"{_ENCODER}\.self_attn\.{_QKV}",
            ),
            "out_proj": LayerRole(
                rf"{_BERT}\.attention\.output\.dense\.weight",
                rf"{_ENCODER}\.self_attn\.out_proj\.weight",
            ),
            "fc1": LayerRole(rf"{_BERT}\.intermediate\.dense\.weight", rf"{_ENCODER}\.(linear1|fc1)\.weight"),
            "fc2": LayerRole(rf"{_BERT}\.output\.dense\.weight", rf"{_ENCODER}\.(linear2|fc2)\.weight"),
        },
        dense="pooler, heads",
    ),
}


def is_preset(target: str) -> bool:
    """Return whether a target is written `preset:...`."""
    return target.startswith(PREFIX)


def preset_of(target: str) -> TargetPreset:
    """Return the preset that `preset:name` names. Raises ValueError with the nearest right name."""
    name = target.removeprefix(PREFIX)
    if name not in TARGET_PRESETS:
        raise ValueError(f"no preset {name!r}{suggest(name, TARGET_PRESETS)}")
    return TARGET_PRESETS[name]


def is_prunable(module: nn.Module, attribute: str) -> bool:
    """Return whether a preset may take a parameter: a matrix or kernel, but no depthwise convolution."""
    if isinstance(module, nn.MultiheadAttention):
        return attribute.endswith("proj_weight")
    if isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels:
        return False
    return attribute == "weight" and isinstance(module, (nn.Linear, *_CONVOLUTIONS))


def match_preset(
    target: str, sizes: Mapping[str, int], *, others: Collection[str] = (), owner: str
) -> dict[str, list[str]]:
    """Return the names that `preset:name` takes from a model, by role.

    Args:
        target: the preset.
        sizes: weights of each prunable parameter of the model, by name, in its order.
        others: names that targets beside the preset take.
        owner: the model's class, for messages.

    Raises:
        ValueError: a required role that matches nothing; a preset where more stays dense than all targets take;
            another preset that takes all of it and more, as where `vit` meets a Swin. The one that fits is named.
    """
    preset = preset_of(target)
    missing = preset.missing(sizes)
    if missing:
        raise ValueError(
            f"{target} finds no {', no '.join(missing)} in {owner} "
            f"(names such as {preset.roles[missing[0]].patterns[0]}){_that_fit(target, sizes)}"
        )
    taken = preset.take(sizes)
    left = [name for name in sizes if name not in taken and name not in others]
    counted = [name for name in sizes if not _CLASSIFIER.fullmatch(name)]
    rest = _total(sizes, [name for name in left if name in counted])
    if 2 * rest > _total(sizes, counted):
        biggest = max(left, key=sizes.__getitem__)
        raise ValueError(
            f"{target} takes {_total(sizes, taken):,} weights of {owner}, and {rest:,} stay dense, such as {biggest!r}"
            f"{_that_fit(target, sizes)}"
        )
    for name, wider in _fitting_presets(sizes).items():
        more = [each for each in left if each in wider]
        if taken < wider and more:
            raise ValueError(
                f"{target} is not made for {owner}: '{PREFIX}{name}' takes the same and {_total(sizes, more):,} "
                f"weights more, such as {more[0]!r}"
            )
    _warn_of_strangers(target, sizes, taken, left)
    return preset.find(sizes)


def _warn_of_strangers(target: str, sizes: Mapping[str, int], taken: Collection[str], left: Collection[str]) -> None:
    """Warn of weights that stay dense in blocks of which the preset takes others: they may have been renamed."""
    blocks = {_block(name) for name in taken} - {""}
    strangers = [name for name in left if _block(name) in blocks]
    if strangers:
        warn(
            f"{target} leaves {_total(sizes, strangers):,} weights dense in blocks that it prunes, such as "
            f"{strangers[0]!r}: name them beside it if they should go too"
        )


def _block(name: str) -> str:
    """Return the numbered module that a weight lies in: blocks.3 of blocks.3.attn.qkv.weight."""
    found = re.match(r"(.*\.)?\d+(?=\.)", name)
    return found[0] if found else ""


def _total(sizes: Mapping[str, int], names: Collection[str]) -> int:
    return sum(sizes[name] for name in names)


def _fitting_presets(sizes: Mapping[str, int]) -> dict[str, set[str]]:
    """Presets that have all their required roles and take at least half, with what they take; the largest first."""
    matching = {name: preset.take(sizes) for name, preset in TARGET_PRESETS.items() if not preset.missing(sizes)}
    by_size = sorted(matching, key=lambda name: -_total(sizes, matching[name]))
    return {name: matching[name] for name in by_size if 2 * _total(sizes, matching[name]) >= _total(sizes, sizes)}


def _that_fit(target: str, sizes: Mapping[str, int]) -> str:
    fitting = [f"'{PREFIX}{name}'" for name in _fitting_presets(sizes) if f"{PREFIX}{name}" != target]
    return f"; {fitting[0]} fits" if fitting else "; no other preset fits: name the weights themselves"
