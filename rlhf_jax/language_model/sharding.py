"""Over which axes of the mesh each parameter of a decoder is divided.

Matrices are [outputs, inputs]. Those that make heads or inner features are split by outputs over
`model`, those that read them by inputs, so that one sum over `model` follows each pair; vectors and
heads of one row are whole everywhere. A new matrix needs a line here: a test asks for it.
"""

from jaxtyping import Array, Float

from experiment_runs import devices
from experiment_runs.errors import UserError
from rlhf_jax.language_model.decoder_config import DecoderConfig

BOTH = ("model", "data")
RULES = (
    (r"(q|k|v|gate|up)_proj\.kernel$", ("model", "data")),
    (r"(o|down)_proj\.kernel$", ("data", "model")),
    (r"(q|k|v|gate|up)_proj\.lora_a$", (None, ("data", "model"))),
    (r"(q|k|v|gate|up)_proj\.lora_b$", (BOTH, None)),
    (r"(o|down)_proj\.lora_a$", (None, BOTH)),
    (r"(o|down)_proj\.lora_b$", (("data", "model"), None)),
    (r"(q|k|v|gate|up)_proj\.bias$", ("model",)),
    (r"embedding$", ("model", "data")),
)


def check(cfg: DecoderConfig) -> None:
    """Stops where the heads of a decoder cannot be divided over `model`.

    Raises:
      UserError: says which meshes would do.
    """
    heads = {name: getattr(cfg, name) for name in ("num_heads", "num_kv_heads")}
    own = devices.mesh().shape["model"]
    if wrong := [f"{name}={count}" for name, count in heads.items() if count % own]:
        fitting = devices.fitting_meshes(
            lambda _, model: not any(count % model for count in heads.values())
        )
        raise UserError(f"{' and '.join(wrong)} cannot be divided over model={own}; {fitting}")


def gathered(matrix: Float[Array, "vocab embed"]) -> Float[Array, "vocab embed"]:
    """An embedding or unembedding as it is used."""
    return devices.gathered({"embedding": matrix}, RULES)["embedding"]
