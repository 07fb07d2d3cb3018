"""DyCoke as a model of lmms-eval: `lmms_eval --model dycoke_llava_onevision --model_args ...`.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models` and imports the model
when it is asked for. Nothing else here imports lmms-eval, and it is none of our dependencies.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "dycoke_llava_onevision"


def manifest() -> "ModelManifest":
    """What lmms-eval's registry wants to know."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path="dycoke_core.lmms_plugin.model.DycokeLlavaOnevision",
    )
