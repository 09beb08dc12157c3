"""TiTok and TA-TiTok as bytedance/1d-tokenizer publishes them: both stages, decoders of codes and of pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

from lexel.convert import maskgit_vqgan
from lexel.convert.family import Conversion, Family, Layout, Names, Request, convert_tokenizer
from lexel.convert.names import Rule, count, require, table_at
from lexel.convert.vqgan import END, one_of
from lexel.errors import UsageError

BLOCK = {"ln_1.": "norm1.", "attn.in_proj_": "qkv.", "attn.out_proj.": "out.", "ln_2.": "norm2."}
BLOCK |= {"mlp.c_fc.": "fc1.", "mlp.c_proj.": "fc2."}
NORMS = {"ln_pre": "norm_in", "ln_post": "norm_out"}
PARAMETERS = {
    "class_embedding": "class_token",
    "positional_embedding": "positions",
    "latent_token_positional_embedding": "token_positions",
    "mask_token": "mask_token",
    "text_guidance_positional_embedding": "text_positions",
}
RULES: Sequence[Rule] = [
    ("latent_tokens", "encoder.tokens"),
    (rf"(encoder|decoder)\.{one_of(PARAMETERS)}", lambda m: f"{m[1]}.{PARAMETERS[m[2]]}"),
    (rf"encoder\.patch_embed\.{END}", r"encoder.patches.\1"),
    (rf"(encoder|decoder)\.{one_of(NORMS)}\.{END}", lambda m: f"{m[1]}.transformer.{NORMS[m[2]]}.{m[3]}"),
    (
        rf"(encoder|decoder)\.transformer\.(\d+)\.{one_of(BLOCK)}{END}",
        lambda m: f"{m[1]}.transformer.blocks.{m[2]}.{BLOCK[m[3]]}{m[4]}",
    ),
    (rf"encoder\.conv_out\.{END}", r"to_codes.\1"),
    (rf"decoder\.decoder_embed\.{END}", r"from_codes.\1"),
    (rf"decoder\.text_guidance_proj\.{END}", r"decoder.text.\1"),
    (rf"decoder\.ffn\.2\.{END}", r"decoder.head.logits.\1"),
    (rf"decoder\.conv_out\.{END}", r"decoder.head.conv_out.\1"),
    (r"quantize\.embedding\.weight", "quantizer.weight"),
    (r"quantize\.embed_prob", "quantizer.use"),
    (r"pixel_quantize\.embedding\.weight", "decoder.head.codebook"),
    *maskgit_vqgan.rules("pixel_decoder", "decoder.head.pixels"),
]
# The same name for two layers: the first of two on the way to codes, the only one on the way to pixels.
CODES: Sequence[Rule] = [(rf"decoder\.ffn\.0\.{END}", r"decoder.head.hidden.\1")]
PIXELS: Sequence[Rule] = [(rf"decoder\.ffn\.0\.{END}", r"decoder.head.patches.\1")]
NEEDED = ["encoder.patches.weight", "encoder.positions", "encoder.tokens", "decoder.positions", "to_codes.weight"]


def rules(names: Names) -> list[Rule]:
    return [*RULES, *(CODES if "decoder.ffn.2.weight" in names else PIXELS)]


def config(tensors: Names, source: str, options: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as shapes tell them; a head has the published 64 channels, and images are square unless overridden."""
    transformers = {side: size(tensors, source, side) for side in ("encoder", "decoder")}
    patches, dim = tensors["encoder.patches.weight"], tensors["to_codes.weight"].shape[0]
    side = int((tensors["encoder.positions"].shape[0] - 1) ** 0.5)
    autoencoder = {
        "kind": "titok",
        "channels": patches.shape[1],
        "size": side * patches.shape[2],
        "patch": patches.shape[2],
        "tokens": tensors["encoder.tokens"].shape[0],
        **transformers,
    }
    codes = "decoder.head.logits.weight" in tensors
    if codes:
        proxy: dict[str, Any] = {"codebook_size": tensors["decoder.head.logits.weight"].shape[0]}
        if "decoder.head.codebook" in tensors:
            proxy["pixels"] = maskgit_vqgan.sizes(tensors, source, "decoder.head.pixels")
        autoencoder |= {"head": "codes", "proxy": proxy, "scrambled": True}
    if "decoder.text.weight" in tensors:
        require(tensors, ["decoder.text_positions"], source)
        length, width = tensors["decoder.text_positions"].shape[0], tensors["decoder.text.weight"].shape[1]
        autoencoder["text"] = {"length": length, "width": width}
    if "quantizer.weight" not in tensors:
        return {"autoencoder": autoencoder, "quantizer": {"kind": "gaussian", "codebook_dim": dim // 2}}
    normalised = options.get("use_l2_norm", True if codes else None)  # true of all checkpoints that predict codes
    if normalised is None and "quantizer.kind" not in overrides:
        raise UsageError(
            f"{source} does not tell how it searches its codebook: give overrides quantizer.kind = 'cosine' "
            "(use_l2_norm) or 'vq', or the published config.json beside it"
        )
    quantizer = {"kind": "cosine" if normalised else "vq", "codebook_size": tensors["quantizer.weight"].shape[0]}
    if "quantizer.use" in tensors:
        quantizer["clustering"] = True
    return {"autoencoder": autoencoder, "quantizer": {**quantizer, "codebook_dim": dim}}


def size(tensors: Names, source: str, side: str) -> dict[str, Any]:
    """The size of one transformer."""
    name = f"{side}.transformer.blocks.0.fc1.weight"
    require(tensors, [name], source)
    hidden, width = tensors[name].shape
    depth = count(tensors, rf"{side}\.transformer\.blocks\.(\d+)\..*")
    return {"width": width, "depth": depth, "heads": max(1, width // 64), "mlp": hidden}


def convert(request: Request) -> Conversion:
    """1x1 convolutions and linear layers on 1-D tokens become Conv1d; the mask token loses its first axes."""
    tensors = dict(request.published.tensors)
    for name, reshaped in {
        "encoder.conv_out.weight": lambda tensor: tensor[:, :, 0],
        "decoder.decoder_embed.weight": lambda tensor: tensor[:, :, None],
        "decoder.mask_token": lambda tensor: tensor[0],
    }.items():
        if name in tensors:
            tensors[name] = reshaped(tensors[name])
    options = table_at(request.published.config, "model", "vq_model")
    layout = Layout(
        "titok",
        rules,
        {},
        [],
        NEEDED,
        lambda tensors, source: config(tensors, source, options, request.overrides),
    )
    return convert_tokenizer(request, layout, tensors)


FAMILY = Family(
    "titok",
    "TiTok and TA-TiTok (1d-tokenizer)",
    lambda names: "latent_tokens" in names and "encoder.latent_token_positional_embedding" in names,
    convert,
)
